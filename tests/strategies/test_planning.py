"""The plan in force: what it hears, when it looks, and that it survives a resume."""

from __future__ import annotations

from pathlib import Path

from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from fomoe_flwr.compose import Composed
from fomoe_flwr.plan.record import Plan, load_plan
from tests.conftest import Compose
from tests.strategies.helpers import metrics, run, without_times

AFFINE = (
    "federation.num_sites=4", "strategy.overlap=2", "strategy.placement=affine",
    "train.expert_warmup_steps=0",
)  # fmt: skip


def test_a_resumed_run_goes_by_what_is_asked_of_the_planner_now(small: Compose, tmp_path: Path) -> None:
    def composed(*more: str) -> Composed:
        return small(*AFFINE, "checkpoint.keep=5", f"hydra.run.dir={tmp_path / 'run'}", *more)

    run_dir = run(composed("train.rounds=1"))
    run(composed("train.rounds=2", f"resume={run_dir}", "strategy.placement=memory"))
    held = [read_checkpoint(checkpoint_path(run_dir, round_)).manifest for round_ in (1, 2)]
    assert [manifest["memory"]["plan"]["plan"]["placement"] for manifest in held] == ["affine", "memory"]
    assert (in_force := load_plan(run_dir)) is not None
    assert in_force.to_dict() == Plan.from_dict(held[1]["memory"]["plan"]["plan"]).to_dict()


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
