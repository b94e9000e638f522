"""Small runs, round by round, against traces that were reviewed: what changes a number must say so in a commit."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.golden.runs import SETTINGS, TRACES

Traces = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found() -> Traces:
    """By a process of its own, for PyTorch chooses its kernels when it loads."""
    command = [sys.executable, "-m", "tests.golden", "--print"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_gives_the_figures_of_its_trace(name: str, found: Traces) -> None:
    expected = json.loads((TRACES / f"{name}.json").read_text())
    assert _exact(found[name]) == _exact(expected)
    assert _numbers(found[name]) == pytest.approx(_numbers(expected), rel=2e-3)


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
