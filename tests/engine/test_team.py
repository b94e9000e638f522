"""The processes of a site's devices: they come together, end together, and one that fails is told about."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fomoe_flwr.engine import EngineState
from fomoe_flwr.engine.team import CODE, Team, end_team, team_of
from fomoe_flwr.errors import WorkerError
from tests.engine.test_several import assert_equal_rounds, member, shard_of, shared_task, tokens


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    end_team()
    assert ranks() == []


def ranks(parent: int | None = None) -> list[int]:
    """The processes of more devices below this one."""
    children = psutil.Process(parent).children(recursive=True)
    return [child.pid for child in children if "fomoe_flwr.engine.rank" in child.cmdline()]


def until(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_process_for_each_further_device() -> None:
    first = team_of(3, "cpu")
    assert sorted(ranks()) == sorted(process.pid for process in first.others)
    assert len(ranks()) == 2
    assert team_of(3, "cpu") is first
    other = team_of(2, "cpu")
    assert other is not first
    assert len(ranks()) == 1
    end_team()
    end_team()
    assert ranks() == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "ep"])
def test_one_that_is_killed_in_a_round_costs_that_round(parallel: str) -> None:
    task = shared_task()
    engine = member(task, 2, parallel)
    engine.load(task, shard_of(task), EngineState())
    text = tokens()

    def batches() -> Iterator[object]:
        yield text[0]
        os.kill(engine.team.others[0].pid, signal.SIGKILL)
        yield from text[1:]

    with pytest.raises(WorkerError, match=r"^the process of device 2 of 2 ended \(code -9\)$"):
        engine.train(batches())  # type: ignore[arg-type]
    assert ranks() == []
    assert_equal_rounds(task, member(task, 2, parallel), tokens(steps=1), 1e-5)


def test_one_that_died_between_rounds_is_replaced() -> None:
    first = team_of(2, "cpu")
    os.kill(first.others[0].pid, signal.SIGKILL)
    first.others[0].wait()
    task = shared_task()
    assert_equal_rounds(task, member(task, 2, "fsdp"), tokens(steps=1), 1e-5)


def test_one_that_fails_says_why() -> None:
    task = shared_task()
    engine = member(task, 2, "ddp")
    line = r"^device 2 of 2: AttributeError: .* has no attribute 'fly'$"
    with pytest.raises(WorkerError, match=line), engine.all_do("fly"):
        engine._largest(1)
    assert ranks() == []


def test_two_sites_of_a_process_have_the_devices_one_after_the_other() -> None:
    task = shared_task()
    first = member(task, 2, "fsdp")
    second = member(task, 2, "fsdp")
    with pytest.raises(WorkerError, match="another site of this process uses its devices"):
        first.load(task, shard_of(task), EngineState())
    second.load(task, shard_of(task), EngineState())
    with second.team.busy, pytest.raises(WorkerError, match="another site of this process uses its devices"):
        member(task, 2, "fsdp")
    assert second.train(tokens(steps=1)).tokens > 0


def test_work_that_is_broken_off_ends_the_others() -> None:
    task = shared_task()
    engine = member(task, 2, "fsdp")
    engine.load(task, shard_of(task), EngineState())

    class Abandoned(Exception):
        pass

    def batches() -> Iterator[object]:
        yield tokens()[0]
        raise Abandoned

    with pytest.raises(Abandoned):
        engine.train(batches())  # type: ignore[arg-type]
    assert ranks() == []


@pytest.mark.parametrize("way", ["ends", "is killed", "is killed at work"])
def test_the_others_end_with_the_first(way: str, tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, time
        from fomoe_flwr.engine import EngineState
        from tests.engine.test_several import member, shard_of, shared_task, tokens
        task = shared_task()
        engine = member(task, 2, "fsdp")
        engine.load(task, shard_of(task), EngineState())
        print(engine.team.others[0].pid, flush=True)
        def batches():
            while True:
                yield tokens()[0]
        if sys.argv[1] == "is killed at work":
            engine.train(batches())
        if sys.argv[1] == "is killed":
            time.sleep(60)
        """
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, way],
        stdout=subprocess.PIPE,
        text=True,
        cwd=CODE,
        env={**os.environ, "PYTHONPATH": str(CODE)},
    )
    assert first.stdout is not None
    other = int(first.stdout.readline())
    if way != "ends":
        first.kill()
    first.wait()
    first.stdout.close()
    until(lambda: not psutil.pid_exists(other))


def test_processes_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: object, **kwargs: object) -> Team:
        raise RuntimeError("no such interface")

    monkeypatch.setattr("fomoe_flwr.engine.team.join", nothing)
    line = "the 2 devices of this site do not find each other: no such interface"
    with pytest.raises(WorkerError, match=f"^{line}$"):
        team_of(2, "cpu")
