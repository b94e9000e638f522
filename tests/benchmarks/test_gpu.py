"""benchmarks/gpu.sh where there is no GPU: it runs, says so, and one part cannot lose the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, medium, run_part
from fomoe_flwr.compose import compose

ROOT = Path(__file__).parents[2]


def call(folder: Path, *options: str) -> str:
    """The result file of a call."""
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--cpu", "--out", str(folder), *options]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHON": sys.executable})
    (file,) = folder.iterdir()
    return file.read_text(encoding="utf-8")


def test_two_parts_on_a_cpu(tmp_path: Path) -> None:
    text = call(tmp_path, "--only", "ghosts", "memory")
    for line in ("- date: ", "- machine: ", "- commit: ", "- command: `python -m benchmarks.gpu --cpu"):
        assert f"\n{line}" in text
    assert "no figure means anything" in text
    assert [line.split(" | ")[-1] for line in text.splitlines() if line.startswith(("| 0 |", "| 8 |", "| 16 |"))] == [
        "1.0 |", "1.16 |", "1.43 |",
    ]  # fmt: skip
    assert "failed" not in text
    assert "stopped" not in text


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path: Path) -> None:
    text = call(tmp_path)
    assert text.count("\n## ") == len(PARTS)
    assert "nothing was measured" not in text
    assert "failed" not in text


def test_a_part_that_takes_too_long_is_stopped_and_said() -> None:
    text = run_part("mfu", cpu=True, limit_s=0.05)
    assert "**stopped after its 0 s**" in text
    assert "nothing was measured" in text


def test_all_limits_together_are_under_nine_minutes() -> None:
    assert sum(limit for _, limit, _ in PARTS.values()) < 9 * 60


def test_medium_is_that_of_conf() -> None:
    assert medium() == compose(["model=medium"]).config.model


def test_neither_flower_nor_hydra_is_needed() -> None:
    check = (
        "import sys, benchmarks.gpu, torch._dynamo; found = {'flwr', 'hydra', 'omegaconf'} & set(sys.modules); "
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
