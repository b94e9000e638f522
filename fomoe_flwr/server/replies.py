"""The replies of a round: checked as they come in, kept on the disk, and read from there when they are averaged.

No site is trusted to send sense: a reply may be damaged, late, of another version, or hostile. A site can only change
what it holds, by an amount that the other sites' updates find ordinary.

What a reply is worth (is it an outlier? are there enough?) is known only when all are in, and the mean must not
depend on the order in which the network delivers them. So they wait on the disk, as the bytes that arrived, and the
server's memory does not grow with the number of sites. They also outlive the server: a run that is killed before
it has taken the outer step finds them again and asks only the sites that have not answered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import shutil
import statistics
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundle_file import PAGE
from fomoe_flwr.codecs import Codec, decode, decoded, nbytes, of_part, part_name
from fomoe_flwr.codecs.cast import DIGEST_BYTES
from fomoe_flwr.codecs.lossy import Layout
from fomoe_flwr.errors import NotFiniteError, WireError
from fomoe_flwr.inputs import OWN_TEXT, UNKNOWN, Inputs, differences
from fomoe_flwr.messages import Reply
from fomoe_flwr.model.spec import MOMENTS
from fomoe_flwr.untrusted import one_line

log = logging.getLogger("fomoe")

BATCH_BYTES = 8 * 2**20  # hashed and checked at a time, while it is in the processor's cache
MAX_METRIC = 1e30  # so that sums and products over sites and tokens stay finite
MAX_LOSS = 1e4  # nats a token; what is above is no model's loss
PIECE = 2**22  # numbers; PyTorch turns what it takes the norm of into fp32 first
MOST_STARTS = 3  # of a server on the same saved replies; then they are asked for anew


class Refused(WireError):
    """A reply that does not become part of the model. `kind` is one word for the metrics."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@contextmanager
def refusing() -> Iterator[None]:
    """Around what does nothing but look at a site's bytes: whatever goes wrong in it is the reply's fault, and becomes
    a Refused.

    So nothing in it may touch the disk or the model. No memory and no disk are the server's own trouble, here too.
    """
    try:
        yield
    except (Refused, MemoryError, OSError):
        raise
    except WireError as error:
        raise Refused("damaged", str(error)) from error
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        raise Refused("damaged", f"{type(error).__name__} at {where}: {error}") from error


@dataclass(frozen=True)
class Expected:
    """What a site's reply is held against.

    Args:
        digests: of each tensor it was sent (`Codec.digest`), by name.
        shapes: of every tensor of the model.
        tokens: that its round has at the most.
        top_k: experts a token chooses in a layer.
        load_shape: layers, experts of a layer.
        step_scale: by which its update's norm is multiplied before it is held against the others': a site that takes
            more local steps goes farther.
        inputs: tokenizer, text and the rest that the site's must equal.
        asked: the tensors that it may answer with; None: those it was sent.
    """

    run: str
    round: int
    site: str
    digests: Mapping[str, bytes]
    shapes: Mapping[str, Sequence[int]]
    codec: Codec
    tokens: int
    top_k: int
    load_shape: tuple[int, int]
    step_scale: float = 1.0
    inputs: Inputs = UNKNOWN
    asked: Collection[str] | None = None

    @property
    def names(self) -> Collection[str]:
        """The tensors that it may answer with."""
        return self.digests.keys() if self.asked is None else self.asked

    @property
    def longest_header(self) -> int:
        """Characters of the reply's JSON and bytes of a bundle's header, at most: an honest one has a third of it."""
        parts = len(self.codec.layout((1, 1)))
        return 2**16 + 512 * parts * max(len(self.digests), len(self.names)) + 32 * math.prod(self.load_shape)

    @property
    def longest_reply(self) -> int:
        """Bytes of its bundles in one file, at most."""
        tensors = nbytes(self.codec, (self.shapes[name] for name in self.names))
        # Dense and experts apart, and large ones cut.
        bundles = 2 + -(-tensors // wire.MAX_BUNDLE_BYTES) * 2
        return tensors + bundles * (self.longest_header + PAGE)


Norms = dict[str, float]  # root mean square by kind of tensor: update, exp_avg, exp_avg_sq


class Checked(NamedTuple):
    """What the check of a reply's bundles says of its tensors."""

    norms: Norms
    by_name: dict[str, float]  # Euclidean norm of each tensor


def check_header(text: str, expected: Expected) -> Reply:
    """The reply's header, held against what its site was asked.

    Raises:
        Refused: the first thing that is wrong.
    """
    try:
        reply = Reply.from_json(text, expected.longest_header)
    except WireError as error:
        kind = "not_finite" if isinstance(error, NotFiniteError) else "damaged"
        raise Refused(kind, str(error)) from error
    for key in ("run", "round", "site"):
        if (said := getattr(reply, key)) != (asked := getattr(expected, key)):
            raise Refused(key, f"answered for {key} {said!r:.80}, asked was {key} {asked!r}")
    free = ("partition", "corpus", "split") if reply.inputs.partition == OWN_TEXT else ()
    for difference in differences(expected.inputs, reply.inputs):
        if difference.part not in free:
            raise Refused("inputs", f"not what the run goes by: {difference}")
    _check_start(reply, expected)
    if not 0 < reply.num_examples <= expected.tokens:
        raise Refused(
            "weight",
            f"num_examples={reply.num_examples}: must be above 0 and at most the round's {expected.tokens}",
        )
    for key, value in reply.metrics.items():
        if abs(value) > MAX_METRIC:
            raise Refused("not_finite", f"metric {key!r}={value:.3g}: at most {MAX_METRIC:g} is allowed")
    # The only text in it that goes on: into metrics, tables and terminals. What is next to nothing is nothing, so that
    # a quotient stays finite, too.
    metrics = {
        one_line(key): value if abs(value) * MAX_METRIC >= 1 else 0.0 for key, value in reply.metrics.items()
    }
    return replace(reply, metrics=metrics)


def check_evaluation(text: str, expected: Expected) -> Reply:
    """The reply to an evaluation, which is nothing but its header.

    Raises:
        Refused: as `check_header`; or there is no loss, or none that a model can have.
    """
    reply = check_header(text, expected)
    loss = reply.metrics.get("val_loss")
    if loss is None or not 0 <= loss <= MAX_LOSS:
        raise Refused("loss", f"val_loss={loss}: must be there, at least 0 and at most {MAX_LOSS:g}")
    return reply


def _check_start(reply: Reply, expected: Expected) -> None:
    """Whether the site started from what it was sent, tensor by tensor."""
    names, size = sorted(expected.digests), DIGEST_BYTES
    wanted = b"".join(expected.digests[name] for name in names)
    if reply.start_digests == wanted:
        return
    if len(reply.start_digests) != len(wanted):
        raise Refused("attestation", "does not say which tensors it started from")
    differing = [
        name
        for at, name in zip(range(0, len(wanted), size), names, strict=True)
        if reply.start_digests[at : at + size] != wanted[at : at + size]
    ]
    raise Refused(
        "attestation",
        f"started from another {differing[0]} than it was sent ({len(differing)} such tensors)",
    )


def check_load(reply: Reply, expected: Expected) -> NDArray[np.int64]:
    """How often the site's router chose each expert, load_LE; zeros where a ClientApp of another make does not say.

    Raises:
        Refused: not a table of this model, or more choices than the round can have.
    """
    if not reply.load_LE:
        return np.zeros(expected.load_shape, dtype=np.int64)
    most, (layers, experts) = expected.tokens * expected.top_k, expected.load_shape
    # In Python's own numbers, which cannot overflow.
    if len(reply.load_LE) != layers or not all(
        isinstance(row, list)
        and len(row) == experts
        and all(type(choices) is int and choices >= 0 for choices in row)
        and sum(row) <= most
        for row in reply.load_LE
    ):
        raise Refused("weight", f"load_LE: not at most {most} choices in each of {layers} layers")
    return np.array(reply.load_LE, dtype=np.int64)


def check_blobs(blobs: Mapping[str, wire.Blob], reply: Reply, expected: Expected) -> Checked:
    """Hold the bundles against their digests and against what the site was sent; one pass over their bytes.

    Raises:
        Refused: the first thing that is wrong.
    """
    if reply.bundle_digests.keys() != blobs.keys():
        raise Refused("digest", "its bundles are not those whose SHA-256 it names")
    if len(blobs) > len(expected.names):
        raise Refused("damaged", f"{len(blobs)} bundles for {len(expected.names)} tensors")
    sums = _Sums()
    seen: set[str] = set()
    for key, blob in blobs.items():
        try:
            entries = wire.read_header(blob, expected.longest_header)
            if not entries:
                raise WireError("a bundle without tensors")
            if twice := seen & {entry.name for entry in entries}:
                raise WireError(f"{min(twice)}: sent twice in one message")
            seen |= {entry.name for entry in entries}
            digest = _read_through(blob, entries, expected, sums)
        except Refused:
            raise
        except WireError as error:
            whole = hashlib.sha256(blob).hexdigest() == reply.bundle_digests[key]
            raise Refused("damaged" if whole else "digest", str(error)) from error
        if digest != reply.bundle_digests[key]:
            raise Refused("digest", "its bundles are not those whose SHA-256 it names")
    if not seen:
        raise Refused("damaged", "the reply has no tensors")
    norms = sums.root_mean_squares()
    if "update" in norms:
        norms["update"] *= expected.step_scale
    return Checked(norms, sums.by_name)


def _read_through(blob: wire.Blob, entries: list[wire.Entry], expected: Expected, sums: _Sums) -> str:
    """Check the tensors of a blob, add their squares to the sums, and return its SHA-256."""
    digest, data, at = hashlib.sha256(), memoryview(blob), 0
    # Tensors whose parts are not all there yet, and those that wait to be added up.
    parts: dict[str, dict[str, Tensor]] = {}
    batch: dict[str, Tensor] = {}
    for index, entry in enumerate(entries):
        name, suffix = of_part(entry.name)
        tensor = wire.view(blob, entry)
        layout = _layout_of(name, suffix, tensor, expected)
        own = parts.setdefault(name, {})
        own[suffix] = tensor
        if len(own) == len(layout):
            batch[name] = _decoded(name, parts.pop(name), expected)
        # A batch is empty where a tensor's first parts alone are as large as that.
        if batch and (index == len(entries) - 1 or entry.end - at >= BATCH_BYTES):
            digest.update(data[at : entry.end])
            sums.add(batch)
            at, batch = entry.end, {}
    if parts:
        raise Refused("damaged", f"{min(parts)}: only the parts {', '.join(sorted(parts[min(parts)]))}")
    digest.update(data[at:])
    return digest.hexdigest()


def _layout_of(name: str, suffix: str, part: Tensor, expected: Expected) -> Layout:
    """The parts of a tensor, of which this is one."""
    if name not in expected.shapes:
        raise Refused("unknown_name", f"{name}: no tensor of this model")
    if name not in expected.names:
        raise Refused("not_held", f"{name}: this site was not asked for it")
    layout = expected.codec.layout(expected.shapes[name])
    if suffix not in layout:
        agreed = ", ".join(part_name(name, other) for other in layout)
        raise Refused("dtype", f"{part_name(name, suffix)}: agreed is {agreed}")
    shape, dtype = layout[suffix]
    if tuple(part.shape) != shape:
        raise Refused("shape", f"{part_name(name, suffix)}: shape {list(part.shape)}, expected {list(shape)}")
    if str(part.dtype) != f"torch.{dtype}":
        raise Refused("dtype", f"{part_name(name, suffix)}: dtype {part.dtype}, agreed is torch.{dtype}")
    return layout


def _decoded(name: str, parts: Mapping[str, Tensor], expected: Expected) -> Tensor:
    try:
        return decoded(expected.codec, name, parts, expected.shapes[name])
    except NotFiniteError as error:
        raise Refused("not_finite", str(error)) from error


class _Sums:
    """Norms of tensors; sums of squares and counts by kind of tensor."""

    def __init__(self) -> None:
        self.by_name: dict[str, float] = {}
        self.squares: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, named: Mapping[str, Tensor]) -> None:
        """Add some tensors.

        Raises:
            Refused: a value that is not finite, or a negative second moment.
        """
        # A norm is finite only if every value is. In pieces: an embedding may be most of the model.
        flat = [tensor.reshape(-1) for tensor in named.values()]
        pieces = [[own[at : at + PIECE] for at in range(0, own.numel(), PIECE)] for own in flat]
        norms = iter(torch._foreach_norm([piece for own in pieces for piece in own], 2, dtype=torch.float32))
        for (name, tensor), own in zip(named.items(), pieces, strict=True):
            norm = math.hypot(*(float(next(norms)) for _ in own))
            if not math.isfinite(norm) and not bool(torch.isfinite(tensor).all()):
                raise Refused("not_finite", f"{name}: has values that are not finite")
            if name.startswith("exp_avg_sq.") and tensor.numel() and float(tensor.min()) < 0:
                raise Refused("not_finite", f"{name}: a second moment cannot be negative")
            self.by_name[name] = norm
            kind = next((moment for moment in MOMENTS if name.startswith(f"{moment}.")), "update")
            self.squares[kind] = self.squares.get(kind, 0.0) + norm**2
            self.counts[kind] = self.counts.get(kind, 0) + tensor.numel()

    def root_mean_squares(self) -> Norms:
        return {kind: math.sqrt(square / max(self.counts[kind], 1)) for kind, square in self.squares.items()}


def outliers(norms: Mapping[int, Norms], history: Sequence[Norms], bound: float) -> dict[int, str]:
    """Sites whose update is more than `bound` times the median of the others'.

    Each is held against the others alone, so that a huge one cannot hide in its own median; and against this round's
    alone, because what makes all updates large (a hard stretch of data, a higher learning rate) is no site's fault.
    Only where fewer than two others answered do rounds before count too. With nobody to compare with, nothing
    is refused.

    Returns:
        The reason by site; empty if `bound` is 0.
    """
    found = {}
    for site, own in norms.items():
        others = [norms[other] for other in norms if other != site]
        if len(others) < 2:
            others += history
        for kind, value in own.items():
            known = [other[kind] for other in others if kind in other]
            if bound and known and not value <= bound * statistics.median(known):
                found[site] = (
                    f"{kind} of RMS {value:.3g}, the others' median is {statistics.median(known):.3g} "
                    f"(strategy.norm_bound={bound:g})"
                )
                break
    return found


# ----- on the disk


class Inbox:
    """One round's good replies below `folder`, each in a folder of its own that is whole or not there.

    Nothing is flushed: what the machine loses with its power is found out by the reply's own digests.

    Args:
        codec: of what is in them.
    """

    def __init__(self, folder: Path, codec: Codec) -> None:
        self._root, self._codec = folder, codec
        self._folder = folder / "none"
        # What stands where in a site's bundles. Their files are open only while they are read: a descriptor for each
        # would bound the number of sites.
        self._contents: dict[int, list[tuple[Path, dict[str, wire.Entry]]]] = {}

    @property
    def folder(self) -> Path:
        """That of the round."""
        return self._folder

    def begin(self, round_: int) -> list[int]:
        """Open a round and drop every other; returns the sites whose replies are here from before a crash.

        What a server has died of again and again may be one of these replies: then they are dropped too.
        """
        self.close()
        self._folder = self._root / f"round_{round_:05d}"
        for path in self._root.glob("*"):
            if path != self._folder:
                shutil.rmtree(path, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob("*.partial"):
            shutil.rmtree(partial)
        # What else may be there is somebody else's.
        saved = sorted(
            int(path.name)
            for path in self._folder.iterdir()
            if path.is_dir() and path.name.isascii() and path.name.isdecimal()
        )
        starts = self._folder / "starts"  # a byte for each
        if saved and starts.exists() and starts.stat().st_size >= MOST_STARTS:
            log.warning(
                "round %d: the server ended %d times with these replies: their sites are asked anew",
                round_,
                MOST_STARTS,
            )
            for site in saved:
                self.drop(site)
            saved = []
            starts.unlink()
        with starts.open("ab") as file:
            file.write(b".")
        return saved

    def put(self, site: int, header: str, blobs: Mapping[str, bytes]) -> None:
        """Keep a reply."""
        partial = self._folder / f"{site}.partial"
        partial.mkdir()
        index = {key: f"bundle-{number}" for number, key in enumerate(blobs)}
        for key, file in index.items():
            (partial / file).write_bytes(blobs[key])
        (partial / "bundles.json").write_text(json.dumps(index))
        (partial / "reply.json").write_text(header)
        partial.rename(self._folder / str(site))

    def get(self, site: int) -> tuple[str, dict[str, bytes]]:
        """Header and bundles of a reply as they arrived.

        Raises:
            Exception: whatever reading a damaged file raises; use `drop` then.
        """
        folder = self._folder / str(site)
        index = json.loads((folder / "bundles.json").read_text())
        return (folder / "reply.json").read_text(), {
            key: (folder / file).read_bytes() for key, file in index.items()
        }

    def drop(self, site: int) -> None:
        """Throw a reply away."""
        shutil.rmtree(self._folder / str(site))

    def tensors(self, site: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Those of the tensors that this site's reply has; with a plain codec, as read-only views of its files.

        A file stays open as long as one of its tensors is held.

        Args:
            shapes: of the tensors that are asked for, by name.
        """
        if site not in self._contents:
            folder = self._folder / str(site)
            files: Sequence[str] = list(json.loads((folder / "bundles.json").read_text()).values())
            self._contents[site] = [
                (path, {entry.name: entry for entry in wire.read_header(_mapped(path))})
                for path in (folder / file for file in files)
            ]
        names = [
            part_name(name, part) for name, shape in shapes.items() for part in self._codec.layout(shape)
        ]
        found: dict[str, Tensor] = {}
        for path, entries in self._contents[site]:
            if wanted := [entries[name] for name in names if name in entries]:
                data = _mapped(path)
                found.update((entry.name, wire.view(data, entry)) for entry in wanted)
        return decode(self._codec, found, shapes)

    def close(self) -> None:
        """The round is over; its replies stay."""
        self._contents.clear()

    def clear(self) -> None:
        """The run is over, or another one begins here: nothing stays."""
        self.close()
        shutil.rmtree(self._root, ignore_errors=True)


def _mapped(path: Path) -> mmap.mmap:
    """A bundle's file: its tensors are read where they lie, and only when somebody adds them up."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
