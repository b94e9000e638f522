"""Sites with two devices, in a deployment and in this process: the model is that of one device; one device is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from flwr.clientapp import ClientApp

from fomoe_flwr.checkpoint import find_checkpoint
from fomoe_flwr.compose import compose
from fomoe_flwr.deploy.processes import program_of
from strategies.local_grid import LocalGrid
from tests.e2e.deployment import Deployment, until
from tests.e2e.test_deployment import small
from tests.strategies.helpers import metrics
from tests.strategies.helpers import run as run_here

SITES = ("a", "b")


def assert_near(run: Path, reference: Path) -> None:
    """Losses and parameters, but for rounding, which AdamW's first steps enlarge."""
    lines, wanted = metrics(run), metrics(reference)
    assert len(lines) == len(wanted)
    for line, one in zip(lines, wanted, strict=True):
        assert line["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
        assert line["train_loss"] == (one["train_loss"] and pytest.approx(one["train_loss"], rel=1e-4))
    ours, theirs = (find_checkpoint(str(folder), "RUN")[1].parameters for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-2, atol=1e-3)


class OneAtATime(LocalGrid):
    """As `fomoe train runtime=local` has it."""

    def __init__(self, client_app: ClientApp, num_nodes: int, workers: int = 1) -> None:
        super().__init__(client_app, num_nodes, workers=1)


def ranks(deployment: Deployment) -> list[int]:
    """Processes of more devices."""
    pids = [process.pid for process in deployment.marked.look()]
    return [pid for pid in pids if program_of(pid) == "fomoe_flwr.engine.rank"]


def overrides_of(corpus_dir: Path, cache_dir: Path, rounds: int) -> list[str]:
    given = [
        *small(corpus_dir, cache_dir),
        "train.batch_size=4",
        "strategy.overlap=1",
        f"train.rounds={rounds}",
    ]
    return list({text.partition("=")[0]: text for text in given}.values())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "ep"])
def test_two_devices_in_this_process(
    parallel: str, tmp_path: Path, corpus_dir: Path, cache_dir: Path
) -> None:
    overrides = [*overrides_of(corpus_dir, cache_dir, 2), "federation.num_sites=2", "runtime=local"]
    reference = run_here(compose([*overrides, f"hydra.run.dir={tmp_path}/one"]))
    several = [*overrides, "train.devices=2", f"train.parallel={parallel}", f"hydra.run.dir={tmp_path}/two"]
    assert_near(run_here(compose(several), grid_type=OneAtATime), reference)


@pytest.mark.slow
def test_two_devices_in_a_deployment(tmp_path: Path, corpus_dir: Path, cache_dir: Path) -> None:
    overrides = [*overrides_of(corpus_dir, cache_dir, 4), "train.devices=2", "train.parallel=fsdp"]
    deployment = Deployment(tmp_path / "deployment", SITES)
    killed: list[int] = []

    def ended() -> bool:
        """Kill one as soon as the first round is over."""
        written = tmp_path / "run" / "metrics.jsonl"
        if not killed and written.exists() and len(written.read_text().splitlines()) > 1:
            killed.append(ranks(deployment)[0])
            os.kill(killed[0], signal.SIGKILL)
        time.sleep(0.05)
        return run.poll() is not None

    with deployment:
        run = deployment.submit(overrides, tmp_path / "run")
        until(ended, 300, deployment.logs)
        assert run.wait() == 0, deployment.logs()
        # Each site has its other device again.
        assert len(ranks(deployment)) == 2
    assert killed
    lines = metrics(tmp_path / "run")
    assert len(lines) == 5
    # Between two rounds nothing is lost, in the middle of one a site's reply.
    assert sum(len(line["sites"]) for line in lines[1:]) >= 7
    assert ranks(deployment) == []
