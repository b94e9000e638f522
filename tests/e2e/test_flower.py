"""The same run through real Flower: its simulation engine, from `fomoe train` and from `flwr run`."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_flwr.cli import main
from tests.conftest import SMALL_MODEL, SMALL_TRAIN
from tests.strategies.helpers import metrics, without_times

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run_overrides(corpus_dir: Path, cache_dir: Path) -> list[str]:
    """No `runtime=`: it is what the tests of this file vary."""
    return [
        *SMALL_MODEL, *SMALL_TRAIN, "data=text", f"data.path={corpus_dir}", f"data.cache_dir={cache_dir}",
        "strategy.overlap=2", "strategy.up=fp32", "strategy.down=fp32", "wandb.mode=disabled",
    ]  # fmt: skip


@pytest.fixture
def overrides(corpus_dir: Path, cache_dir: Path) -> list[str]:
    return run_overrides(corpus_dir, cache_dir)


def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


def train(overrides: list[str], run_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [BIN / "fomoe", "train", *overrides, "runtime=flower", f"hydra.run.dir={run_dir}"]
    return subprocess.run(
        command,
        env=environment(run_dir.parent / "home"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_same_losses(run_dir: Path, reference: Path) -> None:
    """Everything but the clock and the length of the run directory's path, losses to 1e-5."""
    ours, theirs = without_times(metrics(run_dir)), without_times(metrics(reference))
    assert [line["round"] for line in ours] == [line["round"] for line in theirs] == [0, 1, 2]
    for a, b in zip(ours, theirs, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        assert a["bytes_by_class"]["dense"] == b["bytes_by_class"]["dense"]
        assert a["bytes_by_class"]["expert"] == b["bytes_by_class"]["expert"]
        if a["round"]:
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
            assert a["resident_share"] == pytest.approx(b["resident_share"], rel=1e-5)
            assert [site["site"] for site in a["sites"]] == [site["site"] for site in b["sites"]]


@pytest.fixture(scope="module")
def reference(corpus_dir: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("reference") / "local"
    main(["train", *run_overrides(corpus_dir, cache_dir), "runtime=local", f"hydra.run.dir={run_dir}"])
    return run_dir


def test_the_simulation_engine_equals_the_local_runtime(
    overrides: list[str], reference: Path, tmp_path: Path
) -> None:
    done = train(overrides, tmp_path / "flower")
    assert done.returncode == 0, done.stderr
    assert_same_losses(tmp_path / "flower", reference)


@pytest.mark.slow
def test_a_run_that_fails_in_the_simulation_engine_has_an_exit_code(
    overrides: list[str], tmp_path: Path
) -> None:
    failed = train([*overrides, "train.lr=1e30"], tmp_path / "flower")
    assert failed.returncode == 1
    assert "error: round 2: nothing was committed in the last 2 rounds" in failed.stderr
    assert "training loss is" in failed.stderr


def test_ctrl_c_ends_a_run_that_can_be_resumed(overrides: list[str], reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "stops"
    command = [
        BIN / "fomoe",
        "train",
        *overrides,
        "train.rounds=1000",
        "runtime=flower",
        f"hydra.run.dir={run_dir}",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(tmp_path / "home"), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not (run_dir / "checkpoints/round_00002").exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
            process.wait()
    assert "interrupted; resume=RUN_DIR" in (tmp_path / "log").read_text()
    # What was there before the interruption is whole; the rest of the run can be had from it.
    checkpoint = run_dir / "checkpoints/round_00002"
    if not checkpoint.exists():  # the run went on and dropped it between two looks
        checkpoint = min((run_dir / "checkpoints").iterdir())
    main(["train", f"resume={checkpoint}", f"train.rounds={int(checkpoint.name[-5:]) + 1}", "runtime=local"])
    assert metrics(run_dir)[1]["val_loss"] == pytest.approx(metrics(reference)[1]["val_loss"], rel=1e-5)


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A SuperLink for simulations on a free loopback port, in a folder of its own: its name and environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, folder = tmp_path / "home", tmp_path / "empty"
    home.mkdir()
    folder.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = [
        BIN / "flower-superlink",
        "--insecure",
        "--simulation",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    log = (tmp_path / "superlink.log").open("w")
    process = subprocess.Popen(
        command, cwd=folder, env=environment(home), stdout=log, stderr=log, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (tmp_path / "superlink.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield "here", environment(home)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def test_flwr_run_composes_the_same_run(
    superlink: tuple[str, dict[str, str]], overrides: list[str], reference: Path, tmp_path: Path
) -> None:
    name, env = superlink
    hydra_overrides = shlex.join([*overrides, f"hydra.run.dir={tmp_path / 'flwr'}"])
    done = subprocess.run(
        [
            BIN / "flwr", "run", str(REPOSITORY), name, "--stream",
            "--federation-config", "num-supernodes=4 client-resources-num-cpus=1 init-args-log-to-driver=false",
            "--run-config", f'hydra-overrides="{hydra_overrides}"',
        ],
        env=env, cwd=tmp_path / "empty", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (tmp_path / "flwr/metrics.jsonl").exists(), done.stdout + done.stderr
    assert_same_losses(tmp_path / "flwr", reference)
    assert (tmp_path / "flwr/report.png").exists()
