"""Kill processes of a real federation, one after another, and see it come back.

What is killed is drawn from a seed or listed; when, too, as a delay after a round has begun. After each blow the
federation must get back by itself (a dead ServerApp or SuperLink: by starting them again and resuming) to a round in
which every site has its part. In the end the model must be, bit for bit, that of a run in one process in which exactly
the replies that were lost are missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fomoe_flwr.checkpoint import checkpoint_path, list_checkpoints, read_checkpoint
from fomoe_flwr.compose import compose
from fomoe_flwr.server.rounds import Server
from tests.conftest import SMALL_MODEL
from tests.e2e.deployment import Deployment, until
from tests.faults.injector import Faults, grid_with
from tests.strategies.helpers import metrics, run

SITES = ("a", "b", "c")
PROGRAMS = {
    "ClientApp": "flwr-clientapp",
    "worker": "clients.worker",
    "SuperNode": "flower-supernode",
    "ServerApp": "flwr-serverapp",
    "SuperLink": "flower-superlink",
}
STALL_S, STOPPED_S = 8, 5
# Rounds of about a second of work; a lost reply costs the deadline, 15 to 20 s.
OVERRIDES = (
    *SMALL_MODEL, "train.batch_size=2", "train.seq_len=32", "train.warmup_steps=4", "train.device=cpu",
    "train.local_steps=40", "train.eval_batches=0", "wandb.mode=disabled", "checkpoint.keep=3",
    "strategy.overlap=2", "model.num_experts=9", "strategy.quorum=0.3", "strategy.max_discarded=100",
    "strategy.timeout_s=20", "strategy.timeout_floor_s=15",
)  # fmt: skip


@dataclass(frozen=True)
class Blow:
    """One signal to one process, `delay_s` after a round has begun."""

    process: str
    signal: signal.Signals
    site: str | None
    delay_s: float

    def __str__(self) -> str:
        return f"{self.signal.name} of {self.process}{f' of {self.site}' if self.site else ''}"


def every_blow() -> list[Blow]:
    """Each process with each signal, once."""
    blows = [
        Blow(process, which, SITES[index % 3], 2.5)
        for index, process in enumerate(("ClientApp", "worker", "SuperNode"))
        for which in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
    ]
    return blows + [Blow(process, signal.SIGKILL, None, 2.5) for process in ("ServerApp", "SuperLink")]


def random_blows(seed: int, number: int) -> list[Blow]:
    """Drawn from all processes and signals; a site three times as often as the server."""
    rng = random.Random(seed)
    blows = []
    for _ in range(number):
        process = rng.choice(("ClientApp", "worker", "SuperNode") * 3 + ("ServerApp", "SuperLink"))
        server = process in ("ServerApp", "SuperLink")
        which = signal.SIGKILL if server else rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))
        blows.append(Blow(process, which, None if server else rng.choice(SITES), rng.uniform(0.0, 5.0)))
    return blows


class Chaos:
    """A run of three sites that is hit, and watched."""

    def __init__(self, folder: Path, data: Sequence[str]) -> None:
        self.run_dir, self.overrides = folder / "run", [*OVERRIDES, *data]
        options = ["--stall-s", str(STALL_S), "--stopped-s", str(STOPPED_S)]
        self.deployment = Deployment(folder / "deployment", SITES, site_options=options)
        self.submitted: subprocess.Popen[bytes] | None = None
        self.resumed = 0

    def play(self, blows: Sequence[Blow]) -> list[float]:
        """Seconds from each blow to the end of the first round in which all sites have their part again."""
        with self.deployment:
            self.submit(*self.overrides, "train.rounds=100000")
            self.wait_for_full_round(0)
            seconds = []
            for blow in blows:
                seconds.append(self.strike(blow))
                print(f"{blow}: {seconds[-1]:.1f} s", flush=True)
            # Let it end by itself: one round more than it has.
            self.kill("ServerApp", signal.SIGKILL, None)
            self.submit(f"resume={self.run_dir}", f"train.rounds={self.rounds_done() + 2}")
            assert self.submitted is not None
            assert self.submitted.wait(180) == 0, self.deployment.logs()
        return seconds

    def strike(self, blow: Blow) -> float:
        self.wait_for_full_round(self.rounds_done())
        time.sleep(blow.delay_s)
        struck = time.monotonic()
        before = self.rounds_done()
        self.kill(blow.process, blow.signal, blow.site)
        if blow.site is None:
            assert self.submitted is not None
            self.submitted.wait(120)
            if blow.process == "SuperLink":
                self.deployment.start_superlink()
            self.submit(f"resume={self.run_dir}", "train.rounds=100000")
        self.wait_for_full_round(before + 1)  # the round it was hit in may have had its reply already
        return time.monotonic() - struck

    def kill(self, process: str, which: signal.Signals, site: str | None) -> None:
        found = self.deployment.wait_for(PROGRAMS[process], site)
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, which)

    def submit(self, *overrides: str) -> None:
        self.resumed += 1
        self.submitted = self.deployment.submit(overrides, self.run_dir, f"run-{self.resumed}")

    def lines(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def rounds_done(self) -> int:
        return max((line["round"] for line in self.lines()), default=0)

    def wait_for_full_round(self, after: int) -> None:
        """Until a round later than that has all sites in it."""

        def full() -> bool:
            assert self.submitted is not None
            assert self.submitted.poll() is None, self.deployment.logs()
            return any(line["round"] > after and len(line["sites"]) == len(SITES) for line in self.lines())

        until(full, 240, lambda: f"no full round after {after}: {self.deployment.logs()}")


def lost_replies(run_dir: Path) -> list[tuple[str, int]]:
    """(site, round) of all that did not become part of the model."""
    return [
        (site, line["round"])
        for line in metrics(run_dir)[1:]
        for site in SITES
        if not line["committed"] or site not in {entry["site"] for entry in line["sites"]}
    ]


def not_asked(run_dir: Path) -> set[tuple[str, int]]:
    """(site, round) of all that were away when the round began: with strategy.delay=1 it matters who is asked."""
    return {
        (site, line["round"])
        for line in metrics(run_dir)[1:]
        for site in SITES
        if site not in line["failures"] and site not in {entry["site"] for entry in line["sites"]}
    }


@contextlib.contextmanager
def away(absent: set[tuple[str, int]]) -> Iterator[None]:
    """Rounds begin without these sites."""
    begin = Server.begin

    def without(self: Server, number: int, alive: Sequence[int], deadline_s: float) -> list[int]:
        here = [site for site in alive if (self.site_names[site], number) not in absent]
        return begin(self, number, here, deadline_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "begin", without)
        yield


def assert_is_the_run_without_the_lost_replies(chaos: Chaos, folder: Path) -> None:
    """The same replies missing, in one process: the same bits."""
    rounds = metrics(chaos.run_dir)[-1]["round"]
    lost = Faults.lost(lost_replies(chaos.run_dir))
    overrides = [
        *chaos.overrides, "runtime=local", f"train.rounds={rounds}", f"hydra.run.dir={folder}",
        "federation=file", f"federation.path={chaos.deployment.federation}",
    ]  # fmt: skip
    with away(not_asked(chaos.run_dir)):
        run(compose(overrides), grid_type=grid_with(lost))
    assert list_checkpoints(chaos.run_dir)[-1].name == checkpoint_path(folder, rounds).name
    ours, theirs = (read_checkpoint(checkpoint_path(where, rounds)) for where in (chaos.run_dir, folder))
    for kind in ("parameters", "outer"):
        mine, yours = getattr(ours, kind), getattr(theirs, kind)
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            assert torch.equal(value, yours[name]), (
                f"{kind} {name} after losing {lost_replies(chaos.run_dir)}"
            )
