"""The failures of `test_rounds.py` and `test_server_death.py` with real processes and real signals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import Chaos, assert_is_the_run_without_the_lost_replies, every_blow, random_blows


@pytest.fixture
def chaos(tmp_path: Path, corpus_dir: Path, cache_dir: Path) -> Chaos:
    return Chaos(tmp_path, ["data=text", f"data.path={corpus_dir}", f"data.cache_dir={cache_dir}"])


@pytest.mark.slow
def test_any_process_may_be_killed_terminated_or_stopped(chaos: Chaos, tmp_path: Path) -> None:
    chaos.play(every_blow())
    assert_is_the_run_without_the_lost_replies(chaos, tmp_path / "reference")


@pytest.mark.slow
def test_random_kills_in_a_row(chaos: Chaos, tmp_path: Path) -> None:
    """Fifty of them: `python -m benchmarks.recovery`."""
    chaos.play(random_blows(seed=0, number=4))
    assert_is_the_run_without_the_lost_replies(chaos, tmp_path / "reference")
