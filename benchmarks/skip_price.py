"""What it costs in learning not to hold an expert: `python -m benchmarks.skip_price`.

The planner counts a token as `1 - plan.skip_price · (1 - share held)`. Here the price is measured: a federation of
full replicas and the same one with each expert at some of the sites train on the same tokens; T tokens of the second
are worth as many of the first as bring it to the same validation loss with all experts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import train, write_result

SETTINGS = (
    "runtime=local", "federation.num_sites=4", "wandb.mode=disabled", "checkpoint.every=0",
    "train.final_eval_batches=0", "train.eval_batches=64",
)  # fmt: skip
FIRST_ROUND = 2  # before it all curves are one


def prices(whole: Sequence[dict[str, Any]], part: Sequence[dict[str, Any]], held: float) -> list[float]:
    """(1 - tokens of the same worth / tokens) / share not held, by round from the first on that says something."""
    # Loss falls with tokens, so tokens are a function of loss; np.interp wants it ascending.
    loss, tokens = [line["val_loss"] for line in whole], [line["tokens"] for line in whole]
    found = []
    for line in part[FIRST_ROUND:]:
        same = float(np.interp(-line["val_loss"], [-value for value in loss], tokens))
        found.append((1 - same / line["tokens"]) / (1 - held))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--routing", choices=("skip", "partitioned"), default="skip")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    by_overlap: dict[int, list[list[float]]] = {overlap: [] for overlap in chosen.overlaps}
    losses: dict[int, list[float]] = {overlap: [] for overlap in (4, *chosen.overlaps)}
    for seed in chosen.seeds:
        curves = {}
        with tempfile.TemporaryDirectory(prefix="fomoe-price-") as temporary:
            for overlap in losses:
                common = (f"train.rounds={chosen.rounds}", f"seed={seed}", f"strategy.overlap={overlap}")
                routing = f"strategy.routing={chosen.routing}"
                curves[overlap] = train(Path(temporary) / str(overlap), *SETTINGS, *common, routing)
                losses[overlap].append(curves[overlap][-1]["val_loss"])
        for overlap, found in by_overlap.items():
            found.append(prices(curves[4], curves[overlap], overlap / 4))
            print(f"seed {seed}, overlap {overlap}: {[round(price, 2) for price in found[-1]]}", flush=True)
    header = " | ".join(str(number) for number in range(FIRST_ROUND, chosen.rounds + 1))
    rows = [
        f"| {overlap} of 4 | {1 - overlap / 4:.0%} | "
        + " | ".join(f"{statistics.median(values):.2f}" for values in zip(*found, strict=True))
        + f" | {min(f[-1] for f in found):.2f} to {max(f[-1] for f in found):.2f} |"
        for overlap, found in by_overlap.items()
    ]
    finals = ", ".join(
        f"{overlap} of 4: {statistics.median(values):.3f}" for overlap, values in losses.items()
    )
    write_result(
        f"skip_price_{chosen.routing}",
        f"What it costs in learning not to hold an expert, {chosen.routing} mode (model=tiny, 4 sites)",
        f"Price by round, median of {len(chosen.seeds)} seed(s): 0, a token teaches as much as if its experts were "
        "all there; 1, the part of it whose experts are not held teaches nothing.\n\n"
        f"| sites with each expert | not held | {header} | seeds, last round |\n"
        f"|---|---|{'---|' * (chosen.rounds + 2 - FIRST_ROUND)}\n" + "\n".join(rows) + "\n\n"
        f"Validation loss after round {chosen.rounds}, each expert at {finals}.",
        "larger models, more tokens, text that differs between the sites, locality.",
    )


if __name__ == "__main__":
    main()
