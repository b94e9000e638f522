"""What a run tells the world: `metrics.jsonl`, a line on the console, a progress bar, and wandb.

One object with one method a round; where a part is off, it does nothing, and the loop never asks. Only `metrics.jsonl`
must be written: each other part is an `OptionalOutput`, and its failure does not end a run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast

from tqdm import tqdm

from fomoe_flwr.config import RunConfig
from fomoe_flwr.files import naming, write_atomically
from fomoe_flwr.reading import as_type, read_lines
from fomoe_flwr.units import duration, in_bytes

log = logging.getLogger("fomoe")

T = TypeVar("T")

CURVES = 64  # a figure has a curve for each layer in wandb, but not for more layers than this


class _Line(TypedDict):
    round: int


class OptionalOutput:
    """An output that a run can do without. After its first failure it is off, and one warning has said so."""

    def __init__(self, name: str) -> None:
        self._name, self._on = name, True

    def __call__(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None if it fails, or something did before."""
        if not self._on:
            return None
        try:
            return work()
        # Whatever a library raises.
        except Exception as error:  # noqa: BLE001
            self._on = False
            reason = " ".join(str(error).split())[:200]
            log.warning(
                "%s failed, the run goes on without it: %s: %s", self._name, type(error).__name__, reason
            )
            return None


class Telemetry:
    """Writes the figures of each round as they come.

    Args:
        last: the line of the round after which a run is resumed. Later lines are cut from `metrics.jsonl`: they
            belong to a future that this run does not have.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, run: str, last: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.path = config, run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        self._last = last
        if last is None:
            write_atomically(self.path, lambda path: path.write_text(""))
        self._started, self._first_round = time.monotonic(), last["round"] if last else 0
        self._bar: tqdm[Any] | None = None
        self._try_bar = OptionalOutput("the progress bar")
        self._try_wandb = OptionalOutput("wandb (see wandb.mode)")
        self._wandb = self._try_wandb(lambda: _start_wandb(config, run_dir, run))

    def _keep_lines(self, last: Mapping[str, Any]) -> None:
        """Cut the lines of rounds that are played again, when the first of them is over."""
        kept = {line["round"]: line for line in read_lines(self.path, lambda line: as_type(_Line, line))}
        # A line of this round that is there may be of before the run was resumed.
        kept[last["round"]] = last
        text = "".join(json.dumps(kept[number]) + "\n" for number in sorted(kept) if number <= last["round"])
        write_atomically(self.path, lambda path: path.write_text(text))

    def begin_round(self, number: int, sites: int) -> None:
        """A bar that fills as sites answer; it shows itself only if the round is long and somebody looks."""
        if sites and sys.stderr.isatty():
            self._bar = self._try_bar(
                lambda: tqdm(total=sites, desc=f"round {number}", unit="site", leave=False, delay=2.0)
            )

    def site_answered(self) -> None:
        """One more reply of the round is in."""
        if (bar := self._bar) is not None:
            self._try_bar(lambda: bar.update())

    def end_round(self, line: Mapping[str, Any]) -> None:
        """Record a round's line of metrics."""
        self._close_bar()
        if self._last is not None:
            self._keep_lines(self._last)
            self._last = None
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        log.info(self._summary(line))
        if (wandb := self._wandb) is not None:
            self._try_wandb(lambda: wandb.log(figures(line), step=line["round"]))

    def _summary(self, line: Mapping[str, Any]) -> str:
        number, rounds = line["round"], self.config.train.rounds
        parts = [f"round {number}/{rounds}"]
        if line["train_loss"] is not None:
            parts.append(f"train {line['train_loss']:.3f}")
        if line["val_loss"] is not None:
            parts.append(f"val {line['val_loss']:.3f}")
        if line["val_bpb"] is not None:
            parts.append(f"bpb {line['val_bpb']:.3f}")
        if number:
            parts += [
                f"{sum(site['tokens'] for site in line['sites']) / line['seconds']['round']:,.0f} tokens/s",
                f"down {in_bytes(line['bytes_down'])} up {in_bytes(line['bytes_up'])}",
                *([] if line["resident_share"] is None else [f"resident {line['resident_share']:.0%}"]),
                f"{line['seconds']['round']:.1f} s",
            ]
            done = number - self._first_round
            left = (time.monotonic() - self._started) / done * (rounds - number)
            parts.append(f"left {duration(left)}")
            if line["failures"]:
                parts.append(f"FAILED {', '.join(line['failures'])}")
            if not line["committed"]:
                parts.append("DISCARDED")
        return "  ".join(parts)

    def end_run(self, evaluation: Mapping[str, Any]) -> None:
        """Show the figures of the finished model among wandb's of the run."""
        if (wandb := self._wandb) is not None:
            self._try_wandb(lambda: wandb.summary.update(figures(evaluation, "final/")))

    def close(self, failed: bool = False) -> None:
        """Finish wandb's run, as failed if the run did."""
        self._close_bar()
        if self._last is not None and not failed:
            self._keep_lines(self._last)
        if (wandb := self._wandb) is not None:
            self._try_wandb(lambda: wandb.finish(exit_code=1 if failed else 0))

    def _close_bar(self) -> None:
        if (bar := self._bar) is not None:
            self._bar = None
            self._try_bar(bar.close)


def figures(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures under slash-joined names, as wandb groups them; a list's by their place (layer) in it."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= figures(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    flat |= figures(item, f"{prefix}{key}/{item.get('site', '')}/")
                elif isinstance(item, int | float) and len(value) <= CURVES:
                    flat[f"{prefix}{key}/{index}"] = item
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat


def _start_wandb(config: RunConfig, run_dir: Path, run: str) -> Any:
    settings = config.wandb
    if settings.mode == "disabled":
        return None
    import wandb  # slow to import, and not needed when off

    return wandb.init(
        id=run,
        resume="allow",
        mode=cast(Literal["offline", "online"], settings.mode),
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        name=run_dir.name,
        dir=run_dir,
        config=dataclasses.asdict(config),
        settings=wandb.Settings(silent=True, console="off", disable_git=True),
    )
