"""`init_from=`: a new run begins with the model of an earlier run's checkpoint, and with nothing else of that run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any, TypedDict

import torch
from torch import Tensor

from fomoe_flwr.checkpoint import Origin, named_checkpoint
from fomoe_flwr.checks import check_fields
from fomoe_flwr.config import DataConfig, ModelConfig, RunConfig, StrategyConfig
from fomoe_flwr.data import load_tokenizer
from fomoe_flwr.data.tokenizer import at_hand
from fomoe_flwr.errors import CheckpointError, ConfigError
from fomoe_flwr.eval_command import check_tokenizer, load
from fomoe_flwr.export import whole_state
from fomoe_flwr.hf_files import as_held
from fomoe_flwr.inputs import FREE_MODEL_KEYS
from fomoe_flwr.mapped import in_pieces
from fomoe_flwr.model.build import initial_standins
from fomoe_flwr.overrides import spelled
from fomoe_flwr.reading import WrongTypeError, as_type

log = logging.getLogger("fomoe")

# Of the model, what may be another than in the checkpoint: the weights mean the same.
_FREE = (
    *FREE_MODEL_KEYS, "name", "standins", "balance", "locality", "locality_target", "locality_coefficient",
    "locality_epsilon",
)  # fmt: skip
_KEYS = {spec.name for spec in dataclasses.fields(ModelConfig)}


class _Strategy(TypedDict):
    routing: str


class _Data(TypedDict):
    tokenizer: str


class _Config(TypedDict):
    """What is taken from the configuration in a checkpoint."""

    model: ModelConfig
    strategy: _Strategy
    data: _Data


def take_model(config: RunConfig, given: Collection[str]) -> None:
    """Complete the configuration by what the checkpoint says of its model (`TAKEN`).

    Args:
        given: keys that the user gave.

    Raises:
        ConfigError: one of them makes another model of it.
        CheckpointError: there is none, or its manifest is damaged or not of this program.
    """
    assert config.init_from is not None
    asked, model = spelled("init_from", config.init_from), config.model
    if model.path is not None or model.init == "checkpoint":
        key = "init" if model.path is None else "path"
        raise ConfigError(
            f"model.{key}={getattr(model, key)}: not with init_from, which brings a model, too; leave model=hf and "
            "model.path out"
        )
    before = _before(config.init_from, asked)
    was = before.model
    if "model" in given and bool(model.hf) != bool(was.hf):
        raise ConfigError(
            f"model={model.name}: the model of {asked} is {was.hf.get('model_type', 'a σ-MoE')}; leave it out"
        )
    # Of an architecture of transformers its sizes follow, and single keys may be given.
    model.hf = was.hf | model.hf
    whole = "model" in given and not was.hf
    named = {key for key in _KEYS if whole or key in ("hf", "init", "path") or f"model.{key}" in given}
    for key, before_, now in _contradictions(was, model, named):
        raise ConfigError(f"model.{key}={now!s:.80}: the model of {asked} has {before_!s:.80}; leave it out")
    for key in _KEYS - named:
        setattr(model, key, getattr(was, key))
    if "strategy.routing" not in given:
        config.strategy.routing = before.strategy.routing
    if "data.tokenizer" not in given:
        # With another one its embeddings mean nothing.
        config.data.tokenizer = before.data.tokenizer


def _before(where: str, asked: str) -> RunConfig:
    """A configuration with what is taken from that of the checkpoint."""
    checkpoint = named_checkpoint(where, asked, tensors=False)
    try:
        found: _Config = as_type(_Config, checkpoint.manifest.get("config"))
        before = RunConfig(
            model=found["model"],
            strategy=StrategyConfig(routing=found["strategy"]["routing"]),
            data=DataConfig(tokenizer=at_hand(found["data"]["tokenizer"], checkpoint.path.parent.parent)),
        )
        check_fields(before)
    except (WrongTypeError, ConfigError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: manifest.json: config: {error!s:.200}"
        ) from error
    return before


def _contradictions(was: ModelConfig, now: ModelConfig, keys: Set[str]) -> Iterator[tuple[str, Any, Any]]:
    """The keys, below `model`, by which it is another model, and their values."""
    # The family first: with another one all else differs, too.
    order = sorted(now.hf.keys() | was.hf.keys(), key=lambda key: (key != "model_type", key))
    for key in order if "hf" in keys else ():
        if was.hf.get(key) != now.hf.get(key):
            yield f"hf.{key}", was.hf.get(key), now.hf.get(key)
    for key in sorted(keys - {"hf", *_FREE}):
        if getattr(was, key) != getattr(now, key):
            yield key, getattr(was, key), getattr(now, key)


# ----- when the run begins


def open_model(config: RunConfig, asked: Collection[str]) -> tuple[Origin, Iterator[tuple[str, Tensor]]]:
    """The checkpoint, verified, and held against the run that begins with it.

    Args:
        asked: keys that the command gave.

    Returns:
        What the run's own checkpoints keep of it; and the parameters, fp32, one after the other, as a run with this
        routing has them, without moments.

    Raises:
        CheckpointError: it is damaged, or not of the model that the configuration describes, or its tokenizer is
            another one now.
    """
    assert config.init_from is not None
    saved = load(config.init_from, spelled("init_from", config.init_from))
    checkpoint, model = saved.checkpoint, saved.judged.model
    for key, was, now in _contradictions(model, config.model, _KEYS):
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: model.{key} is {was!s:.80}, but the run was composed for {now!s:.80}"
        )
    check_tokenizer(saved, load_tokenizer(config.data.tokenizer), "data.tokenizer" in asked)
    state = whole_state(saved)
    origin = Origin(
        path=config.init_from,
        run=str(checkpoint.manifest.get("run", "?")),
        round=checkpoint.round,
        sha256=checkpoint.manifest["sha256"]["parameters.safetensors"],
    )
    log.info("weights of %s", checkpoint.path)
    return origin, _copies(state, model, config)


def _copies(
    state: Mapping[str, Tensor], model: ModelConfig, config: RunConfig
) -> Iterator[tuple[str, Tensor]]:
    routing = config.strategy.routing
    for name, tensor in in_pieces(state.items(), lambda item: item[1].nbytes):
        for held, part in as_held(name, tensor, model, routing):
            yield held, part.to(torch.float32, copy=True).contiguous()
    # Those of the checkpoint stood in for experts as they were while they were trained.
    yield from initial_standins(config.model, config.strategy.routing, config.seed)
