"""A server that dies in any phase of a round resumes to the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.checkpoint import compose_run
from tests.conftest import Compose
from tests.faults.injector import Faults, grid_with
from tests.faults.server_death import PHASES, run_until_killed
from tests.faults.test_replies import SETTINGS
from tests.strategies.helpers import metrics, run
from tests.strategies.test_resume import assert_same_run


@pytest.mark.parametrize(
    ("phase", "outer"),
    [(phase, "nesterov") for phase in PHASES]
    + [(phase, "local_adamw") for phase in ("last reply", "in commit", "after commit")],
)
def test_killed_in_any_phase_it_resumes_to_the_same_numbers(
    small: Compose, tmp_path: Path, phase: str, outer: str
) -> None:
    overrides = (*SETTINGS, f"strategy.outer={outer}", "strategy.placement=random")
    whole = run(small(*overrides, run_dir=tmp_path / "full"))
    composed = small(*overrides, run_dir=tmp_path / "dies")
    run_until_killed(composed, Faults(), phase, 2)
    assert len(metrics(composed.run_dir)) == 2  # the lines of rounds 0 and 1
    resumed = run(compose_run([f"resume={composed.run_dir}"]))
    assert_same_run(resumed, whole, 3)
    assert not (resumed / "inbox").exists()


def test_replies_that_were_in_are_not_asked_for_again(small: Compose, tmp_path: Path) -> None:
    """The round had lost site-1 for good; a resumed server must not get another answer from the others."""
    composed = small(*SETTINGS, run_dir=tmp_path / "dies")
    run_until_killed(composed, Faults(), "last reply", 2)
    nobody = Faults()
    for site in range(4):
        nobody.at(f"site-{site}", round=2).fail()
    resumed = run(compose_run([f"resume={composed.run_dir}"]), grid_type=grid_with(nobody))
    assert metrics(resumed)[2]["failures"] == {}
    assert_same_run(resumed, run(small(*SETTINGS, run_dir=tmp_path / "full")), 3)


def test_a_damaged_reply_in_the_inbox_is_asked_for_again(small: Compose, tmp_path: Path) -> None:
    composed = small(*SETTINGS, run_dir=tmp_path / "dies")
    run_until_killed(composed, Faults(), "last reply", 2)
    bundle = composed.run_dir / "inbox/round_00002/2/bundle-0"
    bundle.write_bytes(bundle.read_bytes()[:-1] + b"x")
    (composed.run_dir / "inbox/round_00002/3/bundles.json").write_text("{")
    resumed = run(compose_run([f"resume={composed.run_dir}"]))
    assert_same_run(resumed, run(small(*SETTINGS, run_dir=tmp_path / "full")), 3)
