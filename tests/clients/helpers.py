"""Messages to the site of a test, as Flower would bring them, and what its answers come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from clients.app import app
from fomoe_flwr import wire
from fomoe_flwr.bundles import blobs_of
from fomoe_flwr.config import RunConfig
from fomoe_flwr.model.sigma_moe import initial_state
from fomoe_flwr.server.outer import with_moments
from fomoe_flwr.messages import Task, make_task
from strategies.fomoe import FoMoE
from strategies.local_grid import LocalGrid

SITE = 1


def site_task(config: RunConfig, round_: int, after: int | None = None, run: str = "run") -> Task:
    """Round after round, unless `after` says otherwise."""
    residents = FoMoE(config).placement(round_).residents(SITE)
    return make_task(config, run, "", round_, SITE, residents, round_ - 1 if after is None else after)


def shard_of(config: RunConfig, task: Task, evaluate: bool = False) -> dict[str, Tensor]:
    """Another shard each round, so that what is left of the last one would be noticed."""
    shard = initial_state(task.model, task.residents, task.strategy.routing, config.seed + task.round)
    if config.strategy.outer == "local_adamw" and not evaluate:
        shard = with_moments(shard)
        for name, tensor in shard.items():
            if name.startswith("exp_avg"):
                tensor += 1e-4 * task.round
    return shard


def bundles_of(config: RunConfig, task: Task, evaluate: bool = False) -> dict[str, bytes]:
    dtype = wire.WIRE_DTYPES[config.strategy.wire_dtype]
    return wire.encode_bundles("all", shard_of(config, task, evaluate), dtype)


def ask(
    kind: str, config: RunConfig, task: Task, node: Mapping[str, Any], budget_s: float = 300.0
) -> tuple[dict[str, bytes], dict[str, Any], dict[str, Any]]:
    """The answer's bundles, its metrics without what the clock says, and its facts."""
    LocalGrid(app, 1).close()  # Flower lets a Message be made only inside a run
    arrays = wire.to_arrays(
        "all", shard_of(config, task, kind == "evaluate"), wire.WIRE_DTYPES[config.strategy.wire_dtype]
    )
    content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord({"task": task.to_json()})})
    reply = app(Message(content, 7, kind, ttl=budget_s), Context(1, 7, dict(node), RecordDict(), {})).content
    metrics = {key: value for key, value in reply["metrics"].items() if key != "seconds"}
    blobs = blobs_of(reply["arrays"]) if kind == "train" else {}
    return blobs, metrics, dict(reply["config"])


def state_files(folder: Path) -> dict[str, bytes]:
    """A site's state files as they are, below any folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("round_*.safetensors"))
    }


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, local_steps=steps))


def as_sent(named: Mapping[str, Tensor], config: RunConfig) -> bytes:
    """What `start-digests` must be."""
    return wire.digests(named, wire.WIRE_DTYPES[config.strategy.wire_dtype])
