"""Real workers: the same answers as without one, whatever is killed or stopped meanwhile, and no process left over.

A worker takes two or three seconds to start, so the tests share one, and some look at several things.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from clients import relay, worker
from clients.worker import Abandoned, RequestQueue, beat_for, deliver
from fomoe_flwr.bundle_file import bundle_digests, mapped_blobs, read_blobs, write_blobs
from fomoe_flwr.config import RunConfig
from fomoe_flwr.deploy import channel
from fomoe_flwr.deploy.channel import Channel
from fomoe_flwr.errors import ConfigError, WorkerError
from fomoe_flwr.messages import Reply, Task
from fomoe_flwr.site.identity import NodeSettings
from tests.clients.helpers import ask, bundles_of, site_task, state_files, task_of, with_steps
from tests.conftest import Compose

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).with_name("one_message.py")
MANY_STEPS = 150  # of the small model: about a second


def workers(place: Path) -> list[int]:
    """Workers whose socket is below this folder."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "clients.worker" in (words := process.info["cmdline"] or [])
        and any(word.startswith(str(place)) for word in words)
    ]


def until(condition: Callable[[], Any], seconds: float = 30.0, why: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.01)
    return value


@dataclass
class Site:
    """A site in a deployment, whose worker serves one test after the other; each test has runs of its own."""

    place: Path  # for sockets; short
    state: Path
    stall_s: float = 60.0
    log_before: int = 0

    def ask(self, kind: str, config: RunConfig, task: Task, budget_s: float = 300.0) -> tuple[dict, Reply]:
        node = {"site": "site-1", "state-dir": str(self.state), "stall-s": self.stall_s}
        return ask(kind, config, task, node, budget_s)

    @property
    def worker(self) -> int:
        """Its one worker."""
        (pid,) = workers(self.place)
        return pid

    @property
    def log(self) -> str:
        """What its workers have printed since the last `mark`."""
        path = self.state / "site-1.worker.log"
        return path.read_text()[self.log_before :] if path.exists() else ""

    def mark(self) -> None:
        self.log_before += len(self.log)

    def warm_up(self, config: RunConfig) -> int:
        """Have a worker that has begun to work, and return its number."""
        self.ask("evaluate", config, site_task(config, 1, run="warm-up"))
        self.mark()
        return self.worker

    def wait_for_log(self, text: str) -> None:
        until(lambda: text in self.log, why=lambda: self.log)

    @contextmanager
    def when_it_trains(self, action: Callable[[], object]) -> Iterator[None]:
        """Do this as soon as the log tells of steps."""

        def wait_and_act() -> None:
            self.wait_for_log(" step ")
            action()

        thread = threading.Thread(target=wait_and_act)
        thread.start()
        yield
        thread.join()

    def client(self, folder: Path, kind: str, config: RunConfig, task: Task) -> list[str]:
        """The command of a ClientApp process for this message."""
        folder.mkdir(parents=True)
        settings = NodeSettings("site-1", None, None, str(self.state), None, None, self.stall_s)
        (folder / "settings.json").write_text(json.dumps(asdict(settings)))
        (folder / "task.json").write_text(task.to_json())
        (folder / "kind").write_text(kind)
        for key, blob in bundles_of(config, task).items():
            (folder / f"{key}.blob").write_bytes(blob)
        return [sys.executable, str(CLIENT), str(folder)]

    def end(self) -> None:
        for pid in workers(self.place):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not workers(self.place))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    # Not below pytest's folder: a socket's path must be short.
    site = Site(Path(tempfile.mkdtemp(prefix="fomoe-test-")), tmp_path_factory.mktemp("state"))
    yield site
    site.end()
    shutil.rmtree(site.place)


@pytest.fixture
def site(shared: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(shared.place))
    shared.stall_s = 60.0
    shared.mark()
    return shared


def assert_same_states(site: Site, folder: Path, *runs: str) -> None:
    for run in runs:
        assert state_files(site.state / run) == state_files(folder / run) != {}


def in_process(config: RunConfig, task: Task, folder: Path, kind: str = "train") -> tuple[dict, Reply]:
    """What the same message comes to without a worker."""
    return ask(kind, config, task, {"partition-id": 1, "site": "site-1", "state-dir": str(folder)})


def test_a_worker_gives_the_same_bits_and_stays(site: Site, small: Compose, tmp_path: Path) -> None:
    """Three rounds, an evaluation and a second run in between; then the worker is killed, and nothing is lost."""
    site.end()
    config, other = small("strategy.overlap=2").config, small("seed=7").config
    pids = set()
    for round_ in (1, 2, 3):
        for kind in ("train", "evaluate"):
            task = site_task(config, round_)
            assert site.ask(kind, config, task) == in_process(config, task, tmp_path, kind)
            pids.add(site.worker)
    assert len(pids) == 1
    assert site.log.count("builds its model") == 1
    for round_ in (1, 2):
        task = site_task(other, round_, run="other")
        assert site.ask("train", other, task) == in_process(other, task, tmp_path)
        task = site_task(config, 3 + round_)
        assert site.ask("train", config, task) == in_process(config, task, tmp_path)
    with pytest.raises(ConfigError, match="site-0"):
        site.ask("train", config, task_of(config, 0, 6))
    hot = small("strategy.overlap=2", "train.lr=1e30").config
    with pytest.raises(FloatingPointError):
        site.ask("train", hot, site_task(hot, 6))
    assert {site.worker} == pids
    os.kill(site.worker, signal.SIGKILL)
    task = site_task(config, 6)
    assert site.ask("train", config, task) == in_process(config, task, tmp_path)
    assert {site.worker} != pids
    assert_same_states(site, tmp_path, "run", "other")


def test_a_worker_killed_in_a_round_costs_time_and_nothing_else(
    site: Site, small: Compose, tmp_path: Path
) -> None:
    short = small("strategy.overlap=2").config
    config = with_steps(short, MANY_STEPS)
    first, second = (site_task(short, 1, run="killed"), site_task(config, 2, run="killed"))
    site.ask("train", short, first)
    site.mark()
    pid = site.worker
    with site.when_it_trains(lambda: os.kill(pid, signal.SIGKILL)):
        answer = site.ask("train", config, second)
    assert site.worker != pid
    assert site.log.count("worker of site site-1, process") == 1
    in_process(short, first, tmp_path)
    assert answer == in_process(config, second, tmp_path)
    assert_same_states(site, tmp_path, "killed")


def test_a_client_that_gives_up_or_is_told_to_end_and_a_worker_that_hangs(
    site: Site, small: Compose, tmp_path: Path
) -> None:
    """Work for which no client waits any more is dropped and leaves no state; a worker that hangs, as one that is
    stopped does, is ended; and the next round works.
    """
    config = with_steps(small("strategy.overlap=2").config, MANY_STEPS)
    task = site_task(config, 1, run="dropped")
    pid = site.warm_up(config)
    with pytest.raises(WorkerError, match=r"0\.3 s"):
        site.ask("train", config, task, budget_s=0.3)
    site.wait_for_log("its work is dropped")

    # SIGTERM gives an error reply, in place of Flower's handler, which would end the process without one.
    site.mark()
    ours = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        flowers = signal.getsignal(signal.SIGTERM)
        with (
            site.when_it_trains(lambda: os.kill(os.getpid(), signal.SIGTERM)),
            pytest.raises(WorkerError, match="SIGTERM"),
        ):
            site.ask("train", config, task)
        assert signal.getsignal(signal.SIGTERM) is flowers
    finally:
        signal.signal(signal.SIGTERM, ours)
    site.wait_for_log("its work is dropped")
    assert site.worker == pid

    site.mark()
    site.stall_s = 1.0
    with (
        site.when_it_trains(lambda: os.kill(pid, signal.SIGSTOP)),
        pytest.raises(WorkerError, match=r"stall-s.*site-1\.worker\.log"),
    ):
        site.ask("train", config, task)
    assert not state_files(site.state / "dropped")
    site.stall_s = 60.0
    assert site.ask("train", config, task) == in_process(config, task, tmp_path)
    assert site.worker != pid


def ranks_of(worker: int) -> list[int]:
    """The processes of a worker's other devices."""
    return [
        child.pid
        for child in psutil.Process(worker).children()
        if "fomoe_flwr.engine.rank" in child.cmdline()
    ]


def test_a_device_that_dies_or_hangs_costs_a_round_and_leaves_no_process(site: Site, small: Compose) -> None:
    config = small("train.devices=2", "train.parallel=fsdp", "strategy.overlap=2").config
    busy = with_steps(config, MANY_STEPS)
    task, long_task = (site_task(each, 1, run="several") for each in (config, busy))
    site.end()
    site.ask("train", config, task)
    pid = site.worker
    (rank,) = ranks_of(pid)

    site.mark()
    with (
        site.when_it_trains(lambda: os.kill(rank, signal.SIGKILL)),
        pytest.raises(WorkerError, match=r"^the process of device 2 of 2 ended \(code -9\)$"),
    ):
        site.ask("train", busy, long_task)
    _, reply = site.ask("train", config, task)
    assert reply.num_examples > 0
    assert site.worker == pid
    (other,) = ranks_of(pid)
    assert other != rank

    site.mark()
    site.stall_s = 2.0
    with (
        site.when_it_trains(lambda: os.kill(other, signal.SIGSTOP)),
        pytest.raises(WorkerError, match="gave no sign of life for 2 s"),
    ):
        site.ask("train", busy, long_task)
    until(lambda: not psutil.pid_exists(other))
    site.stall_s = 60.0
    assert site.ask("train", config, task)[1].load_LE == reply.load_LE
    new = ranks_of(site.worker)
    assert site.worker != pid
    site.end()
    until(lambda: not any(psutil.pid_exists(pid) for pid in new))


def test_clients_that_die_and_clients_that_wait(site: Site, small: Compose, tmp_path: Path) -> None:
    """Two at the same moment start one worker; a client that waits longer than stall-s for the other kills nothing;
    a client that is killed takes its work with it, and leaves no state.
    """
    site.end()
    config = with_steps(small("strategy.overlap=2").config, MANY_STEPS)
    site.stall_s = 1.0
    runs = ("one", "two")
    commands = [site.client(tmp_path / run, "train", config, site_task(config, 1, run=run)) for run in runs]
    clients = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for command in commands
    ]
    answers = [json.loads(client.communicate(timeout=120)[0]) for client in clients]
    assert site.log.count("worker of site site-1, process") == 1
    for run, answer in zip(runs, answers, strict=True):
        expected, _ = in_process(config, site_task(config, 1, run=run), tmp_path / "here")
        assert answer["digests"] == bundle_digests(expected), answer

    pid = site.worker
    site.mark()
    task = site_task(config, 1, run="three")
    command = site.client(tmp_path / "three", "train", config, task)
    client = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    site.wait_for_log(" step ")
    client.kill()
    client.wait()
    assert site.ask("train", config, task) == in_process(config, task, tmp_path / "here")
    assert site.worker == pid
    assert site.log.count("its work is dropped") == 1
    assert_same_states(site, tmp_path / "here", *runs, "three")


def test_a_worker_ends_with_its_supernode(site: Site, small: Compose, tmp_path: Path) -> None:
    """A SuperNode here is a script of that name which starts a client and stays."""
    config = small("strategy.overlap=2").config
    command = site.client(tmp_path / "message", "train", config, site_task(config, 1, run="supernode"))
    script = tmp_path / "flower-supernode"
    script.write_text(
        f"import subprocess, sys, time\nsubprocess.run({command!r}, check=True)\nprint('done', flush=True)\n"
        "time.sleep(100)\n"
    )
    supernode = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert supernode.stdout is not None
        assert "digests" in supernode.stdout.readline()
        assert supernode.stdout.readline() == "done\n"
        pid = site.worker
        assert os.getsid(pid) == pid
        # It stays as long as its SuperNode: it looks twice a second.
        time.sleep(1.1)
        assert workers(site.place) == [pid]
    finally:
        supernode.kill()
        supernode.wait()
    until(lambda: not workers(site.place), 10)


def test_other_code_gets_a_worker_of_its_own(site: Site, small: Compose, tmp_path: Path) -> None:
    """As when an app is updated while its worker of the version before still runs."""
    config = small("strategy.overlap=2").config
    tasks = [site_task(config, round_, run="updated") for round_ in (1, 2)]
    site.ask("train", config, tasks[0])
    pid = site.worker
    for package in ("clients", "fomoe_flwr"):
        shutil.copytree(REPOSITORY / package, tmp_path / "new" / package)
    command = site.client(tmp_path / "message", "train", config, tasks[1])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "new")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert site.worker != pid
    assert f"code in {(tmp_path / 'new').resolve()}" in site.log
    for task in tasks:
        expected, _ = in_process(config, task, tmp_path / "here")
    assert json.loads(done.stdout)["digests"] == bundle_digests(expected)
    os.kill(site.worker, signal.SIGTERM)
    until(lambda: not workers(site.place), 10)


def test_a_worker_that_cannot_start_says_why(
    site: Site, small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.end()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/torch.py").write_text("raise ImportError('no driver for this GPU')")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    config = small().config
    with pytest.raises(WorkerError, match="no driver for this GPU"):
        site.ask("train", config, site_task(config, 1))


# ----- without a process


def test_an_idle_worker_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)
    folder = channel.socket_folder(site.state, "idle")
    assert worker.run("idle", folder, idle_s=0.1) == 0
    assert not (folder / channel.SOCKET).exists()


@pytest.mark.parametrize("spoil", ["mode", "kind", "owner"])
def test_a_socket_folder_that_is_not_private_is_refused(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, uid = Path("/state"), os.getuid()
    with tempfile.TemporaryDirectory(prefix="fomoe-test-") as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", place)
        folder = channel.socket_folder(state, "site-1")
        assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        assert folder != channel.socket_folder(state, "site-2")
        assert folder != channel.socket_folder(state / "other", "site-1")
        if spoil == "mode":
            folder.parent.chmod(0o755)
            expected = "mode 755"
        elif spoil == "kind":
            folder.rmdir()
            folder.symlink_to("/tmp")
            expected = "must be a folder"
        else:
            folder.parent.rename(folder.parent.with_name(f"fomoe-{uid + 1}"))
            monkeypatch.setattr(os, "getuid", lambda: uid + 1)
            expected = f"user {uid}"
        with pytest.raises(WorkerError, match=expected):
            channel.socket_folder(state, "site-1")
        monkeypatch.undo()


def test_too_long_a_path_for_a_socket_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(WorkerError, match="too long a path for a socket"):
        channel.socket_folder(tmp_path, "site-1")


def test_bundles_in_a_file(tmp_path: Path) -> None:
    """Of any length, one after the other, read where they lie, with no name in the folder."""
    blobs = {"empty": b"", "one": b"x", "page": b"y" * 4096, "more": os.urandom(10_000)}
    file, sizes = write_blobs(blobs.items(), tmp_path / "new")
    with file:
        mapped = mapped_blobs(file, sizes)
        assert read_blobs(file, sizes) == blobs
    assert not list((tmp_path / "new").iterdir())
    assert {key: blob[:] for key, blob in mapped.items()} == blobs
    assert list(mapped) == list(blobs)
    with pytest.raises(WorkerError, match="cannot write a message"):
        write_blobs(blobs.items(), Path("/proc/nowhere"))


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    pair = [Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)]
    yield pair[0], pair[1]
    for end in pair:
        end.close()


def test_long_lines_and_files_arrive_together(ends: tuple[Channel, Channel], tmp_path: Path) -> None:
    ours, theirs = ends
    lines = [{"number": number, "text": "x" * (300_000 if number == 1 else 10)} for number in range(3)]
    file, sizes = write_blobs([("a", b"content")], tmp_path)

    def send() -> None:
        for line in lines:
            ours.send(line, file if line["number"] == 1 else None, 5)

    with ThreadPoolExecutor(1) as pool, file:
        done = pool.submit(send)
        assert [theirs.receive(5) for _ in lines] == lines
        done.result()
    with theirs.file() as received:
        assert read_blobs(received, sizes) == {"a": b"content"}
    with pytest.raises(ConnectionError):
        theirs.file()
    with pytest.raises(TimeoutError):
        theirs.receive(0.01)
    assert not theirs.is_closed()
    ours.close()
    assert theirs.is_closed()
    with pytest.raises(ConnectionError):
        theirs.receive(1)


def test_a_client_that_is_gone_or_does_not_read_ends_the_work(ends: tuple[Channel, Channel]) -> None:
    """One that was stopped keeps its connection: beats and answers must not wait for it for ever."""
    ours, theirs = ends
    beat = beat_for(ours, stall_s=0.2)
    beat("data")
    beat("work")
    # Too early for another line.
    beat("work")
    assert [theirs.receive(1)["phase"] for _ in range(2)] == ["data", "work"]
    while ours.try_send({"fill": "x" * 1000}):
        pass
    beat("data")
    began = time.monotonic()
    time.sleep(0.25)
    with pytest.raises(Abandoned):
        beat("data")
    deliver(ours, {"result": "x" * 10**6}, None, 0.1)
    assert time.monotonic() - began < 2
    theirs.close()
    with pytest.raises(Abandoned):
        beat_for(ours, stall_s=60)("work")


@pytest.mark.parametrize("module", ["clients.app", "clients.relay", "fomoe_flwr.cli"])
def test_what_starts_often_stays_light(module: str) -> None:
    """A ClientApp starts for each message, and the command for each `--help`."""
    heavy = {"ray", "wandb", "matplotlib", "scipy"} | (set() if module == "fomoe_flwr.cli" else {"torch"})
    code = f"import sys, {module}; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_supernode_is_the_program_and_not_a_shell_that_names_it() -> None:
    code = "from clients.relay import parent_supernode; print(parent_supernode())"
    shell = ["bash", "-c", f"{sys.executable} -c '{code}'; true flower-supernode"]
    done = subprocess.run(shell, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_relay_keeps_the_kind_of_an_error() -> None:
    assert isinstance(relay._error({"type": "ConfigError", "text": "x"}), ConfigError)
    assert isinstance(relay._error({"type": "FloatingPointError", "text": "x"}), FloatingPointError)
    assert str(relay._error({"type": "OSError", "text": "disk"})) == "OSError: disk"


def test_a_full_disk_is_an_answer_and_the_worker_stays(
    ends: tuple[Channel, Channel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line to the server and in the worker's log; the machine may have room again in the next round."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/round_00002.safetensors")

    monkeypatch.setattr(worker, "perform", full)
    settings = asdict(NodeSettings("a", None, None, str(tmp_path), None, None))
    client, server = ends
    file, sizes = write_blobs([], tmp_path)
    header = {
        "kind": "train", "task": "", "stored": "", "settings": settings, "sizes": sizes, "folder": str(tmp_path),
        "seconds": 60.0,
    }  # fmt: skip
    before = Path.cwd()
    try:
        with file:
            client.send(header, file, 5.0)
        request = worker.Request(server, server.receive(5.0))
        with ThreadPoolExecutor(1) as sender:
            assert worker.serve(request, worker.Memory(), RequestQueue(), sender)
    finally:
        os.chdir(before)
    error = relay._error(client.receive(5.0)["error"])
    assert isinstance(error, WorkerError)
    assert str(error) == f"site a: {tmp_path}/round_00002.safetensors: No space left on device"
    assert "Traceback" not in caplog.text
