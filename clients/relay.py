"""Hands a message to the worker of this site and waits for its answer. It never imports PyTorch.

Flower starts a process for every message. So that PyTorch, data and model are not loaded each time, a worker keeps
them (`clients.worker`). It is started when it is needed and may die at any time: the message is then handed to a new
one, because all that a site must keep is on its disk.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

import psutil

from fomoe_flwr import errors
from fomoe_flwr.bundle_file import write_blobs
from fomoe_flwr.deploy import processes
from fomoe_flwr.deploy.channel import (
    SOCKET,
    START_LOCK,
    Answer,
    Channel,
    locked,
    socket_folder,
    unpack_answer,
)
from fomoe_flwr.deploy.supernode import EXECUTOR, SUPERNODE
from fomoe_flwr.errors import WorkerError
from fomoe_flwr.site.identity import NodeSettings, own_task, state_root

log = logging.getLogger("fomoe.site")

CODE = Path(__file__).resolve().parents[1]  # the folder in which the packages lie
START_S = 120.0  # in which a new worker must be there
ATTEMPTS = 3  # workers that a message is handed to, one after the death of the other
LOG_BYTES = 8 * 2**20  # a longer log is renamed when a worker starts
TAIL_LINES = 8


class _Ending(Exception):
    """The worker is about to end, and does not take the message."""


class _Site(NamedTuple):
    name: str
    folder: Path  # where its worker is met
    log_file: Path  # what its workers print


def hand_over(
    kind: str,
    task_text: str,
    stored: str,
    blobs: Iterable[tuple[str, bytes]],
    settings: NodeSettings,
    budget_s: float,
) -> Answer:
    """Have the worker do `train` or `evaluate`.

    Args:
        task_text: the Task as JSON.
        stored: the StoredShard as JSON, where the shard is in an object store; else empty.
        blobs: the shard's bundles; each is asked for once and let go.
        budget_s: seconds after which no one waits for the answer any more.

    Raises:
        FomoeError: what the worker says; or a WorkerError if it cannot be started, dies again and again, gives no
            sign of life for `stall-s` seconds, or takes longer than the budget, or if this process is
            told to end.
        FloatingPointError: the loss is not finite.
    """
    with _terminating_raises():
        task = own_task(task_text, settings)
        deadline = time.monotonic() + budget_s
        root = state_root(settings).resolve()
        site = _Site(task.name, socket_folder(root, task.name), root / f"{task.name}.worker.log")
        file, sizes = write_blobs(blobs, root)
        header: dict[str, Any] = {
            "kind": kind,
            "task": task_text,
            "stored": stored,
            # With the folder written out: the worker may have another environment than this process.
            "settings": asdict(replace(settings, state_dir=str(root))),
            "sizes": sizes,
            "folder": str(Path.cwd()),
            "code": str(CODE),
            "supernode": parent_supernode(),
        }
        with file:
            for _ in range(ATTEMPTS):
                channel = _connect(site)
                header["seconds"] = max(deadline - time.monotonic(), 0.0)
                worker = _peer(channel.socket)
                try:
                    return _ask(channel, worker, site, header, file, settings.stall_s, deadline)
                except ConnectionError:
                    log.warning("the worker of site %s died: the message goes to a new one", site.name)
                    processes.wait_until_gone(*worker, 10.0)
                    # Its socket may still be there for a moment.
                    time.sleep(0.1)
                except _Ending:
                    log.info("the worker of site %s was about to end: a new one is started", site.name)
                finally:
                    channel.close()
    raise WorkerError(
        f"site {site.name}: {ATTEMPTS} workers ended before they answered; {site.log_file} ends: {_tail(site)}"
    )


def _ask(
    channel: Channel,
    worker: tuple[int, float],
    site: _Site,
    header: Mapping[str, Any],
    file: IO[bytes],
    stall_s: float,
    deadline: float,
) -> Answer:
    """Send a message and wait for the answer, as long as the worker gives signs of life and there is time."""
    began = heard = time.monotonic()
    takes_its_time = False
    # A worker that does not read gives no sign of life either.
    with suppress(TimeoutError):
        channel.send(header, file, stall_s)
    while True:
        now = time.monotonic()
        if now >= deadline:
            raise WorkerError(f"site {site.name} gave up after {now - began:.1f} s: the round's time is over")
        silence = math.inf if takes_its_time else heard + stall_s - now
        if silence <= 0:
            # With the processes of its other devices, of which one may be what hangs.
            processes.kill(*worker, group=True)
            raise WorkerError(
                f"the worker of site {site.name} gave no sign of life for {stall_s:g} s (node-config stall-s) and "
                f"was ended; {site.log_file} ends: {_tail(site)}"
            )
        try:
            line = channel.receive(min(deadline - now, silence))
        except TimeoutError:
            continue
        if "result" in line:
            with channel.file() as answer:
                return unpack_answer(line["result"], answer)
        if "error" in line:
            raise _error(line["error"])
        if "ending" in line:
            raise _Ending
        heard = time.monotonic()
        # Reading a corpus for the first time, or waiting for a store, may take any time without a sign of life: only
        # the budget ends that.
        takes_its_time = line["phase"] in ("data", "transfer")


def _error(error: Mapping[str, str]) -> Exception:
    """The worker's exception; one that is not ours keeps its name in the text."""
    name, text = error["type"], error["text"]
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.FomoeError):
        return kind(text)
    return FloatingPointError(text) if name == "FloatingPointError" else WorkerError(f"{name}: {text}")


def _peer(connection: socket.socket) -> tuple[int, float]:
    """The process that listens at the other end, and when it started (-1: it has ended)."""
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    started = processes.start_time(pid)
    return pid, -1 if started is None else started


def _connect(site: _Site) -> Channel:
    """A connection to the worker, which is started if there is none.

    Raises:
        WorkerError: it cannot be started.
    """
    # Without the lock two ClientApps could start two workers.
    with locked(site.folder / START_LOCK, 2 * START_S):
        channel = _try_connect(site.folder)
        if channel is not None:
            return channel
        process = _start(site)
        deadline = time.monotonic() + START_S
        while (channel := _try_connect(site.folder)) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise WorkerError(
                    f"the worker of site {site.name} does not start; {site.log_file} ends: {_tail(site)}"
                )
            time.sleep(0.02)
        return channel


def _try_connect(folder: Path) -> Channel | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(folder / SOCKET))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return Channel(connection)


def _start(site: _Site) -> subprocess.Popen[bytes]:
    """A worker of this very code, which survives this process."""
    if site.log_file.exists() and site.log_file.stat().st_size > LOG_BYTES:
        site.log_file.replace(site.log_file.with_name(f"{site.log_file.name}.1"))
    # -P: do not import from the folder it starts in.
    command = [sys.executable, "-P", "-m", "clients.worker", "--site", site.name]
    command += ["--folder", str(site.folder)]
    paths = [str(CODE), *(path for path in sys.path if Path(path).is_absolute())]
    with site.log_file.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
            start_new_session=True,
        )


def _tail(site: _Site) -> str:
    try:
        lines = site.log_file.read_text(errors="replace").splitlines()
    except OSError:
        return "nothing"
    return " | ".join(lines[-TAIL_LINES:]) or "nothing"


def parent_supernode() -> tuple[int, float] | None:
    """The SuperNode above this process, or else its helper that started us: its number and when it started.

    The worker ends when that process does.
    """
    # Of two of a name the nearest is kept.
    parents = reversed(psutil.Process().parents())
    above = {processes.program_of(process.pid): process.pid for process in parents}
    for program in (SUPERNODE, EXECUTOR):
        if program in above and (started := processes.start_time(above[program])) is not None:
            return above[program], started
    return None


@contextmanager
def _terminating_raises() -> Iterator[None]:
    """SIGTERM raises an error, which Flower turns into a reply.

    Flower's own handler ends the process without a reply, and then the SuperNode waits for it for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise WorkerError("the ClientApp was told to end (SIGTERM)")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
