"""What the kernel says about processes (Linux `/proc`), and how to end one without hitting another.

A process number is used again after its process ended, so a process is named by its number *and* the time at which
it started. A zombie counts as ended: nobody has asked for its exit status yet, but it does nothing any more.

Where there is no `/proc` only a process number can be asked about; tables are empty there.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    state: str  # one letter: R, S, D, T (stopped by a signal), t (by a debugger), I
    started: int  # clock ticks since the machine was started


def has_proc() -> bool:
    """Whether this system tells about processes in `/proc`."""
    return (PROC / "self" / "stat").exists()


def read(pid: int) -> Process | None:
    """The process of this number; None where there is none, or only a zombie."""
    try:
        # The name of the program stands in parentheses and may itself hold blanks and parentheses.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    if len(fields) < 20 or fields[0] in "ZXx":
        return None
    return Process(pid, int(fields[1]), fields[0], int(fields[19]))


def command(pid: int) -> list[str]:
    """The words of the command that the process runs; empty if it has ended."""
    return _words(pid, "cmdline")


def program_of(pid: int) -> str:
    """`flower-superexec`, `clients.worker`, …: the script or module a process runs, not the interpreter of it."""
    words = command(pid)
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    names = [Path(word).name for word in words if word and not word.startswith("-")]
    if len(names) > 1 and "python" in names[0]:
        return names[1]
    return names[0] if names else ""


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since the machine was started; None if it has ended.

    Without `/proc` it is 0 for every living process.
    """
    if has_proc():
        process = read(pid)
        return None if process is None else process.started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's, but alive
    return 0


def is_alive(pid: int, started: int) -> bool:
    """Whether the process that had this number and this `start_time` still runs (or is stopped)."""
    return start_time(pid) == started


def table() -> list[Process]:
    """Every living process of the machine."""
    numbers = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()] if has_proc() else []
    return [process for pid in numbers if (process := read(pid)) is not None]


class Marked:
    """The processes that were started with NAME=VALUE in their environment, and all that they started.

    Unlike a walk from parents to children this also finds those whose parent has ended.
    """

    def __init__(self, name: str, value: str) -> None:
        self._entry = f"{name}={value}"
        self._known: dict[tuple[int, int], bool] = {}  # an environment is read once for each process

    def look(self) -> list[Process]:
        """Those that live now; a process of another user is never among them."""
        now = {(process.pid, process.started): process for process in table()}
        self._known = {known: marked for known, marked in self._known.items() if known in now}
        for known in now.keys() - self._known.keys():
            self._known[known] = self._entry in _words(known[0], "environ")
        return [process for known, process in now.items() if self._known[known]]


def kill(pid: int, started: int, signum: int = signal.SIGKILL) -> bool:
    """Send a signal to this process unless its number belongs to another one by now; whether it was sent."""
    if not is_alive(pid, started):
        return False
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end_marked(marked: Marked, grace_s: float = 0.0) -> int:
    """Kill all of these after at most `grace_s` seconds in which they may end by themselves; how many were killed.

    One that hangs in the kernel cannot be killed; it is waited for 10 seconds.
    """
    deadline = time.monotonic() + grace_s
    while marked.look() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed: set[tuple[int, int]] = set()
    deadline = time.monotonic() + 10.0
    while (left := marked.look()) and time.monotonic() < deadline:  # again: one may have started another
        killed |= {(process.pid, process.started) for process in left if kill(process.pid, process.started)}
        time.sleep(0.02)
    return len(killed)


def wait_until_gone(processes: Iterable[tuple[int, int]], seconds: float) -> list[tuple[int, int]]:
    """Those, given as (number, start time), that still live after at most so many seconds."""
    deadline = time.monotonic() + seconds
    left = list(processes)
    while (left := [known for known in left if is_alive(*known)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _words(pid: int, file: str) -> list[str]:
    try:
        return (PROC / str(pid) / file).read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []
