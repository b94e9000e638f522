"""Named tensors to bundles and back: few big blobs a message, each in the safetensors format with the names inside.

Flower charges about 35 ms for an object and nothing for a name, and it refuses bf16 tensors; so a bundle is bytes
that Flower need not understand. The dense bundle is one object for all sites, and experts are bundled by their
set of holders, so that sites with the same experts share the object; the number of bundles does not grow with
the number of experts. Reading copies nothing, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe_flwr.codecs import Codec, CodecState, Parts, of_part
from fomoe_flwr.codecs.cast import DIGEST_BYTES, Cast
from fomoe_flwr.errors import WireError
from fomoe_flwr.mapped import in_pieces
from fomoe_flwr.model.spec import expert_of
from fomoe_flwr.untrusted import parse_json

MAX_BUNDLE_BYTES = 512 * 2**20  # memory that one encode or decode needs at the most
MAX_HEADER_BYTES = 100 * 2**20  # of a bundle, as in safetensors
MAX_NAME, MAX_DIMENSIONS = 200, 8  # characters; of a tensor

_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
# Half precision is for exports: nothing here reads it.
_DTYPES_BACK = {text: dtype for dtype, text in _DTYPES.items() if dtype != torch.float16}

# A bundle is read where it lies, and nobody writes to what arrived. PyTorch warns of that once a process:
# let it do so here, unheard, instead of in the middle of a run.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def encode(parts: Parts) -> bytes:
    """A safetensors blob of the parts, each cast to its dtype while it is copied: one copy in all."""
    header: dict[str, Any] = {}
    size = 0
    for name, (tensor, dtype) in parts.items():
        end = size + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    text = _header_bytes(header)
    start = len(text)
    # A BytesIO that nobody else holds gives its bytes away without a copy.
    blob = io.BytesIO(bytes(start + size))
    with blob.getbuffer() as memory:
        memory[:start] = text
        for name, (tensor, dtype) in in_pieces(parts.items(), lambda item: item[1].tensor.nbytes):
            begin, end = header[name]["data_offsets"]
            if begin < end:
                target = torch.frombuffer(memory[start + begin : start + end], dtype=dtype)
                target.view(tensor.shape).copy_(tensor)
                del target  # it holds on to the memory
    return blob.getvalue()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
    seen: Callable[[bytes | memoryview], object] = lambda piece: None,
) -> None:
    """Write a safetensors file, the same bytes for the same tensors, marked as PyTorch's.

    Not by safetensors 0.8: that makes every file readable by its owner only, orders metadata by chance, and says in an
    error of its own kind that the disk is full.

    Args:
        facts: more metadata.
        read: a tensor by its name, when its turn has come; it is cast to the dtype of the one in `tensors`, which may
            then be without content (`meta`).
        seen: is given all that is written, in order.

    Raises:
        OSError: the file cannot be written.
    """
    # The widest numbers first, so that each lies at a multiple of its size.
    read = read or tensors.__getitem__
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    # transformers opens no file without `format`.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(facts or {})}}
    size = 0
    for name in order:
        end = size + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [size, end],
        }
        size = end
    with path.open("wb") as file:

        def write(piece: bytes | memoryview) -> None:
            file.write(piece)
            seen(piece)

        write(_header_bytes(header))
        for name in in_pieces(order, lambda name: tensors[name].nbytes):
            write(raw_bytes(read(name).to(tensors[name].dtype)))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, in place if it lies in one piece in this machine's memory."""
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def digest_of_all(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors and a text that goes with them; about a second for each GB."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


Blob = bytes | mmap.mmap  # a mapped file reads like bytes


class Entry(NamedTuple):
    """Where a tensor lies in its blob."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(blob: Blob, longest: int = MAX_HEADER_BYTES) -> list[Entry]:
    """What the header says, in the order of the data, held against the length of the blob.

    Args:
        longest: bytes that the header may have.

    Raises:
        WireError: not a safetensors blob, or tensors that do not fill it exactly.
    """
    size = len(blob)
    start = 8 + int.from_bytes(blob[:8], "little")
    if size < 8 or start > size:
        raise WireError(f"bundle of {size} bytes: truncated or not safetensors")
    if start - 8 > longest:
        raise WireError(f"bundle of {size} bytes: its header has {start - 8}, at most {longest} are expected")
    try:
        header = parse_json(blob[8:start], longest)
    except ValueError as error:  # bad UTF-8 and bad JSON
        raise WireError(f"bundle of {size} bytes: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise WireError(f"bundle of {size} bytes: its header is not a table of names")
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        if len(name) > MAX_NAME:
            raise WireError(f"a tensor's name of {len(name)} characters, at most {MAX_NAME} are allowed")
        try:
            dtype, shape = _DTYPES_BACK[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"{name}: unreadable entry in the bundle's header ({error})") from error
        # JSON also has true, 1.5 and Infinity, which Python would take for numbers.
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise WireError(
                f"{name}: unreadable entry in the bundle's header (sizes must be whole numbers, and few)"
            )
        if end - begin != math.prod(shape) * dtype.itemsize or end > size - start:
            raise WireError(
                f"{name}: {end - begin} bytes at {begin} do not hold {entry['dtype']} {list(shape)}"
            )
        entries.append(Entry(name, dtype, shape, start + begin, start + end))
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    for entry, begin in zip(entries, [start, *(entry.end for entry in entries)], strict=False):
        if entry.begin != begin:
            raise WireError(
                f"bundle of {size} bytes: its tensors overlap or leave bytes over at {entry.name}"
            )
    if (entries[-1].end if entries else start) != size:
        raise WireError(f"bundle of {size} bytes: its tensors leave bytes over")
    return entries


def view(blob: Blob, entry: Entry) -> Tensor:
    """An entry of a blob as a read-only tensor, where it lies.

    Raises:
        WireError: sizes that PyTorch cannot have.
    """
    count = math.prod(entry.shape)
    if not count:  # frombuffer refuses to read nothing
        flat = torch.empty(0, dtype=entry.dtype)
    else:
        flat = torch.frombuffer(blob, dtype=entry.dtype, count=count, offset=entry.begin)
    try:
        return flat.view(entry.shape)
    except (
        RuntimeError,
        TypeError,
        OverflowError,
    ) as error:  # no number at all, but other sizes beyond 64 bits
        raise WireError(f"{entry.name}: PyTorch cannot have the shape {list(entry.shape)}") from error


def decode(blob: Blob) -> dict[str, Tensor]:
    """The tensors of a blob, as read-only views of its bytes.

    Raises:
        WireError: damaged, or a dtype that does not belong on this wire.
    """
    return {entry.name: view(blob, entry) for entry in read_header(blob)}


def from_blobs(blobs: Iterable[Blob]) -> dict[str, Tensor]:
    """The tensors of several blobs.

    Raises:
        WireError: a name stands in two of them.
    """
    named: dict[str, Tensor] = {}
    for blob in blobs:
        part = decode(blob)
        if twice := part.keys() & named.keys():
            raise WireError(f"{min(twice)}: sent twice in one message")
        named.update(part)
    return named


# ----- bundles


def split_bundle(names: Sequence[str], sizes: Mapping[str, int], limit: float) -> Iterator[list[str]]:
    """Names in order, cut so that no piece is larger than `limit` bytes (unless one tensor is)."""
    bundle: list[str] = []
    total = 0
    for name in names:
        if bundle and total + sizes[name] > limit:
            yield bundle
            bundle, total = [], 0
        bundle.append(name)
        total += sizes[name]
    if bundle:
        yield bundle


def encode_bundles(key: str, parts: Parts) -> dict[str, bytes]:
    """The parts as bundles named key, key.1, key.2, …: one, but for very large groups.

    All parts of a tensor are in one bundle, so that each bundle can be checked by itself.
    """
    of_tensor: dict[str, list[str]] = {}
    for part in parts:
        of_tensor.setdefault(of_part(part)[0], []).append(part)
    sizes = {
        name: sum(parts[part].tensor.numel() * parts[part].dtype.itemsize for part in own)
        for name, own in of_tensor.items()
    }
    return {
        key if index == 0 else f"{key}.{index}": encode(
            {part: parts[part] for name in names for part in of_tensor[name]}
        )
        for index, names in enumerate(split_bundle(list(of_tensor), sizes, MAX_BUNDLE_BYTES))
    }


def encode_update(
    named: Mapping[str, Tensor], codec: Codec, state: CodecState
) -> tuple[dict[str, bytes], CodecState]:
    """A site's update as bundles, dense and experts apart, and what its encoder must remember."""
    parts, state = codec.encode(named, state)
    dense = {name: part for name, part in parts.items() if expert_of(name) is None}
    experts = {name: part for name, part in parts.items() if expert_of(name) is not None}
    return encode_bundles("dense", dense) | encode_bundles("expert", experts), state


# ----- digests and bytes


def blob_digests(blob: Blob) -> dict[str, bytes]:
    """Digest of every tensor in a blob of ours, from its bytes: the same as `Cast.digest` gives."""
    data = memoryview(blob)
    return {
        entry.name: hashlib.blake2b(data[entry.begin : entry.end], digest_size=DIGEST_BYTES).digest()
        for entry in read_header(blob)
    }


def digests(named: Mapping[str, Tensor], codec: Cast) -> bytes:
    """The tensors' digests end to end, in the order of their sorted names."""
    return b"".join(codec.digest(named[name]) for name in sorted(named))


def byte_classes(blob: Blob, longest: int = MAX_HEADER_BYTES) -> dict[str, int]:
    """Length of a blob by class: dense tensors, expert tensors, and other (its header).

    A damaged bundle crossed the wire all the same: its bytes count as other, for its tensors cannot be told.

    Args:
        longest: as in `read_header`.
    """
    classes = {"dense": 0, "expert": 0, "other": len(blob)}
    try:
        entries = read_header(blob, longest)
    except WireError:
        return classes
    for entry in entries:
        classes["other"] -= entry.end - entry.begin
        classes["dense" if expert_of(entry.name) is None else "expert"] += entry.end - entry.begin
    return classes


@dataclass
class Traffic:
    """Bytes really put into messages, by class; `other` is bundle headers, configuration and metrics."""

    dense: int = 0
    expert: int = 0
    other: int = 0
    by_site: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.dense + self.expert + self.other

    def count(self, site: int, bundles: Iterable[Mapping[str, int]], header_bytes: int) -> None:
        """Add one message to or from a site.

        Args:
            bundles: `byte_classes` of each.
            header_bytes: of all that is no bundle.
        """
        before = self.total
        self.other += header_bytes
        for classes in bundles:
            self.dense += classes["dense"]
            self.expert += classes["expert"]
            self.other += classes["other"]
        self.by_site[site] = self.by_site.get(site, 0) + self.total - before
