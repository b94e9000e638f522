"""A server that dies in any phase of a round resumes to the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.checkpoint import compose_run
from tests.conftest import Compose
from tests.faults.injector import Faults, grid_with
from tests.faults.server_death import PHASES, run_until_killed
from tests.faults.test_replies import SETTINGS
from tests.strategies.helpers import composed_anew, copy_of, finished, metrics, run
from tests.strategies.test_resume import assert_same_run


@pytest.mark.parametrize(
    ("phase", "outer"), [(phase, "nesterov") for phase in PHASES] + [("in commit", "local_adamw")]
)
def test_killed_in_any_phase_it_resumes_to_the_same_numbers(
    small: Compose, tmp_path: Path, phase: str, outer: str
) -> None:
    overrides = (*SETTINGS, f"strategy.outer={outer}", "strategy.placement=random")
    composed = composed_anew(small, tmp_path, *overrides)
    run_until_killed(composed, Faults(), phase, 2)
    assert len(metrics(composed.run_dir)) == 2  # the lines of rounds 0 and 1
    resumed = run(compose_run([f"resume={composed.run_dir}"]))
    assert_same_run(resumed, finished(small, tmp_path, *overrides), 3)
    assert not (resumed / "inbox").exists()


def test_what_was_half_done_in_mapped_files_is_never_gone_on_with(small: Compose, tmp_path: Path) -> None:
    """The whole run lies in memory, and has the same numbers."""
    overrides = (*SETTINGS, "strategy.outer=nesterov", "strategy.placement=random")
    composed = composed_anew(small, tmp_path, *overrides, "checkpoint.state=files")
    run_until_killed(composed, Faults(), "in commit", 2)
    resumed = run(compose_run([f"resume={composed.run_dir}"]))
    assert_same_run(resumed, finished(small, tmp_path, *overrides), 3)
    assert list(resumed.glob(".state*")) == []


def test_replies_that_were_in_are_not_asked_for_again_unless_they_are_damaged(
    small: Compose, tmp_path: Path
) -> None:
    """The round had lost site-1 for good; a resumed server must not get another answer from the others."""
    whole = finished(small, tmp_path, *SETTINGS)
    composed = composed_anew(small, tmp_path, *SETTINGS)
    run_until_killed(composed, Faults(), "last reply", 2)
    damaged = copy_of(composed.run_dir)
    nobody = Faults.lost([(f"site-{site}", 2) for site in range(4)])
    resumed = run(compose_run([f"resume={composed.run_dir}"]), grid_type=grid_with(nobody))
    assert metrics(resumed)[2]["failures"] == {}
    assert_same_run(resumed, whole, 3)

    bundle = damaged / "inbox/round_00002/2/bundle-0"
    bundle.write_bytes(bundle.read_bytes()[:-1] + b"x")
    (damaged / "inbox/round_00002/3/bundles.json").write_text("{")
    assert_same_run(run(compose_run([f"resume={damaged}"])), whole, 3)
