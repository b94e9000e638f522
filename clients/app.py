"""The Flower ClientApp of a site: `train`, `evaluate` and `query`.

Flower starts a process of it for every message, so it stays light: it never imports PyTorch in a deployment, but hands
the work to the site's worker (`clients.relay`). In a simulation and with `runtime=local`, where one process serves many
messages, the work is done right here. Errors are raised, and Flower turns them into an error reply that
the server reports.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.relay import hand_over
from fomoe_flwr.bundles import as_array, blobs_of, header_in, record_in
from fomoe_flwr.deploy.channel import Answer
from fomoe_flwr.errors import WorkerError
from fomoe_flwr.site.identity import NodeSettings, node_settings
from fomoe_flwr.store.messages import STORED

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which site this node is, and whether it has text of its own."""
    settings = node_settings(context.node_config)
    answer = ConfigRecord(
        {
            "site": settings.site or "",
            "partition-id": -1 if settings.partition is None else settings.partition,
            "own-text": settings.data_path is not None,
        }
    )
    return Message(RecordDict({"config": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take K local steps and answer with the pseudo-gradient of what this site holds."""
    return _reply(message, _work("train", message, context))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Validation loss of the shard this site was sent: dense part and its residents only."""
    return _reply(message, _work("evaluate", message, context))


def _reply(message: Message, answer: Answer) -> Message:
    config = ConfigRecord({"reply": answer.header})
    if answer.stored:
        config[STORED] = answer.stored
    content = RecordDict({"config": config})
    if answer.blobs:
        content["arrays"] = ArrayRecord({key: as_array(answer.blobs.pop(key)) for key in list(answer.blobs)})
    return Message(content, reply_to=message)


def _work(kind: str, message: Message, context: Context) -> Answer:
    settings = node_settings(context.node_config)
    task_text = header_in(message.content, "config", "task")
    stored = header_in(message.content, "config", STORED)
    if settings.partition is None:
        return hand_over(kind, task_text, stored, _taken_out(message), settings, message.metadata.ttl)
    return _work_here(kind, task_text, stored, message, settings)


def _taken_out(message: Message) -> Iterator[tuple[str, bytes]]:
    """The message's bundles, one by one, each gone from it when the next is asked for."""
    record = record_in(message.content, "arrays", ArrayRecord) or ArrayRecord()
    for key in list(record):
        yield from blobs_of(ArrayRecord({key: record.pop(key)})).items()


def _work_here(kind: str, task_text: str, stored: str, message: Message, settings: NodeSettings) -> Answer:
    from fomoe_flwr.site.memory import Memory
    from fomoe_flwr.site.work import answer

    began, budget_s = time.monotonic(), message.metadata.ttl

    def beat(phase: str) -> None:
        if time.monotonic() - began > budget_s:
            raise WorkerError(f"gave up after {budget_s:.3g} s")

    blobs = dict(_taken_out(message))
    return answer(kind, task_text, stored, blobs, settings, Memory(), beat, budget_s)
