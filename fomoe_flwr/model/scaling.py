"""CompleteP: initialisation and learning rates that transfer across width and depth.

Source: "Don't be lazy: CompleteP enables compute-efficient deep transformers", arXiv 2505.01618, table 1, with
alpha = 1, relative to the base model of `ModelConfig.base_*`. Hidden weights start with variance 1/fan_in and learn
at lr·(base fan_in / fan_in); embedding and norms learn at lr; each branch is multiplied by base depth / depth
and the logits by base width / width. Where the paper also scales AdamW's epsilon, this project keeps it fixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.gates import orthonormal_rows
from fomoe_flwr.model.names import expert_name, is_gate, parameter_shapes


def depth_multiplier(model: ModelConfig) -> float:
    """Factor of each residual branch."""
    return model.base_num_layers / model.num_layers


def logit_multiplier(model: ModelConfig) -> float:
    """Factor of the logits."""
    return model.base_d_model / model.d_model


def lr_multiplier(model: ModelConfig, name: str) -> float:
    """Factor of the learning rate of parameter `name`."""
    if name.endswith("down_proj.weight"):
        return model.base_d_expert / model.d_expert
    if name.endswith(
        ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "up_proj.weight", "gate.weight")
    ):
        return model.base_d_model / model.d_model
    return 1.0


def _draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal numbers that depend on the name and the seed alone, so that any shard can be drawn by itself."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def initial_state(
    model: ModelConfig, residents: Sequence[Sequence[int]], routing: str, seed: int
) -> dict[str, Tensor]:
    """The parameters at step 0, fp32, for a shard with these residents. Both routing modes start alike."""
    state: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(model, residents, routing).items():
        if name.endswith("norm.weight"):
            state[name] = torch.ones(shape)
        elif name == "model.embed_tokens.weight":
            state[name] = _draw(name, shape, model.init_std, seed)
        elif is_gate(name):
            layer = int(name.split(".")[2])
            row_names = [expert_name(layer, expert, "gate") for expert in range(model.num_experts)]
            rows_CD = torch.stack([_draw(row, shape[1:], model.d_model**-0.5, seed) for row in row_names])
            state[name] = orthonormal_rows(rows_CD) if model.router == "orthogonal" else rows_CD
        else:
            state[name] = _draw(name, shape, shape[-1] ** -0.5, seed)
    return state
