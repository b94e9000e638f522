"""New plans move what must move, and else only what pays for itself."""

from __future__ import annotations

import numpy as np
import pytest

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.planner import make_plan, plan_placement
from fomoe_flwr.plan.replan import replan
from fomoe_flwr.plan.sites import BYTES_A_GIB

PLANNED = ("federation=hetero", "strategy.placement=planned", "plan.tflops=0.05")


def config(*overrides: str) -> RunConfig:
    return compose([*PLANNED, *overrides]).config


def demand_for(preferred: list[int], layers: int, experts: int) -> np.ndarray:
    """Each site's tokens go to half of the experts, from its own one on."""
    demand_MLE = np.full((len(preferred), layers, experts), 1e-6)
    for site, first in enumerate(preferred):
        chosen = (first + np.arange(experts // 2)) % experts
        demand_MLE[site, :, chosen] = 1.0
    return demand_MLE / demand_MLE.sum(axis=2, keepdims=True)


def test_nothing_has_changed_nothing_moves() -> None:
    made = config()
    plan = make_plan(made)
    assert replan(made, plan, plan_placement(made, plan), [0, 1, 2, 3], 100) is None


@pytest.mark.parametrize("away", [0, 1, 3])
def test_a_site_leaves_and_the_others_hold_everything(away: int) -> None:
    made = config()
    plan = make_plan(made)
    before = plan_placement(made, plan)
    present = [site for site in range(4) if site != away]
    new = replan(made, plan, before, present, rounds_left=5)
    orphaned = int((before.holds_LEM[:, :, present].sum(axis=2) == 0).sum())
    if new is None:
        assert orphaned == 0  # the others were doing well as they were
        return
    assert new.placement.holds_LEM[:, :, present].sum(axis=2).min() >= 1
    assert not new.placement.holds_LEM[:, :, away].any()
    assert new.plan.sites[away].experts_per_layer == new.plan.sites[away].tokens == 0
    for site in present:
        planned, given = new.plan.sites[site], made.federation.sites[site]
        assert planned.site == given.name
        assert given.memory_gib is not None
        assert planned.memory_bytes <= given.memory_gib * BYTES_A_GIB
        assert (new.placement.holds_LEM[:, :, site].sum(axis=1) == planned.experts_per_layer).all()
    # What a site keeps, it keeps: moves are no more than what it holds more, and what had no holder.
    more = sum(
        max(0, new.plan.sites[site].experts_per_layer - plan.sites[site].experts_per_layer)
        for site in present
    )
    assert orphaned <= new.moved <= made.model.num_layers * more + orphaned


def test_a_site_comes_back() -> None:
    made = config()
    plan = make_plan(made)
    before = plan_placement(made, plan)
    without = replan(made, plan, before, [1, 2, 3], rounds_left=50)
    assert without is not None
    again = replan(made, without.plan, without.placement, [0, 1, 2, 3], rounds_left=50)
    assert again is not None
    assert [site.experts_per_layer for site in again.plan.sites] == [s.experts_per_layer for s in plan.sites]


def test_what_is_left_may_be_too_little() -> None:
    made = config()
    plan = make_plan(made)
    with pytest.raises(ConfigError, match=r"plan\.holders=1: 16 experts a layer .* room for"):
        replan(made, plan, plan_placement(made, plan), [3], rounds_left=5)


def test_demand_is_followed_only_if_there_is_time_for_it_to_pay() -> None:
    made = config("train.expert_warmup_steps=400")
    plan = make_plan(made)
    before = plan_placement(made, plan)
    demand = demand_for([0, 4, 8, 12], made.model.num_layers, made.model.num_experts)
    assert replan(made, plan, before, [0, 1, 2, 3], 1, demand) is None
    new = replan(made, plan, before, [0, 1, 2, 3], 10_000, demand)
    assert new is not None
    assert new.moved > 0

    def hits(holds_LEM: np.ndarray) -> np.ndarray:
        return np.einsum("mle,lem->m", demand, holds_LEM.astype(float)) / made.model.num_layers

    assert (hits(new.placement.holds_LEM) >= hits(before.holds_LEM) - 1e-9).all()
    assert hits(new.placement.holds_LEM).sum() > hits(before.holds_LEM).sum() + 0.1


@pytest.mark.parametrize("policy", ["equal", "affine"])
def test_equal_shares_stay_equal_when_a_site_leaves(policy: str) -> None:
    made = config("strategy.overlap=2", f"plan.policy={policy}")
    plan = make_plan(made)
    new = replan(made, plan, plan_placement(made, plan), [0, 1, 2], rounds_left=50)
    assert new is not None
    assert [site.experts_per_layer for site in new.plan.sites] == [
        11,
        11,
        11,
        0,
    ]  # two copies of 16, rounded up
    assert {site.local_steps for site in new.plan.sites[:3]} == {made.train.local_steps}
    assert new.placement.holds_LEM[:, :, :3].sum(axis=2).min() >= 1


def test_the_affine_policy_gives_each_site_what_its_tokens_ask_for() -> None:
    made = config("strategy.overlap=2", "plan.policy=affine", "train.expert_warmup_steps=0")
    plan = make_plan(made)
    demand = demand_for([0, 4, 8, 12], made.model.num_layers, made.model.num_experts)
    new = replan(made, plan, plan_placement(made, plan), [0, 1, 2, 3], 100, demand)
    assert new is not None
    for site, first in enumerate([0, 4, 8, 12]):
        wanted = sorted((first + expert) % 16 for expert in range(8))
        assert new.placement.residents(site) == [wanted] * made.model.num_layers
        assert new.plan.sites[site].resident_share == pytest.approx(1, abs=1e-4)
    # And once they have it, they keep it.
    assert replan(made, new.plan, new.placement, [0, 1, 2, 3], 100, demand) is None
