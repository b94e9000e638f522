"""`fomoe site`: its decisions as functions of what it sees, and the whole of it over a `flower-supernode` of straw."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from fomoe_flwr.deploy.flower import toml_string
from fomoe_flwr.deploy.options import Options, node_config, parse, supernode_command
from fomoe_flwr.deploy.processes import Marked, Process, is_alive, program_of, start_time
from fomoe_flwr.deploy.site import MARK, REFUSED_S, may_be_accepted_later, pause_s, refusal, site
from fomoe_flwr.deploy.supernode import WEDGED_S, Watch
from fomoe_flwr.errors import ConfigError

SUPERNODE = Process(pid=10, parent=1, state="S", started=100)
EXECUTOR = Process(pid=11, parent=10, state="S", started=101)
CLIENT = Process(pid=12, parent=11, state="S", started=102)
WORKER = Process(pid=13, parent=1, state="S", started=103)
ALL = {
    SUPERNODE: "flower-supernode",
    EXECUTOR: "flower-superexec",
    CLIENT: "flwr-clientapp",
    WORKER: "clients.worker",
}
IDLE = {SUPERNODE: "flower-supernode", EXECUTOR: "flower-superexec", WORKER: "clients.worker"}

# As Flower 1.41 prints them.
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
        "--device", "cuda:1", "--cache-dir", f'{tmp_path}/it\'s a "cache"\\', "--data-path", "relative",
        "--stall-s", "600", tmp=tmp_path,
    )  # fmt: skip
    assert parse_config_args([node_config(given)]) == {
        "site": "a",
        "device": "cuda:1",
        "state-dir": str(tmp_path),
        "cache-dir": f'{tmp_path}/it\'s a "cache"\\',
        "data-path": str(Path.cwd() / "relative"),
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
    ("arguments", "message"),
    [
        ("--name a", "arguments are required: --superlink"),
        ("--superlink h:1", "arguments are required: --name"),
        ("--superlink h --name a", "--superlink h: not HOST:PORT"),
        ("--superlink https://h:1 --name a", "--superlink https://h:1: not HOST:PORT"),
        ("--superlink h:99999 --name a", "not HOST:PORT"),
        ("--superlink h:1 --name a/b", "--name a/b: letters"),
        ("--superlink h:1 --name .a", "--name .a: letters"),
        ("--superlink h:1 --name a --key /none", "--key /none: no such file"),
        ("--superlink h:1 --name a --root-certificates /none", "--root-certificates /none: no such file"),
        ("--superlink h:1 --name a --key k --insecure", "--key: Flower uses keys over TLS only"),
        ("--superlink h:1 --name a --root-certificates c --insecure", "not allowed with"),
        ("--superlink h:1 --name a --stall-s 0", "--stall-s: 0 is not a number of seconds above 0"),
        ("--superlink h:1 --name a --stopped-s nan", "nan is not a number of seconds"),
        ("--superlink h:1 --name a --port x", "--port: x is not a port"),
        ("--superlink h:1 --name a --colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(arguments.split())
    assert message in str(error.value)
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
    _, why = watch.look(10, IDLE, 701.0 + WEDGED_S)
    assert why is not None
    assert "no process has worked on it" in why


def test_without_its_executor_a_supernode_is_started_again() -> None:
    watch = Watch()
    assert watch.look(10, IDLE, 0.0) == ([], None)
    _, why = watch.look(10, {SUPERNODE: "flower-supernode", WORKER: "clients.worker"}, 1.0)
    assert why is not None
    assert "flower-superexec is gone" in why
    never = Watch()
    never.hear(ACCEPTED, 0.0)
    assert never.look(10, {SUPERNODE: "flower-supernode"}, 1.0)[1] is not None
    assert never.look(10, {}, 1.0) == ([], None)  # a system without /proc tells nothing


@pytest.mark.parametrize("process", [EXECUTOR, CLIENT, WORKER])
def test_a_process_that_stays_stopped_is_killed(process: Process) -> None:
    watch = Watch(stopped_s=15.0)
    stopped = replace(process, state="T")
    processes = {stopped if each == process else each: name for each, name in ALL.items()}
    assert watch.look(10, processes, 0.0) == ([], None)
    assert watch.look(10, processes, 14.9) == ([], None)
    assert watch.look(10, ALL, 15.0) == ([], None)  # it was let go on
    assert watch.look(10, processes, 16.0) == ([], None)
    assert watch.look(10, processes, 31.0) == ([stopped], None)
    other = replace(stopped, started=999)  # another process of the same number
    assert watch.look(10, {SUPERNODE: "flower-supernode", EXECUTOR: "flower-superexec", other: ""}, 32.0) == (
        [],
        None,
    )


def test_a_supernode_that_stays_stopped_is_started_again() -> None:
    watch = Watch(stopped_s=15.0)
    stopped = replace(SUPERNODE, state="T")
    watch.look(10, {stopped: "flower-supernode", EXECUTOR: "flower-superexec"}, 0.0)
    kill, why = watch.look(10, {stopped: "flower-supernode", EXECUTOR: "flower-superexec"}, 15.0)
    assert kill == [stopped]
    assert why == "the SuperNode was stopped for 15 s"


# The whole of it

STRAW = """#!{python} -S
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


# Quick, where the real one is patient.
RUNNER = """
import sys
import fomoe_flwr.deploy.site as supervisor
from fomoe_flwr.console import setup_logging
setup_logging()
supervisor.POLL_S, supervisor.LONGEST_PAUSE_S = 0.1, 0.2
sys.exit(supervisor.site(sys.argv[1:]))
"""


class Straw:
    """A folder with a `flower-supernode` of straw, the supervisors started over it, and what is left of all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts_file, self.refuse = folder / "starts", folder / "refuse"
        self.log = folder / "log"
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[bytes]] = []
        (folder / "bin").mkdir()
        self.script(
            "flower-supernode",
            STRAW.format(python=sys.executable, starts=str(self.starts_file), refuse=str(self.refuse)),
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
def straw(tmp_path: Path) -> Iterator[Straw]:
    straw = Straw(tmp_path)
    try:
        yield straw
    finally:
        for process in straw.left():
            os.kill(process.pid, signal.SIGKILL)
        for supervisor in straw.started:
            supervisor.wait()


def ready(straw: Straw, number: int = 1) -> None:
    until(lambda: len(straw.starts()) == number and {"flower-superexec", "sleep"} <= straw.programs().keys())


def test_a_dead_supernode_is_started_again_and_nothing_is_left_at_the_end(straw: Straw) -> None:
    supervisor = straw.supervise()
    ready(straw)
    first = straw.left()
    os.kill(straw.starts()[0], signal.SIGKILL)
    ready(straw, 2)
    old = [process for process in first if process.pid != supervisor.pid]
    assert len(old) == 3
    assert not any(is_alive(process.pid, process.started) for process in old)

    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 0
    assert straw.left() == []
    output = straw.log.read_text()
    assert "SuperNode ID: 7" in output  # passed on
    assert "site a: SuperNode ended with exit code -9" in output
    assert "site a: starting again in 0.2 s" in output
    assert output.splitlines()[-1].endswith("site a: ended")
    memory = json.loads((straw.folder / "state/a.site.lock").read_text())
    assert memory == {"pid": supervisor.pid, "accepted": "127.0.0.1:8000 "}


def test_stopped_processes_are_killed_and_ctrl_c_ends_all(straw: Straw) -> None:
    supervisor = straw.supervise("--stopped-s", "1")
    ready(straw)
    os.kill(straw.programs()["sleep"].pid, signal.SIGSTOP)
    until(lambda: "sleep" not in straw.programs())
    assert len(straw.starts()) == 1
    os.kill(straw.starts()[0], signal.SIGSTOP)
    ready(straw, 2)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(20) == 130
    assert straw.left() == []
    assert "SuperNode is started again: the SuperNode was stopped for 1 s" in straw.log.read_text()


def test_a_lost_executor_brings_a_new_supernode(straw: Straw) -> None:
    straw.supervise()
    ready(straw)
    os.kill(straw.programs()["flower-superexec"].pid, signal.SIGKILL)
    ready(straw, 2)


def test_a_second_supervisor_is_refused_and_an_orphan_is_ended(straw: Straw) -> None:
    supervisor = straw.supervise()
    ready(straw)
    with pytest.raises(ConfigError, match=f"process {supervisor.pid} supervises this site already"):
        site(["--superlink", "h:1", "--name", "a", "--state-dir", f"{straw.folder}/state"])
    second = straw.supervise()
    assert second.wait(20) == 1
    assert (
        straw.log.read_text().splitlines()[-1].startswith("fomoe_flwr.errors.ConfigError: --name a: process")
    )

    supervisor.kill()
    supervisor.wait()
    orphan, started = straw.starts()[0], start_time(straw.starts()[0])
    assert started is not None
    third = straw.supervise()
    ready(straw, 2)
    assert not is_alive(orphan, started)
    third.send_signal(signal.SIGTERM)
    assert third.wait(20) == 0
    assert straw.left() == []
    assert "ended 3 processes that an earlier supervisor left" in straw.log.read_text()


def test_an_unknown_key_ends_it_and_a_known_one_is_tried_again(straw: Straw, tmp_path: Path) -> None:
    straw.refuse.touch()
    supervisor = straw.supervise()
    assert supervisor.wait(20) == 1
    assert straw.log.read_text().splitlines()[-1].startswith("fomoe_flwr.errors.RunError: the SuperLink at")

    straw.refuse.unlink()
    supervisor = straw.supervise()
    ready(straw, 2)
    until(lambda: "accepted" in (tmp_path / "state/a.site.lock").read_text())
    straw.refuse.touch()
    os.kill(straw.starts()[1], signal.SIGKILL)
    until(lambda: len(straw.starts()) == 3)
    straw.refuse.unlink()
    ready(straw, 4)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 0
    assert "refused; either" in straw.log.read_text()


def test_a_mark_finds_what_has_lost_its_parent() -> None:
    mark = uuid.uuid4().hex
    subprocess.run(["sh", "-c", "sleep 1000 &"], env=os.environ | {MARK: mark}, check=True)
    marked = Marked(MARK, mark)
    # The shell's child is a shell for a moment.
    until(lambda: [program_of(process.pid) for process in marked.look()] == ["sleep"])
    found = marked.look()
    assert Marked(MARK, mark[:-1]).look() == []
    os.kill(found[0].pid, signal.SIGKILL)
    until(lambda: not is_alive(found[0].pid, found[0].started))


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen(["true"]) as process:
        until(lambda: start_time(process.pid) is None)
    assert start_time(os.getpid()) is not None
