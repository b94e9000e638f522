"""Tokens per second of a whole federation, by strategy, number of sites and WAN bandwidth; numbers, no pictures.

Weak scaling: every site brings the same accelerators and the same tokens a step, so with a free network the
federation's speed is M times that of one site. Everything is a formula: `system.py` for compute and bytes,
`hybridep.py` for what is exchanged inside a step.

What the sites do at every step (DDP, expert parallelism) they do among themselves, on a ring for gradients. What they
do once a round (DiLoCo, FoMoE) goes through a server, as in this program; it sends all sites their shards at the
same time, so each gets its part of the server's link. A gradient or a shard is not hidden behind compute, in any
strategy; hiding it could gain no more than a factor of two. Where a formula must be kind to somebody, it is kind to
the rivals: the ring of M sites pays its latency once and not 2(M−1) times, and the gathers of HybridEP never pay it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from benchmarks.paper.formulas import compute_s, ring_dense_bytes, site_flops, star_bytes
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.model.spec import FLOPS_PER_PARAMETER, expert_parameters, parameter_counts, token_flops
from fomoe_flwr.plan.hybridep import (
    ExchangeCase,
    best_whole_domain_size,
    check_not_negative,
    check_positive,
    check_share,
    latency_s,
    share_of_domain,
)
from fomoe_flwr.plan.system import split_parameters, transfer_s

GBPS = 1e9 / 8  # bytes/s
H100_FLOPS_PER_S = 989e12  # dense bf16, by its data sheet
MFU = 0.4  # the share of it that training reaches; an assumption

SITES = (8, 16, 32, 64, 128, 256, 512, 1024)
BANDWIDTHS_GBPS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Strategy(StrEnum):
    """What is exchanged, and how often."""

    DDP = "DDP"  # the whole gradient, every step
    EXPERT_PARALLEL = "expert parallelism"  # tokens to experts in every layer, and the dense gradient
    HYBRID_DOMAIN = "HybridEP, fixed domain"  # experts gathered in domains of a fixed number of sites
    HYBRID_SHARE = (
        "HybridEP, fixed share"  # a fixed share of the tokens is sent, whatever the number of sites
    )
    HYBRID_BEST = "HybridEP, best domain"  # the domain that its model finds best for these sites and links
    DILOCO = "full-replica DiLoCo"  # the whole model, every K steps
    PARTITIONED = "FoMoE, partitioned"  # dense part and residents, every K steps
    SKIP = "FoMoE, skip"


@dataclass(frozen=True)
class Scale:
    """What stays the same while sites and bandwidth change.

    Raises:
        ConfigError: one line with the field, its value and what is allowed.
    """

    model: ModelConfig
    seq_len: int = 2048
    tokens_a_step: float = 262_144  # of one site: 128 sequences, the paper's global batch on 8 sites
    local_steps: int = 32  # K, the paper's smallest
    overlap_share: float = 0.5  # O_e/M, and so the share of the experts that a site holds
    flops_per_s: float = 32 * MFU * H100_FLOPS_PER_S  # of one site: enough of them to hold XXL's state
    latency_s: float = 0.05
    server_bytes_per_s: float | None = 100 * GBPS  # each way, for all sites together; None: no limit
    bytes_per_number: float = 2  # bf16: weights, gradients and activations on the wire
    domain_size: int = 4  # sites, of Strategy.HYBRID_DOMAIN
    token_share: float = 0.5  # p, of Strategy.HYBRID_SHARE
    skip_price: float = 1.0  # what a skipped assignment costs: 0 nothing, 1 all that it would have taught

    def __post_init__(self) -> None:
        check_positive(
            seq_len=self.seq_len,
            tokens_a_step=self.tokens_a_step,
            local_steps=self.local_steps,
            overlap_share=self.overlap_share,
            flops_per_s=self.flops_per_s,
            bytes_per_number=self.bytes_per_number,
            domain_size=self.domain_size,
        )
        check_share(
            overlap_share=self.overlap_share, token_share=self.token_share, skip_price=self.skip_price
        )
        check_not_negative(latency_s=self.latency_s)
        if self.server_bytes_per_s is not None:
            check_positive(server_bytes_per_s=self.server_bytes_per_s)

    @property
    def residents(self) -> float:
        """N_le, experts of a layer at a site; a mean need not be whole."""
        return self.overlap_share * self.model.num_experts


class Throughput(NamedTuple):
    """One point of the sweep. Seconds are those of a step; a synchronisation is spread over its K steps."""

    strategy: Strategy
    num_sites: int
    bytes_per_s: float  # of a site's WAN link, each way
    compute_s: float
    network_s: float  # what compute does not hide
    tokens_per_s: float  # of all sites
    worth_per_s: float  # the same, with skipped assignments at their price


def sweep(
    scale: Scale,
    sites: Sequence[int] = SITES,
    bandwidths_gbps: Sequence[float] = BANDWIDTHS_GBPS,
    strategies: Sequence[Strategy] = tuple(Strategy),
) -> list[Throughput]:
    """Every strategy at every bandwidth and number of sites, in this order.

    Raises:
        ConfigError: as `throughput`.
    """
    return [
        throughput(scale, strategy, num_sites, gbps * GBPS)
        for strategy in strategies
        for gbps in bandwidths_gbps
        for num_sites in sites
    ]


def throughput(scale: Scale, strategy: Strategy, num_sites: int, bytes_per_s: float) -> Throughput:
    """How fast a federation of so many sites, with such links, trains.

    Raises:
        ConfigError: no bandwidth, fewer than two sites, or an expert on less than one site.
    """
    check_positive(bytes_per_s=bytes_per_s)
    if num_sites < 2:
        raise ConfigError(f"num_sites={num_sites}: a federation has at least 2")
    if scale.overlap_share * num_sites < 1:
        raise ConfigError(
            f"overlap_share={scale.overlap_share:g}: with {num_sites} sites at least 1/{num_sites}, "
            "so that every expert is somewhere"
        )
    compute = step_compute_s(scale, strategy)
    network = _NETWORK_S[strategy](scale, num_sites, bytes_per_s)
    tokens_per_s = num_sites * scale.tokens_a_step / (compute + network)
    worth = token_worth(scale) if strategy is Strategy.SKIP else 1.0
    return Throughput(strategy, num_sites, bytes_per_s, compute, network, tokens_per_s, worth * tokens_per_s)


def token_worth(scale: Scale) -> float:
    """`1 − price · (1 − share resident)`: a token in skip mode, beside one that meets all its experts (ours).

    The share of resident assignments is that of balanced routing, O_e/M.
    """
    return 1 - scale.skip_price * (1 - scale.overlap_share)


def step_compute_s(scale: Scale, strategy: Strategy) -> float:
    """Compute of a step at one site, all k experts of a token unless FoMoE leaves some out."""
    routing, residents = {
        Strategy.PARTITIONED: ("partitioned", scale.residents),
        Strategy.SKIP: ("skip", scale.residents),
    }.get(strategy, ("skip", float(scale.model.num_experts)))  # skip with every expert here skips nothing
    flops = site_flops(scale.model, scale.seq_len, routing, residents)
    return compute_s(flops, scale.tokens_a_step, scale.flops_per_s)


# -- once a round, through the server --------------------------------------------------------------------


def server_rate(scale: Scale, num_sites: int, bytes_per_s: float) -> float:
    """Bytes/s that a site gets, each way: its own link or its part of the server's, whichever is less."""
    if scale.server_bytes_per_s is None:
        return bytes_per_s
    return min(bytes_per_s, scale.server_bytes_per_s / num_sites)


def _round_network_s(scale: Scale, num_sites: int, bytes_per_s: float, parameters: float) -> float:
    """A shard down and up once in K steps, for one of them."""
    one_way_bytes = star_bytes(parameters, scale.bytes_per_number)
    one_way_s = transfer_s(one_way_bytes, server_rate(scale, num_sites, bytes_per_s), scale.latency_s)
    return 2 * one_way_s / scale.local_steps


def _diloco_s(scale: Scale, num_sites: int, bytes_per_s: float) -> float:
    return _round_network_s(scale, num_sites, bytes_per_s, parameter_counts(scale.model).total)


def _fomoe_s(routing: str) -> Callable[[Scale, int, float], float]:
    def network_s(scale: Scale, num_sites: int, bytes_per_s: float) -> float:
        held = split_parameters(scale.model, routing).held(scale.model.num_layers * scale.residents)
        return _round_network_s(scale, num_sites, bytes_per_s, held)

    return network_s


# -- at every step, among the sites ----------------------------------------------------------------------


def _ddp_s(scale: Scale, num_sites: int, bytes_per_s: float) -> float:
    return _all_reduce_s(scale, num_sites, bytes_per_s, parameter_counts(scale.model).total)


def _all_reduce_s(scale: Scale, num_sites: int, bytes_per_s: float, parameters: float) -> float:
    ring_bytes = ring_dense_bytes(num_sites, parameters * scale.bytes_per_number)
    return transfer_s(ring_bytes, bytes_per_s, scale.latency_s)


def exchange_case(scale: Scale, num_sites: int, bytes_per_s: float) -> ExchangeCase:
    """One expert layer of HybridEP's model, in which a site is a worker and every expert begins at one site.

    With more sites than experts a site has less than one expert a layer, in the mean over the layers. A token is
    sent once for each expert it chose, as in the paper's D.
    """
    model, width = scale.model, scale.bytes_per_number
    flops = token_flops(model, scale.seq_len)
    unembedding = model.vocab_size * model.d_model * FLOPS_PER_PARAMETER  # not before any expert layer
    forward_flops = (flops.dense - unembedding + flops.router) / 3 / model.num_layers
    return ExchangeCase(
        dispatch_bytes=scale.tokens_a_step * model.top_k * model.d_model * width,
        expert_bytes=model.num_experts / num_sites * expert_parameters(model) * width,
        bandwidth_bytes_per_s=bytes_per_s,
        workers=num_sites,
        pre_expert_s=compute_s(forward_flops, scale.tokens_a_step, scale.flops_per_s),
    )


def _exchange_s(scale: Scale, num_sites: int, bytes_per_s: float, token_share: float) -> float:
    """What HybridEP's layers add to a step beyond compute, and the all-reduce of the gradients of the dense part.

    Its model has neither the dense gradients nor latency. Both are real between sites: tokens go out and back,
    forward and backward, and in each of the four a layer waits for an answer. Gathers are prefetched.
    """
    case = exchange_case(scale, num_sites, bytes_per_s)
    beyond_compute_s = latency_s(case, token_share, backward=True) - 3 * case.pre_expert_s
    waiting_s = 4 * scale.latency_s if token_share > 0 else 0.0
    counts = parameter_counts(scale.model)
    dense_s = _all_reduce_s(scale, num_sites, bytes_per_s, counts.dense + counts.router)
    # Where all is hidden the subtraction may leave minus a rounding error.
    return scale.model.num_layers * (max(0.0, beyond_compute_s) + waiting_s) + dense_s


def _expert_parallel_s(scale: Scale, num_sites: int, bytes_per_s: float) -> float:
    return _exchange_s(scale, num_sites, bytes_per_s, token_share=1.0)


def _hybrid_domain_s(scale: Scale, num_sites: int, bytes_per_s: float) -> float:
    domain = min(scale.domain_size, num_sites)
    return _exchange_s(scale, num_sites, bytes_per_s, share_of_domain(num_sites, domain))


def _hybrid_share_s(scale: Scale, num_sites: int, bytes_per_s: float) -> float:
    return _exchange_s(scale, num_sites, bytes_per_s, scale.token_share)


def best_domain(scale: Scale, num_sites: int, bytes_per_s: float) -> int:
    """S*, or one domain of all sites if that is faster.

    S* knows of no latency, and only where no token is sent is there none: otherwise it is the same for every
    domain, so these two are all there is to compare.
    """
    case = exchange_case(scale, num_sites, bytes_per_s)
    candidates = (best_whole_domain_size(case, backward=True), num_sites)
    return min(
        candidates,
        key=lambda size: _exchange_s(scale, num_sites, bytes_per_s, share_of_domain(num_sites, size)),
    )


def _hybrid_best_s(scale: Scale, num_sites: int, bytes_per_s: float) -> float:
    domain = best_domain(scale, num_sites, bytes_per_s)
    return _exchange_s(scale, num_sites, bytes_per_s, share_of_domain(num_sites, domain))


_NETWORK_S: dict[Strategy, Callable[[Scale, int, float], float]] = {
    Strategy.DDP: _ddp_s,
    Strategy.EXPERT_PARALLEL: _expert_parallel_s,
    Strategy.HYBRID_DOMAIN: _hybrid_domain_s,
    Strategy.HYBRID_SHARE: _hybrid_share_s,
    Strategy.HYBRID_BEST: _hybrid_best_s,
    Strategy.DILOCO: _diloco_s,
    Strategy.PARTITIONED: _fomoe_s("partitioned"),
    Strategy.SKIP: _fomoe_s("skip"),
}
