"""How a ClientApp and its worker talk to each other: lines of JSON over a Unix socket, bundles in a file.

The file has no name and lies in the site's state folder, whose disk has room for it; its descriptor goes along with a
line. The receiver maps it and reads the bundles where they lie. No PyTorch here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from fomoe_flwr.bundle_file import read_blobs, write_blobs
from fomoe_flwr.errors import WorkerError

READ_BYTES = 2**16


class Answer(NamedTuple):
    """What a site answers, before Flower's records are made of it."""

    blobs: dict[str, bytes]
    header: str  # the Reply as JSON
    stored: str = ""  # what the message says of its bundles where they are in an object store


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._received = bytearray()
        self._searched = 0
        self._descriptors: list[int] = []

    def send(self, message: Mapping[str, Any], file: IO[bytes] | None, seconds: float) -> None:
        """Send one line, and with it a file.

        Raises:
            TimeoutError: the other end does not read for so many seconds.
            OSError: the other end is gone.
        """
        self.socket.settimeout(seconds)
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if file is not None:
            line = line[socket.send_fds(self.socket, [line], [file.fileno()]) :]
        # Nothing may be left, and then the other end may be gone already.
        if line:
            self.socket.sendall(line)

    def try_send(self, message: Mapping[str, Any]) -> bool:
        """Send one short line if there is room for it.

        Raises:
            OSError: the other end is gone.
        """
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        self.socket.setblocking(False)
        try:
            self.socket.send(line)
        except BlockingIOError:
            return False
        return True

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next line.

        Raises:
            TimeoutError: no whole line within `seconds`.
            ConnectionError: the other end is gone.
        """
        deadline = time.monotonic() + seconds
        while (end := self._received.find(b"\n", self._searched)) < 0:
            self._searched = len(self._received)
            self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part, descriptors, _, _ = socket.recv_fds(self.socket, READ_BYTES, 1)
            self._descriptors += descriptors
            if not part:
                raise ConnectionResetError("the other end closed the connection")
            self._received += part
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        message: dict[str, Any] = json.loads(line)
        return message

    def file(self) -> IO[bytes]:
        """The file that came with the last line.

        Raises:
            ConnectionError: there was none.
        """
        if not self._descriptors:
            raise ConnectionAbortedError("the other end sent no file")
        return os.fdopen(self._descriptors.pop(0), "rb")

    def is_closed(self) -> bool:
        """Whether either end is gone. For an end that has read all it was sent."""
        try:
            self.socket.setblocking(False)
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self.socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def pack_answer(answer: Answer, folder: Path) -> tuple[dict[str, Any], IO[bytes]]:
    """The line and the file of an answer; its bundles are taken out of it."""
    blobs = answer.blobs
    file, sizes = write_blobs(((key, blobs.pop(key)) for key in list(blobs)), folder)
    return {"header": answer.header, "stored": answer.stored, "sizes": sizes}, file


def unpack_answer(line: Mapping[str, Any], file: IO[bytes]) -> Answer:
    """The answer of a line and a file."""
    return Answer(read_blobs(file, line["sizes"]), line["header"], line["stored"])


# ----- the folder with the socket: only its owner may enter it
#
# Nothing listens on a network. A user who can enter the folder can have the worker do anything, so a folder of another
# user, or one that others can enter, is refused.

SOCKET = "socket"
START_LOCK = "start.lock"  # held by a ClientApp that looks for a worker or starts one
WORKER_LOCK = "worker.lock"  # held by the worker as long as it lives
LONGEST_SOCKET_PATH = 107  # bytes; the kernel's limit


def socket_folder(state_root: Path, site: str) -> Path:
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
    """Raises WorkerError for anything but a folder of our own that no one else can enter."""
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
    """Hold a lock that is released when its process ends, however it ends.

    Raises:
        WorkerError: another process holds it and does not release it within `seconds`.
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
