"""Find the processes of a site, and end one without hitting another.

A process number is used again after its process ended. So a process is identified by its number *and* the time at
which it started.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class Process(NamedTuple):
    """A living process."""

    pid: int
    started: float  # see `start_time`
    stopped: bool = False  # by a signal; a process that a debugger holds is not meant


def program_of(pid: int) -> str:
    """`flower-superexec`, `clients.worker`, …: the script or module a process runs, not the interpreter of it."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return ""
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    names = [Path(word).name for word in words if word and not word.startswith("-")]
    if len(names) > 1 and "python" in names[0]:
        return names[1]
    return names[0] if names else ""


def start_time(pid: int) -> float | None:
    """What tells this process from an earlier or later one of the same number; None if it has ended.

    A zombie counts as ended: it does nothing any more, only its exit code has not been read yet.
    """
    try:
        process = psutil.Process(pid)
        with suppress(psutil.AccessDenied):
            if process.status() in _ENDED:
                return None
        return _started(pid)
    except psutil.NoSuchProcess:
        return None


def _started(pid: int) -> float:
    if not psutil.LINUX:
        return psutil.Process(pid).create_time()
    # Clock ticks since the machine was started. Not psutil's create_time: that changes when the clock is set.
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError as error:
        raise psutil.NoSuchProcess(pid) from error
    # The second field is the name of the program in parentheses, which may itself hold blanks and parentheses.
    return int(stat.rpartition(")")[2].split()[19])


def is_alive(pid: int, started: float) -> bool:
    """Whether the process that had this number and this `start_time` still runs (or is stopped)."""
    return start_time(pid) == started


class Marked:
    """The processes that were started with NAME=VALUE in their environment, and all that they started.

    A walk from parents to children would not find those whose parent has ended.
    """

    def __init__(self, name: str, value: str) -> None:
        self._name, self._value = name, value
        self._known: dict[tuple[int, float], bool] = {}  # an environment is read once for each process

    def look(self) -> list[Process]:
        """Those that live now; a process of another user is never among them."""
        before, self._known, found = self._known, {}, []
        for pid in psutil.pids():
            with suppress(psutil.Error):
                known = pid, _started(pid)
                marked = before[known] if known in before else self._is_marked(pid)
                if marked is not None:
                    self._known[known] = marked
                if marked and (status := psutil.Process(pid).status()) not in _ENDED:
                    found.append(Process(*known, status == psutil.STATUS_STOPPED))
        return found

    def _is_marked(self, pid: int) -> bool | None:
        """None if it cannot be said yet: the environment is empty while a process starts its program."""
        try:
            environment = psutil.Process(pid).environ()
        except psutil.AccessDenied:
            return False
        return environment.get(self._name) == self._value if environment else None


def kill(pid: int, started: float, signum: int = signal.SIGKILL, group: bool = False) -> bool:
    """Send a signal to this process unless its number belongs to another one by now; whether it was sent.

    Args:
        group: it leads a process group, all of which is meant.
    """
    if not is_alive(pid, started):
        return False
    try:
        (os.killpg if group else os.kill)(pid, signum)
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
    killed: set[tuple[int, float]] = set()
    deadline = time.monotonic() + 10.0
    # Again and again: one may have started another in the meantime.
    while (left := marked.look()) and time.monotonic() < deadline:
        killed |= {(pid, started) for pid, started, _ in left if kill(pid, started)}
        time.sleep(0.02)
    return len(killed)


def wait_until_gone(pid: int, started: float, seconds: float) -> None:
    """Return when this process has ended, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while is_alive(pid, started) and time.monotonic() < deadline:
        time.sleep(0.02)
