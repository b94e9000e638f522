"""The table of who can hold what of public models."""

from __future__ import annotations

from pathlib import Path

from benchmarks.room import table
from tests.model.configs import FOLDER, FOUR, overrides

DOCS = Path(__file__).parents[2] / "docs" / "plan.md"


def test_the_table_in_the_docs_is_what_the_planner_goes_by() -> None:
    overrides(FOUR[0])
    lines = list(table([FOLDER / name for name in FOUR]))
    assert "\n".join(lines) in DOCS.read_text(encoding="utf-8")
