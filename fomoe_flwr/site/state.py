"""What a site keeps between rounds, on its own disk: its place in the data, the engine's state (moments by
name, what its routers go by besides their weights), what its encoder has not sent yet, what it was sent last, where the
next message brings differences to it or the next round begins from it, and in that case what it sent itself. Where
parts of the model take turns, of those that were not due their values and how far they have come since they last were.

One file a round: `round_00003.safetensors` is the state after round 3. A file is either whole or not there.

The server says which of them counts (`Task.counted_round`), because only the server knows which replies became part of
the model. Later files belong to replies that were lost, refused or discarded, and are removed when the next round
begins. So every file that is older than the newest counted too, and the server's checkpoint of round c goes with the
newest state up to c.
"""

from __future__ import annotations

import glob
import json
import logging
import mmap
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.codecs import CodecState
from fomoe_flwr.engine import EngineState, Moments
from fomoe_flwr.errors import CheckpointError, WireError
from fomoe_flwr.files import write_atomically
from fomoe_flwr.site.delay import Sent

log = logging.getLogger("fomoe.site")

RUNS = 10  # finished or not, whose states a site keeps beside that of the run it works for

_PATTERN = re.compile(r"round_(\d{5,})\.safetensors")


@dataclass
class SiteState:
    """State of a site after `round`; round 0 is before the first."""

    round: int = 0
    position: int = 0  # sequences of its stream that it has consumed
    last_round: int = 0  # the last round of its run as it was planned then
    engine: EngineState = field(default_factory=EngineState)
    encoder: CodecState = field(default_factory=dict)
    public: dict[str, Tensor] = field(
        default_factory=dict
    )  # as it came, where strategy.down is lossy or delay=1
    sent: Sent = field(default_factory=Sent)
    # Of tensors that were not due, fp32: their values at the end of the round, from which they go on; and the sum of
    # their updates since they were synchronised.
    local: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)
    stream: dict[str, Any] = field(
        default_factory=dict
    )  # how its data is found again at `position`, if that helps
    lost: bool = False  # what the site had kept of this round was missing or damaged, so it begins without


def _files(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("round_*.safetensors"):
        if match := _PATTERN.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def discard_later(folder: Path, counted_round: int) -> None:
    """Remove the states of rounds later than `counted_round`, and what a process that died left half written."""
    for path in [path for round_, path in _files(folder).items() if round_ > counted_round]:
        path.unlink()
    for path in folder.glob("round_*.partial-*"):
        path.unlink()


def forget_old_runs(root: Path, site: str, current: Path) -> None:
    """Remove this site's states of all but the RUNS newest runs; a run of them that is resumed begins without moments.

    By their order and not by their age, for a clock may be wrong.

    Args:
        root: the states of a run are in `root / run / site`.
        current: the folder of the run that begins, which is not counted.
    """
    others = {
        folder: max(path.stat().st_mtime for path in files.values())
        for folder in root.glob(f"*/{glob.escape(site)}")
        if folder != current and (files := _files(folder))
    }
    for folder in sorted(others, key=lambda folder: others[folder], reverse=True)[RUNS:]:
        log.warning(
            "removing the state of an old run, %s: only those of the newest %d are kept", folder, RUNS
        )
        shutil.rmtree(folder)
        with suppress(OSError):
            # Another site's state of that run may be beside it.
            folder.parent.rmdir()


def load_state(folder: Path, counted_round: int, position: int) -> SiteState:
    """The state after round `counted_round`; the very first for 0.

    If it is missing (the disk was lost) or damaged, the site goes on without moments, from `position` (sequences) on,
    and the server is told (`SiteState.lost`): a site without moments is worth more than none.
    """
    if counted_round == 0:
        return SiteState()
    path = _files(folder).get(counted_round)
    try:
        if path is None:
            raise CheckpointError(f"no state of round {counted_round} in {folder}")
        return _read(path, counted_round)
    except CheckpointError as error:
        log.warning("%s: this site goes on with fresh moments", error)
        return SiteState(counted_round, position, lost=True)


def _read(path: Path, counted_round: int) -> SiteState:
    with _opened(path) as metadata:
        tensors, facts = _tensors(path), json.loads(metadata["state"])
        # Those that an earlier version wrote have none.
        if set(metadata) != {"state"} and metadata["digest"] != wire.digest_of_all(
            metadata["state"], tensors
        ):
            raise ValueError("it differs from its own SHA-256")
        moments = {
            # Muon has no second moment.
            name: Moments(tensors[f"exp_avg/{name}"], tensors.get(f"exp_avg_sq/{name}"), step, reset_at)
            for name, (step, reset_at) in facts["steps"].items()
        }
        encoder, public, parts, local, pending = (
            {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in ("encoder/", "public/", "sent/", "local/", "pending/")
        )
        engine = EngineState(moments, **facts.get("routers", {}))
        return SiteState(
            counted_round,
            int(facts["position"]),
            int(facts["last_round"]),
            engine,
            encoder,
            public,
            Sent(parts, **facts.get("sent", {})),
            local,
            pending,
            facts.get("stream", {}),
        )


def save_state(folder: Path, state: SiteState, counted_round: int, checkpoint_every: int, keep: int) -> None:
    """Write the state after a round, and drop those that the server cannot come back to.

    Args:
        counted_round: the round whose state this one went on from; it counts until the server has taken the reply.
        checkpoint_every: rounds between two checkpoints of the server; 0: it makes one at the end of the run.
        keep: the number of checkpoints it keeps.
    """
    tensors = {
        f"{kind}/{name}": tensor.contiguous()
        for kind, named in (
            ("encoder", state.encoder),
            ("public", state.public),
            ("sent", state.sent.parts),
            ("local", state.local),
            ("pending", state.pending),
        )
        for name, tensor in named.items()
    }
    moments = state.engine.moments
    for name, moment in moments.items():
        tensors[f"exp_avg/{name}"] = moment.exp_avg.contiguous()
        if moment.exp_avg_sq is not None:
            tensors[f"exp_avg_sq/{name}"] = moment.exp_avg_sq.contiguous()
    steps = {name: (moment.step, moment.reset_at) for name, moment in moments.items()}
    facts = json.dumps(
        {
            "position": state.position,
            "stream": state.stream,
            "steps": steps,
            "last_round": state.last_round,
            "routers": {"bias": state.engine.bias, "load": state.engine.load},
            "sent": {"codec": state.sent.codec, "shares": state.sent.shares},
        }
    )
    metadata = {"state": facts, "digest": wire.digest_of_all(facts, tensors)}
    write_atomically(
        folder / f"round_{state.round:05d}.safetensors",
        lambda path: wire.write_tensors(path, tensors, metadata),
    )
    files = _files(folder)
    kept = {state.round, counted_round, *_at_checkpoints(files, state.round, checkpoint_every, keep)}
    for round_, path in files.items():
        if round_ not in kept:
            path.unlink()


def _tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors, each in memory of its own.

    Not by safe_open: safetensors 0.8 never frees two objects for each tensor that it reads, and a simulation reads all
    sites' states in every round.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        return {entry.name: wire.view(blob, entry).clone() for entry in wire.read_header(blob)}


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, str]]:
    """The metadata in the header of a state's file. What fails while it is read is a CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file.metadata()
    except (SafetensorError, WireError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"site state {path} is damaged ({error!s:.200})") from error


def _at_checkpoints(files: Mapping[int, Path], round_: int, every: int, keep: int) -> Iterator[int]:
    """The states that go with the server's last `keep` checkpoints before a round."""
    if every:
        last = (round_ - 1) // every * every
        for checkpoint in range(last, max(last - keep * every, 0), -every):
            yield from [max((r for r in files if r <= checkpoint), default=0)]
        return
    # A run with one checkpoint, at its end, may get more rounds; until they end it can go back to that checkpoint.
    for earlier in sorted((r for r in files if r < round_), reverse=True):
        try:
            with _opened(files[earlier]) as metadata:
                fits = json.loads(metadata["state"])["last_round"] < round_
        except CheckpointError as error:
            log.warning("%s", error)
            continue
        if fits:
            yield earlier
            return
