"""Small runs, round by round, against traces that were reviewed: what changes a number must say so in a commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.runs import SETTINGS, TRACES, trace, trained


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_gives_the_figures_of_its_trace(name: str, tmp_path: Path) -> None:
    expected = json.loads((TRACES / f"{name}.json").read_text())

    found = trace(trained(name, tmp_path))

    assert _exact(found) == _exact(expected)
    for line, wanted in zip(found, expected, strict=True):
        assert _numbers(line) == pytest.approx(_numbers(wanted), rel=tolerance(wanted["round"]))


def tolerance(round_: int) -> float:
    """What else differs is a change of ours: it shows in round 1.

    Processors differ in the last bits of a sum. In round 1 that is below the digits that are kept; in each round after
    it, routers that choose another expert for a token or two multiply it (seen: 1.2 % in round 2, from Intel to AMD).
    """
    return 2e-3 if round_ <= 1 else 2e-2


def _exact(value: Any) -> Any:
    """Everything but the floats: keys, counts, bytes, what was committed."""
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return "float" if isinstance(value, float) else value


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []
