"""Placement's invariants for every feasible size, and what the random one does on average."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.placement import (
    Placement,
    adopt,
    check_overlap,
    draw_for_round,
    draw_placement,
    equal_shares,
    from_residents,
    full_residents,
    holder_groups,
    moves,
    uncovered,
)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Feasible (M, N_e, O_e, layers): N_e·O_e is at least M, which need not divide it."""
    num_sites = draw(st.integers(1, 12))
    overlap = draw(st.integers(1, num_sites))
    num_experts = draw(st.integers(-(-num_sites // overlap), 24))
    return num_sites, num_experts, overlap, draw(st.integers(1, 3))


seeds = st.integers(0, 2**31)


def place(size: tuple[int, int, int, int], seed: int = 0, draw: int = 0) -> Placement:
    return draw_placement(*size, seed=seed, draw=draw)


# -- invariants ----------------------------------------------------------------------------------------------


@given(sizes(), seeds)
def test_each_expert_is_on_exactly_overlap_sites(size: tuple[int, int, int, int], seed: int) -> None:
    _, _, overlap, _ = size
    assert (place(size, seed).holds_LEM.sum(axis=2) == overlap).all()


@given(sizes(), seeds)
def test_each_site_holds_its_equal_share_of_every_layer(size: tuple[int, int, int, int], seed: int) -> None:
    """Shares differ by one expert at most, and are the same in every layer, with every seed and draw."""
    num_sites, num_experts, overlap, num_layers = size
    placement, shares = place(size, seed, seed % 3), equal_shares(num_sites, num_experts, overlap)
    assert sum(shares) == num_experts * overlap
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)
    assert placement.num_sites == num_sites
    for site in range(num_sites):
        residents = placement.residents(site)
        assert len(residents) == num_layers
        for experts in residents:
            assert len(experts) == shares[site] >= 1
            assert experts == sorted(set(experts))
            assert set(experts) <= set(range(num_experts))


@given(sizes(), seeds, st.integers(0, 3))
def test_a_placement_depends_on_seed_and_draw_alone(
    size: tuple[int, int, int, int], seed: int, draw: int
) -> None:
    np.random.seed(1)  # the global generator must not matter
    first = place(size, seed, draw)
    np.random.seed(2)
    assert (first.holds_LEM == place(size, seed, draw).holds_LEM).all()


@given(sizes(), seeds)
def test_there_are_few_sets_of_holders(size: tuple[int, int, int, int], seed: int) -> None:
    """M / gcd(M, O_e) at most, M with unequal shares, for all layers and experts: each is a bundle on the wire."""
    num_sites, num_experts, overlap, num_layers = size
    divides = num_experts * overlap % num_sites == 0
    placement = place(size, seed)
    sets = {placement.holders(layer, e) for layer in range(num_layers) for e in range(num_experts)}
    assert len(sets) <= num_sites // (math.gcd(num_sites, overlap) if divides else 1)


@given(sizes(), seeds)
def test_holders_and_residents_tell_the_same(size: tuple[int, int, int, int], seed: int) -> None:
    num_sites, num_experts, _, num_layers = size
    placement = place(size, seed)
    residents = [placement.residents(site) for site in range(num_sites)]
    assert (from_residents(residents, num_experts).holds_LEM == placement.holds_LEM).all()
    assert holder_groups(residents) == {
        (layer, expert): placement.holders(layer, expert)
        for layer in range(num_layers)
        for expert in range(num_experts)
    }


def test_a_full_overlap_is_the_full_replica() -> None:
    placement = draw_placement(4, 6, 4, 2, seed=0)
    assert [placement.residents(site) for site in range(4)] == [full_residents(2, 6)] * 4


def test_different_draws_and_seeds_differ() -> None:
    size = (4, 16, 2, 2)
    drawn = [place(size, seed=0, draw=draw) for draw in range(20)] + [
        place(size, seed=s) for s in range(1, 20)
    ]
    for one, other in itertools.combinations(drawn, 2):
        assert (one.holds_LEM != other.holds_LEM).any()


def test_layers_are_drawn_independently() -> None:
    holds_LEM = place((4, 16, 2, 8), seed=0).holds_LEM
    for one, other in itertools.combinations(holds_LEM, 2):
        assert (one != other).any()


# -- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_sites", "num_experts", "overlap", "said"),
    [
        (4, 16, 0, "between 1 and the number of sites, 4"),
        (4, 16, 5, "between 1 and the number of sites, 4"),
        (8, 4, 1, "overlap must be at least 2"),  # fewer experts than sites
        (7, 2, 3, "overlap must be at least 4"),
    ],
)
def test_an_infeasible_size_names_what_is_allowed(
    num_sites: int, num_experts: int, overlap: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"^strategy.overlap={overlap}: .*{said}") as error:
        draw_placement(num_sites, num_experts, overlap, 1, seed=0)
    assert "\n" not in str(error.value)


@given(st.integers(1, 12), st.integers(1, 24), st.integers(-1, 14))
def test_a_size_is_refused_exactly_where_some_site_would_have_no_expert(
    num_sites: int, num_experts: int, overlap: int
) -> None:
    feasible = 1 <= overlap <= num_sites <= num_experts * overlap
    if feasible:
        check_overlap(num_sites, num_experts, overlap)
    else:
        with pytest.raises(ConfigError):
            check_overlap(num_sites, num_experts, overlap)


@given(st.integers(1, 12), st.integers(1, 24))
def test_what_the_error_calls_allowed_is_allowed(num_sites: int, num_experts: int) -> None:
    """From the one that it names on all overlaps are feasible; there always is one: the number of sites."""
    feasible = [o for o in range(1, num_sites + 1) if num_experts * o >= num_sites]
    for overlap in set(range(1, num_sites + 1)) - set(feasible):
        with pytest.raises(ConfigError) as error:
            check_overlap(num_sites, num_experts, overlap)
        least = int(str(error.value).rpartition(" ")[2])
        assert list(range(least, num_sites + 1)) == feasible


# -- random placement ----------------------------------------------------------------------------------------


@given(sizes(), seeds)
def test_moves_are_exactly_what_is_gained(size: tuple[int, int, int, int], seed: int) -> None:
    before, after = place(size, seed, 0), place(size, seed, 1)
    gained = {
        (site, layer, expert)
        for site in range(size[0])
        for layer in range(size[3])
        for expert in set(after.residents(site)[layer]) - set(before.residents(site)[layer])
    }
    moved = [tuple(move) for move in moves(before, after)]
    assert moved == sorted(gained)


def test_staying_moves_nothing() -> None:
    placement = place((4, 16, 2, 2))
    assert list(moves(placement, placement)) == []


@pytest.mark.parametrize(("num_sites", "overlap"), [(2, 1), (4, 1), (4, 2), (8, 6), (4, 4)])
def test_a_redraw_misses_one_minus_overlap_over_sites_on_average(num_sites: int, overlap: int) -> None:
    """FoMoE, section 3: the share of experts that a site must fetch. 200 draws of 2 layers of 16 experts."""
    size = (num_sites, 16, overlap, 2)
    drawn = [place(size, seed=7, draw=draw) for draw in range(201)]
    held = 2 * 16 * overlap
    shares = [len(list(moves(before, after))) / held for before, after in itertools.pairwise(drawn)]
    error_of_mean = np.std(shares) / len(shares) ** 0.5
    assert abs(np.mean(shares) - (1 - overlap / num_sites)) <= 4 * error_of_mean


def test_every_expert_comes_to_every_site_equally_often() -> None:
    mean_LEM = np.mean([place((4, 8, 2, 1), seed=3, draw=draw).holds_LEM for draw in range(400)], axis=0)
    # A share of 1/2 over 400 draws has a standard deviation of 0.025.
    assert np.abs(mean_LEM - 0.5).max() < 0.1


@pytest.mark.parametrize(
    ("kind", "reshuffle_every", "draws"),
    [
        ("fixed", 1, [0, 0, 0, 0, 0, 0, 0]),
        ("random", 1, [0, 1, 2, 3, 4, 5, 6]),
        ("random", 3, [0, 0, 0, 1, 1, 1, 2]),
    ],
)
def test_the_draw_in_force_in_a_round(kind: str, reshuffle_every: int, draws: list[int]) -> None:
    assert [draw_for_round(kind, reshuffle_every, round_) for round_ in range(1, 8)] == draws


def test_an_expert_that_nobody_holds_has_no_group() -> None:
    assert holder_groups([[[0], [1]], [[0, 2], []]]) == {(0, 0): (0, 1), (1, 1): (0,), (0, 2): (1,)}


# -- sites that are away -------------------------------------------------------------------------------------


@given(sizes(), seeds, st.data())
def test_orphans_are_given_to_those_who_are_there(
    size: tuple[int, int, int, int], seed: int, data: st.DataObject
) -> None:
    num_sites, num_experts, _, _ = size
    alive = data.draw(st.sets(st.integers(0, num_sites - 1), min_size=1))
    before = place(size, seed)
    after = adopt(before, alive)
    there = sorted(alive)
    orphans = uncovered(before, alive)
    assert orphans == [
        (layer, expert)
        for layer in range(size[3])
        for expert in range(num_experts)
        if not alive & set(before.holders(layer, expert))
    ]
    assert uncovered(after, alive) == []
    assert after.holds_LEM[:, :, there].any(axis=2).all()  # nobody is an orphan
    assert (after.holds_LEM >= before.holds_LEM).all()  # nobody gives anything up
    given_LEM = after.holds_LEM & ~before.holds_LEM
    orphaned_LE = ~before.holds_LEM[:, :, there].any(axis=2)
    assert (given_LEM.sum(axis=2) == orphaned_LE).all()  # each orphan to one site, nothing else to anybody
    loads_LM = after.holds_LEM[:, :, there].sum(axis=1)
    assert (loads_LM.max(axis=1) - loads_LM.min(axis=1) <= 1).all()  # shared out evenly
    assert loads_LM.max() <= num_experts


def test_with_everybody_or_nobody_there_nothing_changes() -> None:
    before = place((4, 8, 2, 2))
    assert (adopt(before, range(4)).holds_LEM == before.holds_LEM).all()
    assert (adopt(before, []).holds_LEM == before.holds_LEM).all()
