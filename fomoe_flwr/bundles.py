"""What Flower carries: bundles as Arrays of our own type, the header as text in a ConfigRecord. No PyTorch here.

A site's ClientApp, which Flower starts anew for every message, hands bundles on without reading them; importing
PyTorch for that would cost it more than its work.
"""

from __future__ import annotations

from typing import TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fomoe_flwr.errors import WireError

BUNDLE = "fomoe.safetensors"  # stype of our Arrays

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


def record_in(content: RecordDict, key: str, kind: type[Record]) -> Record | None:
    """The record of this kind under a key.

    Not `content.array_records[key]`: Flower's property makes a cycle of references, and the arrays that hang on
    it stay in memory until Python's garbage collector comes by.
    """
    record = content.get(key)
    return record if isinstance(record, kind) else None


def header_in(content: RecordDict, record_key: str, key: str) -> str:
    """The text under `key` (`task` or `reply`) of a message's ConfigRecord; empty where there is none."""
    record = record_in(content, record_key, ConfigRecord) or ConfigRecord()
    text = record.get(key, "")
    return text if isinstance(text, str) else ""


def header_bytes(text: str) -> int:
    """Length of a reply's header as Flower puts it on the wire."""
    return len(ConfigRecord({"reply": text}).deflate())


def as_array(blob: bytes) -> Array:
    """A bundle as a Flower Array."""
    return Array(dtype="uint8", shape=(len(blob),), stype=BUNDLE, data=blob)


def blobs_of(record: ArrayRecord) -> dict[str, bytes]:
    """The bundles' bytes by key.

    Raises:
        WireError: an Array that is not a bundle of ours.
    """
    for key, array in record.items():
        if array.stype != BUNDLE:
            raise WireError(f"array {key!r} has stype {array.stype!r}, expected {BUNDLE!r}")
    return {key: array.data for key, array in record.items()}
