"""The plan in force: what it hears, when it looks, and that it survives a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.checkpoint import checkpoint_path, compose_run, read_checkpoint
from fomoe_flwr.plan.record import Plan, load_plan
from tests.conftest import Compose
from tests.strategies.helpers import copy_of, finished, metrics, run, without_times


@pytest.fixture
def whole(small: Compose, tmp_path: Path) -> Path:
    """A run that looks at its plan after every second round."""
    return finished(
        small, tmp_path, "federation.num_sites=4", "strategy.overlap=2", "strategy.placement=affine",
        "train.expert_warmup_steps=0", "plan.demand_every=2", "checkpoint.keep=5", "train.rounds=4",
    )  # fmt: skip


def test_a_resumed_run_goes_by_what_is_asked_of_the_planner_now(whole: Path) -> None:
    copy = copy_of(whole)
    run(compose_run([f"resume={checkpoint_path(copy, 1)}", "train.rounds=2", "strategy.placement=memory"]))
    held = [read_checkpoint(checkpoint_path(copy, round_)).manifest for round_ in (1, 2)]
    assert [manifest["memory"]["plan"]["plan"]["placement"] for manifest in held] == ["affine", "memory"]
    assert (in_force := load_plan(copy)) is not None
    assert in_force.to_dict() == Plan.from_dict(held[1]["memory"]["plan"]["plan"]).to_dict()


def test_a_run_follows_what_its_tokens_ask_for_and_so_does_a_resumed_one(whole: Path) -> None:
    parts = run(compose_run([f"resume={checkpoint_path(copy_of(whole), 1)}"]))
    lines = metrics(whole)
    assert without_times(lines)[1:] == without_times(metrics(parts))[1:]
    held = [read_checkpoint(checkpoint_path(whole, number)).manifest["placement"] for number in range(1, 5)]
    assert held[0] == held[1]
    assert held[1] != held[2]
    assert held[2] == held[3]
    for line in lines[1:]:
        assert line["failures"] == {}
        assert line["experts"]["num_orphaned"] == 0
