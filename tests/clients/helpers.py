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
from fomoe_flwr.bundles import as_array, blobs_of
from fomoe_flwr.codecs import down_codec
from fomoe_flwr.config import RunConfig
from fomoe_flwr.inputs import Inputs
from fomoe_flwr.messages import Reply, Task, deals, make_task
from fomoe_flwr.model.build import initial_state
from fomoe_flwr.policies import POLICIES
from fomoe_flwr.server.outer import with_moments
from fomoe_flwr.site.work import resting_of
from fomoe_flwr.turns import takes_turns
from strategies.local_grid import LocalGrid

SITE = 1


def task_of(
    config: RunConfig,
    site: int = SITE,
    round_: int = 1,
    residents: list[list[int]] | None = None,
    counted_round: int = 0,
    run: str = "run",
    run_dir: str = "",
) -> Task:
    """A site's task, by default with the residents that the run's placement gives it."""
    policy = POLICIES[config.strategy.placement](config)
    placement = policy.intended(round_).placement
    if residents is None:
        residents = placement.residents(site)
    held = [[len(placement.holders(row, expert)) for expert in own] for row, own in enumerate(residents)]
    sole, until = [], []
    if takes_turns(config.strategy):
        until_LE = policy.holders_until(round_, placement)
        for row, own in enumerate(residents):
            sole.append([expert for expert, holders in zip(own, held[row], strict=True) if holders == 1])
            until.append(until_LE[row, own].tolist())
    return make_task(
        config,
        site,
        run=run,
        run_dir=run_dir,
        round_=round_,
        counted_round=counted_round,
        deal=deals(config.data, config.federation.sites)[site],
        inputs=Inputs(),
        residents=residents,
        local_steps=config.train.local_steps,
        asked=placement.num_sites,
        holders=held,
        sole=sole,
        until=until,
    )


def site_task(config: RunConfig, round_: int, counted_round: int | None = None, run: str = "run") -> Task:
    """Round after round, unless `counted_round` says otherwise."""
    before = round_ - 1 if counted_round is None else counted_round
    return task_of(config, SITE, round_, counted_round=before, run=run)


def shard_of(config: RunConfig, task: Task, evaluate: bool = False) -> dict[str, Tensor]:
    """Another shard each round, so that what is left of the last one would be noticed."""
    shard = initial_state(task.model, task.residents, task.strategy.routing, config.seed + task.round)
    if config.strategy.outer == "local_adamw" and not evaluate:
        shard = with_moments(shard)
        for name, tensor in shard.items():
            if name.startswith("exp_avg"):
                tensor += 1e-4 * task.round
    return shard


def bundled(named: Mapping[str, Tensor], config: RunConfig) -> dict[str, bytes]:
    parts, _ = down_codec(config.strategy).encode(named, {})
    return wire.encode_bundles("all", parts)


def bundles_of(config: RunConfig, task: Task, evaluate: bool = False) -> dict[str, bytes]:
    """Without what rested in the round before, if that is the one that counts."""
    shard, resting = shard_of(config, task, evaluate), set[str]()
    if not evaluate and task.counted_round == task.round - 1 > 0:
        resting = resting_of(task_of(config, round_=task.counted_round))
    return bundled({name: tensor for name, tensor in shard.items() if name not in resting}, config)


def without_seconds(reply: Reply) -> Reply:
    """The reply without what the clock says."""
    metrics = {key: value for key, value in reply.metrics.items() if key != "seconds"}
    return dataclasses.replace(reply, metrics=metrics)


def ask(
    kind: str, config: RunConfig, task: Task, node: Mapping[str, Any], budget_s: float = 300.0
) -> tuple[dict[str, bytes], Reply]:
    """The answer's bundles, and its reply without what the clock says."""
    LocalGrid(app, 1).close()  # Flower lets a Message be made only inside a run
    arrays = {key: as_array(blob) for key, blob in bundles_of(config, task, kind == "evaluate").items()}
    content = RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord({"task": task.to_json()})})
    answer = app(Message(content, 7, kind, ttl=budget_s), Context(1, 7, dict(node), RecordDict(), {})).content
    blobs = blobs_of(answer["arrays"]) if kind == "train" else {}
    return blobs, without_seconds(Reply.from_json(str(answer["config"]["reply"])))


def state_files(folder: Path) -> dict[str, bytes]:
    """A site's state files as they are, below any folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("round_*.safetensors"))
    }


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, local_steps=steps))


def as_sent(named: Mapping[str, Tensor], config: RunConfig) -> bytes:
    """What `Reply.start_digests` must be."""
    return wire.digests(named, down_codec(config.strategy))
