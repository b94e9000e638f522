"""What routing does and what it is worth, by how the experts are shared out: `python -m benchmarks.routing`.

The same text and the same tokens, over four sites, with all experts everywhere, with each expert at half of the sites
(and there with and without locality, and routed among residents only), and at one site for all the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import spread, train, write_result

SETTINGS = (
    "runtime=local", "wandb.mode=disabled", "checkpoint.every=0", "train.eval_batches=64",
    "train.final_eval_batches=16",
)  # fmt: skip
SITES = ("federation.num_sites=4",)
CENTRAL = "one site, all data"
TARGET = 0.75  # of the choices resident; half of the experts are
LOCAL = ("strategy.overlap=2", "model.locality=bias", f"model.locality_target={TARGET}")
VARIANTS = {
    CENTRAL: ("federation.num_sites=1", "strategy.overlap=1", "train.batch_size=32"),
    "all experts everywhere": (*SITES, "strategy.overlap=4"),
    "half, skip": (*SITES, "strategy.overlap=2"),
    f"half, skip, bias to {TARGET:.0%}": (*SITES, *LOCAL),
    f"half, skip, bias to {TARGET:.0%}, balance=global": (*SITES, *LOCAL, "model.balance=global"),
    "half, partitioned": (*SITES, "strategy.overlap=2", "strategy.routing=partitioned"),
}

Lines = list[dict[str, Any]]


def final(folder: Path) -> dict[str, Any]:
    """What the run found out at its end."""
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


def loss_row(name: str, runs: Sequence[tuple[Lines, dict[str, Any]]], central: Sequence[float]) -> str:
    """Loss with all experts and with residents, necessity, and what the routers look like."""
    needed = [evaluation["routing"]["necessity"] for _, evaluation in runs]
    resident = [
        statistics.mean(site["loss"] for site in evaluation["residents"].values()) for _, evaluation in runs
    ]
    share = [100 * one / other for one, other in zip(needed, central, strict=True)]
    everything = [evaluation["all_experts"]["loss"] for _, evaluation in runs]
    return (
        f"| {name} | {spread(everything)} | {spread(resident)} | {spread(needed)} | "
        f"{spread(share, '.0f')} % | "
        + " | ".join(
            f"{statistics.median(values):.3f}" if all(v is not None for v in values) else "–"
            for figure in ("agreement", "drift", "expert_similarity")
            for values in [[lines[-1]["routing"][figure] for lines, _ in runs]]
        )
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    runs: dict[str, list[tuple[Lines, dict[str, Any]]]] = {name: [] for name in VARIANTS}
    for seed in chosen.seeds:
        for name, overrides in VARIANTS.items():
            with tempfile.TemporaryDirectory(prefix="fomoe-routing-") as temporary:
                folder = Path(temporary) / "run"
                lines = train(folder, *SETTINGS, *overrides, f"train.rounds={chosen.rounds}", f"seed={seed}")
                runs[name].append((lines, final(folder)))
            print(f"seed {seed}, {name}: {lines[-1]['val_loss']:.3f}", flush=True)
    central = [evaluation["routing"]["necessity"] for _, evaluation in runs[CENTRAL]]
    write_result(
        "routing",
        "What routing does and what it is worth (model=tiny, four sites)",
        f"After {chosen.rounds} rounds on the same tokens; median and range of {len(chosen.seeds)} seed(s). Losses in "
        "nats a token; necessity is the loss with random routing minus the loss with the learned router.\n\n"
        "| experts at each site | loss, all experts | loss, residents only | necessity | of the central run's | "
        "agreement | drift | similarity |\n|---|---|---|---|---|---|---|---|\n"
        + "\n".join(loss_row(name, found, central) for name, found in runs.items()),
        "larger models, more tokens, text that differs between the sites, locality=loss, the other routers.",
    )


if __name__ == "__main__":
    main()
