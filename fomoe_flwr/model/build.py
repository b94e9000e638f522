"""A site's model on its device, and the parameters at step 0."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.base import LanguageModel, load_shard
from fomoe_flwr.model.moe import orthonormal_rows
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import Residents, expert_name, is_standin, parameters


def build(
    model: ModelConfig,
    residents: Residents,
    routing: str,
    shard: Mapping[str, Tensor] | None,
    device: str,
    divide: Callable[[LanguageModel], None] = lambda _: None,
) -> LanguageModel:
    """A site's model on its device.

    Args:
        shard: its parameters; None: they are whatever the memory holds, until `load_shard`.
        divide: leaves of a module that has no memory yet what this device of several is to hold.
    """
    with torch.device("meta"):  # skip PyTorch's own initialisation: the shard overwrites all of it
        module = _architecture(model)(model, residents, routing)
    divide(module)
    module.to_empty(device=device)
    module.finish_building(device)
    if shard is not None:
        load_shard(module, shard)
    return module


def _architecture(model: ModelConfig) -> type[LanguageModel]:
    if not model.hf:
        return Transformer
    # It imports transformers, which an installation for the σ-MoE need not have.
    from fomoe_flwr.model.stock import StockModel

    return StockModel


# ----- the state at step 0


def initial_state(model: ModelConfig, residents: Residents, routing: str, seed: int) -> dict[str, Tensor]:
    """The parameters at step 0, fp32, for a shard with these residents. Both routing modes start alike."""
    return dict(initial_tensors(model, residents, routing, seed))


def initial_tensors(
    model: ModelConfig,
    residents: Residents,
    routing: str,
    seed: int,
    wanted: Callable[[str], bool] = lambda _: True,
) -> Iterator[tuple[str, Tensor]]:
    """The same, one after the other: of a model that is larger than the memory.

    Args:
        wanted: names for which it is false are left out.
    """
    for name, param in parameters(model, residents, routing).items():
        if not wanted(name):
            continue
        if param.init_std is None:
            yield name, torch.ones(param.shape)
        elif param.kind == "router" and not param.per_expert:
            layer = int(name.split(".")[2])
            row_names = [expert_name(layer, expert, "gate") for expert in range(model.num_experts)]
            rows_CD = torch.stack([_draw(row, param.shape[1:], param.init_std, seed) for row in row_names])
            yield name, orthonormal_rows(rows_CD) if model.router == "orthogonal" else rows_CD
        else:
            yield name, _draw(name, param.shape, param.init_std, seed)


def initial_standins(model: ModelConfig, routing: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Those of them that no checkpoint brings: the stand-ins of ghosts, if the model has any."""
    return initial_tensors(model, [[] for _ in range(model.num_layers)], routing, seed, is_standin)


def _draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal numbers that depend on the name and the seed alone, so that any shard can be drawn by itself."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
