"""HybridEP's domain-based partition: who gathers experts from whom, and who exchanges tokens with whom.

Workers sit in levels, the outermost first (data centre, rack, node, …); level l has SF_l members in each group of
the level above, cut into domains of S_l. A worker is a number in mixed radix SF; two workers talk at level l when
their coordinates differ at l alone. In the same domain, ⌊x_l/S_l⌋, they gather each other's experts; in different
domains at the same offset, x_l mod S_l, they exchange tokens. All pairs here are ordered: (from, to).

Source: HybridEP, arXiv 2510.19470, domain-based partition. As printed, its algorithm does not ask for equal
coordinates at the outer levels and pairs workers that have nothing to say to each other; here it does.

Experts are gathered from the outermost level inwards, so that each crosses a slow link once per domain and not
once per worker; tokens go inwards too, a hop a level, and come back the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.hybridep import (
    ExchangeCase,
    all_gather_s,
    all_to_all_s,
    check_positive,
    forward_backward_s,
    forward_s,
    share_of_domain,
)

Pair = tuple[int, int]


class PairCounts(NamedTuple):
    """Ordered pairs of workers that talk at one level."""

    all_to_all: int
    all_gather: int


@dataclass(frozen=True)
class Level:
    """One level of the network: each worker's bandwidth across it, and how many members a group has.

    Raises:
        ConfigError: a bandwidth that is not above zero, or no worker.
    """

    workers: int  # SF
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        check_positive(bandwidth_bytes_per_s=self.bandwidth_bytes_per_s)
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers}: at least one")


def check_partition(scaling_factors: Sequence[int], domain_sizes: Sequence[int]) -> None:
    """Raise unless every level has a domain size that divides its scaling factor.

    Raises:
        ConfigError: naming the first level that cannot be.
    """
    if len(scaling_factors) != len(domain_sizes) or not scaling_factors:
        raise ConfigError(
            f"domain_sizes: {len(domain_sizes)} for {len(scaling_factors)} levels; one for each of at least one level"
        )
    for level, (factor, size) in enumerate(zip(scaling_factors, domain_sizes, strict=True)):
        if factor < 1:
            raise ConfigError(f"scaling_factors[{level}]={factor}: at least one worker")
        if size < 1 or factor % size:
            raise ConfigError(f"domain_sizes[{level}]={size}: must divide the {factor} workers of its level")


# -- places --------------------------------------------------------------------------------------------------


def coordinates(worker: int, scaling_factors: Sequence[int]) -> tuple[int, ...]:
    """The worker's place at each level, outermost first: its digits in mixed radix SF.

    Raises:
        ConfigError: a worker that there is not.
    """
    total = math.prod(scaling_factors)
    if not 0 <= worker < total:
        raise ConfigError(f"worker={worker}: between 0 and {total - 1}")
    digits = []
    for factor in reversed(scaling_factors):
        worker, digit = divmod(worker, factor)
        digits.append(digit)
    return tuple(reversed(digits))


def worker_at(place: Sequence[int], scaling_factors: Sequence[int]) -> int:
    """The worker at a place, the inverse of `coordinates`."""
    worker = 0
    for digit, factor in zip(place, scaling_factors, strict=True):
        worker = worker * factor + digit
    return worker


# -- pairs ---------------------------------------------------------------------------------------------------


def gather_pairs(scaling_factors: Sequence[int], domain_sizes: Sequence[int], level: int) -> list[Pair]:
    """Pairs that gather each other's experts at a level, ascending.

    Raises:
        ConfigError: a partition or a level that cannot be.
    """
    check_partition(scaling_factors, domain_sizes)
    return _pairs(scaling_factors, level, lambda digit: _same_domain(digit, domain_sizes[level]))


def exchange_pairs(scaling_factors: Sequence[int], domain_sizes: Sequence[int], level: int) -> list[Pair]:
    """Pairs that exchange tokens at a level, ascending.

    Raises:
        ConfigError: a partition or a level that cannot be.
    """
    check_partition(scaling_factors, domain_sizes)
    return _pairs(
        scaling_factors,
        level,
        lambda digit: _same_offset(digit, domain_sizes[level], scaling_factors[level]),
    )


def level_counts(scaling_factors: Sequence[int], domain_sizes: Sequence[int]) -> list[PairCounts]:
    """A2A = G·(SF/S − 1) and AG = G·(S − 1) pairs at each level, G workers in all.

    For one level SF = G, which is HybridEP's table VII; several levels are ours.

    Raises:
        ConfigError: a partition that cannot be.
    """
    check_partition(scaling_factors, domain_sizes)
    total = math.prod(scaling_factors)
    return [
        PairCounts(all_to_all=total * (factor // size - 1), all_gather=total * (size - 1))
        for factor, size in zip(scaling_factors, domain_sizes, strict=True)
    ]


# -- what they lead to ---------------------------------------------------------------------------------------


def gathered_workers(worker: int, scaling_factors: Sequence[int], domain_sizes: Sequence[int]) -> list[int]:
    """Those whose experts the worker holds after the all-gathers, itself among them: its domain at every level.

    Raises:
        ConfigError: a partition or a worker that cannot be.
    """
    check_partition(scaling_factors, domain_sizes)
    place = coordinates(worker, scaling_factors)
    domains = [_same_domain(digit, size) for digit, size in zip(place, domain_sizes, strict=True)]
    return [worker_at(other, scaling_factors) for other in itertools.product(*domains)]


def exchanged_workers(worker: int, scaling_factors: Sequence[int], domain_sizes: Sequence[int]) -> list[int]:
    """Those that compute the worker's tokens, itself among them: its offset at every level.

    Between them they hold every expert exactly once.

    Raises:
        ConfigError: a partition or a worker that cannot be.
    """
    check_partition(scaling_factors, domain_sizes)
    place = coordinates(worker, scaling_factors)
    offsets = [
        _same_offset(digit, size, factor)
        for digit, size, factor in zip(place, domain_sizes, scaling_factors, strict=True)
    ]
    return [worker_at(other, scaling_factors) for other in itertools.product(*offsets)]


def resident_experts(
    worker: int, scaling_factors: Sequence[int], domain_sizes: Sequence[int], experts_per_worker: int = 1
) -> list[int]:
    """Experts on the worker after the all-gathers, ascending; worker m starts with m·n, …, m·n + n − 1.

    Raises:
        ConfigError: a partition or a worker that cannot be, or workers without an expert.
    """
    if experts_per_worker < 1:
        raise ConfigError(f"experts_per_worker={experts_per_worker}: at least one")
    return [
        owner * experts_per_worker + expert
        for owner in gathered_workers(worker, scaling_factors, domain_sizes)
        for expert in range(experts_per_worker)
    ]


# -- advice --------------------------------------------------------------------------------------------------


def partition_s(
    levels: Sequence[Level],
    domain_sizes: Sequence[int],
    *,
    dispatch_bytes: float,
    expert_bytes: float,
    pre_expert_s: float,
    backward: bool = False,
) -> float:
    """Seconds of one expert layer under a partition: the stream model with a sum over levels (ours).

    Lat = max(Lat_PE, Σ_l Lat_AG,l) + 2·Σ_l Lat_A2A,l, and with backward as in `forward_backward_s`. At level l a
    worker gathers what the outer levels brought together, P_E·S_1·…·S_(l−1), from each of its S_l − 1 peers; with
    balanced routing all D bytes pass every level. One level is HybridEP's model.

    Raises:
        ConfigError: a partition or a size that cannot be.
    """
    check_partition([level.workers for level in levels], domain_sizes)
    gather_s = exchange_s = 0.0
    for level, size in zip(levels, domain_sizes, strict=True):
        case = ExchangeCase(
            dispatch_bytes, expert_bytes, level.bandwidth_bytes_per_s, level.workers, pre_expert_s
        )
        token_share = share_of_domain(level.workers, size)
        gather_s += all_gather_s(case, token_share)
        exchange_s += all_to_all_s(case, token_share)
        expert_bytes *= size
    total_s = forward_backward_s if backward else forward_s
    return total_s(pre_expert_s, gather_s, exchange_s)


def advise_domains(
    levels: Sequence[Level],
    *,
    dispatch_bytes: float,
    expert_bytes: float,
    pre_expert_s: float,
    backward: bool = False,
) -> tuple[int, ...]:
    """The domain size of each level, outermost first, that makes `partition_s` least (ours).

    Every combination of divisors is tried: the levels share the compute they hide behind, so the best size of one
    depends on the others, and there are few combinations. Of two that are equally fast, the one with fewer experts
    to hold.

    Args:
        levels: outermost first.
        dispatch_bytes: D, tokens of a worker in one layer and direction.
        expert_bytes: P_E, weights that a worker starts with.
        pre_expert_s: Lat_PE, compute before the expert layer, forward only.

    Raises:
        ConfigError: no level, or a size that cannot be.
    """
    if not levels:
        raise ConfigError("levels: give at least one")

    def cost(sizes: tuple[int, ...]) -> tuple[float, int]:
        layer_s = partition_s(
            levels,
            sizes,
            dispatch_bytes=dispatch_bytes,
            expert_bytes=expert_bytes,
            pre_expert_s=pre_expert_s,
            backward=backward,
        )
        return layer_s, math.prod(sizes)

    return min(itertools.product(*(_divisors(level.workers) for level in levels)), key=cost)


def _pairs(
    scaling_factors: Sequence[int], level: int, partners: Callable[[int], Sequence[int]]
) -> list[Pair]:
    """(worker, peer) for each peer that has a partner's digit at one level and the worker's own at all others."""
    if not 0 <= level < len(scaling_factors):
        raise ConfigError(f"level={level}: between 0 and {len(scaling_factors) - 1}")
    pairs = []
    for worker in range(math.prod(scaling_factors)):
        place = coordinates(worker, scaling_factors)
        for digit in partners(place[level]):
            if digit != place[level]:
                peer = (*place[:level], digit, *place[level + 1 :])
                pairs.append((worker, worker_at(peer, scaling_factors)))
    return pairs


def _same_domain(digit: int, size: int) -> range:
    first = digit - digit % size
    return range(first, first + size)


def _same_offset(digit: int, size: int, factor: int) -> range:
    return range(digit % size, factor, size)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
