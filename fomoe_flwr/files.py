"""Files that are whole or not there, also after a crash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, flush what it wrote, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    write(aside)
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def state_home() -> Path:
    """Where programs of this package keep what must outlive them: below $XDG_STATE_HOME."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "fomoe-flwr"
