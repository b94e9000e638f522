"""Placement policies: what a round is by each, when a plan is made anew, and that a resumed run goes on alike."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fomoe_flwr.compose import Composed
from fomoe_flwr.config import RunConfig
from fomoe_flwr.placement import Placement, draw_placement, uncovered
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.policies import POLICIES, Planned, Policy
from tests.conftest import Compose

FOUR = ("federation.num_sites=4", "strategy.overlap=2")
AFFINE = (*FOUR, "strategy.placement=affine", "train.expert_warmup_steps=0")
# Three sites that differ in memory, speed and link; big and one other can hold the whole model, free moves.
HETERO = (
    "federation.sites=["
    "{name:big,memory_gib:0.01,speed:4,up_mbps:100,down_mbps:100},"
    "{name:lab,memory_gib:0.002,up_mbps:20,down_mbps:50,latency_ms:20},"
    "{name:desk,memory_gib:0.002,speed:0.5,up_mbps:5,down_mbps:20,batch_size:1}]",
    "federation.num_sites=3",
    "strategy.placement=planned",
    "plan.tflops=0.002",
    "train.local_steps=6",
    "plan.skip_price=0",
)
ALL = [0, 1, 2, 3]


def policy_of(composed: Composed) -> Policy:
    return POLICIES[composed.config.strategy.placement](composed.config)


def planned(composed: Composed) -> Planned:
    policy = policy_of(composed)
    assert isinstance(policy, Planned)
    return policy


def same(one: Placement, other: Placement) -> bool:
    return bool((one.holds_LEM == other.holds_LEM).all())


def residents_of(placement: Placement) -> list[list[list[int]]]:
    return [placement.residents(site) for site in range(placement.num_sites)]


# -- until when ----------------------------------------------------------------------------------------------


def test_a_drawn_placement_is_known_to_end(small: Compose) -> None:
    """All its experts that others hold then; what a site holds for another one may go back at once."""
    policy = policy_of(small(*FOUR, "strategy.placement=random", "strategy.reshuffle_every=3"))
    for round_ in range(1, 8):
        last = -(-round_ // 3) * 3
        now, then = (policy.intended(number).placement for number in (round_, last + 1))
        until_LE = policy.holders_until(round_, now)
        assert set(np.unique(until_LE)) <= {0, last}
        for layer, expert in np.ndindex(until_LE.shape):
            moves = now.holders(layer, expert) != then.holders(layer, expert)
            assert until_LE[layer, expert] == (last if moves else 0)
    alive = [0]
    adopted = policy.for_round(4, alive).placement
    uncovered_LE = np.zeros_like(until_LE)
    for layer, expert in uncovered(policy.intended(4).placement, alive):
        uncovered_LE[layer, expert] = 4
    assert uncovered_LE.any()
    assert (policy.holders_until(4, adopted)[uncovered_LE > 0] == 4).all()
    assert (policy.holders_until(4, adopted)[uncovered_LE == 0] != 4).all()


@pytest.mark.parametrize("overrides", [FOUR, AFFINE, HETERO], ids=["fixed", "affine", "planned"])
def test_of_other_placements_no_end_is_known(small: Compose, overrides: tuple[str, ...]) -> None:
    policy = policy_of(small(*overrides))
    assert not policy.holders_until(3, policy.intended(3).placement).any()


# -- drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "every", "draws"),
    [("fixed", 1, [0, 0, 0, 0]), ("random", 1, [0, 1, 2, 3]), ("random", 2, [0, 0, 1, 1])],
)
def test_a_drawn_round_is_the_draw_in_force_and_equal_steps(
    small: Compose, kind: str, every: int, draws: list[int]
) -> None:
    composed = small(*FOUR, f"strategy.placement={kind}", f"strategy.reshuffle_every={every}")
    policy = policy_of(composed)
    for round_, draw in enumerate(draws, start=1):
        expected = draw_placement(4, 8, 2, 2, composed.config.seed, draw)
        placement, steps_M = policy.for_round(round_, ALL)
        assert same(placement, expected)
        assert steps_M == (3, 3, 3, 3)
        assert same(policy.intended(round_).placement, expected)
    assert same(policy.intended(0).placement, policy.intended(1).placement)  # before the first round
    assert policy.memory() is None


@pytest.mark.parametrize("kind", ["fixed", "random", "equal", "affine"])
def test_three_sites_share_what_does_not_divide_as_their_plan_says(small: Compose, kind: str) -> None:
    """As with the README's command and three sites. A site's memory and bytes are as planned in every round."""
    composed = small(
        "federation.num_sites=3", "strategy.overlap=2", f"strategy.placement={kind}", "model.num_experts=16"
    )
    shares = [site.experts_per_layer for site in make_plan(composed.config).sites]
    assert shares == [11, 11, 10]
    policy = policy_of(composed)
    for round_ in (1, 2, 3):
        placement = policy.for_round(round_, [0, 1, 2]).placement
        assert (placement.holds_LEM.sum(axis=2) == 2).all()
        assert (placement.holds_LEM.sum(axis=1) == shares).all()
    assert policy.model(2) == composed.config.model


@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_only_a_random_placement_gives_orphans_away(small: Compose, kind: str) -> None:
    policy = policy_of(small("federation.num_sites=4", "strategy.overlap=1", f"strategy.placement={kind}"))
    placement, _ = policy.for_round(1, [0, 2])
    assert bool(uncovered(placement, [0, 2])) == (kind == "fixed")
    assert (placement.holds_LEM >= policy.intended(1).placement.holds_LEM).all()


# -- planned: what the tokens ask for ------------------------------------------------------------------------


def asked_for(config: RunConfig, sites: Sequence[int] = ALL) -> dict[str, NDArray[np.int64]]:
    """The sites ask for experts 0-3, 2-5, 4-7 and 6-1 alone."""
    loads = {}
    for site in sites:
        load_LE = np.zeros((config.model.num_layers, config.model.num_experts), dtype=np.int64)
        load_LE[:, [(2 * site + i) % 8 for i in range(4)]] = 100
        loads[f"site-{site}"] = load_LE
    return loads


def test_it_looks_when_it_is_time_and_moves_what_is_asked_for(small: Compose) -> None:
    composed = small(*AFFINE, "plan.demand_every=3", "train.rounds=9")
    policy = planned(composed)
    before = policy.for_round(1, ALL).placement
    for round_ in (1, 2, 3):
        policy.heard(asked_for(composed.config))
        assert same(policy.intended(round_).placement, before)
        after = policy.for_round(round_ + 1, ALL).placement
    assert residents_of(after) == [[sorted((2 * site + i) % 8 for i in range(4))] * 2 for site in ALL]


@pytest.mark.parametrize(
    "deaf",
    [
        "plan.demand_every=0",
        "strategy.placement=equal",
        "strategy.placement=memory",
        "strategy.routing=partitioned",
    ],
)
def test_nobody_listens_where_the_plan_does_not_go_by_it(small: Compose, deaf: str) -> None:
    composed = small(*FOUR, "strategy.placement=planned", "plan.demand_every=1", deaf)
    policy = planned(composed)
    before = policy.for_round(1, ALL).placement
    policy.heard(asked_for(composed.config))
    assert same(policy.for_round(2, ALL).placement, before)
    assert policy.memory()["demand"] == {}


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_a_checkpoints_routers_place_experts_before_round_1(small: Compose, routing: str) -> None:
    """Whatever the warm-up of an expert that moves: nobody has begun with any."""
    composed = small(*FOUR, "strategy.placement=affine", "train.expert_warmup_steps=10000")
    config = dataclasses.replace(
        composed.config,
        model=dataclasses.replace(composed.config.model, init="checkpoint"),
        strategy=dataclasses.replace(composed.config.strategy, routing=routing),
    )
    policy = Planned(config)
    assert policy.surveys
    assert not planned(composed).surveys
    drawn = policy.intended(0).placement
    assert same(policy.for_round(0, ALL).placement, drawn)
    policy.surveyed(asked_for(config))
    placement = policy.for_round(1, ALL).placement
    assert residents_of(placement) == [[sorted((2 * site + i) % 8 for i in range(4))] * 2 for site in ALL]
    assert same(policy.for_round(2, ALL).placement, placement)


def test_a_site_not_heard_of_asks_for_all_alike(small: Compose) -> None:
    composed = small(*AFFINE, "plan.demand_every=1")
    policy = planned(composed)
    policy.heard(asked_for(composed.config, [0]))
    placement = policy.for_round(2, ALL).placement
    assert placement.residents(0) == [[0, 1, 2, 3]] * 2
    assert placement.holds_LEM.sum(axis=2).min() >= 1


def test_memory_is_json_and_complete(small: Compose) -> None:
    composed = small(*AFFINE, "plan.demand_every=2")
    one, other = planned(composed), planned(composed)
    one.heard(asked_for(composed.config))
    other.remember(json.loads(json.dumps(one.memory())), residents_of(one.intended(1).placement))
    assert same(one.for_round(3, ALL).placement, other.for_round(3, ALL).placement)
    assert one.plan == other.plan


def test_a_plan_that_has_been_made_is_taken(small: Compose) -> None:
    composed = small(*HETERO)
    plan = make_plan(composed.config)
    assert Planned(composed.config, plan).plan is plan
    config = dataclasses.replace(composed.config)
    assert Planned(config).plan == plan


# -- planned: who is there -----------------------------------------------------------------------------------


def test_a_site_that_leaves_for_good_is_planned_without(small: Compose) -> None:
    """One round away is no reason to move experts as long as each has a holder; the second is."""
    policy = planned(small(*HETERO, "train.rounds=9", "plan.holders=2"))
    before, steps_M = policy.for_round(1, [0, 1, 2])
    assert all(steps_M)
    assert not uncovered(before, [1, 2])
    assert same(policy.for_round(2, [1, 2]).placement, before)
    after, steps_M = policy.for_round(3, [1, 2])
    assert not after.holds_LEM[:, :, 0].any()
    assert steps_M[0] == 0
    assert not uncovered(after, [1, 2])
    assert same(policy.for_round(4, [1, 2]).placement, after)  # as planned
    policy.for_round(5, [0, 1, 2])
    again, steps_M = policy.for_round(6, [0, 1, 2])
    assert again.holds_LEM[:, :, 0].any()  # it is back, for the second time
    assert steps_M[0] > 0


def test_experts_without_a_holder_are_planned_at_once(small: Compose) -> None:
    policy = planned(small(*HETERO, "train.rounds=9"))
    before = policy.for_round(1, [0, 1, 2]).placement
    lonely = next(
        site for site in range(3) if uncovered(before, [other for other in range(3) if other != site])
    )
    there = [site for site in range(3) if site != lonely]
    assert not uncovered(policy.for_round(2, there).placement, there)


def test_where_no_plan_can_be_made_the_old_one_stays_and_says_why(
    small: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    sites = HETERO[0].replace("0.002", "0.0006")  # the two others cannot hold the model between them
    policy = planned(small(sites, *HETERO[1:]))
    before = policy.for_round(1, [0, 1, 2]).placement
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        assert same(policy.for_round(2, [2]).placement, before)
    assert any("round 2" in line and "plan stays" in line for line in caplog.messages)


def test_a_site_prefers_its_residents_as_much_as_it_holds(small: Compose) -> None:
    overrides = (
        "federation.sites=[{name:a,memory_gib:0.01},{name:b,memory_gib:0.00065}]", "federation.num_sites=2",
        "strategy.placement=memory", "strategy.overlap=1", "model.locality=bias", "model.locality_target=0.7",
    )  # fmt: skip
    policy = planned(small(*overrides))
    held = [site.experts_per_layer for site in policy.plan.sites]
    assert held[0] > held[1]
    targets = [policy.model(site).locality_target for site in (0, 1)]
    assert targets == [pytest.approx(min(1 - (1 - count / 8) * 0.6, count / 2)) for count in held]
    assert targets == [site.resident_share for site in policy.plan.sites]
    drawn = small(*overrides, "strategy.placement=fixed")
    assert policy_of(drawn).model(0) == drawn.config.model
