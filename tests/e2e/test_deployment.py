"""Real federations of processes: docs/deployment.md word for word, and Flower's own commands."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fomoe_flwr.deploy.processes import program_of
from fomoe_flwr.deploy.site import KEY_REFUSED
from fomoe_flwr.deploy.submit import STARTED
from fomoe_flwr.deploy.supernode import (
    ACCEPTED,
    CLIENT_APP,
    EXECUTOR,
    RECEIVED,
    REFUSED,
    SENDING,
    SUPERNODE,
    Watch,
)
from tests.conftest import SMALL_MODEL, SMALL_TRAIN
from tests.e2e.deployment import BIN, REPOSITORY, Deployment, Marker, blocks, free_port, until
from tests.strategies.helpers import metrics

ROUNDS = 2


def small(corpus: Path, cache: Path) -> list[str]:
    """Without the number of rounds, which the document sets."""
    train = [item for item in SMALL_TRAIN if not item.startswith("train.rounds=")]
    return [
        *SMALL_MODEL, *train, "model.num_experts=6", "data=text", f"data.path={corpus}", f"data.cache_dir={cache}",
        "strategy.overlap=2", "strategy.up=fp32", "strategy.down=fp32", "wandb.mode=disabled",
    ]  # fmt: skip


def local_run(overrides: list[str], folder: Path) -> Path:
    """The same run in one process."""
    command = [BIN / "fomoe", "train", *overrides, "runtime=local", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_losses(run_dir: Path, reference: Path) -> None:
    """Round by round; the order in which the messages came must not matter."""
    ours, theirs = metrics(run_dir), metrics(reference)
    assert [line["round"] for line in ours] == [line["round"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        if a["round"]:
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def text_of_site(name: str) -> str:
    return next(text for _, text in blocks() if text.startswith("fomoe site") and f"--name {name}" in text)


def test_the_document_word_for_word(tmp_path: Path, corpus_dir: Path, cache_dir: Path) -> None:
    """Its blocks one after the other, each in a shell with its settings, unchanged.

    One test, because it takes long: the losses are those of a run in one process, a site whose key is not registered is
    turned away, Ctrl-C ends all, and Flower still prints what `fomoe site` and `fomoe submit` read.
    """
    overrides = small(corpus_dir, cache_dir)
    folder = tmp_path / "fomoe"
    marker = Marker(
        tmp_path / "logs",
        {
            "SERVER": f"127.0.0.1:{free_port()}",
            "FOLDER": str(folder),
            "FLWR_HOME": str(folder / "flower"),
            "ROUNDS": str(ROUNDS),
            "OVERRIDES": shlex.join(overrides),
        },
    )
    settings = blocks()[0][1]

    def shell(name: str, text: str) -> subprocess.Popen[bytes]:
        # As in a terminal: the programs of a block belong to it, and Ctrl-C reaches them.
        return marker.start(name, ["bash", "-e", "-o", "pipefail", "-c", f"{settings}\n{text}"], REPOSITORY)

    background: dict[str, subprocess.Popen[bytes]] = {}
    programs: set[str] = set()
    submitted = ""
    try:
        for number, (heading, text) in enumerate(blocks()):
            name = f"{number:02d}_{heading.replace(' ', '_')}"
            if "\nfomoe server" in text or text.startswith("fomoe site"):
                background[name] = shell(name, text)
                continue
            if heading == "A run":
                # In the middle of it, a site whose key the SuperLink does not know.
                command = (
                    text_of_site("c").replace("--name c", "--name d").replace('"$FOLDER/c"', '"$FOLDER/d"')
                )
                stranger = shell("stranger", f'ssh-keygen -q -t ecdsa -b 384 -N "" -f "$FOLDER/d"\n{command}')
                submitted = name
            done = shell(name, text)
            deadline = time.monotonic() + 180
            while done.poll() is None and time.monotonic() < deadline:
                if heading == "A run":
                    programs |= {program_of(process.pid) for process in marker.marked.look()}
                time.sleep(0.1)
            assert done.poll() == 0, marker.logs()
        stranger_code = stranger.wait(60)
        for process in reversed(background.values()):
            os.killpg(process.pid, signal.SIGINT)
        exit_codes = {name: process.wait(30) for name, process in background.items()}
        until(lambda: not marker.left() or None, 15, lambda: f"left: {marker.left()}")
    finally:
        marker.end_all()

    more = [f"train.rounds={ROUNDS + 1}", f"federation={folder}/labs.yaml"]
    assert_same_losses(folder / "run", local_run([*overrides, *more], tmp_path / "local"))
    assert all(len(line["sites"]) == 3 for line in metrics(folder / "run")[1:])
    assert [code for name, code in exit_codes.items() if "sites" in name] == [130, 130, 130]

    assert stranger_code == 1
    last = marker.log("stranger").splitlines()[-1]
    assert last.startswith("error: ")
    assert f"flwr supernode register {folder}/d.pub" in last

    logs = {name: marker.log(name) for name in background if "sites" in name}
    assert_heard(logs, marker.log("stranger"), marker.log(submitted), programs)


def watch_of(log: str) -> Watch:
    """What the watch of a SuperNode knows after it has heard all of this."""
    watch = Watch()
    for line in log.splitlines():
        watch.hear(line, 0.0)
    return watch


def assert_heard(sites: dict[str, str], refused_site: str, submitted: str, programs: set[str]) -> None:
    """That Flower prints and starts what `fomoe_flwr/deploy` looks for; each failure names what is missing."""
    assert {SUPERNODE, EXECUTOR, CLIENT_APP} <= programs, "names of Flower's programs"
    assert STARTED.search(submitted), f"{STARTED.pattern}: {submitted}"
    assert REFUSED.search(refused_site), f"{REFUSED.pattern}: {refused_site}"
    watch = watch_of(refused_site)
    assert (watch.node, watch.refused) == (None, KEY_REFUSED)
    for name, log in sites.items():
        for pattern in (ACCEPTED, RECEIVED, SENDING):
            assert pattern.search(log), f"{pattern.pattern} in the output of {name}: {log}"
        watch = watch_of(log)
        assert watch.node is not None
        assert watch.refused is None
        # Every message was answered, in lines of the order that the watch expects.
        assert watch._waiting_since is None, log


@pytest.mark.slow
def test_flowers_own_commands_do_it_too(tmp_path: Path, corpus_dir: Path, cache_dir: Path) -> None:
    overrides = [
        *small(corpus_dir, cache_dir),
        "train.rounds=1",
        f"federation={tmp_path}/plain/federation.yaml",
    ]
    with Deployment(tmp_path / "plain", supervised=False) as deployment:
        text = shlex.join([*overrides, f"hydra.run.dir={tmp_path}/run"])
        config = f'hydra-overrides="{text}"'
        run = deployment.start("run", ["flwr", "run", REPOSITORY, "test", "--stream", "--run-config", config])
        assert run.wait(120) == 0, deployment.logs()
        listed = subprocess.run(
            ["flwr", "ls", "test", "--limit", "1", "--format", "json"],
            env=deployment.environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(listed.stdout)["runs"][0]["status"] == "finished:completed", deployment.logs()
    assert_same_losses(tmp_path / "run", local_run(overrides, tmp_path / "local"))


WEDGING_APP = {
    "pyproject.toml": """
[project]
name = "wedging"
version = "1.0.0"
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "wedging:server"
clientapp = "wedging:client"
""",
    "wedging.py": """
import signal, time
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()

@server.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    grid.push_messages([Message(RecordDict(), nodes[0], "train", ttl=30.0)])
    time.sleep(30)

@client.train()
def train(message, context):
    signal.raise_signal(signal.SIGTERM)
""",
}


@pytest.mark.slow
def test_a_supernode_that_will_never_answer_is_started_again(tmp_path: Path) -> None:
    """Flower's own behaviour: a ClientApp that is asked to end leaves its SuperNode waiting for ever."""
    app = tmp_path / "app"
    app.mkdir()
    for name, text in WEDGING_APP.items():
        (app / name).write_text(text)
    with Deployment(tmp_path / "deployment", sites=["a"]) as deployment:
        deployment.run_to_end("run", "flwr", "run", str(app), "test")
        deployment.wait_for_line("a", "Received successfully")
        deployment.wait_for_line("a", "for 75 s no process has worked on it", seconds=120)
        until(lambda: deployment.log("a").count("SuperNode ID: ") == 2, 30, deployment.logs)
