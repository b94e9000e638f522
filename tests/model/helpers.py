"""A model small enough to be worked out by hand, and the paper's equations as plain loops over named tensors.

Nothing here calls the code under test: the loops read a shard (name -> tensor) and know the method from the paper.

Letters: T tokens, S positions, D d_model, W width of a head, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.placement import full_residents

Shard = Mapping[str, Tensor]

# Every CompleteP multiplier differs from 1, so that a forgotten one shows.
SMALL = ModelConfig(
    name="small",
    vocab_size=29,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_experts=6,
    d_expert=8,
    top_k=3,
    base_d_model=24,
    base_num_layers=3,
    base_d_expert=32,
    base_top_k=4,
    init_std=0.5,
    load_balance=0.1,
    rope_theta=50.0,
)
SHARED = dataclasses.replace(SMALL, num_shared_experts=2)
FULL = full_residents(SMALL.num_layers, SMALL.num_experts)
SOME = [[0, 2, 5], [1, 3]]  # layers need not hold equally many


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written to holds NaN, so that reading it shows.

    Twice over: PyTorch fills what it allocates, and freed blocks of the sizes used here are full of NaN.
    """
    for exponent in range(4, 16):
        blocks = [torch.full((2**exponent,), torch.nan) for _ in range(8)]
        del blocks
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def randomized(shard: Shard, seed: int = 0) -> dict[str, Tensor]:
    """The shard with other gains than 1 in its norms, so that a gain nobody applies shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 1 + 0.3 * torch.randn(value.shape, generator=generator)
        if name.endswith("norm.weight")
        else value
        for name, value in shard.items()
    }


def plain_expert(x_D: Tensor, up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """Up-projection, SiLU, down-projection of one token."""
    hidden_H = up_HD @ x_D
    return down_DH @ (hidden_H * torch.sigmoid(hidden_H))


def plain_moe(
    x_TD: Tensor,
    router_rows: Mapping[int, Tensor],
    experts: Mapping[int, tuple[Tensor, Tensor]],
    top_k: int,
) -> Tensor:
    """σ-MoE token by token: the k best of the candidates, each weighted by its own score; ghosts contribute nothing.

    Args:
        router_rows: a row w_D for each expert the router may choose.
        experts: (up_HD, down_DH) of each expert that is here.
    """
    outputs = []
    for x_D in x_TD:
        scores = {expert: torch.sigmoid(row_D @ x_D) for expert, row_D in router_rows.items()}
        chosen = sorted(scores, key=lambda expert: -scores[expert].item())[:top_k]
        y_D = torch.zeros_like(x_D)
        for expert in chosen:
            if expert in experts:
                y_D = y_D + scores[expert] * plain_expert(x_D, *experts[expert])
        outputs.append(y_D)
    return torch.stack(outputs)


def plain_layer_norm(x_D: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    centred_D = x_D - x_D.mean(-1, keepdim=True)
    return centred_D / (centred_D.square().mean(-1, keepdim=True) + eps).sqrt() * gain_D


def plain_rope(x_SW: Tensor, theta: float) -> Tensor:
    """Feature f of the first half and f of the second are one complex number, turned by position · theta^(-2f/W)."""
    width = x_SW.shape[1]
    rows = []
    for position, x_W in enumerate(x_SW):
        angles_F = torch.tensor(
            [position * theta ** (-2 * f / width) for f in range(width // 2)], dtype=x_W.dtype
        )
        turned_F = torch.complex(x_W[: width // 2], x_W[width // 2 :]) * torch.exp(1j * angles_F)
        rows.append(torch.cat((turned_F.real, turned_F.imag)))
    return torch.stack(rows)


def plain_attention(shard: Shard, prefix: str, x_SD: Tensor, model: ModelConfig) -> Tensor:
    width = model.d_model // model.num_heads
    heads = []
    for head in range(model.num_heads):
        rows = slice(head * width, (head + 1) * width)
        q_SW, k_SW, v_SW = (x_SD @ shard[f"{prefix}{p}_proj.weight"][rows].T for p in "qkv")
        q_SW, k_SW = plain_rope(q_SW, model.rope_theta), plain_rope(k_SW, model.rope_theta)
        outputs = []
        for position in range(len(x_SD)):
            past_S = k_SW[: position + 1] @ q_SW[position] / math.sqrt(width)
            outputs.append(torch.softmax(past_S, 0) @ v_SW[: position + 1])
        heads.append(torch.stack(outputs))
    return torch.cat(heads, dim=1) @ shard[f"{prefix}o_proj.weight"].T


def plain_logits(
    shard: Shard,
    tokens_S: Sequence[int],
    model: ModelConfig,
    residents: Sequence[Sequence[int]],
    routing: str,
) -> Tensor:
    """The whole decoder for one sequence, from the paper's appendix B; logits_SV."""
    m = model.base_num_layers / model.num_layers
    embedding_VD = shard["model.embed_tokens.weight"]

    def norm(name: str, x_SD: Tensor) -> Tensor:
        return plain_layer_norm(x_SD, shard[f"model.{name}.weight"], model.norm_eps)

    x_SD = norm("embed_norm", embedding_VD[list(tokens_S)])
    for layer in range(model.num_layers):
        at, prefix = f"layers.{layer}.", f"model.layers.{layer}."
        y_SD = plain_attention(shard, f"{prefix}self_attn.", norm(f"{at}input_layernorm", x_SD), model)
        x_SD = x_SD + m * norm(f"{at}post_attention_layernorm", y_SD)
        inner_SD = norm(f"{at}pre_feedforward_layernorm", x_SD)
        local = residents[layer]
        if routing == "skip":
            router_rows = dict(enumerate(shard[f"{prefix}mlp.gate.weight"]))
        else:
            router_rows = {e: shard[f"{prefix}mlp.experts.{e}.gate.weight"] for e in local}
        experts = {
            e: (
                shard[f"{prefix}mlp.experts.{e}.up_proj.weight"],
                shard[f"{prefix}mlp.experts.{e}.down_proj.weight"],
            )
            for e in local
        }
        y_SD = plain_moe(inner_SD, router_rows, experts, model.top_k)
        if model.num_shared_experts:
            shared = [shard[f"{prefix}mlp.shared_experts.{p}_proj.weight"] for p in ("up", "down")]
            y_SD = y_SD + torch.stack([plain_expert(inner_D, *shared) for inner_D in inner_SD])
        x_SD = x_SD + m * norm(f"{at}post_feedforward_layernorm", y_SD)
    return norm("norm", x_SD) @ embedding_VD.T * (model.base_d_model / model.d_model)


def plain_loss(logits_SV: Tensor, targets_S: Sequence[int]) -> Tensor:
    """Mean cross-entropy in nats."""
    terms = [
        torch.logsumexp(logits_V, 0) - logits_V[t] for logits_V, t in zip(logits_SV, targets_S, strict=True)
    ]
    return torch.stack(terms).mean()
