"""How long a federation needs to be whole again after a blow. `python -m benchmarks.recovery --kills 50 --seed 0`

Real processes on one machine: a SuperLink and three sites under `fomoe site`, as in docs/deployment.md without TLS.
Each process is hit with each signal once, and then `--kills` more from a seed; see `tests/faults/chaos.py`, which also
compares the model at the end with that of a run in one process in which just the lost replies are missing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import write_result
from tests.conftest import WORDS
from tests.faults.chaos import (
    SITES,
    STALL_S,
    STOPPED_S,
    Chaos,
    assert_is_the_run_without_the_lost_replies,
    every_blow,
    lost_replies,
    random_blows,
)
from tests.strategies.helpers import metrics


def write_corpus(folder: Path) -> None:
    rng = random.Random(0)
    folder.mkdir()
    for index in range(48):
        (folder / f"{index}.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(200)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=int, default=0, help="strategy.delay")
    parser.add_argument("--random-only", action="store_true", help="without one of each before them")
    chosen = parser.parse_args()
    first = [] if chosen.random_only else every_blow()
    blows = first + random_blows(chosen.seed, chosen.kills)
    with tempfile.TemporaryDirectory(prefix="fomoe-recovery-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus")
        data = ["data=text", f"data.path={folder}/corpus", f"data.cache_dir={folder}/cache"]
        chaos = Chaos(folder, [*data, f"strategy.delay={chosen.delay}"])
        seconds = chaos.play(blows)
        assert_is_the_run_without_the_lost_replies(chaos, folder / "reference")
        lines, lost = metrics(chaos.run_dir)[1:], lost_replies(chaos.run_dir)
        discarded = sum(not line["committed"] for line in lines)
    by_kind: dict[str, list[float]] = {}
    for blow, taken in zip(blows, seconds, strict=True):
        by_kind.setdefault(f"{blow.process} | {blow.signal.name}", []).append(taken)
    rows = [
        f"| {kind} | {len(taken)} | {statistics.median(taken):.0f} | {min(taken):.0f} to {max(taken):.0f} |"
        for kind, taken in sorted(by_kind.items())
    ]
    write_result(
        "recovery_delay" if chosen.delay else "recovery",
        f"{len(blows)} blows to a federation of three sites, and how long until all sites are in a round again",
        "From the signal to the end of the first whole round after the one that was hit, in seconds; an undisturbed "
        "round takes 5 to 8 s. A site is watched by `fomoe site` "
        f"(--stall-s {STALL_S}, --stopped-s {STOPPED_S}; the defaults are longer), a round's deadline is 15 to 20 s, "
        "the run is submitted again with resume= as soon as `fomoe submit` has said that it failed. "
        f"strategy.delay={chosen.delay}.\n\n"
        "| process | signal | times | median | range |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"The run ended with exit code 0 after {len(lines)} rounds, {discarded} of them discarded; {len(lost)} of "
        f"{len(lines) * len(SITES)} replies were lost. Model and outer optimizer equal, bit for bit, those of a run in "
        "one process in which exactly these replies are missing. No process was left behind.",
        "TLS and registered keys (with which a killed SuperNode is refused for up to a minute), several machines.",
    )


if __name__ == "__main__":
    main()
