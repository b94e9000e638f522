"""What a site does with a message, whoever carried it: bundles in, bundles and figures out."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from clients.channel import Answer
from clients.identity import NodeSettings, own_task
from clients.memory import Memory
from clients.site import Beat, Outcome, evaluate_shard, train_round
from fomoe_flwr import residual, wire
from fomoe_flwr.bundles import bundle_digests
from fomoe_flwr.model.names import expert_of
from fomoe_flwr.task import SiteTask


def perform(
    kind: str, task_text: str, blobs: dict[str, bytes], settings: NodeSettings, memory: Memory, beat: Beat
) -> Answer:
    """Train or evaluate.

    Args:
        kind: `train` or `evaluate`.
        task_text: the SiteTask as JSON.
        blobs: the shard's bundles by key; emptied, so that they can be freed before the work is done.

    Raises:
        FomoeError: a message that this version cannot read, that is another site's, or whose work cannot be done.
        FloatingPointError: the loss is not finite.
    """
    task = own_task(task_text, settings)
    with memory.serving(task.run):
        shard = residual.unpack(wire.from_blobs(blobs.values()), shared={})
        blobs.clear()
        if kind == "evaluate":
            loss, tokens, start = evaluate_shard(task, shard, settings, memory, beat)
            return Answer({}, {"num-examples": tokens, "val_loss": loss}, _facts(task, start))
        return _trained(task, train_round(task, shard, settings, memory, beat))


def _trained(task: SiteTask, outcome: Outcome) -> Answer:
    report = outcome.report
    blobs = _encoded(outcome.update, task.strategy.wire_dtype)
    metrics: dict[str, int | float] = {
        "num-examples": report.tokens,
        "train_loss": report.train_loss,
        "first_loss": report.first_loss,
        "last_loss": report.last_loss,
        "seconds": report.seconds,
        "resident_share": report.resident_share,
        "memory_bytes": outcome.memory_bytes,
        "new_experts": outcome.new_experts,
    }
    facts = _facts(task, outcome.start) | {
        "router-load": json.dumps(report.load_LE),
        "bundle-digests": json.dumps(bundle_digests(blobs)),
    }
    return Answer(blobs, metrics, facts)


def _encoded(update: Mapping[str, Tensor], wire_dtype: str) -> dict[str, bytes]:
    dtype = wire.WIRE_DTYPES[wire_dtype]
    dense = {name: value for name, value in update.items() if expert_of(name) is None}
    expert = {name: value for name, value in update.items() if expert_of(name) is not None}
    return wire.encode_bundles("dense", dense, dtype) | wire.encode_bundles("expert", expert, dtype)


def _facts(task: SiteTask, start: bytes) -> dict[str, int | str | bytes]:
    return {"run": task.run, "round": task.round, "site": task.name, "start-digests": start}
