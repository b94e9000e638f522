"""64 sites, 300 rounds: does anything grow? `python -m benchmarks.endurance`

A run of its own process, looked at from outside after each round: memory, time, open files, threads, children, and
what lies in its temporary folder and run directory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import write_result

OVERRIDES = (
    "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.num_experts=64", "model.d_expert=16",
    "model.vocab_size=264", "strategy.overlap=8", "train.local_steps=1", "train.batch_size=1", "train.seq_len=32",
    "train.warmup_steps=4", "train.eval_batches=2", "train.eval_every=20", "runtime=local", "wandb.mode=disabled",
)  # fmt: skip


def status(pid: int) -> dict[str, float]:
    """Memory in MiB, threads, open files and children of a process.

    Memory is the process's own; pages of files that it has mapped (the tokens, as more and more of them are read)
    belong to the system's cache and are counted apart.
    """
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        "memory_mib": int(fields["RssAnon"].split()[0]) / 1024,
        "mapped_mib": int(fields["RssFile"].split()[0]) / 1024,
        "threads": int(fields["Threads"]),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "children": len(children),
    }


def entries(folder: Path) -> int:
    """Files and folders below it, while they come and go."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def watch(
    process: subprocess.Popen[bytes], run_dir: Path, temporary: Path, rounds: int
) -> list[dict[str, float]]:
    """One sample after each round."""
    samples: list[dict[str, float]] = []
    path = run_dir / "metrics.jsonl"
    while process.poll() is None and len(samples) < rounds:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) > len(samples) + 1:
            line = json.loads(lines[-1])
            sample = status(process.pid)
            sample |= {
                "round": line["round"],
                "seconds": line["seconds"]["round"],
                "temporary": entries(temporary),
                "run_files": entries(run_dir),
            }
            samples += [sample] * (len(lines) - 1 - len(samples))
        time.sleep(0.02)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=300)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run_dir, temporary = Path(name) / "run", Path(name) / "tmp"
        temporary.mkdir()
        command = [
            str(Path(sys.executable).with_name("fomoe")), "train", *OVERRIDES, f"federation.num_sites={chosen.sites}",
            f"train.rounds={chosen.rounds}", f"hydra.run.dir={run_dir}",
        ]  # fmt: skip
        environment = os.environ | {"TMPDIR": str(temporary)}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            samples = watch(process, run_dir, temporary, chosen.rounds)
            code = process.wait()
        finally:
            process.kill()
        left = sorted(path.name for path in temporary.rglob("*"))
        failures = sum(
            len(json.loads(line)["failures"]) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        )
    rows = []
    edges = [1, 10, 50, 100, 150, 200, 250, 300]
    for first, last in itertools.pairwise(edges):
        window = [sample for sample in samples if first <= sample["round"] < last + (last == chosen.rounds)]
        if window:
            rows.append(
                f"| {first} to {int(window[-1]['round'])} "
                f"| {statistics.median(s['seconds'] for s in window):.2f} "
                f"| {statistics.median(s['memory_mib'] for s in window):.0f} "
                f"| {max(s['memory_mib'] for s in window):.0f} "
                f"| {max(s['mapped_mib'] for s in window):.0f} "
                f"| {max(s['threads'] for s in window):.0f} | {max(s['files'] for s in window):.0f} "
                f"| {max(s['children'] for s in window):.0f} | {max(s['temporary'] for s in window):.0f} "
                f"| {max(s['run_files'] for s in window):.0f} |"
            )
    write_result(
        "endurance",
        f"{chosen.sites} sites, {chosen.rounds} rounds of a very small model in runtime=local",
        "| rounds | seconds a round (median) | memory, MiB (median) | (largest) | mapped files, MiB | threads "
        "| open files | children | entries in the temporary folder | entries in the run directory |\n"
        f"|{'---|' * 10}\n"
        + "\n".join(rows)
        + f"\n\nExit code {code}, {failures} failures; left in the temporary folder afterwards: {left or 'nothing'}. "
        "The run directory holds the sites' states of the last four rounds, three checkpoints and the replies of the "
        "round in progress.",
        "larger models, real links.",
    )


if __name__ == "__main__":
    main()
