"""One name for every tensor, everywhere (wire, checkpoints, exports, logs), in Hugging Face's form.

model.layers.3.self_attn.q_proj.weight            dense
model.layers.3.mlp.gate.weight                    the router in skip mode: dense, [N_e, d_model]
model.layers.3.mlp.experts.7.up_proj.weight       an expert, [d_expert, d_model]
model.layers.3.mlp.experts.7.gate.weight          its router row in partitioned mode, [d_model]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fomoe_flwr.config import ModelConfig

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")

# LocalAdamW also averages AdamW's moments; each travels under its parameter's name with one of these in front.
MOMENTS = ("exp_avg", "exp_avg_sq")


def expert_name(layer: int, expert: int, part: str) -> str:
    """Name of an expert's tensor; `part` is up_proj, down_proj or gate."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


def gate_name(layer: int) -> str:
    """Name of a layer's whole router (skip mode)."""
    return f"model.layers.{layer}.mlp.gate.weight"


def is_gate(name: str) -> bool:
    """Whether a parameter is a layer's whole router."""
    return name.endswith(".mlp.gate.weight") and not is_moment(name)


def expert_of(name: str) -> tuple[int, int] | None:
    """(layer, expert) of an expert's tensor or moment, None for a dense one."""
    match = _EXPERT.search(name)
    return (int(match[1]), int(match[2])) if match else None


def moment_name(moment: str, name: str) -> str:
    """Name under which a moment of parameter `name` travels."""
    return f"{moment}.{name}"


def is_moment(name: str) -> bool:
    """Whether a name is a moment's and not a parameter's."""
    return name.startswith(("exp_avg.", "exp_avg_sq."))


def parameter_shapes(
    model: ModelConfig, residents: Sequence[Sequence[int]], routing: str
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in the shard of a site with these residents (one list a layer)."""
    d, h = model.d_model, model.d_expert
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (model.vocab_size, d),
        "model.embed_norm.weight": (d,),
        "model.norm.weight": (d,),
    }
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{prefix}{norm}_layernorm.weight"] = (d,)
        for projection in "qkvo":
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (d, d)
        if model.num_shared_experts:
            width = model.num_shared_experts * h
            shapes[f"{prefix}mlp.shared_experts.up_proj.weight"] = (width, d)
            shapes[f"{prefix}mlp.shared_experts.down_proj.weight"] = (d, width)
        if routing == "skip" and model.router != "grap":
            shapes[gate_name(layer)] = (model.num_experts, d)
        for expert in residents[layer]:
            shapes[expert_name(layer, expert, "up_proj")] = (h, d)
            shapes[expert_name(layer, expert, "down_proj")] = (d, h)
            if routing == "partitioned":
                shapes[expert_name(layer, expert, "gate")] = (d,)
    return shapes
