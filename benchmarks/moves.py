"""What cheap expert moves cost in quality: `python -m benchmarks.moves`.

Random placement, redrawn every round, so that half of all experts are new to their sites each time: with the
experts sent whole, and as residuals from the mean expert (strategy.moves=residual) at several ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.harness import train, write_result

SETTINGS = (
    "runtime=local", "federation.num_sites=4", "strategy.placement=random", "wandb.mode=disabled", "checkpoint.every=0",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 5], help="rounds between two placements")
    parser.add_argument("--ratios", type=float, nargs="+", default=[50.0, 10.0])
    chosen = parser.parse_args()
    sections = []
    for every in chosen.every:
        common = (f"train.rounds={chosen.rounds}", f"strategy.reshuffle_every={every}")
        curves = {}
        with tempfile.TemporaryDirectory(prefix="fomoe-moves-") as temporary:
            root = Path(temporary)
            curves["whole"] = train(root / "full", *SETTINGS, *common)
            for ratio in chosen.ratios:
                settings = ("strategy.moves=residual", f"strategy.move_ratio={ratio:g}")
                curves[f"residual, {ratio:g}x"] = train(
                    root / f"residual-{ratio:g}", *SETTINGS, *common, *settings
                )
        header = " | ".join(f"{number}" for number in range(chosen.rounds + 1))
        rows = [
            f"| {name} | " + " | ".join(f"{line['val_loss']:.3f}" for line in lines) + " |"
            for name, lines in curves.items()
        ]
        details = []
        for name, lines in curves.items():
            moved = [line["moves"] for line in lines if line["moves"]["experts"]]
            if moved:
                sent, full, shared = (
                    sum(m[key] for m in moved) for key in ("bytes_sent", "bytes_full", "bytes_shared")
                )
                errors = ", ".join(f"{m['error']:.3f}" for m in moved)
                details.append(
                    f"- {name}: {full / sent:.1f}x fewer bytes for the moved experts ({sent / 1e6:.3f} of "
                    f"{full / 1e6:.2f} MB), and {shared / 1e6:.2f} MB of mean experts beside; errors {errors}"
                )
        sections.append(
            f"A new placement every {every} round(s). Validation loss, all experts, after round\n\n"
            f"| moves | {header} |\n|---|{'---|' * (chosen.rounds + 1)}\n"
            + "\n".join(rows)
            + "\n\n"
            + "\n".join(details)
        )
        print(sections[-1], flush=True)
    write_result(
        "moves",
        "Random placement with whole and with compressed moves (model=tiny, 4 sites, overlap 2)",
        "\n\n".join(sections),
        "larger models, later phases of training, more than one seed.",
    )


if __name__ == "__main__":
    main()
