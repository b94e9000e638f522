"""What every benchmark needs: the machine in words, paired timing, and a dated result file."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"

# Models for what a round costs besides training: next to nothing, and about 100 M parameters of which few compute.
EMPTY = (
    "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.num_experts=8", "model.d_expert=16",
)  # fmt: skip
HUNDRED = (
    "model.d_model=512", "model.num_layers=4", "model.num_heads=8", "model.num_experts=32", "model.d_expert=128",
    "model.vocab_size=150000",
)  # fmt: skip


def machine() -> str:
    """Processor, cores, threads and versions, as one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        model = f"{names[0]} x {len(names)}" if names else model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{model}, {device}, {torch.get_num_threads()} thread(s), {versions}"


def commit() -> str:
    """The commit measured, with a mark if the tree had changes."""
    root = RESULTS.parent.parent
    command = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def paired(
    variants: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each variant, taken in turn (A B A B …) after one warm-up each, so that drift hits all alike."""
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> str:
    """Median of the pairwise ratios, with their range."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def train(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """A whole `fomoe train` in a process of its own; the lines of its metrics, from round 0 on."""
    command = [str(Path(sys.executable).parent / "fomoe"), "train", *overrides, f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_result(name: str, title: str, body: str, not_measured: str, folder: Path = RESULTS) -> Path:
    """A dated file in `results/`, or in another folder, and the same on the terminal."""
    today = datetime.date.today().isoformat()
    text = (
        f"# {title}\n\n- date: {today}\n- machine: {machine()}\n- commit: {commit()}\n"
        f"- command: `python {' '.join([*sys.orig_argv[1:]])}`\n\n{body.strip()}\n\nNot measured: {not_measured}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{today}_{name}.md"
    path.write_text(text)
    print(text)
    return path


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def options(description: str, repeats: int, dtypes: Sequence[str] = ()) -> argparse.Namespace:
    """The command line all benchmarks share.

    Args:
        dtypes: those that are measured, where one may choose among them.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    if dtypes:
        parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=list(dtypes))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen
