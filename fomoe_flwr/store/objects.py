"""An object store as the server sees it: what a run keeps there, and links for sites, which hold no credentials.

Everything of a run lies below `<store>/<run>/`: bundles under the SHA-256 of their bytes, each once, and replies under
`replies/<round>/<site>-<random>`. Bytes travel by links, for the server as for a site (`transfer.py`); obstore signs,
lists and deletes. It takes credentials from the environment, as the store's own tools do (AWS_…, GOOGLE_…, AZURE_…).

With `store=file:///…` links are paths. That is for sites that share a disk and trust each other.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from copy import copy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from fomoe_flwr.checks import check_store
from fomoe_flwr.errors import ConfigError, StoreError
from fomoe_flwr.files import machine_error
from fomoe_flwr.store.links import (
    PATIENCE,
    Again,
    Clock,
    Patience,
    Progress,
    Source,
    Tries,
    blocks,
    refusal,
    size_of,
)
from fomoe_flwr.store.transfer import fetch_file, send
from fomoe_flwr.untrusted import one_line

LONGEST_LINK = 7 * 24 * 3600.0  # seconds; S3 and Google sign for no longer

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

Method = Literal["GET", "PUT"]
Result = TypeVar("Result")


class Store:
    """What one run keeps in an object store.

    Names are paths below the run: the key of a bundle, the name of a reply. Every operation ends within
    `Patience.seconds`, at the latest one `Patience.stall` after it, and what fails raises a StoreError of one line.
    """

    def __init__(self, url: str, run: str, patience: Patience = PATIENCE) -> None:
        """Nothing is asked yet; `names` tells whether it can be reached.

        Args:
            url: `file:///…`, `s3://bucket/…`, `gs://bucket/…` or `az://account/container/…`.
            run: name of the run, below which all of it lies.

        Raises:
            ConfigError: another URL, or one with a password; or obstore is missing, or cannot work with it.
        """
        check_store(url)
        parts = urlsplit(url)
        if not _NAME.fullmatch(run):
            raise ConfigError(
                f"{run}: the name of a run in a store has letters, digits, '.', '_' and '-' only"
            )
        self._url = f"{url.rstrip('/')}/{run}"
        self.patience = patience
        self.shared: Path | None = None
        """Of a `file://` store its folder, below which links lie."""
        self._backend: _Backend
        if parts.scheme == "file":
            self.shared = Path(unquote(parts.path))
            self._backend = _Folder(self.shared, run)
        else:
            self._backend = _Bucket(url, self._url, patience)

    def within(self, seconds: float) -> Store:
        """The same, with no more time for each operation."""
        other = copy(self)
        other.patience = replace(self.patience, seconds=min(seconds, self.patience.seconds))
        return other

    def put(
        self,
        source: Source,
        progress: Progress | None = None,
        clock: Clock | None = None,
        afresh: bool = False,
    ) -> str:
        """Store bytes under their SHA-256, and return that. An object of this size that is there is not sent again.

        Args:
            afresh: send it all the same; what is there may be damaged.
            clock: by which it can be stopped; by default one of its own.

        Raises:
            StoreError: it could not be stored, or is stopped.
            OSError: the source cannot be read.
        """
        sha256 = hashlib.sha256()
        for block in blocks(source):
            sha256.update(block)
        key = sha256.hexdigest()
        clock = clock or Clock(self.patience)
        if afresh or self._asked(key, lambda: self._backend.size(key), clock) != size_of(source):
            link = self._own_link("PUT", key, clock)
            send(link, source, self.shared, clock=clock, progress=progress)
        return key

    def get_file(
        self, name: str, digest: str, nbytes: int, target: Path, progress: Progress | None = None
    ) -> None:
        """An object as a file, verified; goes on where an earlier call was cut. See `transfer.fetch_file`."""
        clock = Clock(self.patience)
        link = self._own_link("GET", name, clock)
        fetch_file(link, digest, nbytes, target, self.shared, clock.rest(), progress)

    def bundle_link(self, key: str, seconds: float) -> str:
        """A link with which whoever has it can read this object for so long."""
        return self._link("GET", key, seconds, Clock(self.patience))

    def reply_link(self, round_number: int, site: str, seconds: float) -> tuple[str, str]:
        """A name for a site's reply, and a link with which it can write that object, and nothing else, for so long.

        No kind of store lets obstore sign a size. A reply that is larger than announced is refused by `get` before its
        first byte; `delete` or `sweep` gives its room back.

        Raises:
            StoreError: it cannot be signed; or the site's name does not fit into one of an object.
        """
        if not _NAME.fullmatch(site):
            raise StoreError(
                f"{site}: the name of a site in a store has letters, digits, '.', '_' and '-' only"
            )
        name = f"replies/{round_number:06d}/{site}-{secrets.token_hex(8)}"
        return name, self._link("PUT", name, seconds, Clock(self.patience))

    def names(self) -> dict[str, int]:
        """All objects of this run, with their sizes."""
        return self._asked("", self._backend.sizes, Clock(self.patience))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. One that is not there is deleted already."""
        self._delete(names, Clock(self.patience))

    def sweep(self, keep: Collection[str]) -> int:
        """Delete all objects of this run but some; returns how many bytes that gave back.

        Not while a reply is waited for: in a folder, the link to write it would be no good any more.
        """
        clock = Clock(self.patience)
        there = self._asked("", self._backend.sizes, clock)
        # While a site writes an object in a folder, that has its name with something behind it.
        old = {name: size for name, size in there.items() if name.partition(".partial-")[0] not in keep}
        self._delete(old, clock)
        return sum(old.values())

    def _delete(self, names: Iterable[str], clock: Clock) -> None:
        for some in _batches(sorted(names), 1000):
            self._asked("", lambda some=some: self._backend.delete(some), clock)  # type: ignore[misc]

    def _own_link(self, method: Method, name: str, clock: Clock) -> str:
        return self._link(method, name, self.patience.seconds + 60, clock)

    def _link(self, method: Method, name: str, seconds: float, clock: Clock) -> str:
        return self._asked(name, lambda: self._backend.link(method, name, min(seconds, LONGEST_LINK)), clock)

    def _asked(self, name: str, ask: Callable[[], Result], clock: Clock) -> Result:
        shown = f"{self._url}/{name}".rstrip("/")
        tries = Tries(shown, clock)
        while True:
            try:
                try:
                    return ask()
                except self._backend.errors as error:
                    # Its text may have a signature in it.
                    raise self._backend.meaning(shown, error) from None
            except Again as error:
                tries.wait(error)


class _Backend(Protocol):
    """What a kind of store is asked."""

    errors: tuple[type[Exception], ...]

    def size(self, name: str) -> int | None: ...

    def sizes(self) -> dict[str, int]: ...

    def delete(self, names: list[str]) -> None: ...

    def link(self, method: Method, name: str, seconds: float) -> str: ...

    def meaning(self, shown: str, error: Exception) -> Exception: ...


class _Folder:
    """A folder on a disk that all sites share."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, shared: Path, run: str) -> None:
        self._folder, self._run = shared / run, run

    def size(self, name: str) -> int | None:
        path = self._folder / name
        return path.stat().st_size if path.exists() else None

    def sizes(self) -> dict[str, int]:
        found = {}
        for path in self._folder.rglob("*"):
            try:
                if path.is_file():
                    found[path.relative_to(self._folder).as_posix()] = path.stat().st_size
            except FileNotFoundError:
                # A site has just finished writing, and it has another name now.
                continue
        return found

    def delete(self, names: list[str]) -> None:
        for name in names:
            (self._folder / name).unlink(missing_ok=True)
        below = [path for path in self._folder.rglob("*") if path.is_dir()]
        for folder in (*sorted(below, reverse=True), self._folder):
            # One that has something in it stays.
            with suppress(OSError):
                folder.rmdir()

    def link(self, method: Method, name: str, seconds: float) -> str:
        if method == "PUT":
            # A site that does not find it knows that the shared disk is missing.
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
        return f"file:{self._run}/{name}"

    def meaning(self, shown: str, error: Exception) -> Exception:
        return StoreError(f"{shown}: {machine_error(error)}")


class _Bucket:
    """A bucket, by obstore."""

    def __init__(self, url: str, run_url: str, patience: Patience) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise ConfigError(f"store={url}: needs obstore; pip install 'fomoe-flwr[store]'") from error
        self.errors: tuple[type[Exception], ...] = (BaseError, OSError, ValueError)
        self._obstore: Any = obstore
        seconds = timedelta(seconds=patience.stall)
        options: dict[str, Any] = {
            # Without encryption only where the environment has an endpoint of that kind.
            "client_options": {"timeout": seconds, "connect_timeout": seconds, "allow_http": True},
            # Tries are counted by us, for all requests alike.
            "retry_config": {"max_retries": 0},
        }
        if run_url.startswith("az://"):
            if not urlsplit(url).path.strip("/"):
                raise ConfigError(f"store={url}: names no container; needs az://account/container/…")
            # obstore has the container first, and looks for the account elsewhere.
            options["account_name"], _, rest = run_url.removeprefix("az://").partition("/")
            run_url = f"az://{rest}"
        try:
            self._store: Any = from_url(run_url, **options)
        except self.errors as error:
            raise ConfigError(f"store={url}: {_shown(error)}") from None

    def size(self, name: str) -> int | None:
        try:
            return int(self._obstore.head(self._store, name)["size"])
        except FileNotFoundError:
            # Or there is no such bucket: the answer does not say, and what comes next will.
            return None

    def sizes(self) -> dict[str, int]:
        return {item["path"]: item["size"] for page in self._obstore.list(self._store) for item in page}

    def delete(self, names: list[str]) -> None:
        try:
            self._obstore.delete(self._store, names)
        except FileNotFoundError:
            # Google and Azure stop at one that is not there.
            for name in set(names) & set(self.sizes()):
                self._obstore.delete(self._store, name)

    def link(self, method: Method, name: str, seconds: float) -> str:
        return str(self._obstore.sign(self._store, method, name, timedelta(seconds=seconds)))

    def meaning(self, shown: str, error: Exception) -> Exception:
        text = str(error)
        status = re.search(r"status code: (\d{3})", text)
        try:
            if status:
                refusal(shown, int(status[1]), text)
        except (Again, StoreError) as meaning:
            return meaning
        if re.search(r"HTTP error(?!: builder)|time(d )?out|connection", text):
            return Again("the store does not answer")
        return StoreError(f"{shown}: {_shown(error)}")


def _batches(names: list[str], most: int) -> Iterable[list[str]]:
    return (names[at : at + most] for at in range(0, len(names), most))


def _shown(error: Exception) -> str:
    """An error of obstore without what is for programmers, and what stands behind a question mark: it may be signed."""
    return one_line(re.sub(r"\?\S+", "?…", str(error).partition("\n\nDebug source")[0]))
