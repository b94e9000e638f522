"""A real S3 server on loopback, and a bad line in front of it."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KEY, SECRET = "fomoe-test-key", "fomoe-test-secret"
BUCKET = "bucket"


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """nanio in a thread; yields its port. It keeps the signatures' promises: method, name and expiry."""
    import uvicorn
    from nanio.app import build_app
    from nanio.auth.credentials import StaticCredentialResolver
    from nanio.config import Settings

    (folder / BUCKET).mkdir(parents=True)
    app = build_app(Settings(data_dir=folder, credentials=StaticCredentialResolver({KEY: SECRET})))
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1)
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def environment(port: int) -> dict[str, str]:
    """What the server of a federation finds the store by."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


class Line:
    """A line to the server, which carries what it gets until it is told to be bad.

    Each connection gets the next of `faults`, or else one at random with some probability. A fault is `(what, after)`:
    after so many bytes of both directions the line is cut, hangs (swallows all), or damages one byte.
    """

    KINDS = ("cut", "hang", "damage")

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self.faults: list[tuple[str, int]] = []
        self.uploaded = self.downloaded = 0  # bytes to and from the server
        self.spoilt = 0  # connections, at random
        self._probability, self._rng = 0.0, random.Random(0)
        self._sockets: list[socket.socket] = []

    def spoil(self, seed: int, probability: float) -> None:
        self._probability, self._rng = probability, random.Random(seed)

    def go_down(self) -> None:
        """Cut what is open, and whatever connects until the faults are cleared."""
        self.faults[:] = [("cut", 0)] * 10_000
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            fault = self._next_fault()
            server = socket.create_connection(("127.0.0.1", self._upstream))
            self._sockets += [client, server]
            carried = [0]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(
                    target=self._pump, args=(source, sink, *fault, carried, sink is server), daemon=True
                ).start()

    def close(self) -> None:
        for end in self._sockets:
            end.close()

    def _next_fault(self) -> tuple[str, int]:
        if self.faults:
            return self.faults.pop(0)
        if self._rng.random() < self._probability:
            self.spoilt += 1
            return self._rng.choice(self.KINDS), int(10 ** self._rng.uniform(0, 6))
        return "none", 0

    def _pump(
        self, source: socket.socket, sink: socket.socket, what: str, after: int, carried: list[int], up: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while block := bytearray(source.recv(2**16)):
                begin, carried[0] = carried[0], carried[0] + len(block)
                place = after - begin
                if what == "cut" and place < len(block):
                    sink.sendall(block[: max(0, place)])
                    break
                if what == "hang" and place < len(block):
                    continue
                if what == "damage" and 0 <= place < len(block):
                    block[place] ^= 1
                if up:
                    self.uploaded += len(block)
                else:
                    self.downloaded += len(block)
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def bad_line(upstream: int) -> Iterator[tuple[int, Line]]:
    """A line to a server's port; yields its own port, and the line."""
    line = Line(upstream)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=line.accept, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()[1], line
        finally:
            # Closing alone would not wake it.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            line.close()


@contextmanager
def s3_store(folder: Path) -> Iterator[tuple[str, Line]]:
    """An S3 server behind a line, and the environment that finds it; yields the URL for `store=`, and the line."""
    with (
        s3_server(folder) as port,
        bad_line(port) as (line_port, line),
        pytest.MonkeyPatch.context() as patch,
    ):
        for key, value in environment(line_port).items():
            patch.setenv(key, value)
        yield f"s3://{BUCKET}/some/where", line
