"""Where ClientApps and the worker of a site meet: a folder that only its owner may enter, with a socket in it.

Nothing listens on a network. Who can enter the folder can have the worker do anything, so a folder of somebody else's,
or one that others can enter, is refused. No PyTorch here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clients.channel import WorkerError

CODE = Path(__file__).resolve().parents[1]  # the folder in which the packages lie
SOCKET = "socket"
START_LOCK = "start.lock"  # held by a ClientApp that looks for a worker or starts one
WORKER_LOCK = "worker.lock"  # held by the worker as long as it lives
LONGEST_SOCKET_PATH = 107  # bytes; the kernel's limit


def meeting_folder(state_root: Path, site: str) -> Path:
    """The folder of the site that keeps its state below this root; made if need be.

    Raises:
        WorkerError: it is not private, cannot be made, or has too long a path.
    """
    key = hashlib.sha256(f"{state_root.resolve()}\0{site}".encode()).hexdigest()[:12]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) if runtime and os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())
    ours = base / f"fomoe-{os.getuid()}"
    folder = ours / key
    if len(os.fsencode(folder / SOCKET)) > LONGEST_SOCKET_PATH:
        raise WorkerError(
            f"{folder / SOCKET}: too long a path for a socket; set XDG_RUNTIME_DIR to a shorter one"
        )
    for path in (ours, folder):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise WorkerError(f"{path}: cannot be made: {error.strerror}") from error
        check_private(path)
    return folder


def check_private(folder: Path) -> None:
    """Raises WorkerError for anything but a folder of our own that nobody else can enter."""
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise WorkerError(f"{folder}: must be a folder, for the worker's socket")
    if facts.st_uid != os.getuid():
        raise WorkerError(f"{folder}: belongs to user {facts.st_uid}, not to {os.getuid()}; remove it")
    if facts.st_mode & 0o077:
        raise WorkerError(
            f"{folder}: others can enter it (mode {stat.S_IMODE(facts.st_mode):o}); remove it, or chmod 700"
        )


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lock that goes when its process does.

    Raises:
        WorkerError: somebody else holds it and does not let go within `seconds`.
    """
    deadline = time.monotonic() + seconds
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise WorkerError(f"{path}: held by another process for {seconds:g} s") from error
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
