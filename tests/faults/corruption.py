"""Replies that are wrong in exactly one way: everything else about them, digests included, is in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.bundles import as_array, blobs_of
from fomoe_flwr.codecs import Part
from fomoe_flwr.messages import Reply, Task
from fomoe_flwr.model.spec import expert_name

Update = dict[str, Tensor]

DENSE = "model.norm.weight"


def _with(value: float) -> Callable[[Update, Task], Update]:
    def change(update: Update, task: Task) -> Update:
        update[DENSE].view(-1)[3] = value
        return update

    return change


def _shape(update: Update, task: Task) -> Update:
    return update | {DENSE: update[DENSE].reshape(1, -1)}


def _unknown(update: Update, task: Task) -> Update:
    return update | {"model.stranger.weight": torch.zeros(3, dtype=update[DENSE].dtype)}


def _not_held(update: Update, task: Task) -> Update:
    ghost = min(set(range(task.model.num_experts)) - set(task.residents[0]))
    held = expert_name(0, task.residents[0][0], "up_proj")
    return update | {expert_name(0, ghost, "up_proj"): update[held].clone()}


def _huge(update: Update, task: Task) -> Update:
    return {name: value * 1e4 for name, value in update.items()}


def _dtype(update: Update, task: Task) -> Update:
    other = torch.bfloat16 if update[DENSE].dtype == torch.float32 else torch.float32
    return {name: value.to(other) for name, value in update.items()}


# What is done to the tensors, and the kind of refusal that it must meet.
_TENSORS: dict[str, Callable[[Update, Task], Update]] = {
    "nan": _with(float("nan")),
    "infinity": _with(float("inf")),
    "shape": _shape,
    "dtype": _dtype,
    "unknown name": _unknown,
    "expert not held": _not_held,
    "huge norm": _huge,
}
CORRUPTIONS = {
    "nan": "not_finite",
    "infinity": "not_finite",
    "shape": "shape",
    "dtype": "dtype",
    "unknown name": "unknown_name",
    "expert not held": "not_held",
    "huge norm": "norm",
    "stale round": "round",
    "another site": "site",
    "another run": "run",
    "truncated": "damaged",
    "garbage": "damaged",
    "wrong digest": "digest",
    "another start": "attestation",
    "too many tokens": "weight",
    "metric nan": "not_finite",
}


def corrupt(what: str, message: Message, reply: Message, earlier: Message | None, task: Task) -> Message:
    """The reply with one thing wrong.

    Args:
        earlier: a reply of an earlier round, for "stale round".
    """
    content = reply.content
    blobs = blobs_of(content["arrays"]) if "arrays" in content else {}
    if what in _TENSORS:
        update = {name: value.clone() for name, value in wire.from_blobs(blobs.values()).items()}
        update = _TENSORS[what](update, task)
        parts = {name: Part(value, value.dtype) for name, value in update.items()}
        blobs = wire.encode_bundles("all", parts)
    elif what == "truncated":
        blobs = {key: blob[: len(blob) // 2] for key, blob in blobs.items()}
    elif what == "garbage":
        blobs = {key: bytes(range(256)) * (len(blob) // 256 + 1) for key, blob in blobs.items()}
    answer = Reply.from_json(str(content["config"]["reply"]))
    answer = replace(answer, bundle_digests=bundle_digests(blobs))
    if what == "wrong digest":
        key, blob = next(iter(blobs.items()))
        blobs = blobs | {key: blob[:-1] + bytes([blob[-1] ^ 1])}
    elif what == "another site":
        answer = replace(answer, site="site-0" if task.name != "site-0" else "site-2")
    elif what == "another run":
        answer = replace(answer, run="of somebody else")
    elif what == "another start":
        answer = replace(answer, start_digests=bytes(len(answer.start_digests)))
    elif what == "too many tokens":
        answer = replace(answer, num_examples=answer.num_examples * 1000)
    elif what == "metric nan":
        answer = replace(answer, metrics=answer.metrics | {"train_loss": float("nan")})
    elif what == "stale round":
        if earlier is not None and f'"site":"{task.name}"' in str(earlier.content["config"]["reply"]):
            return Message(earlier.content, reply_to=message)  # truly the reply of another round
        answer = replace(answer, round=task.round - 1)
    arrays = ArrayRecord({key: as_array(blob) for key, blob in blobs.items()})
    header = ConfigRecord({"reply": answer.to_json()})
    return Message(RecordDict({"arrays": arrays, "config": header}), reply_to=message)
