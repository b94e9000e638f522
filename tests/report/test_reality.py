"""Planned beside measured: which assumption was off, and by how much."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fomoe_flwr.plan.planner import plan_for_run
from fomoe_flwr.report.load import Run, load_run
from fomoe_flwr.report.reality import Reality, compare, notes
from tests.report.runs import compose_config, write_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    overrides = ("federation.num_sites=4", "strategy.overlap=2")
    write_run(tmp_path, *overrides)
    plan_for_run(tmp_path, compose_config(*overrides))
    return load_run(tmp_path)


def slower(run: Run, factor: float) -> Reality:
    """As measured, but for the first site, which takes so many times what was planned for a step."""
    reality = compare(run)
    assert reality is not None
    first, *others = (
        site._replace(step_s=site.step_s._replace(measured=site.step_s.planned)) for site in reality.sites
    )
    first = first._replace(step_s=first.step_s._replace(measured=factor * first.step_s.planned))
    return reality._replace(sites=[first, *others])


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (1.0, None), (1.1, None), (0.5, "-50 % at most"), (2.5, "+150 % at most"), (4.2, "a factor of 4.2 at most"),
        (19_000.0, "a factor of 19,000 at most"),
    ],
)  # fmt: skip
def test_a_step_that_was_off_is_named_with_its_assumption(run: Run, factor: float, said: str | None) -> None:
    told = [note for note in notes(run, slower(run, factor)) if note.startswith("step time")]
    if said is None:
        assert told == []
        return
    assert told == [
        f"step time: assumed from plan.tflops=989, plan.mfu=0.4, off by {said}; "
        f"plan.measured={run.directory} uses what this run measured"
    ]


def test_what_was_measured_as_planned_is_not_named(run: Run) -> None:
    reality = compare(run)
    assert reality is not None
    assert not reality.payload_bytes.off
    as_planned = [
        site._replace(
            **{
                name: pair._replace(measured=pair.planned)
                for name in ("memory_bytes", "step_s", "resident_share", "round_s")
                for pair in [getattr(site, name)]
            }
        )
        for site in reality.sites
    ]
    assert notes(run, reality._replace(sites=as_planned)) == []


def test_a_run_without_a_plan_or_without_rounds_has_nothing_to_compare(run: Run) -> None:
    assert compare(dataclasses.replace(run, plan=None)) is None
    assert compare(dataclasses.replace(run, rounds=run.rounds[:1])) is None
