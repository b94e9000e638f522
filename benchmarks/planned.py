"""Planned shares against equal ones on sites that differ: `python -m benchmarks.planned`.

Runs go through Flower's simulation; their time is the virtual clock's, which charges each site its own device and
link. First a short run measures the speeds, which both plans then use. Equal shares are what fits into every
site's memory with strategy.overlap=2 and the same steps everywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import train, write_result
from fomoe_flwr.plan.record import load_plan

SETTINGS = ("federation=hetero", "wandb.mode=disabled", "checkpoint.every=0")
SEEDS = (42, 123, 456)


class Outcome(NamedTuple):
    """One run's figures; the first round is left out of the times, for it starts things up."""

    tokens: list[int]  # trained on, at the end of each round
    losses: list[float]  # validation, all experts
    tokens_per_second: float  # by the virtual clock
    round_s: float  # median
    planned_s: float
    waited_s: float  # all sites together, in a round
    payload_off: int  # measured minus planned bytes of a round
    above_memory: list[str]  # sites that needed more than they have


def outcome(folder: Path, lines: Sequence[dict[str, Any]]) -> Outcome:
    plan = load_plan(folder)
    assert plan is not None
    assert not any(line["failures"] for line in lines)
    settled = lines[2:]
    seconds = [line["virtual"]["round_s"] for line in settled]
    tokens = [sum(site["tokens"] for site in line["sites"]) for line in settled]
    waited = [sum(site["waited_s"] for site in line["virtual"]["sites"].values()) for line in settled]
    payload = {line["bytes_by_class"]["dense"] + line["bytes_by_class"]["expert"] for line in settled}
    planned = sum(site.bytes_down + site.bytes_up for site in plan.sites)
    config = json.loads((folder / "plan.json").read_text())["request"]
    room = {site["name"]: site["memory_gib"] * 2**30 for site in config["sites"]}
    above = {s["site"] for line in settled for s in line["sites"] if s["memory_bytes"] > room[s["site"]]}
    return Outcome(
        [line["tokens"] for line in lines],
        [line["val_loss"] for line in lines],
        sum(tokens) / sum(seconds),
        statistics.median(seconds),
        plan.round_s,
        statistics.median(waited),
        max((abs(measured - planned) for measured in payload), default=0),
        sorted(above),
    )


def loss_at(run: Outcome, tokens: float) -> float:
    return float(np.interp(tokens, run.tokens, run.losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runtime", default="flower")
    chosen = parser.parse_args()
    rows, ratios, differences = [], [], []
    with tempfile.TemporaryDirectory(prefix="fomoe-planned-") as temporary:
        root = Path(temporary)
        runtime = f"runtime={chosen.runtime}"
        probing = ("strategy.placement=planned", "plan.tflops=0.05", "train.rounds=4")
        train(measured := root / "measured", *SETTINGS, runtime, *probing)
        common = (*SETTINGS, runtime, f"plan.measured={measured}", f"train.rounds={chosen.rounds}")
        for seed in SEEDS:
            planned, equal = (
                outcome(folder, train(folder, *common, f"seed={seed}", f"strategy.placement={placement}"))
                for placement in ("planned", "fixed")
                for folder in [root / f"{placement}-{seed}"]
            )
            same = min(planned.tokens[-1], equal.tokens[-1])
            ratios.append(planned.tokens_per_second / equal.tokens_per_second)
            differences.append(loss_at(planned, same) - loss_at(equal, same))
            for name, run in (("planned", planned), ("equal", equal)):
                rows.append(
                    f"| {seed} | {name} | {run.tokens_per_second:,.0f} | {run.planned_s:.2f} | {run.round_s:.2f} "
                    f"({100 * (run.round_s / run.planned_s - 1):+.0f} %) | {run.waited_s:.2f} | {run.payload_off} | "
                    f"{', '.join(run.above_memory) or 'none'} | {loss_at(run, same):.3f} |"
                )
                print(rows[-1], flush=True)
    write_result(
        "planned",
        "Planned shares against equal ones, sites that differ (federation=hetero)",
        f"{chosen.rounds} rounds of model=tiny, {len(SEEDS)} seeds, times by the virtual clock. Payload: "
        "measured minus planned bytes of a round. Loss: validation, all experts, at equal tokens.\n\n"
        "| seed | shares | tokens/s | planned round, s | measured | waited, s, all sites | payload | above memory | "
        "loss |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nTokens per second, planned / equal: "
        f"{statistics.mean(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}). Loss, planned minus equal: "
        f"{statistics.mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f}).",
        "real links and devices; models that need an accelerator; demand that differs between sites.",
    )


if __name__ == "__main__":
    main()
