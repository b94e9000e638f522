"""What the routing figures of a round cost, as a share of it, in one run. `python -m benchmarks.health`

The sites are simulated in this process, so they share the machine and a round takes longer than in a deployment. The
second ratio is therefore to the training of the slowest site alone: a round of any deployment is longer than that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import write_result
from clients.app import app
from fomoe_flwr.compose import compose
from fomoe_flwr.server.health import PROBE_TOKENS
from strategies.launch import run_server
from strategies.local_grid import LocalGrid

CASES = {
    "4 sites, skip": ("federation.num_sites=4", "strategy.overlap=2"),
    "4 sites, partitioned": ("federation.num_sites=4", "strategy.overlap=2", "strategy.routing=partitioned"),
    "8 sites, skip": ("federation.num_sites=8", "strategy.overlap=2"),
    "4 sites, skip, no evaluation on the server": (
        "federation.num_sites=4", "strategy.overlap=2", "train.eval_every=1000",
    ),
}  # fmt: skip


def measure(overrides: Sequence[str], rounds: int, cache: str) -> list[dict[str, float]]:
    """Seconds by phase of each round after the first, which warms up."""
    with tempfile.TemporaryDirectory(prefix="fomoe-health-") as folder:
        settings = (
            "model=tiny", "runtime=local", "wandb.mode=disabled", "train.final_eval_batches=0", "checkpoint.every=0",
            f"train.rounds={rounds + 1}", f"data.cache_dir={cache}", f"hydra.run.dir={folder}/run",
        )  # fmt: skip
        composed = compose([*settings, *overrides])
        grid = LocalGrid(app, len(composed.config.federation.sites), workers=2)
        try:
            run_server(grid, composed)
        finally:
            grid.close()
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines[2:]]


def shares(seconds: Sequence[dict[str, float]], whole: str) -> str:
    """Share of the figures in a phase: median and range over the rounds."""
    each = [100 * round_["routing"] / round_[whole] for round_ in seconds]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows = []
    with tempfile.TemporaryDirectory(prefix="fomoe-health-cache-") as cache:
        for name, overrides in CASES.items():
            seconds = measure(overrides, rounds, cache)
            milliseconds = 1e3 * statistics.median(round_["routing"] for round_ in seconds)
            rows.append(
                f"| {name} | {milliseconds:.0f} | {shares(seconds, 'round')} | {shares(seconds, 'train')} |"
            )
            print(rows[-1], flush=True)
    write_result(
        "health",
        "What the routing figures of a round cost",
        f"model=tiny, 20 local steps of 8 sequences of 256 tokens a site, a probe of {PROBE_TOKENS} tokens; median and "
        f"range of {rounds} rounds after one that warms up.\n\n"
        "| case | figures, ms a round | % of the round | % of the slowest site's training |\n|---|---|---|---|\n"
        + "\n".join(rows),
        "larger models, GPUs, more than eight sites.",
    )


if __name__ == "__main__":
    main()
