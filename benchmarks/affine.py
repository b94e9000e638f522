"""What it brings to give each site the experts its own tokens ask for: `python -m benchmarks.affine`.

Text that differs between the sites (data.partition=domain), load evened out over the federation so that a site may
use some experts more than others, half of the experts at each site: fixed placement against affine placement.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import spread, train, write_result

SETTINGS = (
    "runtime=local", "wandb.mode=disabled", "checkpoint.every=0", "train.eval_batches=64",
    "train.final_eval_batches=0", "federation.num_sites=4", "strategy.overlap=2", "data.partition=domain",
)  # fmt: skip
AFFINE = ("strategy.placement=affine", "plan.demand_every=2")
VARIANTS = {
    "fixed": (),
    "fixed, balance=global": ("model.balance=global",),
    "affine, balance=global": ("model.balance=global", *AFFINE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    rows = []
    for name, overrides in VARIANTS.items():
        shares, losses = [], []
        for seed in chosen.seeds:
            with tempfile.TemporaryDirectory(prefix="fomoe-affine-") as temporary:
                common = (f"train.rounds={chosen.rounds}", f"seed={seed}")
                lines = train(Path(temporary) / "run", *SETTINGS, *common, *overrides)
            shares.append([line["resident_share"] for line in lines[1:]])
            losses.append(lines[-1]["val_loss"])
            print(
                f"{name}, seed {seed}: {losses[-1]:.3f} {[round(share, 3) for share in shares[-1]]}",
                flush=True,
            )
        by_round = " | ".join(f"{statistics.median(values):.3f}" for values in zip(*shares, strict=True))
        rows.append(f"| {name} | {by_round} | {spread(losses)} |")
    rounds = " | ".join(str(number) for number in range(1, chosen.rounds + 1))
    write_result(
        "affine",
        "Experts where they are asked for (model=tiny, four sites with text of their own)",
        f"Share of the choices that are resident, by round, and the loss with all experts after the last; median and "
        f"range of {len(chosen.seeds)} seed(s). The plan looks at demand before rounds 3, 5, 7, ...\n\n"
        f"| placement | {rounds} | validation loss |\n|---|{'---|' * (chosen.rounds + 1)}\n"
        + "\n".join(rows),
        "larger models, longer runs, sites of other sizes.",
    )


if __name__ == "__main__":
    main()
