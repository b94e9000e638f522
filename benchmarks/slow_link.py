"""A slow link to a server on this machine: bytes of each site go through a port at a site's own pace.

Which site a connection is of is told by the process at its other end. What is no site passes at full speed.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

BLOCK = 2**14


class Link:
    """Both directions of one site's link, each with its own rate: bytes a second, for all connections together."""

    def __init__(self, mbps: float, latency_s: float) -> None:
        self.latency_s, self.rate = latency_s, mbps * 1e6 / 8
        self._free_at = {"up": 0.0, "down": 0.0}
        self._lock = threading.Lock()

    def pass_through(self, direction: str, nbytes: int) -> None:
        """Wait for the turn of so many bytes."""
        with self._lock:
            start = max(self._free_at[direction], time.monotonic())
            self._free_at[direction] = done = start + nbytes / self.rate
        time.sleep(max(done - time.monotonic(), 0.0))


@contextmanager
def slow_links(upstream: int, link_of: Callable[[psutil.Process], Link | None]) -> Iterator[int]:
    """A port in front of another one.

    Args:
        link_of: that of the process at the other end of a connection; None: at full speed.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_accept, args=(listener, upstream, link_of), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _accept(listener: socket.socket, upstream: int, link_of: Callable[[psutil.Process], Link | None]) -> None:
    while True:
        try:
            client, address = listener.accept()
        except OSError:
            return
        server = socket.create_connection(("127.0.0.1", upstream))
        link = _link(address[1], link_of)
        for direction, source, sink in (("up", client, server), ("down", server, client)):
            threading.Thread(target=_pump, args=(source, sink, direction, link), daemon=True).start()


def _link(port: int, link_of: Callable[[psutil.Process], Link | None]) -> Link | None:
    for connection in psutil.net_connections("tcp4"):
        if connection.laddr and connection.laddr.port == port and connection.pid:
            with contextlib.suppress(psutil.Error):
                return link_of(psutil.Process(connection.pid))
    return None


def _pump(source: socket.socket, sink: socket.socket, direction: str, link: Link | None) -> None:
    """Carry one direction. What has passed the link arrives `latency_s` later, while the next is on its way."""
    arriving: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=256)

    def deliver() -> None:
        with contextlib.suppress(OSError):
            while (item := arriving.get())[1]:
                time.sleep(max(item[0] - time.monotonic(), 0.0))
                sink.sendall(item[1])
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    threading.Thread(target=deliver, daemon=True).start()
    with contextlib.suppress(OSError):
        while block := source.recv(BLOCK):
            if link is not None:
                link.pass_through(direction, len(block))
            arriving.put((time.monotonic() + (link.latency_s if link else 0.0), block))
    arriving.put((0.0, b""))
