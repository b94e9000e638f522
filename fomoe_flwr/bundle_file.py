"""Bundles as bytes: their digests, and several in one file, each from a multiple of PAGE on.

So each can be mapped by itself, and read where it lies.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, cast

from fomoe_flwr.errors import WorkerError

# A multiple of every machine's pages: the file may be read on another one.
PAGE = 2**16


def padded(size: int) -> int:
    """The room that a bundle takes with another one behind it."""
    return -(-size // PAGE) * PAGE


def write_blobs(blobs: Iterable[tuple[str, bytes]], folder: Path) -> tuple[IO[bytes], dict[str, int]]:
    """A file without a name, with these bundles in it, and their lengths by key.

    Raises:
        WorkerError: there is no room for them in the folder.
    """
    sizes = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The caller closes it.
        file = cast(IO[bytes], tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115
        begin = 0
        for key, blob in blobs:
            sizes[key] = len(blob)
            file.seek(begin)
            rest = memoryview(blob)
            # The system writes at most 2 GiB at a time.
            while rest:
                rest = rest[file.write(rest) :]
            begin += padded(len(blob))
            del blob, rest
    except OSError as error:
        raise WorkerError(f"cannot write a message into {folder}: {error.strerror}") from error
    return file, sizes


def mapped_blobs(file: IO[bytes], sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The bundles where they lie. They stay after the file is closed, until they are not used any more."""
    blobs: dict[str, bytes] = {}
    begin = 0
    for key, size in sizes.items():
        # A map is read like bytes: it has a length, slices are bytes, and PyTorch takes its buffer.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=begin) if size else b""
        blobs[key] = cast(bytes, mapped)
        begin += padded(size)
    return blobs


def read_blobs(file: IO[bytes], sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The bundles as bytes of their own."""
    return {key: blob[:] for key, blob in mapped_blobs(file, sizes).items()}


def bundle_digests(blobs: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each bundle by key."""
    return {key: hashlib.sha256(blob).hexdigest() for key, blob in blobs.items()}
