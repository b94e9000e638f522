"""Files that are whole or not there, also after a crash; and what a machine may say no to, in one line."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fomoe_flwr.errors import ConfigError


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, flush what it wrote, and rename it to `path`.

    Raises:
        OSError: naming the file; what was written of it is gone, for the disk may be full.
    """
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            flush(aside)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        aside.replace(path)
        flush(path.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write files into, which gets the target's name when all of them are on the disk.

    Raises:
        OSError: naming the file. Nothing of it is left then, nor after any other error, for the disk may be full.
    """
    aside = target.with_name(f".partial-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with naming(target):
            aside.mkdir(parents=True)
            yield aside
            for file in (*aside.iterdir(), aside):
                flush(file)
            aside.rename(target)
            flush(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Make the folder if need be, and a file in it, before anything is begun that ends there.

    Raises:
        OSError: naming the folder.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            error.filename = str(folder)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the system the name of the file: a write to a full disk does not say where it failed."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def is_machine_error(error: Exception) -> bool:
    """Whether it is the machine that said no. Of too little memory PyTorch has a RuntimeError."""
    if isinstance(error, RuntimeError):
        return re.search(r"out of memory|allocate memory", str(error)) is not None
    return isinstance(error, OSError | UnicodeError | MemoryError)


def machine_error(error: Exception) -> str:
    """What the machine refused, as one line: a full disk, a missing permission, a name in another encoding, memory."""
    if isinstance(error, MemoryError | RuntimeError):
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        return (
            f"not enough memory{f' for {asked[1]} more' if asked else ''}; fomoe plan says what a run needs"
        )
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename):.400}: {error.strerror}"
    return f"{type(error).__name__}: {error}"[:500]


def expanded(path: str | Path) -> Path:
    """The path with a leading `~` written out.

    Raises:
        ConfigError: it is empty, as an unset variable of a shell leaves it; or this user has no home directory, as in a
            container with a random user number.
    """
    if isinstance(path, str) and not path.strip():
        raise ConfigError("a path is empty; give one, or leave it out")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: this user has no home directory; set HOME, or give a path that does not begin with ~ "
            "(data.cache_dir, fomoe site --state-dir; FOMOE_CACHE, XDG_STATE_HOME)"
        ) from error


def state_home() -> Path:
    """Where programs of this package keep what must outlive them: below $XDG_STATE_HOME."""
    return expanded(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "fomoe-flwr"
