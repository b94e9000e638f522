"""Tensors to Flower Arrays and back: few big bundles a message, each a safetensors blob with the names inside.

Flower charges about 35 ms for an object and nothing for a name, and it refuses bf16 tensors; so a bundle is bytes
that Flower need not understand. The dense bundle is one object for all sites, and experts are bundled by their
set of holders, so that sites with the same experts share the object; the number of bundles does not grow with
the number of experts. Reading is without a copy; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fomoe_flwr.bundles import BUNDLE, as_array, blobs_of
from fomoe_flwr.errors import WireError
from fomoe_flwr.model.names import expert_of

MAX_BUNDLE_BYTES = 512 * 2**20  # memory that one encode or decode needs at the most

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_DTYPES_BACK = {text: dtype for dtype, text in _DTYPES.items()}
WIRE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A bundle is read where it lies, and nobody writes to what arrived. PyTorch warns of that once a process:
# let it do so here, unheard, instead of in the middle of a run.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def encode(named: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    """A safetensors blob of the tensors, cast to `dtype` (fp32 or bf16) while they are copied."""
    header: dict[str, Any] = {}
    size = 0
    for name, tensor in named.items():
        end = size + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    blob_U = torch.empty(8 + len(text) + size, dtype=torch.uint8)
    blob_U[: 8 + len(text)] = torch.frombuffer(
        bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8
    )
    body = blob_U[8 + len(text) :]
    for name, tensor in named.items():
        start, end = header[name]["data_offsets"]
        body[start:end].view(dtype).view(tensor.shape).copy_(tensor)
    return blob_U.numpy().tobytes()


Blob = bytes | mmap.mmap  # a mapped file reads like bytes


class Entry(NamedTuple):
    """Where a tensor lies in its blob."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(blob: Blob) -> list[Entry]:
    """What the header says, held against the length of the blob.

    Raises:
        WireError: not a safetensors blob, or tensors that do not fill it exactly.
    """
    size = len(blob)
    start = 8 + int.from_bytes(blob[:8], "little")
    if size < 8 or start > size:
        raise WireError(f"bundle of {size} bytes: truncated or not safetensors")
    try:
        header = json.loads(blob[8:start])
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON; JSON nested too deep
        raise WireError(f"bundle of {size} bytes: its header is not JSON") from error
    if not isinstance(header, dict):
        raise WireError(f"bundle of {size} bytes: its header is not a table of names")
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        try:
            dtype, shape = _DTYPES_BACK[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"{name}: unreadable entry in the bundle's header ({error})") from error
        # JSON also has true, 1.5 and Infinity, which Python would take for numbers.
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise WireError(f"{name}: unreadable entry in the bundle's header (sizes must be whole numbers)")
        if end - begin != math.prod(shape) * dtype.itemsize or end > size - start:
            raise WireError(
                f"{name}: {end - begin} bytes at {begin} do not hold {entry['dtype']} {list(shape)}"
            )
        entries.append(Entry(name, dtype, shape, start + begin, start + end))
    if sum(entry.end - entry.begin for entry in entries) != size - start:
        raise WireError(f"bundle of {size} bytes: its tensors overlap or leave bytes over")
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
    except (RuntimeError, TypeError) as error:  # no number at all, but other sizes beyond 64 bits
        raise WireError(f"{entry.name}: PyTorch cannot have the shape {list(entry.shape)}") from error


def decode(blob: bytes) -> dict[str, Tensor]:
    """The tensors of a blob, as read-only views of its bytes.

    Raises:
        WireError: damaged, or a dtype that does not belong on this wire.
    """
    return {entry.name: view(blob, entry) for entry in read_header(blob)}


def blob_digests(blob: bytes) -> dict[str, bytes]:
    """`tensor_digest` of every tensor in a blob of ours, from its bytes."""
    data = memoryview(blob)
    return {
        entry.name: hashlib.blake2b(data[entry.begin : entry.end], digest_size=DIGEST_BYTES).digest()
        for entry in read_header(blob)
    }


def byte_classes(blob: bytes) -> dict[str, int]:
    """Length of a blob by class: dense tensors, expert tensors, and other (its header).

    Raises:
        WireError: damaged.
    """
    classes = {"dense": 0, "expert": 0, "other": len(blob)}
    for entry in read_header(blob):
        classes["other"] -= entry.end - entry.begin
        classes["dense" if expert_of(entry.name) is None else "expert"] += entry.end - entry.begin
    return classes


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


def encode_bundles(key: str, named: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, bytes]:
    """The tensors as bundles named key, key.1, key.2, …: one, but for very large groups."""
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in named.items()}
    return {
        key if index == 0 else f"{key}.{index}": encode({name: named[name] for name in names}, dtype)
        for index, names in enumerate(split_bundle(list(named), sizes, MAX_BUNDLE_BYTES))
    }


def to_arrays(key: str, named: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Array]:
    """`encode_bundles` as Flower Arrays."""
    return {key: as_array(blob) for key, blob in encode_bundles(key, named, dtype).items()}


DIGEST_BYTES = (
    8  # of a tensor; enough to notice a difference, small enough to send for every tensor and round
)


def tensor_digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Digest of a tensor's values as they cross the wire: BLAKE2b of its bytes in `dtype`."""
    flat = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=DIGEST_BYTES).digest()


def digests(named: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    """The tensors' digests end to end, in the order of their sorted names."""
    return b"".join(tensor_digest(named[name], dtype) for name in sorted(named))


def from_blobs(blobs: Iterable[bytes]) -> dict[str, Tensor]:
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


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """A message's tensors by name; read-only views of its bytes."""
    return from_blobs(blobs_of(record).values())


def named_from_flower(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of an ArrayRecord made by Flower itself (one Array a name), or of one of our bundles."""
    if all(array.stype == BUNDLE for array in record.values()):
        return from_record(record)
    return record.to_torch_state_dict()


@dataclass
class Ledger:
    """Bytes really put into messages, by class; `other` is bundle headers, configuration and metrics."""

    dense: int = 0
    expert: int = 0
    other: int = 0
    by_site: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.dense + self.expert + self.other

    def count(self, site: int, content: RecordDict) -> None:
        """Add one message to or from a site."""
        before = self.total
        for record in content.values():
            if not isinstance(record, ArrayRecord):
                self.other += len(record.deflate())  # as Flower puts it on the wire
                continue
            for array in record.values():
                classes = _classes_of(array)
                self.dense += classes["dense"]
                self.expert += classes["expert"]
                self.other += classes["other"]
        self.by_site[site] = self.by_site.get(site, 0) + self.total - before


def _classes_of(array: Array) -> dict[str, int]:
    if array.stype == BUNDLE:
        try:
            return byte_classes(array.data)
        except WireError:
            pass  # a damaged bundle crossed the wire all the same: its bytes count, its tensors cannot be told
    return {"dense": 0, "expert": 0, "other": len(array.data)}
