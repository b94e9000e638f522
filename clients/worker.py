"""The worker of a site: stays alive between messages, so that PyTorch, device, data and model stay at hand.

    python -m clients.worker --site NAME --folder FOLDER

`clients.relay` starts it when it is needed and hands it messages over the socket in FOLDER. The main thread
does the work of one message after the other; one accepts connections; one looks twice a second whether the SuperNode is
still there, and tells the clients that wait whether the main thread goes on. Others fetch bundles from an object store
and send replies. Signs of life come from the training loop and not from another thread, so that a loop that hangs is
noticed.

It ends when its SuperNode is gone, when it has been idle, when a message comes from another version of the code,
after an error that it does not know, and on SIGTERM. Nothing is lost then: what a site must keep is on its disk.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from clients.relay import CODE
from fomoe_flwr.bundle_file import mapped_blobs
from fomoe_flwr.deploy.channel import (
    SOCKET,
    WORKER_LOCK,
    Answer,
    Channel,
    check_private,
    locked,
    pack_answer,
)
from fomoe_flwr.deploy.processes import is_alive
from fomoe_flwr.errors import FomoeError, WorkerError
from fomoe_flwr.files import machine_error
from fomoe_flwr.site.identity import NodeSettings, own_task, state_root
from fomoe_flwr.site.memory import Memory
from fomoe_flwr.site.work import TRANSFER, WORK, Beat, begin_next, fetch, may_begin_next, perform, send

log = logging.getLogger("fomoe.worker")

IDLE_S = 1800.0
BEAT_EVERY_S = 0.5
WATCH_EVERY_S = 0.5
REQUEST_S = 30.0  # in which a request must come, once a client has connected
PREDECESSOR_S = 60.0  # in which a worker that is ending must have ended


class Abandoned(Exception):
    """No client waits for this work any more."""


class Superseded(Exception):
    """What was begun before its message came is not what the message asks for."""


@dataclass(eq=False)
class Request:
    """A message that was handed over, and the way back."""

    channel: Channel
    header: Mapping[str, Any]
    came: float = field(default_factory=time.monotonic)
    # Its bundles, if they are in an object store: on their way while the work of an earlier message is done.
    fetched: Future[dict[str, bytes]] | None = None

    def left_s(self) -> float:
        """Seconds until nobody waits for the answer any more."""
        return float(self.header["seconds"]) - (time.monotonic() - self.came)

    def bundles(self, beat: Beat) -> dict[str, bytes]:
        """Its bundles by key; waits for them if they must come.

        Raises:
            StoreError: they do not.
        """
        if self.fetched is None:
            with self.channel.file() as sent:
                return mapped_blobs(sent, self.header["sizes"])
        while not self.fetched.done():
            beat(TRANSFER)
            wait([self.fetched], BEAT_EVERY_S)
        return self.fetched.result()


class RequestQueue:
    """What the threads share: the requests that wait, and how often the main thread gave a sign of life."""

    def __init__(self) -> None:
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._beats = 0
        self._beats_told = 0
        self._phase = WORK
        self.supernode: tuple[int, float] | None = None  # process number and start time

    def add(self, request: Request) -> None:
        """One more. The worker belongs to the SuperNode of whoever came last."""
        # A message from other code may lack it. Such a message is declined later, with a reply.
        supernode = request.header.get("supernode")
        with self._changed:
            self.supernode = None if supernode is None else (supernode[0], supernode[1])
            self._waiting.append(request)
            self._changed.notify()

    def next(self, idle_s: float) -> Request | None:
        """The oldest request whose client still waits; None after `idle_s` seconds without any."""
        with self._changed:
            while True:
                while self._waiting:
                    request = self._waiting.popleft()
                    if not request.channel.is_closed():
                        return request
                    log.info("no client waits for this message any more: it is not begun")
                    request.channel.close()
                if not self._changed.wait(idle_s) and not self._waiting:
                    return None

    def beat(self, phase: str) -> None:
        """The main thread goes on."""
        self._beats, self._phase = self._beats + 1, phase

    def tell_waiting(self) -> None:
        """Pass the main thread's signs of life on to the clients that wait, so that they do not take it for dead."""
        beats, phase = self._beats, self._phase
        if beats == self._beats_told:
            return
        self._beats_told = beats
        with self._changed:
            for request in self._waiting:
                # A client that is gone is noticed when its turn comes.
                with suppress(OSError):
                    request.channel.try_send({"busy": beats, "phase": phase})

    def first(self) -> Request | None:
        """The oldest request, which stays where it is."""
        with self._changed:
            return self._waiting[0] if self._waiting else None

    def decline_all(self) -> None:
        """Have the clients that wait look for another worker."""
        with self._changed:
            for request in self._waiting:
                decline(request)
            self._waiting.clear()


def decline(request: Request) -> None:
    """Have the client look for another worker, because this one is about to end."""
    with suppress(OSError):
        request.channel.try_send({"ending": str(CODE)})
    request.channel.close()


def accept(listener: socket.socket, queue: RequestQueue, fetcher: ThreadPoolExecutor) -> None:
    """Take in requests; a thread."""
    while True:
        try:
            channel = Channel(listener.accept()[0])
        except OSError:
            # The listener is closed: the worker is about to end.
            return
        try:
            request = Request(channel, channel.receive(REQUEST_S))
            if request.header.get("stored"):
                request.fetched = fetcher.submit(_fetch, request)
            queue.add(request)
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("a connection without a request")
            channel.close()


def _fetch(request: Request) -> dict[str, bytes]:
    def beat(phase: str) -> None:
        if request.channel.is_closed():
            raise Abandoned

    header = request.header
    settings = NodeSettings(**header["settings"])
    return fetch(header["task"], header["stored"], settings, request.left_s(), beat)


def watch(queue: RequestQueue) -> None:
    """End with the SuperNode, and pass on signs of life; a thread."""
    while True:
        time.sleep(WATCH_EVERY_S)
        if (supernode := queue.supernode) is not None and not is_alive(*supernode):
            log.info("the SuperNode, process %d, has ended: its worker ends too", supernode[0])
            end(0)
        queue.tell_waiting()


def end(code: int) -> NoReturn:
    """End at once, whatever the other threads are doing: files are written under another name and renamed."""
    logging.shutdown()
    os._exit(code)


def beat_for(channel: Channel, stall_s: float) -> Beat:
    """Signs of life to the client that waits for this work. They raise Abandoned if it is gone or does not read."""
    began = time.monotonic()
    sent, sent_phase, unread_since = 0.0, "", 0.0

    def beat(phase: str) -> None:
        nonlocal sent, sent_phase, unread_since
        if channel.is_closed():
            raise Abandoned
        now = time.monotonic()
        if phase == sent_phase and now - sent < BEAT_EVERY_S:
            return
        try:
            delivered = channel.try_send({"beat": round(now - began, 3), "phase": phase})
        except OSError as error:
            raise Abandoned from error
        if delivered:
            sent, sent_phase, unread_since = now, phase, 0.0
            return
        unread_since = unread_since or now
        if now - unread_since > stall_s:
            raise Abandoned

    return beat


def serve(request: Request, memory: Memory, queue: RequestQueue, sender: ThreadPoolExecutor) -> bool:
    """Do the work of one message and answer; False if an unknown error may have left the process broken.

    With strategy.delay=1 a thread of its own sends the answer, and the next round is begun meanwhile.
    """
    header = request.header
    settings = NodeSettings(**header["settings"])
    tell, began = beat_for(request.channel, settings.stall_s), time.monotonic()

    def beat(phase: str) -> None:
        queue.beat(phase)
        tell(phase)

    try:
        # Relative paths mean what they mean to the ClientApp.
        with suppress(OSError):
            os.chdir(header["folder"])
        blobs, reply = perform(header["kind"], header["task"], request.bundles(beat), settings, memory, beat)
        log.info("%s of round %s: %.2f s", header["kind"], reply.round, time.monotonic() - began)
        if header["kind"] != "train" or not may_begin_next(header["task"], settings):
            answer(request, blobs, reply.to_json(), settings, beat)
            return True
        # What that thread does is no sign of life of this one.
        sender.submit(answer, request, blobs, reply.to_json(), settings, tell)
        # The bundles are the other thread's.
        del blobs
        return go_on(header, settings, memory, queue)
    except Abandoned:
        log.info("no client waits for this message any more: its work is dropped")
        request.channel.close()
        return True
    except Exception as error:  # noqa: BLE001 - the server is told
        refuse(request, error, settings)
        return known(error)
    finally:
        os.chdir("/")


def go_on(header: Mapping[str, Any], settings: NodeSettings, memory: Memory, queue: RequestQueue) -> bool:
    """Begin the round after that of a message, as long as nothing else is asked for; False as in `serve`."""
    try:
        begin_next(header["task"], settings, memory, ahead_beat(queue, header, settings, memory))
    except Superseded:
        log.info("the next message asks for something else than what was begun, which is dropped")
    except Exception as error:
        # Nobody waits for it. If it goes wrong again when the message is there, the server is told.
        log.error("a round that was begun before its message: %s", error, exc_info=not known(error))
        memory.empty()
        return known(error)
    return True


def answer(request: Request, blobs: dict[str, bytes], reply: str, settings: NodeSettings, beat: Beat) -> None:
    """Send a reply, whose bundles go by the client or into the object store."""
    header, file = request.header, None
    try:
        stored = ""
        if header["stored"]:
            stored = send(blobs, header["task"], header["stored"], settings, request.left_s(), beat)
        result, file = pack_answer(Answer(blobs, reply, stored), state_root(settings))
    except Abandoned:
        log.info("no client waits for this reply any more")
        request.channel.close()
    except Exception as error:  # noqa: BLE001 - the server is told
        refuse(request, error, settings)
    else:
        deliver(request.channel, {"result": result}, file, settings.stall_s)


def refuse(request: Request, error: Exception, settings: NodeSettings) -> None:
    """Answer with an error."""
    usable = known(error)
    if isinstance(error, OSError | UnicodeError):
        # The machine's fault, such as a full disk; what the site had in memory is forgotten.
        error = WorkerError(f"site {settings.site}: {machine_error(error)}")
    log.error("%s: %s", type(error).__name__, error, exc_info=None if usable else error)
    line = {"error": {"type": type(error).__name__, "text": str(error)}}
    deliver(request.channel, line, None, settings.stall_s)


def known(error: Exception) -> bool:
    """Whether an error leaves the process as it was."""
    return isinstance(error, FomoeError | FloatingPointError | OSError | UnicodeError)


def deliver(channel: Channel, line: Mapping[str, Any], file: IO[bytes] | None, seconds: float) -> None:
    """Send the answer, and close; a client that does not read it within so many seconds does not get it."""
    try:
        channel.send(line, file, seconds)
    except OSError as error:
        log.info("the client does not take the answer: %s", error)
    finally:
        channel.close()
        if file is not None:
            file.close()


def ahead_beat(
    queue: RequestQueue, header: Mapping[str, Any], settings: NodeSettings, memory: Memory
) -> Beat:
    """Signs of life of work that nobody has asked for yet. They raise Superseded if something else is asked for."""
    looked: Request | None = None

    def beat(phase: str) -> None:
        nonlocal looked
        queue.beat(phase)
        if (request := queue.first()) is None or request is looked:
            return
        looked = request
        other = request.header
        same = all(other.get(key) == header[key] for key in ("kind", "code", "settings"))
        if not same or not memory.has_begun(own_task(other["task"], settings)):
            raise Superseded

    return beat


def listen(folder: Path) -> socket.socket:
    """The socket that ClientApps connect to. The caller holds the lock, so a socket that is there is an old one."""
    (folder / SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / SOCKET))
    listener.listen(64)
    return listener


def run(site: str, folder: Path, idle_s: float) -> int:
    """Serve until there is a reason to end; the exit code."""
    queue, memory, code = RequestQueue(), Memory(), 0
    # What is there now stays. A collection that looked at all of PyTorch would take a tenth of a second.
    gc.freeze()
    listener = listen(folder)
    # A SuperNode hands over one message after the other: more than one of each is left from before.
    fetcher, sender = (ThreadPoolExecutor(2, thread_name_prefix=name) for name in ("fetch", "send"))
    threading.Thread(target=accept, args=(listener, queue, fetcher), daemon=True).start()
    threading.Thread(target=watch, args=(queue,), daemon=True).start()
    log.info("worker of site %s, process %d, code in %s", site, os.getpid(), CODE)
    while (request := queue.next(idle_s)) is not None:
        if request.header["code"] != str(CODE):
            log.info("a message from other code in %s: it needs a new worker", request.header["code"])
            decline(request)
            break
        usable = serve(request, memory, queue, sender)
        # Optimizers and tracebacks are held by cycles, and hold gigabytes.
        gc.collect()
        if not usable:
            code = 1
            break
    (folder / SOCKET).unlink(missing_ok=True)
    listener.close()
    queue.decline_all()
    # What is being sent is worth waiting for.
    sender.shutdown()
    return code


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="clients.worker", description=__doc__)
    parser.add_argument("--site", required=True, help="name of the site")
    parser.add_argument("--folder", required=True, type=Path, help="private folder for the socket")
    parser.add_argument("--idle-s", type=float, default=IDLE_S, help="ends after so many idle seconds")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.chdir("/")
    try:
        check_private(chosen.folder)
        with locked(chosen.folder / WORKER_LOCK, PREDECESSOR_S):
            end(run(chosen.site, chosen.folder, chosen.idle_s))
    except (FomoeError, OSError) as error:
        log.error("%s", error)
        end(1)


if __name__ == "__main__":
    main()
