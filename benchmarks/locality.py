"""Does the bias towards residents come to its target, and at what price? `python -m benchmarks.locality`

Four sites with half of the experts each: without locality, with `model.locality=bias`, and with the federation's load
evened out instead of each site's own. Loss with all experts is what a user would deploy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import spread, train, write_result
from benchmarks.routing import SETTINGS, TARGET, VARIANTS, final

SETTLED = (
    2  # the round from which on targets are held against what was measured: in round 1 the routers are new
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    shares, entropies, losses = [], [], []
    for name, overrides in VARIANTS.items():
        if "skip" not in name:
            continue
        runs: list[list[dict[str, Any]]] = []
        everything, resident = [], []
        for seed in chosen.seeds:
            with tempfile.TemporaryDirectory(prefix="fomoe-locality-") as temporary:
                folder = Path(temporary) / "run"
                common = (f"train.rounds={chosen.rounds}", f"seed={seed}")
                runs.append(train(folder, *SETTINGS, *overrides, *common)[1:])
                evaluation = final(folder)
            everything.append(evaluation["all_experts"]["loss"])
            resident.append(statistics.mean(site["loss"] for site in evaluation["residents"].values()))
            print(f"{name}, seed {seed}: {runs[-1][-1]['val_loss']:.3f}", flush=True)

        share = [[line["resident_share"] for line in lines] for lines in runs]
        mean = [[line["routing"]["load_entropy"] for line in lines] for lines in runs]
        settled = [line for lines in runs for line in lines if line["round"] >= SETTLED]
        off = max(abs(line["resident_share"] - TARGET) for line in settled)
        layer = min(value for line in settled for value in line["routing"]["by_layer"]["load_entropy"])
        lowest = min(line["routing"]["load_entropy"] for line in settled)
        shares.append(f"| {name} | {_medians(share)} | {off:.3f} |")
        entropies.append(f"| {name} | {_medians(mean)} | {lowest:.3f} | {layer:.3f} |")
        losses.append(f"| {name} | {spread(everything)} | {spread(resident)} |")
    rounds = " | ".join(str(number) for number in range(1, chosen.rounds + 1))
    line = "---|" * chosen.rounds
    write_result(
        "locality",
        f"A bias towards residents, target {TARGET} (model=tiny, four sites, half of the experts each)",
        f"{len(chosen.seeds)} seed(s). Share of the choices that are resident, by round (median), and how far from the "
        f"target it was at worst in any round from {SETTLED} on in any run:\n\n"
        f"| half of the experts | {rounds} | off target |\n|---|{line}---|\n" + "\n".join(shares) + "\n\n"
        "Entropy of the load of all sites together as a share of its maximum, mean of the layers, by round (median); "
        f"the lowest from round {SETTLED} on in any run, and the lowest of a single layer:\n\n"
        f"| half of the experts | {rounds} | lowest | of a layer |\n|---|{line}---|---|\n"
        + "\n".join(entropies)
        + f"\n\nLoss after round {chosen.rounds}, nats a token, median and range:\n\n"
        "| half of the experts | all experts | residents only |\n|---|---|---|\n" + "\n".join(losses),
        "larger models, more tokens, text that differs between the sites, locality=loss.",
    )


def _medians(values: list[list[float]]) -> str:
    """By round, over the seeds."""
    return " | ".join(f"{statistics.median(of_round):.3f}" for of_round in zip(*values, strict=True))


if __name__ == "__main__":
    main()
