"""The solver against enumeration, and what every plan must satisfy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.solver import (
    Choice,
    Floats,
    Ints,
    Options,
    finish_s,
    place_by_demand,
    place_in_circle,
    solve,
    useful_tokens,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Options, int]:
    """Small instances: two or three sites, up to four experts, up to four steps."""
    sites, experts = draw(st.integers(2, 3)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most_M = rng.integers(1, experts + 1, sites)
    fits = np.arange(experts)[None, :] < most_M[:, None]
    # Costs rise with the residents, as real ones do; worth too.
    step_s = rng.uniform(0.2, 4, (sites, 1)) * (1 + rng.uniform(0, 2) * np.arange(experts) / experts)
    communication_s = rng.uniform(0, 5, (sites, 1)) * (1 + np.arange(experts))
    worth = np.broadcast_to(1 - rng.uniform(0, 1) * (1 - np.arange(1, experts + 1) / experts), fits.shape)
    tokens = rng.integers(1, 4, sites) * 8
    made = Options(fits, step_s, communication_s, worth, tokens, 4, draw(st.booleans()))
    return made, draw(st.integers(1, sites))


def everything(options: Options) -> list[tuple[Ints, Ints]]:
    per_site = [
        [
            (residents, steps)
            for residents in range(1, options.num_experts + 1)
            if options.fits_MR[site, residents - 1]
            for steps in range(1, options.max_steps + 1)
        ]
        for site in range(len(options.step_tokens_M))
    ]
    return [
        (np.array([r for r, _ in combination]), np.array([s for _, s in combination]))
        for combination in itertools.product(*per_site)
    ]


def enumerated(options: Options, target: float, holders: int) -> float | None:
    """The least round time, by trying everything."""
    times = [
        finish_s(options, residents, steps).max()
        for residents, steps in everything(options)
        if residents.sum() >= holders * options.num_experts
        and useful_tokens(options, residents, steps) >= target * (1 - 1e-12)
    ]
    return float(min(times)) if times else None


@settings(max_examples=150, deadline=None)
@given(problems(), st.floats(0.05, 1.1))
def test_the_solver_equals_enumeration(problem: tuple[Options, int], share: float) -> None:
    options, holders = problem
    most = float((options.max_steps * options.step_tokens_M).sum())
    expected = enumerated(options, share * most, holders)
    if expected is None:
        with pytest.raises(ConfigError):
            solve(options, share * most, holders)
        return
    choice = solve(options, share * most, holders)
    assert choice.round_s == pytest.approx(expected, rel=1e-9)
    check_feasible(options, choice, share * most, holders)


def check_feasible(options: Options, choice: Choice, target: float, holders: int) -> None:
    rows = np.arange(len(choice.residents_M))
    assert options.fits_MR[rows, choice.residents_M - 1].all()
    assert (choice.steps_M >= 1).all()
    assert (choice.steps_M <= options.max_steps).all()
    assert useful_tokens(options, choice.residents_M, choice.steps_M) >= target * (1 - 1e-9)
    placement = place_in_circle(choice.residents_M, 2, options.num_experts, seed=0)
    assert placement.holds_LEM.sum(axis=2).min() >= holders
    assert (placement.holds_LEM.sum(axis=1) == choice.residents_M).all()


def best_placement(gain_ME: Floats, residents_M: Ints, holders: int) -> float:
    """The greatest gain of one layer, by trying every choice of experts for every site."""
    num_sites, num_experts = gain_ME.shape
    per_site = [
        list(itertools.combinations(range(num_experts), int(residents_M[site]))) for site in range(num_sites)
    ]
    best = -np.inf
    for combination in itertools.product(*per_site):
        held = np.zeros((num_sites, num_experts), bool)
        for site, experts in enumerate(combination):
            held[site, list(experts)] = True
        if held.sum(axis=0).min() >= holders:
            best = max(best, float((gain_ME * held).sum()))
    return best


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.integers(2, 4), st.integers(1, 2))
def test_placement_by_demand_equals_enumeration(seed: int, sites: int, experts: int, holders: int) -> None:
    rng = np.random.default_rng(seed)
    residents_M = rng.integers(1, experts + 1, sites)
    demand = rng.dirichlet(np.full(experts, 0.5), (sites, 2))
    if residents_M.sum() < holders * experts:
        with pytest.raises(ConfigError, match=r"plan\.holders"):
            place_by_demand(residents_M, demand, holders)
        return
    placement = place_by_demand(residents_M, demand, holders)
    for layer in range(2):
        held_EM = placement.holds_LEM[layer]
        assert (held_EM.sum(axis=0) == residents_M).all()
        assert held_EM.sum(axis=1).min() >= holders
        gain = float((demand[:, layer] * held_EM.T).sum())
        assert gain == pytest.approx(best_placement(demand[:, layer], residents_M, holders), abs=1e-9)


def test_a_move_must_pay_for_itself() -> None:
    residents_M = np.array([1, 1])
    demand = np.array([[[0.6, 0.4]], [[0.5, 0.5]]])
    held = place_by_demand(residents_M, demand[:, :, ::-1], holders=1)  # the other way round
    assert (place_by_demand(residents_M, demand, 1, held, stay=0.0).holds_LEM != held.holds_LEM).any()
    assert (place_by_demand(residents_M, demand, 1, held, stay=0.2).holds_LEM == held.holds_LEM).all()


def test_too_little_memory_for_the_holders_is_one_line() -> None:
    shape = (2, 4)
    fits = np.arange(4)[None, :] < np.array([[1], [2]])
    options = Options(fits, np.ones(shape), np.ones(shape), np.ones(shape), np.array([8, 8]), 4)
    with pytest.raises(ConfigError, match=r"plan\.holders=1: 4 experts a layer .* room for 3"):
        solve(options, 8.0, holders=1)


def test_more_work_than_the_steps_allow_is_one_line() -> None:
    shape = (2, 2)
    options = Options(
        np.ones(shape, bool), np.ones(shape), np.ones(shape), np.ones(shape), np.array([8, 8]), 2
    )
    with pytest.raises(ConfigError, match=r"plan\.max_steps_ratio: with 2 local steps .* 32 tokens, 40 are"):
        solve(options, 40.0, holders=1)


def test_more_sites_are_never_slower() -> None:
    rng = np.random.default_rng(0)
    step_s = rng.uniform(0.5, 2, (40, 1)) * (1 + np.arange(8) / 8)
    communication_s = rng.uniform(0, 1, (40, 1)) * np.arange(1, 9)
    worth = np.broadcast_to(0.5 + np.arange(1, 9) / 16, (40, 8))

    def round_s(sites: int) -> float:
        options = Options(
            np.ones((sites, 8), bool), step_s[:sites], communication_s[:sites], worth[:sites],
            np.full(sites, 8), 1000,
        )  # fmt: skip
        return solve(options, 8.0 * 500, holders=1).round_s

    times = [round_s(sites) for sites in (5, 10, 20, 40)]
    assert times == sorted(times, reverse=True)
