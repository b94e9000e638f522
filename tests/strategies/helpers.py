"""Runs in this process, and ClientApps that answer what a test wants."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.app import app as real_client_app
from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.bundles import as_array, blobs_of
from fomoe_flwr.codecs import Part, down_codec
from fomoe_flwr.compose import Composed
from fomoe_flwr.messages import Reply, Task
from strategies.launch import run_server
from strategies.local_grid import LocalGrid

Answer = Callable[[Task, dict[str, Tensor]], dict[str, Tensor]]


def run(
    composed: Composed, client_app: ClientApp = real_client_app, grid_type: type[LocalGrid] = LocalGrid
) -> Path:
    """A whole run over an in-process Grid; returns its directory. Without the report, which has tests of its own."""
    grid = grid_type(client_app, len(composed.config.federation.sites), workers=2)
    try:
        with patch("strategies.launch.report"):
            run_server(grid, composed)
    finally:
        grid.close()
    return composed.run_dir


_NUMBERS = itertools.count()
_COMPOSED: dict[tuple[str, ...], Composed] = {}
_FINISHED: dict[tuple[str, ...], Path] = {}


def new_dir(tmp_path: Path) -> Path:
    """A directory for a run. All names have one length: the path travels to the sites and counts among their bytes."""
    return tmp_path.parent / f"run-{next(_NUMBERS):04d}"


def composed_anew(small: Callable[..., Composed], tmp_path: Path, *overrides: str) -> Composed:
    """`small(*overrides)` in a directory of its own. Hydra, which takes a quarter of a run, is asked only once."""
    if overrides not in _COMPOSED:
        _COMPOSED[overrides] = small(*overrides)
    composed = copy.deepcopy(_COMPOSED[overrides])
    return dataclasses.replace(composed, run_dir=new_dir(tmp_path))


def finished(small: Callable[..., Composed], tmp_path: Path, *overrides: str) -> Path:
    """A run with these settings, trained once for all tests. Only read it; change a `copy_of` it."""
    if overrides not in _FINISHED:
        _FINISHED[overrides] = run(composed_anew(small, tmp_path, *overrides))
    return _FINISHED[overrides]


def copy_of(run_dir: Path) -> Path:
    """The same run in another directory, from where it may be resumed."""
    return Path(shutil.copytree(run_dir, new_dir(run_dir)))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what depends on the clock."""
    kept = []
    for line in lines:
        line = {key: value for key, value in line.items() if key not in ("seconds", "deadline_s", "virtual")}
        line["sites"] = [
            {k: v for k, v in site.items() if k not in ("tokens_per_second", "flops_per_second", "seconds")}
            for site in line["sites"]
        ]
        kept.append(line)
    return kept


class LeavingGrid(LocalGrid):
    """From round 2 on the node of site-1 is gone; with a random placement its experts are adopted."""

    left = False

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if not (self.left and node == 101)]

    def push_messages(self, messages):
        messages = list(messages)
        self.left = self.left or any(message.metadata.message_type == "train" for message in messages)
        return super().push_messages(messages)


def answering(
    answer: Answer, dtype: torch.dtype = torch.float32, examples: Callable[[Task], int] = lambda _: 1
) -> ClientApp:
    """A ClientApp whose training is `answer(task, shard)`; an exception becomes an error reply."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        return Message(
            RecordDict({"config": ConfigRecord({"site": "", "partition-id": partition})}), reply_to=message
        )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = Task.from_json(str(message.content["config"]["task"]))
        shard = wire.from_blobs(blobs_of(message.content["arrays"]).values())
        update = answer(task, shard)
        blobs = wire.encode_bundles("all", {name: Part(value, dtype) for name, value in update.items()})
        start = wire.digests(shard, down_codec(task.strategy))
        metrics = {"train_loss": 1.0}
        reply = Reply(
            task.run,
            task.round,
            task.name,
            examples(task),
            metrics,
            start,
            bundle_digests=bundle_digests(blobs),
        )
        content = RecordDict(
            {
                "arrays": ArrayRecord({key: as_array(blob) for key, blob in blobs.items()}),
                "config": ConfigRecord({"reply": reply.to_json()}),
            }
        )
        return Message(content, reply_to=message)

    return app
