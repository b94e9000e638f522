"""The Flower ClientApp of a site: `train`, `evaluate` and `query`.

It translates between Flower's messages and `clients.site`. Errors are raised, and Flower turns them into an
error reply that the server reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.identity import NodeSettings, node_settings
from clients.site import evaluate_shard, train_round
from fomoe_flwr import wire
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.model.names import expert_of
from fomoe_flwr.task import SiteTask

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which site this node is."""
    settings = node_settings(context.node_config)
    answer = ConfigRecord(
        {
            "site": settings.site or "",
            "partition-id": -1 if settings.partition is None else settings.partition,
        }
    )
    return Message(RecordDict({"config": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take K local steps and answer with the pseudo-gradient of what this site holds."""
    task, settings, shard = _open(message, context)
    outcome = train_round(task, shard, settings)
    report = outcome.report
    dtype = wire.WIRE_DTYPES[task.strategy.wire_dtype]
    dense = {name: value for name, value in outcome.update.items() if expert_of(name) is None}
    expert = {name: value for name, value in outcome.update.items() if expert_of(name) is not None}
    arrays = wire.to_arrays("dense", dense, dtype) | wire.to_arrays("expert", expert, dtype)
    metrics = MetricRecord(
        {
            "num-examples": report.tokens,
            "train_loss": report.train_loss,
            "seconds": report.seconds,
            "resident_share": report.resident_share,
            "new_experts": outcome.new_experts,
        }
    )
    facts = ConfigRecord(
        {
            "run": task.run,
            "round": task.round,
            "site": task.name,
            "expert-tokens": json.dumps(report.expert_tokens),
        }
    )
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics, "config": facts}), reply_to=message
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Validation loss of the shard this site was sent: dense part and its residents only."""
    task, settings, shard = _open(message, context)
    loss, tokens = evaluate_shard(task, shard, settings)
    metrics = MetricRecord({"num-examples": tokens, "val_loss": loss})
    facts = ConfigRecord({"run": task.run, "round": task.round, "site": task.name})
    return Message(RecordDict({"metrics": metrics, "config": facts}), reply_to=message)


def _open(message: Message, context: Context) -> tuple[SiteTask, NodeSettings, Mapping[str, Tensor]]:
    """The task, this node's settings and the shard.

    Raises:
        FomoeError: a message this version cannot read, or one meant for another site.
    """
    settings = node_settings(context.node_config)
    task = SiteTask.from_json(str(message.content.config_records["config"]["task"]))
    if settings.site is not None and settings.site != task.name:
        raise ConfigError(f"node-config site={settings.site}: was given the work of site {task.name}")
    return task, settings, wire.from_record(message.content.array_records["arrays"])
