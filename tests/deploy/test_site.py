"""`fomoe site`: its decisions as functions of what it sees, and the whole of it over a fake `flower-supernode`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from flwr.common.config import parse_config_args

import fomoe_flwr.deploy.site as supervisor
from fomoe_flwr.deploy.flower import toml_string
from fomoe_flwr.deploy.processes import Marked, Process, end_marked, is_alive, kill, program_of, start_time
from fomoe_flwr.deploy.site import (
    MARK,
    REFUSED_S,
    check_device,
    may_be_accepted_later,
    pause_s,
    refusal,
    site,
    supervise,
)
from fomoe_flwr.deploy.supernode import (
    WEDGED_S,
    Options,
    Watch,
    node_config,
    parse,
    supernode_command,
)
from fomoe_flwr.errors import ConfigError, RunError

SUPERNODE = Process(10, 100)
EXECUTOR = Process(11, 101)
CLIENT = Process(12, 102)
WORKER = Process(13, 103)
ALL = {
    SUPERNODE: "flower-supernode",
    EXECUTOR: "flower-superexec",
    CLIENT: "flwr-clientapp",
    WORKER: "clients.worker",
}
IDLE = {SUPERNODE: "flower-supernode", EXECUTOR: "flower-superexec", WORKER: "clients.worker"}

# As Flower 1.41 prints them; `tests/e2e/test_deployment.py` looks whether it still does.
ACCEPTED = "\x1b[92mINFO \x1b[0m:      SuperNode ID: 5237784425622666617\n"
RECEIVING = "\x1b[92mINFO \x1b[0m:      Receiving: train message (ID: 9bed)\n"
RECEIVED = "\x1b[92mINFO \x1b[0m:      Received successfully\n"
SENDING = "\x1b[92mINFO \x1b[0m:      Sending: train message (ID: d886)\n"
REFUSED = "[code: 2004] Failed to activate SuperNode.\n"


def options(*more: str, tmp: Path = Path("/tmp")) -> Options:
    return parse(
        ["--superlink", "127.0.0.1:8000", "--name", "a", "--insecure", "--state-dir", str(tmp), *more]
    )


# The command line


def test_node_config_is_what_flower_reads(tmp_path: Path) -> None:
    given = options(
        "--device", "cuda:1", "--cache-dir", f'{tmp_path}/it\'s a "cache"\\', "--data-path", "tests",
        "--store-dir", "docs", "--stall-s", "600", tmp=tmp_path,
    )  # fmt: skip
    assert parse_config_args([node_config(given)]) == {
        "site": "a",
        "device": "cuda:1",
        "state-dir": str(tmp_path),
        "cache-dir": f'{tmp_path}/it\'s a "cache"\\',
        "data-path": str(Path.cwd() / "tests"),
        "store-dir": str(Path.cwd() / "docs"),
        "stall-s": 600.0,
    }
    assert set(parse_config_args([node_config(options())])) == {"site", "state-dir"}


def test_a_toml_string_holds_any_text() -> None:
    text = "overlap=2 'data.path=\"it\\'s\"' tab\t line\n é €"
    assert tomllib.loads(f"k = {toml_string(text)}") == {"k": text}
    assert parse_config_args([f"k={toml_string(text)}"]) == {"k": text}


def test_the_command_of_the_supernode(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").touch()
    (tmp_path / "a key").touch()
    given = parse(
        ["--superlink", "[::1]:8000", "--name", "a", "--root-certificates", f"{tmp_path}/ca.crt",
         "--key", f"{tmp_path}/a key", "--port", "9100"]
    )  # fmt: skip
    command = supernode_command(given)
    assert command[:3] == ["flower-supernode", "--superlink", "[::1]:8000"]
    assert command[-8:] == [
        "--root-certificates", f"{tmp_path}/ca.crt", "--auth-supernode-private-key", f"{tmp_path}/a key",
        "--host", "127.0.0.1", "--port", "9100",
    ]  # fmt: skip
    assert "--insecure" in supernode_command(options())
    assert int(supernode_command(options())[-1]) > 1024


def test_the_state_directory_is_that_of_the_clients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert parse(["--superlink", "h:1", "--name", "a"]).state_dir == tmp_path / "fomoe-flwr"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("--name a", "--superlink"),
        ("--superlink h:1", "--name"),
        ("--superlink h --name a", "--superlink: h "),
        ("--superlink https://h:1 --name a", "--superlink: https://h:1 "),
        ("--superlink h:99999 --name a", "--superlink: h:99999 "),
        ("--superlink h:1 --name a/b", "--name: a/b "),
        ("--superlink h:1 --name .a", "--name: .a "),
        ("--superlink h:1 --name a --key /none", "--key: /none "),
        ("--superlink h:1 --name a --root-certificates /none", "--root-certificates: /none "),
        ("--superlink h:1 --name a --key /etc/passwd --insecure", "--key"),
        ("--superlink h:1 --name a --root-certificates /etc/passwd --insecure", "--insecure"),
        ("--superlink h:1 --name a --stall-s 0", "--stall-s: 0 "),
        ("--superlink h:1 --name a --stopped-s nan", "--stopped-s: nan "),
        ("--superlink h:1 --name a --port x", "--port: x "),
        ("--superlink h:1 --name a --data-path /none", "--data-path: /none "),
        ("--superlink h:1 --name a --store-dir /none", "--store-dir: /none "),
        ("--superlink h:1 --name a --device mps", "--device: mps "),
        ("--superlink h:1 --name a --device cuda:-1", "--device: cuda:-1 "),
        ("--superlink h:1 --name a --colour red", "--colour red"),
        ("--superlink h:1 --nam a", "--name"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(arguments: str, option: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(arguments.split())
    assert option in str(error.value)
    assert "\n" not in str(error.value)


def test_the_pauses_grow_to_fifteen_seconds() -> None:
    assert [pause_s(n, 15.0) for n in (1, 2, 3, 4, 5, 6, 5000)] == [1, 2, 4, 8, 15, 15, 15]


def test_an_unknown_key_is_told_from_a_node_that_is_not_missed_yet() -> None:
    assert not may_be_accepted_later("2004", accepted_before=False, refused_s=0.0)
    assert may_be_accepted_later("2004", accepted_before=True, refused_s=60.0)
    assert not may_be_accepted_later("2004", accepted_before=True, refused_s=REFUSED_S + 1)
    assert not may_be_accepted_later("2001", accepted_before=True, refused_s=0.0)
    assert "give --key" in refusal(options(), "2001")
    with_key = refusal(replace(options(), key=Path("/keys/a")), "2004")
    assert "flwr supernode register /keys/a.pub" in with_key
    assert "\n" not in with_key


# The watch


def test_a_supernode_at_work_is_left_alone() -> None:
    watch = Watch()
    assert watch.look(10, {SUPERNODE: "flower-supernode"}, 0.0) == ([], None)  # it has only just begun
    watch.hear(ACCEPTED, 1.0)
    assert watch.node == "5237784425622666617"
    assert watch.look(10, IDLE, 2.0) == ([], None)
    watch.hear(RECEIVING, 3.0)
    watch.hear(RECEIVED, 4.0)
    for now in range(4, 4000):  # a round may take as long as it takes
        assert watch.look(10, ALL, float(now)) == ([], None)
    assert watch.look(10, IDLE, 4010.0) == ([], None)
    watch.hear(SENDING, 4011.0)
    assert watch.look(10, IDLE, 9000.0) == ([], None)  # nothing to do


def test_a_message_on_which_nothing_works_is_noticed() -> None:
    watch = Watch()
    watch.hear(ACCEPTED, 0.0)
    watch.hear(RECEIVING, 0.0)
    assert watch.look(10, IDLE, 500.0) == ([], None)  # it still arrives
    watch.hear(RECEIVED, 500.0)
    assert watch.look(10, ALL, 700.0) == ([], None)
    assert watch.look(10, IDLE, 700.0 + WEDGED_S) == ([], None)
    assert watch.look(10, IDLE, 701.0 + WEDGED_S)[1] is not None


def test_without_its_executor_a_supernode_is_started_again() -> None:
    watch = Watch()
    assert watch.look(10, IDLE, 0.0) == ([], None)
    assert watch.look(10, {SUPERNODE: "flower-supernode", WORKER: "clients.worker"}, 1.0)[1] is not None
    never = Watch()
    never.hear(ACCEPTED, 0.0)
    assert never.look(10, {SUPERNODE: "flower-supernode"}, 1.0)[1] is not None
    assert never.look(10, {}, 1.0) == ([], None)  # it has just ended


@pytest.mark.parametrize("process", [EXECUTOR, CLIENT, WORKER])
def test_a_process_that_stays_stopped_is_killed(process: Process) -> None:
    watch = Watch(stopped_s=15.0)
    stopped = process._replace(stopped=True)
    processes = {stopped if each == process else each: name for each, name in ALL.items()}
    assert watch.look(10, processes, 0.0) == ([], None)
    assert watch.look(10, processes, 14.9) == ([], None)
    assert watch.look(10, ALL, 15.0) == ([], None)  # it was let go on
    assert watch.look(10, processes, 16.0) == ([], None)
    assert watch.look(10, processes, 31.0) == ([stopped], None)
    other = stopped._replace(started=999)  # another process of the same number
    assert watch.look(10, {SUPERNODE: "flower-supernode", EXECUTOR: "flower-superexec", other: ""}, 32.0) == (
        [],
        None,
    )


def test_a_supernode_that_stays_stopped_is_started_again() -> None:
    watch = Watch(stopped_s=15.0)
    stopped = SUPERNODE._replace(stopped=True)
    watch.look(10, {stopped: "flower-supernode", EXECUTOR: "flower-superexec"}, 0.0)
    to_kill, why = watch.look(10, {stopped: "flower-supernode", EXECUTOR: "flower-superexec"}, 15.0)
    assert to_kill == [stopped]
    assert why is not None


# What starting again cannot cure


def supervised_lives(
    monkeypatch: pytest.MonkeyPatch, life: Watch, fault: str | None, tmp: Path
) -> tuple[list[Watch], threading.Event]:
    """Have every SuperNode live such a life, and the clock have this fault; waiting takes no time."""
    clock, lives, ended = [0.0], list[Watch](), threading.Event()

    def one_life(*_: object) -> Watch:
        lives.append(life)
        if len(lives) == 20:
            ended.set()
        return life

    def wait(seconds: float | None = None) -> bool:
        clock[0] += seconds or 0.0
        return ended.is_set()

    monkeypatch.setattr(ended, "wait", wait)
    monkeypatch.setattr(supervisor, "_one_life", one_life)
    monkeypatch.setattr(supervisor, "clock_fault", lambda *_: fault)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(supervisor, "end_marked", lambda *_: 0)
    return lives, ended


@pytest.mark.parametrize("node", [None, "7"], ids=["never accepted", "while it worked"])
def test_a_clock_that_the_superlink_does_not_take_is_said_once_and_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, node: str | None
) -> None:
    """Flower's SuperNode ends with exit code 0 and says nothing; another one would do the same."""
    lives, ended = supervised_lives(monkeypatch, Watch(node=node), "the clock is 8 s ahead", tmp_path)
    with caplog.at_level("INFO"), pytest.raises(RunError, match="site a: the clock is 8 s ahead"):
        supervise(options(tmp=tmp_path), {}, ended)
    assert len(lives) == 1
    assert caplog.text.count("the clock is 8 s ahead") == 1
    assert supervisor.time.monotonic() == pytest.approx(REFUSED_S, abs=10.0)


def test_a_supernode_that_cannot_work_with_its_options_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with a key of the wrong kind; a SuperLink that is not there yet is no such thing."""
    wrong, absent = Watch(), Watch()
    wrong.hear("ERROR :     Exit Code: 302\n", 0.0)
    absent.hear("ERROR :     Exit Code: 305\n", 0.0)
    lives, ended = supervised_lives(monkeypatch, wrong, None, tmp_path)
    with pytest.raises(RunError, match="exit code 302"):
        supervise(options(tmp=tmp_path), {}, ended)
    assert len(lives) == 1
    lives, ended = supervised_lives(monkeypatch, absent, None, tmp_path)
    supervise(options(tmp=tmp_path), {}, ended)
    assert len(lives) == 20


def test_a_full_disk_does_not_end_the_watch_over_a_site_that_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lives, ended = supervised_lives(monkeypatch, Watch(node="7"), None, tmp_path)
    monkeypatch.setattr(
        Path, "write_text", lambda *_: raise_(OSError(errno.ENOSPC, "No space left on device"))
    )
    supervise(options(tmp=tmp_path), {}, ended)
    assert len(lives) == 20
    assert caplog.text.count("No space left on device") == 1


def raise_(error: Exception) -> None:
    raise error


# The whole of it

FAKE_SUPERNODE = """#!{python} -S
import json, os, signal, subprocess, sys, time
with open({starts!r}, "a") as file:
    file.write(json.dumps({{"pid": os.getpid(), "arguments": sys.argv[1:]}}) + "\\n")
if os.path.exists({refuse!r}):
    print("[code: 2004] Failed to activate SuperNode.", flush=True)
    sys.exit(1)
executor = subprocess.Popen(["flower-superexec"])
subprocess.Popen(["sleep", "1000"], start_new_session=True)  # outlives its parent, as a worker may
print("INFO :      SuperNode ID: 7", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(1000)
"""


# As the real one, with shorter waits.
RUNNER = """
import sys
import fomoe_flwr.deploy.site as supervisor
from fomoe_flwr.console import setup_logging
setup_logging()
supervisor.POLL_S, supervisor.REST_GRACE_S = 0.1, 0.2
supervisor.LONGEST_PAUSE_S, supervisor.REFUSED_PAUSE_S = 0.2, 0.2
sys.exit(supervisor.site(sys.argv[1:]))
"""


class Supervised:
    """A folder with a fake `flower-supernode`, the supervisors started over it, and what is left of all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts_file, self.refuse = folder / "starts", folder / "refuse"
        self.log = folder / "log"
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[bytes]] = []
        (folder / "bin").mkdir()
        self.script(
            "flower-supernode",
            FAKE_SUPERNODE.format(
                python=sys.executable, starts=str(self.starts_file), refuse=str(self.refuse)
            ),
        )
        self.script("flower-superexec", f"#!{sys.executable} -S\nimport time\ntime.sleep(1000)\n")

    def script(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def supervise(self, *more: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([f"{self.folder}/bin", str(Path(sys.executable).parent), os.environ["PATH"]])
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", RUNNER, "--superlink", "127.0.0.1:8000", "--name", "a", "--insecure",
                 "--state-dir", f"{self.folder}/state", *more],
                env=os.environ | {"PATH": path, "FOMOE_TEST_MARK": self.mark},
                stdout=log, stderr=log,
            )  # fmt: skip
        self.started.append(process)
        return process

    def starts(self) -> list[int]:
        """The SuperNodes so far, by process number."""
        if not self.starts_file.exists():
            return []
        return [json.loads(line)["pid"] for line in self.starts_file.read_text().splitlines()]

    def left(self) -> list[Process]:
        return Marked("FOMOE_TEST_MARK", self.mark).look()

    def programs(self) -> dict[str, Process]:
        return {program_of(process.pid): process for process in self.left()}


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path)
    try:
        yield supervised
    finally:
        for process in supervised.left():
            os.kill(process.pid, signal.SIGKILL)
        for supervisor in supervised.started:
            supervisor.wait()


def ready(supervised: Supervised, number: int = 1) -> None:
    until(
        lambda: (
            len(supervised.starts()) == number
            and {"flower-superexec", "sleep"} <= supervised.programs().keys()
        )
    )


def test_a_dead_supernode_or_executor_brings_a_new_one_and_nothing_is_left_at_the_end(
    supervised: Supervised,
) -> None:
    supervisor = supervised.supervise()
    ready(supervised)
    first = supervised.left()
    os.kill(supervised.starts()[0], signal.SIGKILL)
    ready(supervised, 2)
    old = [process for process in first if process.pid != supervisor.pid]
    assert len(old) == 3
    assert not any(is_alive(process.pid, process.started) for process in old)

    os.kill(supervised.programs()["flower-superexec"].pid, signal.SIGKILL)
    ready(supervised, 3)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 0
    assert supervised.left() == []
    assert "SuperNode ID: 7" in supervised.log.read_text()  # passed on
    memory = json.loads((supervised.folder / "state/a.site.lock").read_text())
    assert memory == {"pid": supervisor.pid, "accepted": "127.0.0.1:8000 "}


def test_stopped_processes_are_killed_and_ctrl_c_ends_all(supervised: Supervised) -> None:
    supervisor = supervised.supervise("--stopped-s", "0.3")
    ready(supervised)
    os.kill(supervised.programs()["sleep"].pid, signal.SIGSTOP)
    until(lambda: "sleep" not in supervised.programs())
    assert len(supervised.starts()) == 1
    os.kill(supervised.starts()[0], signal.SIGSTOP)
    ready(supervised, 2)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(20) == 130
    assert supervised.left() == []


def test_a_second_supervisor_is_refused_and_an_orphan_is_ended(supervised: Supervised) -> None:
    supervisor = supervised.supervise()
    ready(supervised)
    with pytest.raises(ConfigError, match=f"process {supervisor.pid} "):
        site(["--superlink", "h:1", "--name", "a", "--state-dir", f"{supervised.folder}/state"])
    supervisor.kill()
    supervisor.wait()
    orphans = supervised.left()
    assert len(orphans) == 3
    second = supervised.supervise()
    ready(supervised, 2)
    assert not any(is_alive(process.pid, process.started) for process in orphans)
    second.send_signal(signal.SIGTERM)
    assert second.wait(20) == 0
    assert supervised.left() == []


def test_an_unknown_key_ends_it_and_a_known_one_is_tried_again(supervised: Supervised) -> None:
    supervised.refuse.touch()
    supervisor = supervised.supervise()
    assert supervisor.wait(20) == 1
    assert supervised.log.read_text().splitlines()[-1].startswith("fomoe_flwr.errors.RunError")

    supervised.refuse.unlink()
    supervisor = supervised.supervise()
    ready(supervised, 2)
    until(lambda: "accepted" in (supervised.folder / "state/a.site.lock").read_text())
    supervised.refuse.touch()
    os.kill(supervised.starts()[1], signal.SIGKILL)
    until(lambda: len(supervised.starts()) == 3)
    supervised.refuse.unlink()
    until(lambda: len(supervised.starts()) > 3 and "flower-superexec" in supervised.programs())
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 0


def test_a_mark_finds_what_has_lost_its_parent() -> None:
    mark = uuid.uuid4().hex
    subprocess.run(["sh", "-c", "sleep 1000 &"], env=os.environ | {MARK: mark}, check=True)
    marked = Marked(MARK, mark)
    # The shell's child is a shell for a moment.
    until(lambda: [program_of(process.pid) for process in marked.look()] == ["sleep"])
    assert Marked(MARK, mark[:-1]).look() == []
    (found,) = marked.look()
    assert not found.stopped
    os.kill(found.pid, signal.SIGSTOP)
    until(lambda: marked.look() == [found._replace(stopped=True)])
    assert end_marked(marked) == 1
    assert marked.look() == []


def test_a_process_is_known_by_its_number_and_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zombie counts as ended; a stopped process is alive; a clock that is set does not make it another process."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        started = start_time(process.pid)
        assert started is not None
        assert not kill(process.pid, started + 1)
        process.send_signal(signal.SIGSTOP)
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
        assert is_alive(process.pid, started)
        assert kill(process.pid, started)
        # It stays a zombie until it is waited for, at the end of this block.
        until(lambda: start_time(process.pid) is None)
        assert not is_alive(process.pid, started)


def test_a_process_of_another_user_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(process: psutil.Process) -> dict[str, str]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "environ", denied)
    assert Marked("PATH", os.environ["PATH"]).look() == []


def test_a_gpu_that_is_not_there_is_said_at_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="fomoe site --device=cuda: PyTorch sees no GPU here"):
        check_device("cuda")
    for other in ("cpu", None):
        check_device(other)
