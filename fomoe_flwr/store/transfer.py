"""Whole objects by links: fetched in parallel pieces and verified, or sent. All that a site needs of an object store:
no credentials, and no library but Python's own.

What fails is tried again, until the time for the whole operation is over. What has come of an object stays, also after
the process was killed, and all of it is verified at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from fomoe_flwr.errors import StoreError
from fomoe_flwr.files import flush, machine_error, naming
from fomoe_flwr.store.links import (
    BLOCK,
    PATIENCE,
    Again,
    Clock,
    FileObject,
    HttpObject,
    Patience,
    Progress,
    Source,
    Tries,
    opened,
)

PIECE = 16 * 2**20  # bytes asked for at once

log = logging.getLogger("fomoe")


class WrongBytesError(StoreError):
    """An object that is not what was announced."""


def fetch_file(
    link: str,
    digest: str,
    nbytes: int,
    target: Path,
    shared: Path | None = None,
    patience: Patience = PATIENCE,
    progress: Progress | None = None,
) -> None:
    """An object as a file, which has its name only when all of it is verified and on the disk.

    What comes before a cut lies beside it, as `<target>.part-<digest>`, and the next call for the same object goes on
    from there: only pieces that were under way come again.

    Args:
        link: to read the object.
        digest: its SHA-256, hex.
        nbytes: its size.
        shared: the folder of the store, if sites share a disk; see `opened`.

    Raises:
        StoreError: it is not there, has another size or other bytes, the link is not good for it, the time is over, or
            the disk is full. One line, without the signature.
    """
    part = target.with_name(f"{target.name}.part-{digest[:16]}")
    with opened(link, shared, Clock(patience)) as source:
        try:
            with naming(part), _part_file(part, source.name) as file:
                _fetch_verified(source, digest, _PartFile(file, nbytes), progress)
                os.ftruncate(file, nbytes)
                os.fsync(file)
                part.replace(target)
                flush(target.parent)
        except OSError as error:
            raise StoreError(f"{source.name}: {machine_error(error)}") from error


def send(
    link: str,
    source: Source,
    shared: Path | None = None,
    patience: Patience = PATIENCE,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> None:
    """Write an object. After a cut all of it is sent again, and `progress` begins anew.

    Args:
        link: to write the object.
        shared: see `opened`.
        clock: of an operation that this is part of, in place of the patience.

    Raises:
        StoreError: the link is not good for it, the store has no space, or the time is over. One line, without the
            signature.
        OSError: the source cannot be read.
    """
    clock = clock or Clock(patience)
    with opened(link, shared, clock) as target:
        tries = Tries(target.name, clock)
        while True:
            try:
                return target.write(source, progress)
            except Again as error:
                tries.wait(error)


class _PartFile:
    """An object's bytes in a file, and behind them one byte for each piece: whether that is complete."""

    def __init__(self, file: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._file = file
        # Of an empty object one: whether it is there must be asked.
        pieces = max(1, -(-nbytes // PIECE))
        if os.fstat(file).st_size != nbytes + pieces:
            os.ftruncate(file, 0)
            # A full disk is known before anything has travelled.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, nbytes + pieces)
            os.ftruncate(file, nbytes + pieces)
        self.done = bytearray(os.pread(file, pieces, nbytes))

    def bounds(self, index: int) -> tuple[int, int]:
        return index * PIECE, min((index + 1) * PIECE, self.nbytes)

    def mark(self, index: int, done: bool) -> None:
        self.done[index] = done
        self.write(self.nbytes + index, bytes([done]))

    def read(self, begin: int, end: int) -> bytes:
        return os.pread(self._file, end - begin, begin)

    def write(self, at: int, block: bytes) -> None:
        view = memoryview(block)
        while view:
            written = os.pwrite(self._file, view, at)
            view, at = view[written:], at + written


@contextmanager
def _part_file(part: Path, name: str) -> Iterator[int]:
    """An open file that no other process writes."""
    part.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other one may have finished in between.
            ours = os.path.samestat(os.fstat(file), part.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise StoreError(f"{name}: another process is fetching it to {part}; end that one first")
        try:
            yield file
        except (OSError, WrongBytesError):
            # The disk may be full; and of wrong bytes nothing is worth keeping.
            part.unlink(missing_ok=True)
            raise
    finally:
        os.close(file)


def _fetch_verified(
    source: FileObject | HttpObject, digest: str, place: _PartFile, progress: Progress | None
) -> None:
    """Fetch what is not there, and compare all of it with the digest; once more if that differs.

    Bytes that lay there may be others since a machine lost its power; bytes that came may have been damaged.
    """
    if _fetched(source, place, progress) == digest:
        return
    log.warning("%s: other bytes than announced; fetching all of it again", source.name)
    for index in range(len(place.done)):
        place.mark(index, False)
    if _fetched(source, place, progress) != digest:
        raise WrongBytesError(
            f"{source.name}: twice other bytes than announced (SHA-256); it has to be written again"
        )


def _fetched(source: FileObject | HttpObject, place: _PartFile, progress: Progress | None) -> str:
    """Fetch the pieces that are not complete; returns the digest of all."""
    clock = source.clock
    pieces = range(len(place.done))
    so_far = sum(end - begin for index in pieces if place.done[index] for begin, end in [place.bounds(index)])
    lock = threading.Lock()

    def fetch_piece(index: int) -> tuple[int, int]:
        nonlocal so_far
        begin, end = place.bounds(index)
        tries = Tries(source.name, clock, index)
        at = begin
        while not place.done[index]:
            before = at
            try:
                for block in source.read(at, end, place.nbytes):
                    place.write(at, block)
                    at += len(block)
                    with lock:
                        so_far += len(block)
                        if progress:
                            progress(so_far)
                place.mark(index, True)
            except Again as error:
                tries.wait(error, moved=at > before)
        return begin, end

    sha256 = hashlib.sha256()
    with ThreadPoolExecutor(min(clock.patience.parallel, len(pieces))) as pool:
        try:
            # In order, so that what has come is digested while the rest comes.
            for begin, end in pool.map(fetch_piece, pieces):
                for at in range(begin, end, BLOCK):
                    sha256.update(place.read(at, min(at + BLOCK, end)))
        except BaseException:
            clock.stop()
            raise
    return sha256.hexdigest()
