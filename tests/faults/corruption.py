"""Replies that are wrong in exactly one way: everything else about them, digests included, is in order."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundles import as_array, blobs_of, bundle_digests
from fomoe_flwr.model.spec import expert_name
from fomoe_flwr.task import SiteTask

Update = dict[str, Tensor]

DENSE = "model.norm.weight"


def _with(value: float) -> Callable[[Update, SiteTask], Update]:
    def change(update: Update, task: SiteTask) -> Update:
        update[DENSE].view(-1)[3] = value
        return update

    return change


def _shape(update: Update, task: SiteTask) -> Update:
    return update | {DENSE: update[DENSE].reshape(1, -1)}


def _unknown(update: Update, task: SiteTask) -> Update:
    return update | {"model.stranger.weight": torch.zeros(3, dtype=update[DENSE].dtype)}


def _not_held(update: Update, task: SiteTask) -> Update:
    ghost = min(set(range(task.model.num_experts)) - set(task.residents[0]))
    held = expert_name(0, task.residents[0][0], "up_proj")
    return update | {expert_name(0, ghost, "up_proj"): update[held].clone()}


def _huge(update: Update, task: SiteTask) -> Update:
    return {name: value * 1e4 for name, value in update.items()}


def _dtype(update: Update, task: SiteTask) -> Update:
    other = torch.bfloat16 if update[DENSE].dtype == torch.float32 else torch.float32
    return {name: value.to(other) for name, value in update.items()}


# What is done to the tensors, and the kind of refusal that it must meet.
_TENSORS: dict[str, Callable[[Update, SiteTask], Update]] = {
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


def corrupt(what: str, message: Message, reply: Message, earlier: Message | None, task: SiteTask) -> Message:
    """The reply with one thing wrong.

    Args:
        earlier: a reply of an earlier round, for "stale round".
    """
    content = reply.content
    blobs = blobs_of(content["arrays"]) if "arrays" in content else {}
    if what in _TENSORS:
        update = {name: value.clone() for name, value in wire.from_blobs(blobs.values()).items()}
        update = _TENSORS[what](update, task)
        blobs = wire.encode_bundles("all", update, update[DENSE].dtype)
    elif what == "truncated":
        blobs = {key: blob[: len(blob) // 2] for key, blob in blobs.items()}
    elif what == "garbage":
        blobs = {key: bytes(range(256)) * (len(blob) // 256 + 1) for key, blob in blobs.items()}
    facts = type(content["config"])(dict(content["config"]))
    metrics = type(content["metrics"])(dict(content["metrics"]))
    facts["bundle-digests"] = json.dumps(bundle_digests(blobs))
    if what == "wrong digest":
        key, blob = next(iter(blobs.items()))
        blobs = blobs | {key: blob[:-1] + bytes([blob[-1] ^ 1])}
    elif what == "another site":
        facts["site"] = next(site.name for site in task.sites if site.name != task.name)
    elif what == "another run":
        facts["run"] = "of somebody else"
    elif what == "another start":
        facts["start-digests"] = bytes(len(facts["start-digests"]))
    elif what == "too many tokens":
        metrics["num-examples"] = int(metrics["num-examples"]) * 1000
    elif what == "metric nan":
        metrics["train_loss"] = float("nan")
    elif what == "stale round":
        if earlier is not None and earlier.content["config"]["site"] == task.name:
            return Message(earlier.content, reply_to=message)  # truly the reply of another round
        facts["round"] = task.round - 1
    arrays = ArrayRecord({key: as_array(blob) for key, blob in blobs.items()})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics, "config": facts}), reply_to=message)
