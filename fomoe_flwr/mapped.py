"""Tensors in memory-mapped files, for a server whose memory is smaller than its model (`checkpoint.state=files`).

A page that was touched counts as this process's memory until it is given back. What works through many tensors does so
in pieces (`in_pieces`), and gives pages back after each. That changes no value: the system has them, in its cache or
on the disk, and reads them again when somebody asks.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.files import naming
from fomoe_flwr.units import in_bytes

PIECE_BYTES = 64 * 2**20  # touched before pages are given back
_ALIGNED = 64  # bytes; of where a tensor begins

# Every mapping that is in use. One list for the process: so what reads a tensor need not know where it lies.
_mappings: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

Item = TypeVar("Item")


def mapped_tensors(
    folder: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Zeros in one file in the folder.

    The file has no name: it is gone when the last of its tensors is, or with the process, however that ends. So nobody
    can mistake what a killed server left half done for its state. Its room on the disk is taken at once, because a full
    disk would later end the process without a word.

    Raises:
        ConfigError: there is too little room, or this system cannot take it beforehand.
        OSError: the folder cannot be written.
    """
    places: dict[str, int] = {}
    size = 0
    for name, shape in shapes.items():
        places[name] = size
        size += -(-dtype.itemsize * math.prod(shape) // _ALIGNED) * _ALIGNED
    if not hasattr(os, "posix_fallocate"):
        raise ConfigError("checkpoint.state=files: this system cannot reserve room on a disk; use memory")
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConfigError(
            f"checkpoint.state=files: the server's tensors need {in_bytes(size)} in {folder}, where "
            f"{in_bytes(free)} are free; choose another hydra.run.dir, or use memory"
        )
    with naming(folder), tempfile.TemporaryFile(prefix=".state-", dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        mapping = mmap.mmap(file.fileno(), size)
    _mappings.add(mapping)
    return {
        name: torch.frombuffer(mapping, dtype=dtype, count=math.prod(shapes[name]), offset=place).view(
            tuple(shapes[name])
        )
        for name, place in places.items()
    }


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, to be read where they lie.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _mappings.add(mapping)
    return mapping


def release() -> None:
    """Give the touched pages of all mappings back. Where nothing is mapped this does nothing."""
    for mapping in list(_mappings):
        mapping.madvise(mmap.MADV_DONTNEED)


def in_pieces(items: Iterable[Item], nbytes: Callable[[Item], int]) -> Iterator[Item]:
    """The items; pages are given back whenever as many bytes as a piece has were gone through, and at the end.

    Args:
        nbytes: size of the tensors that an item stands for.
    """
    touched = 0
    for item in items:
        yield item
        touched += nbytes(item)
        if touched >= PIECE_BYTES:
            release()
            touched = 0
    release()


@torch.no_grad()
def fill(target: Mapping[str, Tensor], source: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Copy tensors into those of the same names, a piece at a time; returns the names.

    Raises:
        KeyError: a name that the target does not have.
        ValueError: another shape.
    """
    names = set()
    for name, value in in_pieces(source, lambda item: item[1].nbytes):
        if target[name].shape != value.shape:
            raise ValueError(f"{name}: shape {list(value.shape)}, expected {list(target[name].shape)}")
        target[name].copy_(value)
        names.add(name)
    return names
