"""The paper's decoder (FoMoE, appendix B): Peri-LN, RoPE, σ-MoE, tied embeddings, CompleteP multipliers.

Layer norms have a gain and no bias. The module tree is laid out so that a dense parameter's path is its name.

Letters: B sequences, S positions, T = B·S tokens, D d_model, N heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import WireError
from fomoe_flwr.model.moe import MoE, orthonormal_rows
from fomoe_flwr.model.spec import (
    Residents,
    depth_multiplier,
    expert_name,
    logit_multiplier,
    parameters,
    slots,
)

# Logits of more than this many numbers are computed in pieces and again in the backward pass: with a
# vocabulary of 200 k, the logits of a batch are larger than everything else together.
_LOGITS_AT_ONCE = 2**27


def _layer_norm(model: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(model.d_model, eps=model.norm_eps, bias=False)


def rope_tables(seq_len: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, each [S, W/2], fp32."""
    exponents_F = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    angles_SF = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), theta**-exponents_F)
    return angles_SF.cos(), angles_SF.sin()


def rotate(x_BNSW: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> Tensor:
    """Rotate each (first half, second half) pair of a head by its position's angle (Hugging Face's layout)."""
    a, b = x_BNSW.chunk(2, dim=-1)
    cos_SF, sin_SF = cos_SF.to(x_BNSW.dtype), sin_SF.to(x_BNSW.dtype)
    return torch.cat((a * cos_SF - b * sin_SF, b * cos_SF + a * sin_SF), dim=-1)


class Attention(nn.Module):
    """Multi-head causal self-attention with RoPE."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.num_heads = model.num_heads
        self.q_proj = nn.Linear(model.d_model, model.d_model, bias=False)
        self.k_proj = nn.Linear(model.d_model, model.d_model, bias=False)
        self.v_proj = nn.Linear(model.d_model, model.d_model, bias=False)
        self.o_proj = nn.Linear(model.d_model, model.d_model, bias=False)

    def forward(self, x_BSD: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> Tensor:
        def heads(projected_BSD: Tensor) -> Tensor:
            batch, positions, _ = projected_BSD.shape
            return projected_BSD.view(batch, positions, self.num_heads, -1).transpose(1, 2)

        q_BNSW = rotate(heads(self.q_proj(x_BSD)), cos_SF, sin_SF)
        k_BNSW = rotate(heads(self.k_proj(x_BSD)), cos_SF, sin_SF)
        y_BNSW = F.scaled_dot_product_attention(q_BNSW, k_BNSW, heads(self.v_proj(x_BSD)), is_causal=True)
        y_BSD: Tensor = self.o_proj(y_BNSW.transpose(1, 2).flatten(2))
        return y_BSD


class Block(nn.Module):
    """Peri-LN: `x + m · LN(F(LN(x)))` for attention and for the MoE, m the CompleteP depth multiplier."""

    def __init__(self, model: ModelConfig, residents: Sequence[int], routing: str) -> None:
        super().__init__()
        self.multiplier = depth_multiplier(model)
        self.input_layernorm = _layer_norm(model)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = _layer_norm(model)
        self.pre_feedforward_layernorm = _layer_norm(model)
        self.mlp = MoE(model, residents, routing)
        self.post_feedforward_layernorm = _layer_norm(model)

    def forward(self, x_BSD: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x_BSD after the block, and the MoE's two losses."""
        y_BSD = self.self_attn(self.input_layernorm(x_BSD), cos_SF, sin_SF)
        x_BSD = torch.add(x_BSD, self.post_attention_layernorm(y_BSD), alpha=self.multiplier)
        y_TD, balance_loss, locality_loss = self.mlp(self.pre_feedforward_layernorm(x_BSD).flatten(0, 1))
        y_BSD = self.post_feedforward_layernorm(y_TD.view_as(x_BSD))
        return torch.add(x_BSD, y_BSD, alpha=self.multiplier), balance_loss, locality_loss


class Backbone(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, model: ModelConfig, residents: Sequence[Sequence[int]], routing: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(model.vocab_size, model.d_model)
        self.embed_norm = _layer_norm(model)
        self.layers = nn.ModuleList(
            Block(model, residents[layer], routing) for layer in range(model.num_layers)
        )
        self.norm = _layer_norm(model)


class Losses(NamedTuple):
    """Scalars of a batch: cross-entropy in nats a token, and the routers' own losses to be added to it."""

    cross_entropy: Tensor
    balance: Tensor  # of the load; with locality=loss, that loss too


class Transformer(nn.Module):
    """The model of a site: dense part and resident experts. Only residents are allocated.

    Args:
        residents: the experts held, ascending, one list a layer.
        routing: `skip` (the router chooses among all experts) or `partitioned` (among the residents).
    """

    def __init__(self, model: ModelConfig, residents: Sequence[Sequence[int]], routing: str) -> None:
        super().__init__()
        self.config, self.routing = model, routing
        self.model = Backbone(model, residents, routing)

    @property
    def moe_layers(self) -> list[MoE]:
        return [block.mlp for block in self.model.layers]  # type: ignore[misc]

    def begin_round(
        self, bias_L: Sequence[Sequence[float]], offset_LE: Sequence[Sequence[float]] | None
    ) -> None:
        """Set what the routers go by besides their weights.

        Args:
            bias_L: this site's own, as `biases()` gave it; empty: as at the start.
            offset_LE: by which the federation's shares of each layer's assignments differ from the site's own.
        """
        for layer, moe in enumerate(self.moe_layers):
            gate = moe.gate
            gate.reset_buffers()
            if bias_L and self.config.locality == "bias":
                bias, trend = bias_L[layer]
                gate.bias.fill_(bias)
                gate.trend.fill_(trend)
            if offset_LE is not None:
                gate.offset_C = gate.load_C.new_tensor(offset_LE[layer])

    def biases(self) -> list[list[float]]:
        """The site's own bias towards its residents and its trend, in each layer; empty where there is none."""
        if self.config.locality != "bias":
            return []
        return [[float(moe.gate.bias), float(moe.gate.trend)] for moe in self.moe_layers]

    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden state x_BSD after its norm, and the routers' losses times their coefficients."""
        config = self.config
        x_BSD = self.model.embed_norm(self.model.embed_tokens(tokens_BS))
        head_width = config.d_model // config.num_heads
        cos_SF, sin_SF = rope_tables(tokens_BS.shape[1], head_width, config.rope_theta, tokens_BS.device)
        balance_losses, locality_losses = [], []
        for block in self.model.layers:
            x_BSD, balance_loss, locality_loss = block(x_BSD, cos_SF, sin_SF)
            balance_losses.append(balance_loss)
            locality_losses.append(locality_loss)
        # A branch's gradient shrinks with depth by CompleteP; the balancing of each router shrinks alike.
        balance = config.load_balance * config.base_num_layers * torch.stack(balance_losses).mean()
        if config.locality == "loss":
            local = torch.stack(locality_losses).mean()
            balance = balance + config.locality_coefficient * config.base_num_layers * local
        return self.model.norm(x_BSD), balance

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits [T, V]; the embedding is tied."""
        return F.linear(hidden_TD, self.model.embed_tokens.weight) * logit_multiplier(self.config)

    def forward(self, tokens_BT: Tensor) -> Losses:
        """Losses of predicting tokens_BT[:, 1:] from tokens_BT[:, :-1]."""
        hidden_BSD, balance = self.hidden(tokens_BT[:, :-1])
        hidden_TD, targets_T = hidden_BSD.flatten(0, 1), tokens_BT[:, 1:].flatten()

        def summed_loss(hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(hidden_TD).float(), targets_T, reduction="sum")

        rows = max(1, _LOGITS_AT_ONCE // self.config.vocab_size)
        if len(targets_T) <= rows:
            total = summed_loss(hidden_TD, targets_T)
        else:
            pieces = zip(torch.split(hidden_TD, rows), torch.split(targets_T, rows), strict=True)
            total = sum(
                (checkpoint(summed_loss, h, t, use_reentrant=False) for h, t in pieces),
                torch.zeros_like(balance),
            )
        return Losses(total / len(targets_T), balance)


class NamedView(NamedTuple):
    """A parameter of the module, or one slice of it, under its wire name."""

    name: str
    parameter: nn.Parameter
    slot: int | None  # the slice; None: the whole parameter

    def of(self, tensor: Tensor) -> Tensor:
        """The same slice of another tensor of the parameter's shape (its data, its gradient)."""
        return tensor if self.slot is None else tensor[self.slot]


def named_views(module: Transformer) -> list[NamedView]:
    """The site's shard as views into the module: stacked experts (and, partitioned, router rows) one by one.

    In the order of the module's parameters.

    Raises:
        KeyError: module and table (`spec.table`) do not list the same parameters.
    """
    views: dict[str, list[NamedView]] = {path: [] for path, _ in module.named_parameters()}
    parameter_at = dict(module.named_parameters())
    residents = [moe.resident_experts for moe in module.moe_layers]
    for name, param, path in slots(module.config, residents, module.routing):
        slot = len(views[path]) if param.stack else None
        views[path].append(NamedView(name, parameter_at[path], slot))
    # It would neither be trained nor sent; only the stack of a layer without residents has no slot.
    for path, parameter in parameter_at.items():
        if parameter.numel() and not views[path]:
            raise KeyError(f"{path} is not in the table of tensors")
    return [view for in_one in views.values() for view in in_one]


@torch.no_grad()
def load_shard(module: Transformer, shard: Mapping[str, Tensor]) -> None:
    """Copy a shard into the module.

    Raises:
        WireError: a name missing, left over, or of another shape.
    """
    views = named_views(module)
    expected = {view.name for view in views}
    for problem, names in (("lacks", expected - set(shard)), ("has an unexpected", set(shard) - expected)):
        if names:
            raise WireError(f"shard {problem} {min(names)} ({len(names)} such names)")
    for view in views:
        target, value = view.of(view.parameter.data), shard[view.name]
        if target.shape != value.shape:
            raise WireError(f"{view.name}: shape {tuple(value.shape)}, expected {tuple(target.shape)}")
        target.copy_(value)


def read_shard(module: Transformer) -> dict[str, Tensor]:
    """The module's parameters by name, as views (no copy)."""
    return {view.name: view.of(view.parameter.data) for view in named_views(module)}


def build(
    model: ModelConfig, residents: Residents, routing: str, shard: Mapping[str, Tensor] | None, device: str
) -> Transformer:
    """A site's model on its device.

    Args:
        shard: its parameters; None: they are whatever the memory holds, until `load_shard`.
    """
    with torch.device("meta"):  # skip PyTorch's own initialisation: the shard overwrites all of it
        module = Transformer(model, residents, routing)
    module.to_empty(device=device)
    for moe in module.moe_layers:
        moe.reset_buffers()
    if shard is not None:
        load_shard(module, shard)
    return module


# ----- the state at step 0


def initial_state(model: ModelConfig, residents: Residents, routing: str, seed: int) -> dict[str, Tensor]:
    """The parameters at step 0, fp32, for a shard with these residents. Both routing modes start alike."""
    state: dict[str, Tensor] = {}
    for name, param in parameters(model, residents, routing).items():
        if param.init_std is None:
            state[name] = torch.ones(param.shape)
        elif param.kind == "router" and not param.per_expert:
            layer = int(name.split(".")[2])
            row_names = [expert_name(layer, expert, "gate") for expert in range(model.num_experts)]
            rows_CD = torch.stack([_draw(row, param.shape[1:], param.init_std, seed) for row in row_names])
            state[name] = orthonormal_rows(rows_CD) if model.router == "orthogonal" else rows_CD
        else:
            state[name] = _draw(name, param.shape, param.init_std, seed)
    return state


def _draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal numbers that depend on the name and the seed alone, so that any shard can be drawn by itself."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
