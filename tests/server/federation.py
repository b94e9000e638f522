"""A server without Flower, and sites that answer what a test wants."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.codecs import down_codec, up_codec
from fomoe_flwr.config import (
    FederationConfig,
    ModelConfig,
    RunConfig,
    SiteConfig,
    StrategyConfig,
    TrainConfig,
)
from fomoe_flwr.engine import Engine, EngineState
from fomoe_flwr.messages import Reply, Task
from fomoe_flwr.model.build import initial_state
from fomoe_flwr.placement import full_residents
from fomoe_flwr.server.rounds import Outgoing, RoundObserver, Server

Answer = Callable[[Task, dict[str, Tensor]], dict[str, Tensor]]


def config_of(*overrides: str) -> RunConfig:
    """A small run on four sites with two holders for each expert, but for these keys; without Hydra, which is slow."""
    config = RunConfig(
        model=ModelConfig(d_model=32, num_layers=2, num_heads=2, num_experts=8, d_expert=16),
        train=TrainConfig(local_steps=3, batch_size=2, seq_len=32, warmup_steps=4, rounds=2, device="cpu"),
        strategy=StrategyConfig(overlap=2),
        federation=FederationConfig(num_sites=4),
    )
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.rpartition(".")
        setattr(getattr(config, section) if section else config, name, yaml.safe_load(value))
    config.federation.sites = [SiteConfig(name=f"site-{i}") for i in range(config.federation.num_sites or 0)]
    return config


def server_of(config: RunConfig, folder: Path) -> Server:
    """With a fresh model."""
    server = Server(config, "run", str(folder), folder / "inbox")
    everything = full_residents(config.model.num_layers, config.model.num_experts)
    server.load(initial_state(config.model, everything, config.strategy.routing, config.seed))
    return server


def nothing(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in shard.items()}


def constant(value: float) -> Answer:
    """The same number everywhere."""
    return lambda task, shard: {name: torch.full_like(tensor, value) for name, tensor in shard.items()}


def answer_to(
    outgoing: Outgoing, answer: Answer = nothing, shard: dict[str, Tensor] | None = None, **changes: Any
) -> tuple[str, dict[str, bytes]]:
    """Header and bundles of a site's reply; `changes` are of the Reply.

    Args:
        shard: where what was sent are not the tensors themselves.
    """
    task = Task.from_json(outgoing.task)
    codec = down_codec(task.strategy)
    shard = wire.from_blobs(outgoing.bundles.values()) if shard is None else shard
    blobs, _ = wire.encode_update(answer(task, shard), up_codec(task.strategy), {})
    tokens = task.train.local_steps * task.train.batch_size * task.train.seq_len
    reply = Reply(
        task.run,
        task.round,
        task.name,
        tokens,
        {"train_loss": 1.0, "first_loss": 1.5, "last_loss": 0.5},
        wire.digests(shard, codec),
        bundle_digests=bundle_digests(blobs),
    )
    return dataclasses.replace(reply, **changes).to_json(), blobs


def trained(outgoing: Outgoing) -> tuple[str, dict[str, bytes]]:
    """The reply of a site that does what it is asked, on random tokens that depend on the site and the round."""
    task = Task.from_json(outgoing.task)
    codec = down_codec(task.strategy)
    engine = Engine(task.model, task.residents, task.strategy.routing, "cpu")
    engine.load(task, wire.from_blobs(outgoing.bundles.values()), EngineState())
    start = wire.digests(engine.loaded(), codec)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{task.name} {task.round}".encode()))
    shape = (task.train.batch_size, task.train.seq_len + 1)
    report = engine.train(
        torch.randint(task.model.vocab_size, shape, generator=generator)
        for _ in range(task.train.local_steps)
    )
    blobs, _ = wire.encode_update(engine.update(), up_codec(task.strategy), {})
    digests = bundle_digests(blobs)
    reply = Reply(
        task.run, task.round, task.name, report.tokens, report.metrics, start, report.load_LE, digests
    )
    return reply.to_json(), blobs


def play(
    server: Server,
    number: int,
    answer: Answer | None = nothing,
    alive: Iterable[int] | None = None,
    answering: Iterable[int] | None = None,
    observer: RoundObserver | None = None,
    needed: int = 1,
    **changes: Any,
) -> bool:
    """A whole round; whether it was committed.

    Args:
        answer: what the sites make of their shards; None: they train.
        alive: the sites that are connected; None: all.
        answering: those of them that answer; None: all.
    """
    everybody = range(len(server.site_names))
    sites = server.begin(number, list(everybody if alive is None else alive), 60.0)
    out = server.outgoing(sites, training=True)
    for site in sites if answering is None else answering:
        reply = trained(out[site]) if answer is None else answer_to(out[site], answer, **changes)
        server.take(site, *reply)
    return server.close(needed, 0.5, observer or RoundObserver())
