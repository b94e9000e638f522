"""The domain partition against its definition, pair by pair, and its advice against every other partition."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.domains import (
    Level,
    Pair,
    advise_domains,
    coordinates,
    exchange_pairs,
    exchanged_workers,
    gather_pairs,
    gathered_workers,
    level_counts,
    partition_s,
    resident_experts,
    worker_at,
)
from fomoe_flwr.plan.hybridep import (
    ExchangeCase,
    best_domain_size,
    gathers_every_expert,
    latency_s,
    share_of_domain,
)

Partition = tuple[tuple[int, ...], tuple[int, ...]]  # SF, S


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def domain_sizes(factors: list[int]) -> st.SearchStrategy[Partition]:
    sizes = st.tuples(*(st.sampled_from(divisors(factor)) for factor in factors))
    return st.tuples(st.just(tuple(factors)), sizes)


# up to three levels, at most 6·6·6 workers
partitions = st.lists(st.integers(1, 6), min_size=1, max_size=3).flatmap(domain_sizes)


def pairs_by_definition(factors: tuple[int, ...], sizes: tuple[int, ...], level: int) -> list[list[Pair]]:
    """[gather, exchange] at a level, from every pair of workers and without the code under test."""
    places = list(itertools.product(*(range(factor) for factor in factors)))
    found: list[list[Pair]] = [[], []]
    for (one, x), (two, y) in itertools.permutations(enumerate(places), 2):
        if [axis for axis in range(len(factors)) if x[axis] != y[axis]] == [level]:
            size = sizes[level]
            if x[level] // size == y[level] // size:
                found[0].append((one, two))
            elif x[level] % size == y[level] % size:
                found[1].append((one, two))
    return found


# -- places and pairs ----------------------------------------------------------------------------------------


def test_coordinates_by_hand() -> None:
    # 2 data centres of 3 racks of 4: worker 17 = 1·12 + 1·4 + 1
    assert coordinates(17, (2, 3, 4)) == (1, 1, 1)
    assert coordinates(23, (2, 3, 4)) == (1, 2, 3)
    assert worker_at((1, 2, 3), (2, 3, 4)) == 23


@given(partitions)
def test_every_worker_has_its_own_place(partition: Partition) -> None:
    factors, _ = partition
    workers = range(math.prod(factors))
    places = [coordinates(worker, factors) for worker in workers]
    assert places == list(itertools.product(*(range(factor) for factor in factors)))
    assert [worker_at(place, factors) for place in places] == list(workers)


@settings(max_examples=60)
@given(partitions)
def test_pairs_are_those_of_the_definition_and_as_many_as_the_closed_form_says(partition: Partition) -> None:
    factors, sizes = partition
    for level, counts in enumerate(level_counts(factors, sizes)):
        gather, exchange = pairs_by_definition(factors, sizes, level)
        assert sorted(gather_pairs(factors, sizes, level)) == gather
        assert sorted(exchange_pairs(factors, sizes, level)) == exchange
        assert counts == (len(exchange), len(gather))


@settings(max_examples=60)
@given(partitions)
def test_pairs_go_both_ways_and_none_belongs_to_two_kinds(partition: Partition) -> None:
    factors, sizes = partition
    kinds = [
        pairs(factors, sizes, level)
        for level in range(len(factors))
        for pairs in (gather_pairs, exchange_pairs)
    ]
    for pairs in kinds:
        assert {(two, one) for one, two in pairs} == set(pairs)
    assert len(set(itertools.chain(*kinds))) == sum(map(len, kinds))


# HybridEP, table VII: all-to-all and all-gather
@pytest.mark.parametrize(
    ("workers", "size", "expected"),
    [
        (8, 1, (56, 0)),
        (8, 2, (24, 8)),
        (8, 4, (8, 24)),
        (8, 8, (0, 56)),
        (32, 1, (992, 0)),
        (32, 2, (480, 32)),
        (32, 4, (224, 96)),
        (32, 8, (96, 224)),
        (32, 16, (32, 480)),
        (32, 32, (0, 992)),
    ],
)
def test_counts_of_the_papers_table(workers: int, size: int, expected: tuple[int, int]) -> None:
    assert level_counts([workers], [size]) == [expected]
    assert len(exchange_pairs([workers], [size], 0)) == expected[0]
    assert len(gather_pairs([workers], [size], 0)) == expected[1]


# -- 4 data centres of 4 GPUs, SF = (4, 4), S = (2, 4) --------------------------------------------------------

FACTORS, SIZES = (4, 4), (2, 4)


def test_pairs_of_four_data_centres_of_four() -> None:
    assert len(gather_pairs(FACTORS, SIZES, 1)) == 48  # in a data centre: 4·4·3
    assert len(gather_pairs(FACTORS, SIZES, 0)) == 16  # across: each of 16 with its like next door
    assert len(exchange_pairs(FACTORS, SIZES, 0)) == 16
    assert exchange_pairs(FACTORS, SIZES, 1) == []  # a data centre is one domain
    assert (0, 4) in gather_pairs(FACTORS, SIZES, 0)
    assert (0, 8) in exchange_pairs(FACTORS, SIZES, 0)


def test_the_algorithm_as_printed_would_add_144_pairs_to_those_of_four_data_centres() -> None:
    """It compares coordinates at a level and further in, not further out."""
    workers = range(16)
    printed = [
        (one, two)
        for one, two in itertools.permutations(workers, 2)
        for level in range(2)
        if coordinates(one, FACTORS)[level] != coordinates(two, FACTORS)[level]
        and coordinates(one, FACTORS)[level + 1 :] == coordinates(two, FACTORS)[level + 1 :]
        and coordinates(one, FACTORS)[level] // SIZES[level]
        == coordinates(two, FACTORS)[level] // SIZES[level]
    ]
    ours = gather_pairs(FACTORS, SIZES, 0) + gather_pairs(FACTORS, SIZES, 1)
    assert set(ours) < set(printed)
    assert len(printed) - len(ours) == 144


def test_experts_of_four_data_centres_of_four() -> None:
    for worker in range(16):
        residents = resident_experts(worker, FACTORS, SIZES)
        assert residents == (list(range(8)) if worker < 8 else list(range(8, 16)))
        reached = [
            resident_experts(peer, FACTORS, SIZES) for peer in exchanged_workers(worker, FACTORS, SIZES)
        ]
        assert sorted(itertools.chain(*reached)) == list(range(16))
    assert exchanged_workers(5, FACTORS, SIZES) == [5, 13]


def test_several_experts_a_worker() -> None:
    assert resident_experts(1, (4,), (2,), experts_per_worker=3) == [0, 1, 2, 3, 4, 5]
    assert resident_experts(2, (4,), (1,), experts_per_worker=3) == [6, 7, 8]


# -- what the pairs lead to ----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(partitions)
def test_gathering_level_by_level_brings_what_is_said(partition: Partition) -> None:
    """Outermost first, every worker sends all it has: nothing arrives twice, and in the end each has its domain."""
    factors, sizes = partition
    workers = range(math.prod(factors))
    held = [{worker} for worker in workers]
    for level in range(len(factors)):
        before = [set(owners) for owners in held]
        for sender, receiver in gather_pairs(factors, sizes, level):
            assert not held[receiver] & before[sender]
            held[receiver] |= before[sender]
    for worker in workers:
        assert sorted(held[worker]) == gathered_workers(worker, factors, sizes)
        assert len(held[worker]) == math.prod(sizes)


@settings(max_examples=60)
@given(partitions)
def test_tokens_reach_every_expert_exactly_once_by_a_hop_a_level(partition: Partition) -> None:
    factors, sizes = partition
    neighbours = [set(exchange_pairs(factors, sizes, level)) for level in range(len(factors))]
    for worker in range(math.prod(factors)):
        reached = {worker}
        for pairs in neighbours:
            reached |= {two for one, two in pairs if one in reached}
        assert sorted(reached) == exchanged_workers(worker, factors, sizes)
        owners = itertools.chain(*(gathered_workers(peer, factors, sizes) for peer in reached))
        assert sorted(owners) == list(range(math.prod(factors)))


# -- advice --------------------------------------------------------------------------------------------------

bandwidths = st.floats(1e6, 1e11)
level_lists = st.lists(st.builds(Level, st.integers(1, 12), bandwidths), min_size=1, max_size=3)
loads = st.fixed_dictionaries(
    {
        "dispatch_bytes": st.floats(0, 1e9),
        "expert_bytes": st.floats(1e3, 1e9),
        "pre_expert_s": st.floats(0, 10),
        "backward": st.booleans(),
    }
)


def test_time_of_two_levels_by_hand() -> None:
    # outer: 2 groups at 1 B/s in one domain: 10 B of experts from one peer, 10 s; no tokens.
    # inner: 4 workers at 10 B/s in domains of 2: 20 B from one peer, 2 s; 8 B of tokens · (4 − 2)/4 = 4 B, 0.4 s.
    levels = [Level(2, 1), Level(4, 10)]
    time_s = partition_s(levels, [2, 2], dispatch_bytes=8, expert_bytes=10, pre_expert_s=5)
    assert time_s == pytest.approx(12 + 2 * 0.4)
    both_s = partition_s(levels, [2, 2], dispatch_bytes=8, expert_bytes=10, pre_expert_s=7, backward=True)
    assert both_s == pytest.approx(12 + 14 + 4 * 0.4)


@given(st.integers(1, 24), bandwidths, loads)
def test_one_level_is_the_stream_model(workers: int, bandwidth: float, load: dict[str, float]) -> None:
    backward = bool(load["backward"])
    case = ExchangeCase(
        load["dispatch_bytes"], load["expert_bytes"], bandwidth, workers, load["pre_expert_s"]
    )
    for size in divisors(workers):
        time_s = partition_s([Level(workers, bandwidth)], [size], **load)  # type: ignore[arg-type]
        assert time_s == pytest.approx(latency_s(case, share_of_domain(workers, size), backward))
    (advised,) = advise_domains([Level(workers, bandwidth)], **load)  # type: ignore[arg-type]
    # the latency is convex in S, so no divisor beats both neighbours of S*
    best = best_domain_size(case, backward)
    around = {
        max(size for size in divisors(workers) if size <= best + 1e-9),
        min(size for size in divisors(workers) if size >= best - 1e-9),
    }
    least_s = min(latency_s(case, share_of_domain(workers, size), backward) for size in around)
    assert latency_s(case, share_of_domain(workers, advised), backward) == pytest.approx(least_s)


@settings(max_examples=400)
@given(level_lists, loads)
def test_no_partition_beats_the_advice(levels: list[Level], load: dict[str, float]) -> None:
    advised = advise_domains(levels, **load)  # type: ignore[arg-type]
    advised_s = partition_s(levels, advised, **load)  # type: ignore[arg-type]
    for sizes in itertools.product(*(divisors(level.workers) for level in levels)):
        assert advised_s <= partition_s(levels, sizes, **load)  # type: ignore[arg-type]


def test_experts_cross_the_slow_link_and_tokens_the_fast_one() -> None:
    # 4 centres at 1 GB/s of 8 workers at 100 GB/s, 64 MB of tokens, 10 MB of experts.
    # Outside 2D = 128 MB ≥ 4·10 MB: gather. Inside, where a worker then has 40 MB, 128 MB < 8·40 MB: exchange.
    levels = [Level(4, 1e9), Level(8, 100e9)]
    assert gathers_every_expert(ExchangeCase(64e6, 10e6, 1e9, 4, 0))
    assert not gathers_every_expert(ExchangeCase(64e6, 40e6, 100e9, 8, 0))
    assert advise_domains(levels, dispatch_bytes=64e6, expert_bytes=10e6, pre_expert_s=0) == (4, 1)


def test_heavy_experts_move_only_behind_compute() -> None:
    # all of them gathered: 3·400 MB at 1 GB/s and 7·1600 MB at 100 GB/s, 1.312 s
    levels = [Level(4, 1e9), Level(8, 100e9)]
    assert advise_domains(levels, dispatch_bytes=64e6, expert_bytes=400e6, pre_expert_s=0) == (1, 1)
    assert advise_domains(levels, dispatch_bytes=64e6, expert_bytes=400e6, pre_expert_s=1.4) == (4, 8)


def test_what_makes_no_difference_holds_fewest_experts() -> None:
    assert advise_domains([Level(4, 1.0)], dispatch_bytes=0, expert_bytes=1, pre_expert_s=100) == (1,)


# -- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "sizes", "line"),
    [
        ((4,), (3,), r"^domain_sizes\[0\]=3: must divide the 4 workers of its level$"),
        ((4, 4), (2, 0), r"^domain_sizes\[1\]=0: must divide the 4 workers"),
        ((4,), (8,), r"^domain_sizes\[0\]=8: must divide"),
        ((4, 0), (2, 1), r"^scaling_factors\[1\]=0: at least one worker$"),
        ((4, 4), (2,), r"^domain_sizes: 1 for 2 levels"),
        ((), (), r"^domain_sizes: 0 for 0 levels"),
    ],
)
def test_an_impossible_partition_names_its_level(
    factors: tuple[int, ...], sizes: tuple[int, ...], line: str
) -> None:
    for ask in (
        lambda: level_counts(factors, sizes),
        lambda: gather_pairs(factors, sizes, 0),
        lambda: exchange_pairs(factors, sizes, 0),
        lambda: gathered_workers(0, factors, sizes),
        lambda: exchanged_workers(0, factors, sizes),
    ):
        with pytest.raises(ConfigError, match=line):
            ask()


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_bandwidth(bandwidth: float) -> None:
    with pytest.raises(ConfigError, match=r"^bandwidth_bytes_per_s=.*: must be a finite number above 0$"):
        Level(4, bandwidth)


def test_other_impossible_inputs() -> None:
    with pytest.raises(ConfigError, match=r"^workers=0: at least one$"):
        Level(0, 1.0)
    with pytest.raises(ConfigError, match=r"^worker=16: between 0 and 15$"):
        coordinates(16, FACTORS)
    with pytest.raises(ConfigError, match=r"^level=2: between 0 and 1$"):
        gather_pairs(FACTORS, SIZES, 2)
    with pytest.raises(ConfigError, match=r"^experts_per_worker=0: at least one$"):
        resident_experts(0, FACTORS, SIZES, experts_per_worker=0)
    with pytest.raises(ConfigError, match=r"^levels: give at least one$"):
        advise_domains([], dispatch_bytes=1, expert_bytes=1, pre_expert_s=1)
    with pytest.raises(ConfigError, match=r"^expert_bytes=0: must be a finite number above 0$"):
        advise_domains([Level(4, 1.0)], dispatch_bytes=1, expert_bytes=0, pre_expert_s=1)
