"""The plan in force: what it hears, when it looks, and that it survives a resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from fomoe_flwr.compose import Composed
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import CheckpointError
from fomoe_flwr.plan.record import Plan, load_plan
from strategies.planning import LivingPlan
from strategies.round import SiteResult
from strategies.server import check_resumable
from tests.conftest import Compose
from tests.strategies.helpers import metrics, run, without_times

AFFINE = (
    "federation.num_sites=4", "strategy.overlap=2", "strategy.placement=planned", "plan.policy=affine",
    "train.expert_warmup_steps=0",
)  # fmt: skip


def asking(config: RunConfig, site: int, experts: list[int]) -> SiteResult:
    """A site whose tokens ask for these experts alone."""
    load_LE = np.zeros((config.model.num_layers, config.model.num_experts), dtype=np.int64)
    load_LE[:, experts] = 100
    return SiteResult(f"site-{site}", 100, 0.0, 0.0, 1.0, 1.0, 0.0, load_LE)


def asked(config: RunConfig) -> list[SiteResult]:
    """The sites ask for experts 0-3, 2-5, 4-7 and 6-1."""
    return [asking(config, site, [(2 * site + i) % 8 for i in range(4)]) for site in range(4)]


def test_it_looks_when_it_is_time_and_moves_what_is_asked_for(small: Compose) -> None:
    config = small(*AFFINE, "plan.demand_every=3", "train.rounds=9").config
    plan = LivingPlan(config, None)
    before = plan.placement.holds_LEM.copy()
    plan.follow(1, [0, 1, 2, 3], at_once=False)
    for round_ in (1, 2, 3):
        plan.heard(asked(config))
        assert (plan.placement.holds_LEM == before).all()
        plan.follow(round_ + 1, [0, 1, 2, 3], at_once=False)
    for site in range(4):
        assert plan.placement.residents(site) == [sorted((2 * site + i) % 8 for i in range(4))] * 2


@pytest.mark.parametrize(
    "deaf", ["plan.demand_every=0", "plan.policy=equal", "plan.policy=memory", "strategy.routing=partitioned"]
)
def test_nobody_listens_where_the_plan_does_not_go_by_it(small: Compose, deaf: str) -> None:
    config = small(*AFFINE[:3], "plan.demand_every=1", "plan.policy=solver", deaf).config
    plan = LivingPlan(config, None)
    before = plan.placement.holds_LEM.copy()
    plan.heard(asked(config))
    plan.follow(2, [0, 1, 2, 3], at_once=False)
    assert (plan.placement.holds_LEM == before).all()
    assert plan.memory()["demand"] == {}


def test_a_site_not_heard_of_asks_for_all_alike(small: Compose) -> None:
    config = small(*AFFINE, "plan.demand_every=1").config
    plan = LivingPlan(config, None)
    plan.heard(asked(config)[:1])
    plan.follow(2, [0, 1, 2, 3], at_once=False)
    assert plan.placement.residents(0) == [[0, 1, 2, 3]] * 2
    assert plan.placement.holds_LEM.sum(axis=2).min() >= 1


def test_memory_is_json_and_complete(small: Compose) -> None:
    config = small(*AFFINE, "plan.demand_every=2").config
    one, other = LivingPlan(config, None), LivingPlan(config, None)
    one.heard(asked(config))
    residents = [one.placement.residents(site) for site in range(4)]
    other.load(json.loads(json.dumps(one.memory())), residents)
    for plan in (one, other):
        plan.follow(3, [0, 1, 2, 3], at_once=False)
    assert (one.placement.holds_LEM == other.placement.holds_LEM).all()
    assert one.plan == other.plan


def test_a_site_prefers_its_residents_as_much_as_it_holds(small: Compose) -> None:
    sites = "federation.sites=[{name:a,memory_gib:0.01},{name:b,memory_gib:0.0005}]"
    config = small(
        sites,
        "federation.num_sites=2",
        "strategy.placement=planned",
        "plan.policy=memory",
        "strategy.overlap=1",
        "model.locality=bias",
        "model.locality_target=0.7",
    ).config
    plan = LivingPlan(config, None)
    held = [site.experts_per_layer for site in plan.plan.sites]
    assert held[0] > held[1]
    targets = [plan.model(site).locality_target for site in (0, 1)]
    assert targets == [pytest.approx(min(1 - (1 - count / 8) * 0.6, count / 2)) for count in held]
    assert targets == [site.resident_share for site in plan.plan.sites]
    config.strategy.placement = "fixed"
    assert plan.model(0) == config.model


def test_a_resumed_run_goes_by_what_is_asked_of_the_planner_now(small: Compose, tmp_path: Path) -> None:
    def composed(*more: str) -> Composed:
        return small(*AFFINE, "checkpoint.keep=5", f"hydra.run.dir={tmp_path / 'run'}", *more)

    run_dir = run(composed("train.rounds=1"))
    run(composed("train.rounds=2", f"resume={run_dir}", "plan.policy=memory"))
    held = [read_checkpoint(checkpoint_path(run_dir, round_)).manifest for round_ in (1, 2)]
    assert [manifest["memory"]["plan"]["plan"]["policy"] for manifest in held] == ["affine", "memory"]
    assert (in_force := load_plan(run_dir)) is not None
    assert in_force.to_dict() == Plan.from_dict(held[1]["memory"]["plan"]["plan"]).to_dict()


def test_a_key_that_is_newer_than_a_checkpoint_had_its_default(small: Compose, tmp_path: Path) -> None:
    run_dir = run(small("train.rounds=1", f"hydra.run.dir={tmp_path / 'run'}"))
    checkpoint = read_checkpoint(checkpoint_path(run_dir, 1))
    del checkpoint.manifest["config"]["model"]["router"]
    config = small("train.rounds=2", f"resume={run_dir}").config
    check_resumable(checkpoint, config)
    config.model.router = "grap"
    with pytest.raises(CheckpointError, match=r"model\.router=grap, but the checkpoint was made with linear"):
        check_resumable(checkpoint, config)


def test_a_run_follows_what_its_tokens_ask_for_and_so_does_a_resumed_one(
    small: Compose, tmp_path: Path
) -> None:
    def composed(name: str, *more: str) -> Composed:
        folder = tmp_path / name
        return small(*AFFINE, "plan.demand_every=2", "checkpoint.keep=5", f"hydra.run.dir={folder}", *more)

    whole = run(composed("whole-run", "train.rounds=5"))
    parts = run(composed("parts-run", "train.rounds=3"))
    run(composed("parts-run", "train.rounds=5", f"resume={parts}"))
    lines = metrics(whole)
    assert without_times(lines)[1:] == without_times(metrics(parts))[1:]
    held = [read_checkpoint(checkpoint_path(whole, number)).manifest["placement"] for number in range(1, 6)]
    assert held[0] == held[1]
    assert held[1] != held[2]
    assert held[2] == held[3]
    for line in lines[1:]:
        assert line["failures"] == {}
        assert line["experts"]["num_orphaned"] == 0
