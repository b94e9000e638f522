"""The devices of a site: one process for each, of which the first is the site's own and starts the others.

PyTorch's distributed package connects them: NCCL between GPUs, gloo between CPUs and for what is not of the model.
The others do what the first tells them (`Team.tell`) until it ends. They end with it; and when one of them ends or
fails, the first finds its connection closed, ends the others, and raises. The next call starts new ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from fomoe_flwr.errors import WorkerError

# A device that another one waits for in vain is given up after so long; a site's worker is given up by `stall-s`.
PATIENCE = timedelta(seconds=600)
# A rank that waits for work waits for as long as it takes.
_FOR_EVER = timedelta(days=3650)
_END_S = 5.0  # in which a process must have ended by itself

CODE = Path(__file__).resolve().parents[2]  # the folder in which the packages lie
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


@dataclass(eq=False)
class Team:
    """One device's place among those of the site."""

    rank: int
    size: int
    device: str
    store: FileStore
    control: dist.ProcessGroup
    # At the first.
    others: tuple[subprocess.Popen[bytes], ...] = ()
    folder: tempfile.TemporaryDirectory[str] | None = None  # of the store
    busy: threading.Lock = field(default_factory=threading.Lock)
    engine: object = None  # whose model the others have

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.partition(":")[0]

    def tell(self, *work: Any) -> None:
        """At the first: have the others do it too."""
        dist.broadcast_object_list([work], src=0, group=self.control)

    def told(self) -> tuple[Any, ...]:
        """At the others: what the first wants next. Waits for it."""
        work: list[Any] = [None]
        dist.broadcast_object_list(work, src=0, group=self.control)
        found: tuple[Any, ...] = work[0]
        return found

    def reason(self) -> str:
        """Why the others fail, as far as is known: of the first that said something, else of one that has ended."""
        for rank in range(1, self.size):
            if self.store.check([f"failed/{rank}"]):
                return f"device {rank + 1} of {self.size}: {self.store.get(f'failed/{rank}').decode()}"
        for rank, process in enumerate(self.others, 1):
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            if (code := process.poll()) is not None:
                return f"the process of device {rank + 1} of {self.size} ended (code {code})"
        return ""


_team: Team | None = None  # of this process


def team_of(size: int, kind: str) -> Team:
    """The devices of this site; started if they are not there.

    Args:
        kind: cpu or cuda.

    Raises:
        WorkerError: they do not start.
    """
    global _team
    if _team is not None and ((_team.size, _team.kind) != (size, kind) or _any_ended(_team)):
        end_team()
    if _team is None:
        _team = _started(size, kind)
    return _team


def is_current(team: Team) -> bool:
    """Whether this is the team of this process, as far as is known."""
    return team is _team and not _any_ended(team)


def _any_ended(team: Team) -> bool:
    return any(process.poll() is not None for process in team.others)


def _started(size: int, kind: str) -> Team:
    if dist.is_initialized():
        raise WorkerError(
            "this process lost a device, and cannot be connected with others again: start it again"
        )
    # They find each other by a file and not by a port: nobody else can come in.
    folder = tempfile.TemporaryDirectory(prefix="fomoe-ranks-")
    file = str(Path(folder.name) / "store")
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    # All are on one machine.
    os.environ["GLOO_SOCKET_IFNAME"] = interface or LOOPBACK
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([str(CODE), *(path for path in sys.path if path)])),
        "WORLD_SIZE": str(size),
        "FOMOE_RANKS": file,
        "FOMOE_DEVICE": kind,
    }
    command = [sys.executable, "-P", "-m", "fomoe_flwr.engine.rank"]
    others = tuple(
        # Its standard input ends with this process, and then it ends too.
        subprocess.Popen(command, stdin=subprocess.PIPE, env={**environment, "RANK": str(rank)})
        for rank in range(1, size)
    )
    try:
        joined = join(0, size, kind, file)
    except Exception as error:
        for process in others:
            process.kill()
            process.wait()
        raise WorkerError(f"the {size} devices of this site do not find each other: {error}") from error
    finally:
        if interface is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
    joined.others, joined.folder = others, folder
    return joined


def join(rank: int, size: int, kind: str, file: str) -> Team:
    """Come together with the other ranks. All of them must call it.

    Args:
        file: through which they find each other.
    """
    device = f"cuda:{rank}" if kind == "cuda" else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = FileStore(file, size)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    control = dist.new_group(backend="gloo", timeout=_FOR_EVER)
    return Team(rank, size, device, store, control)


def end_team(failed: bool = False) -> None:
    """End the other processes of this site, if there are any.

    Args:
        failed: some device may wait for another for ever.
    """
    global _team
    if _team is None:
        return
    ending, _team = _team, None
    for process in ending.others:
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
    for process in ending.others:
        if failed:
            process.kill()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # To leave in peace, NCCL would wait for those that are gone.
    if not (failed and ending.kind == "cuda"):
        dist.destroy_process_group()


@contextmanager
def together(team: Team, engine: object) -> Iterator[None]:
    """Around work of all devices: if it fails at the first, the others are somewhere in the middle of it, so they end.

    Args:
        engine: that does it; the one that was built last.

    Raises:
        WorkerError: another one failed, between CPUs; between GPUs RuntimeError: this process can have no others any
            more and should end. Or two sites of one process want them at a time.
    """
    if team.engine is not engine or not team.busy.acquire(blocking=False):
        raise WorkerError(
            "another site of this process uses its devices: one at a time can (runtime.workers=1)"
        )
    try:
        yield
    except BaseException as error:
        # Only a lost connection is another one's fault.
        reason = team.reason() if isinstance(error, RuntimeError) else ""
        end_team(failed=True)
        if reason:
            raise (WorkerError if team.kind == "cpu" else RuntimeError)(reason) from error
        raise
    finally:
        team.busy.release()


def end_with_the_first() -> None:
    """At the others: end as soon as the first process has. It holds the other end of standard input."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
