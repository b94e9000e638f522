"""What lies behind a link: one object of a store, to be read in ranges or written, with what Python has.

A link is good for one object, one method and some time. As long as it is good it is a secret, so errors and the log
name the object only. Of a store that is a folder on a shared disk, a link is a path below that (`file:run/name`).

What may work later raises `Again`, everything else a StoreError of one line; when to try again is in `Tries`.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

from fomoe_flwr.errors import StoreError
from fomoe_flwr.files import machine_error, write_atomically
from fomoe_flwr.units import duration

BLOCK = 2**20  # bytes between two looks at the clock
LONGEST_WAIT = 30.0  # seconds between two tries
_TELL_AFTER = 4  # tries in a row that moved nothing
_LONGEST_ANSWER = 64 * 2**10  # bytes of what a store says about an error

Source = bytes | bytearray | memoryview | Path  # what is sent; a mapped file as its memoryview
Progress = Callable[[int], None]  # called with the bytes so far, from several threads, by one at a time

log = logging.getLogger("fomoe")


@dataclass(frozen=True)
class Patience:
    """How long an operation may take, and how often it is tried."""

    seconds: float = 3600.0  # for all tries together
    stall: float = 60.0  # seconds without a byte, after which a connection is given up
    first_wait: float = 0.5  # seconds before the second try; doubles with every try that moved nothing
    parallel: int = 8  # pieces of one object at a time
    seed: int = 0  # of the jitter; another one at each site, so that they do not come back all at once


PATIENCE = Patience()


class Again(Exception):
    """What may work when it is tried again."""


class TimeOver(Again):
    """There is no time left. Whoever tries again learns that there is no next try."""


class Clock:
    """The time that is left for one operation, for all its threads.

    Args:
        stopped: ends it when it is set; may be that of several operations.
    """

    def __init__(self, patience: Patience, stopped: threading.Event | None = None) -> None:
        self.patience = patience
        self.told = False
        """Whether the log says already that something is tried again."""
        self._start = time.monotonic()
        self._stopped = stopped or threading.Event()

    def spent(self) -> float:
        return time.monotonic() - self._start

    def left(self) -> float:
        """Seconds that the next wait for the store may take.

        Raises:
            TimeOver: none.
        """
        left = self.patience.seconds - self.spent()
        if left <= 0 or self._stopped.is_set():
            raise TimeOver("it takes too long")
        return min(self.patience.stall, left)

    def rest(self) -> Patience:
        """Patience for a part of the operation."""
        return replace(self.patience, seconds=max(0.0, self.patience.seconds - self.spent()))

    def sleep(self, seconds: float) -> bool:
        """Whether there was time for it, and still is."""
        return self.spent() + seconds < self.patience.seconds and not self._stopped.wait(seconds)

    def stop(self) -> None:
        """Let the other threads end."""
        self._stopped.set()


class Tries:
    """The tries of one thing: when the next one is, and when there is none."""

    def __init__(self, name: str, clock: Clock, piece: int = 0) -> None:
        self._name, self._clock = name, clock
        self._failed = 0  # in a row
        self._reason: Again | None = None
        self._rng = random.Random(f"{clock.patience.seed} {name} {piece}")

    def wait(self, error: Again, moved: bool = False) -> None:
        """Wait before the next try.

        Args:
            moved: the try that failed got something done, so the next one need not wait longer.

        Raises:
            StoreError: the time is over.
        """
        self._failed = 1 if moved else self._failed + 1
        if self._reason is None or not isinstance(error, TimeOver):
            self._reason = error
        if self._failed == _TELL_AFTER and not self._clock.told:
            # Whoever watches should know why nothing moves.
            self._clock.told = True
            log.warning("%s: %s; trying on", self._name, error)
        longest = min(LONGEST_WAIT, self._clock.patience.first_wait * 2.0 ** min(self._failed - 1, 20))
        if not self._clock.sleep(longest * self._rng.uniform(0.5, 1)):
            spent = duration(self._clock.spent())
            raise StoreError(f"{self._name}: given up after {spent}: {self._reason}") from None


def blocks(source: Source) -> Iterator[memoryview | bytes]:
    """The bytes of what is sent; of a file, without holding them."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    else:
        view = memoryview(source).cast("B")
        for at in range(0, len(view), BLOCK):
            yield view[at : at + BLOCK]


def size_of(source: Source) -> int:
    return source.stat().st_size if isinstance(source, Path) else memoryview(source).nbytes


def name_of(link: str) -> str:
    """What may be shown of a link: where it leads, without its signature.

    Raises:
        StoreError: no link.
    """
    try:
        parts = urlsplit(link)
    except ValueError as error:
        raise StoreError(f"a link that cannot be read ({error})") from None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{unquote(parts.path)}"


# What may work later, by status and code: also what was damaged on the way, if the store says so.
_LATER = re.compile(
    r"^(408|425|429|5(?!07|01)\d\d)|BadDigest|Md5Mismatch|RequestTimeout|IncompleteBody|SlowDown"
)
# What all else means, by status, code and text. The first that fits counts.
_MEANINGS = (
    (r"expired|ExpiredToken", "the link, or the server's credentials, have expired"),
    (r"RequestTimeTooSkewed|not yet valid|time frame", "a clock is wrong: set that of the server (NTP)"),
    (
        r"NoSuchBucket|ContainerNotFound|bucket does not exist",
        "there is no such bucket; create it, or correct store=",
    ),
    (
        r"SignatureDoesNotMatch|AuthenticationFailed|InvalidAccessKeyId|^401",
        "the signature is not good for this: the link is for something else, or the server's credentials are wrong",
    ),
    (
        r"AuthorizationHeaderMalformed|PermanentRedirect|TemporaryRedirect|^3\d\d",
        "the store is somewhere else; see the region and endpoint of the server",
    ),
    (r"EntityTooLarge|RequestBodyTooLarge|^413", "it is larger than the store takes"),
    (r"QuotaExceeded|StorageFull|InsufficientStorage|^507", "the store has no space left; make room"),
    (r"AccessDenied|^403", "no permission; see the rights of the server's credentials, and its clock"),
    (r"^404", "there is no such object: it was never sent, or is deleted"),
    (r"InvalidRange|^416", "it is shorter than announced"),
)


def refusal(name: str, status: int, text: str) -> NoReturn:
    """Raise what a store's answer means.

    Args:
        name: of the object; without a signature.
        text: of the store. It may hold signatures, so its code alone is shown.

    Raises:
        Again: it may work later.
        StoreError: it will not.
    """
    code = re.search(r"<Code>(\w{1,80})</Code>", text)
    said = f"{status} {code[1]}" if code else str(status)
    if _LATER.search(said):
        raise Again(f"the store answered {said}")
    # Not all of the text: an object may have any name.
    text = " ".join(re.findall(r"<(?:Message|AuthenticationErrorDetail)>([^<]{1,500})", text))
    meaning = next((line for find, line in _MEANINGS if re.search(find, f"{said} {text}")), "it was refused")
    raise StoreError(f"{name}: {meaning} (the store answered {said})")


@contextmanager
def opened(link: str, shared: Path | None, clock: Clock) -> Iterator[FileObject | HttpObject]:
    """What lies behind a link.

    Args:
        shared: the folder of the store, if sites share a disk: as it is called on this machine. A link to a file lies
            below it, or is refused: a server must not have a site read or write any file it likes.

    Raises:
        StoreError: a link that is not for this site, or none at all.
    """
    try:
        found = FileObject(link, shared, clock) if link.startswith("file:") else HttpObject(link, clock)
    except ValueError as error:
        # Not the link itself: it may be a secret all the same.
        raise StoreError(f"a link that cannot be read ({error})") from None
    with closing(found):
        yield found


class FileObject:
    """An object in a folder on a shared disk."""

    def __init__(self, link: str, shared: Path | None, clock: Clock) -> None:
        relative = link.removeprefix("file:")
        if shared is None:
            raise StoreError(
                f"{relative}: a path on a shared disk, and this site was told of none; give fomoe site --store-dir"
            )
        self._path = shared / relative
        self.name, self.clock = str(self._path), clock
        if not self._path.resolve().is_relative_to(shared.resolve()):
            raise StoreError(f"{self.name}: lies outside of {shared}, the folder that is shared")

    def close(self) -> None:
        """Nothing is open between two calls."""

    def read(self, begin: int, end: int, nbytes: int) -> Iterator[bytes]:
        """Some of the bytes of an object that has `nbytes`."""
        with self._sorted_errors(), self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != nbytes:
                raise StoreError(f"{self.name}: it has {size} bytes, {nbytes} were announced")
            file.seek(begin)
            while begin < end:
                self.clock.left()
                block = file.read(min(BLOCK, end - begin))
                if not block:
                    raise Again(f"it was cut at byte {begin}")
                begin += len(block)
                yield block

    def write(self, source: Source, progress: Progress | None) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                for block in _observed(source, progress):
                    self.clock.left()
                    file.write(block)

        # The server made it when it gave the link away.
        if not self._path.parent.is_dir():
            raise StoreError(f"{self.name}: its folder is not there; is the shared disk mounted?")
        with self._sorted_errors():
            write_atomically(self._path, write)

    @contextmanager
    def _sorted_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise StoreError(
                f"{self.name}: there is no such object: it was never sent, or is deleted; or the disk is not mounted"
            ) from None
        except OSError as error:
            raise StoreError(f"{self.name}: {machine_error(error)}") from error


class HttpObject:
    """An object behind a signed link. Each thread has one connection, which it uses until something fails."""

    def __init__(self, link: str, clock: Clock) -> None:
        self.name, self.clock = name_of(link), clock
        parts = urlsplit(link)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StoreError(f"{self.name}: a link begins with https://, http:// or file:")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._target = f"{parts.path or '/'}?{parts.query}"
        self._times = _times(dict(parse_qsl(parts.query)))
        self._headers: dict[str, str] = {}
        self._connections: dict[int, http.client.HTTPConnection] = {}
        # Apart: a connection forgets its socket when the store says that it will close.
        self._sockets: dict[int, socket.socket] = {}

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def read(self, begin: int, end: int, nbytes: int) -> Iterator[bytes]:
        """Some of the bytes of an object that has `nbytes`."""
        try:
            response = self._ask("GET", {"Range": f"bytes={begin}-{end - 1}"} if nbytes else {})
            self._check_range(response, begin, end, nbytes)
            while begin < end:
                with self._sorted_errors():
                    self._limit()
                    block = response.read1(min(BLOCK, end - begin))
                if not block:
                    raise Again(f"the connection was cut at byte {begin}")
                begin += len(block)
                yield block
            with self._sorted_errors():
                # Nothing is left, and this frees the connection for the next request.
                response.read()
        except BaseException:
            self._drop()
            raise

    def write(self, source: Source, progress: Progress | None) -> None:
        """All of an object; for a link to one object knows no parts."""
        if not self._headers:
            self._headers = {
                "Content-Length": str(size_of(source)),
                "Content-Type": "application/octet-stream",
                # Azure wants it; others do not look at it.
                "x-ms-blob-type": "BlockBlob",
            }
            if not self._secure:
                # Every kind of store compares it, and what was damaged is sent again. TLS sees to that itself.
                md5 = hashlib.md5(usedforsecurity=False)
                for block in blocks(source):
                    md5.update(block)
                self._headers["Content-MD5"] = base64.b64encode(md5.digest()).decode()

        def limited() -> Iterator[memoryview | bytes]:
            for block in _observed(source, progress):
                self._limit()
                yield block
            # A store may have to copy all of it before it answers.
            self._limit()

        try:
            self._ask("PUT", self._headers, limited())
        finally:
            self._drop()

    def _ask(
        self, method: str, headers: dict[str, str], body: Iterator[memoryview | bytes] | None = None
    ) -> http.client.HTTPResponse:
        with self._sorted_errors():
            connection = self._connected()
            try:
                connection.request(method, self._target, body=body, headers=headers)
            except (BrokenPipeError, ConnectionResetError):
                # A store that refuses does not wait for the rest. It may have said why.
                if body is None:
                    raise
            response = connection.getresponse()
            if response.status in (200, 201, 206):
                return response
            text = b""
            while len(text) < _LONGEST_ANSWER and (block := response.read1(_LONGEST_ANSWER)):
                text += block
                self._limit()
        self._check_times(response)
        refusal(self.name, response.status, text.decode(errors="replace"))

    def _check_range(self, response: http.client.HTTPResponse, begin: int, end: int, nbytes: int) -> None:
        said = response.getheader("Content-Range", "")
        size = re.fullmatch(r"bytes \d+-\d+/(\d+)", said)
        length = response.getheader("Content-Length", "")
        found = size[1] if size else length if response.status == 200 else ""
        if found.isdecimal() and int(found) != nbytes:
            raise StoreError(f"{self.name}: it has {found} bytes, {nbytes} were announced")
        if nbytes and said != f"bytes {begin}-{end - 1}/{nbytes}":
            raise StoreError(
                f"{self.name}: the store was asked for a range of bytes, and sent something else"
            )

    def _check_times(self, response: http.client.HTTPResponse) -> None:
        """Of a link that was refused: whether its time is over, or has not begun. The store's clock counts.

        Raises:
            StoreError: so it is.
        """
        try:
            now = parsedate_to_datetime(response.getheader("Date", ""))
        except ValueError:
            return
        if self._times is None or response.status not in (400, 401, 403):
            return
        now = now.replace(tzinfo=now.tzinfo or UTC)
        begin, end = self._times
        # It comes in whole seconds.
        if now >= end:
            ago = duration((now - end).total_seconds())
            raise StoreError(
                f"{self.name}: the link expired at {end:%H:%M:%S} UTC, {ago} ago by the store's clock; the server must "
                "sign for longer. If the link is new, the server's clock is slow: set it (NTP)"
            )
        if begin > now + timedelta(minutes=1):
            ahead = duration((begin - now).total_seconds())
            raise StoreError(
                f"{self.name}: by the store's clock the link will be good in {ahead}: the server's clock is fast; set "
                "it (NTP)"
            )

    def _connected(self) -> http.client.HTTPConnection:
        thread = threading.get_ident()
        connection = self._connections.get(thread)
        if connection is None or connection.sock is None:
            connection = self._new()
            connection.timeout = self.clock.left()
            connection.connect()
            self._connections[thread], self._sockets[thread] = connection, connection.sock
        self._limit()
        return connection

    def _limit(self) -> None:
        """Bound the next wait for the socket."""
        self._sockets[threading.get_ident()].settimeout(self.clock.left())

    def _new(self) -> http.client.HTTPConnection:
        if not self._secure:
            return http.client.HTTPConnection(self._host, self._port)
        context = ssl.create_default_context()
        proxy = urllib.request.getproxies().get("https")
        if proxy is None or urllib.request.proxy_bypass(self._host):
            return http.client.HTTPSConnection(self._host, self._port, context=context)
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port or 80, context=context)
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
        headers = (
            {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"} if parts.username else {}
        )
        connection.set_tunnel(self._host, self._port, headers)
        return connection

    def _drop(self) -> None:
        if connection := self._connections.pop(threading.get_ident(), None):
            connection.close()

    @contextmanager
    def _sorted_errors(self) -> Iterator[None]:
        """What the network says, never with the link in it."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise StoreError(
                f"{self.name}: its certificate is not trusted ({error.verify_message}); see SSL_CERT_FILE"
            ) from None
        except TimeoutError:
            raise Again(f"no byte in {duration(self.clock.patience.stall)}") from None
        except OSError as error:
            raise Again(error.strerror or str(error) or type(error).__name__) from None
        except http.client.HTTPException as error:
            raise Again(f"an answer that cannot be read ({type(error).__name__})") from None


def _observed(source: Source, progress: Progress | None) -> Iterator[memoryview | bytes]:
    sent = 0
    for block in blocks(source):
        yield block
        sent += len(block)
        if progress:
            progress(sent)


def _times(query: dict[str, str]) -> tuple[datetime, datetime] | None:
    """From when to when a link is good; None where it does not say."""
    try:
        if "se" in query:
            # Azure's.
            end = datetime.fromisoformat(query["se"])
            begin = datetime.fromisoformat(query.get("st", query["se"]))
        else:
            vendor = "Goog" if "X-Goog-Date" in query else "Amz"
            begin = datetime.strptime(query[f"X-{vendor}-Date"], "%Y%m%dT%H%M%S%z")
            end = begin + timedelta(seconds=int(query[f"X-{vendor}-Expires"]))
    except (KeyError, ValueError, OverflowError):
        return None
    return begin.replace(tzinfo=begin.tzinfo or UTC), end.replace(tzinfo=end.tzinfo or UTC)
