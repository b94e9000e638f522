"""The paper's decoder (FoMoE, appendix B): Peri-LN, RoPE, σ-MoE, tied embeddings, CompleteP multipliers.

Layer norms have a gain and no bias. The module tree is laid out so that a dense parameter's path is its name.

Letters: B sequences, S positions, T = B·S tokens, D d_model, N heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.base import LanguageModel, MoELayer
from fomoe_flwr.model.documents import Mask, attend, mask_of
from fomoe_flwr.model.experts import compute_dtype
from fomoe_flwr.model.moe import MoE, Routing, router_losses
from fomoe_flwr.model.recompute import kept_or_again
from fomoe_flwr.model.spec import Residents, depth_multiplier, logit_multiplier

# Where model.load_balance is null.
LOAD_BALANCE = 0.01


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

    def forward(self, x_BSD: Tensor, cos_SF: Tensor, sin_SF: Tensor, mask: Mask = None) -> Tensor:
        def heads(projected_BSD: Tensor) -> Tensor:
            batch, positions, _ = projected_BSD.shape
            return projected_BSD.view(batch, positions, self.num_heads, -1).transpose(1, 2)

        q_BNSW = rotate(heads(self.q_proj(x_BSD)), cos_SF, sin_SF)
        k_BNSW = rotate(heads(self.k_proj(x_BSD)), cos_SF, sin_SF)
        y_BNSW = attend(q_BNSW, k_BNSW, heads(self.v_proj(x_BSD)), mask)
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
        self.attention_again = False  # whether to compute attention again in the backward pass

    def _attend(self, x_BSD: Tensor, cos_SF: Tensor, sin_SF: Tensor, mask: Mask) -> Tensor:
        y_BSD: Tensor = self.self_attn(self.input_layernorm(x_BSD), cos_SF, sin_SF, mask)
        return y_BSD

    def forward(
        self, x_BSD: Tensor, cos_SF: Tensor, sin_SF: Tensor, mask: Mask = None
    ) -> tuple[Tensor, Routing]:
        """Returns x_BSD after the block, and what its router decided."""
        y_BSD = kept_or_again(self.attention_again, self._attend, x_BSD, cos_SF, sin_SF, mask)
        x_BSD = torch.add(x_BSD, self.post_attention_layernorm(y_BSD), alpha=self.multiplier)
        y_TD, routing = self.mlp(self.pre_feedforward_layernorm(x_BSD).flatten(0, 1))
        y_BSD = self.post_feedforward_layernorm(y_TD.view_as(x_BSD))
        return torch.add(x_BSD, y_BSD, alpha=self.multiplier), routing


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


class Transformer(LanguageModel):
    """The paper's model."""

    def __init__(self, model: ModelConfig, residents: Residents, routing: str) -> None:
        super().__init__(model, residents, routing)
        self.model = Backbone(model, residents, routing)

    @property
    def blocks(self) -> Sequence[Block]:
        return list(self.model.layers)  # type: ignore[arg-type]

    @property
    def moe_layers(self) -> list[MoELayer]:
        layers = [block.mlp for block in self.blocks]
        return [
            MoELayer(
                moe.gate,
                moe.num_experts,
                moe.resident_experts,
                moe.candidates,
                moe.experts,
                moe.experts.reach,
            )
            for moe in layers
        ]

    def recompute(self, what: str) -> None:
        for block in self.blocks:
            block.mlp.again, block.attention_again = what != "none", what == "full"

    def finish_building(self, device: str) -> None:
        for block in self.blocks:
            block.mlp.reset_buffers()

    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden state x_BSD after its norm, and the routers' losses times their coefficients."""
        config = self.config
        x_BSD = self.model.embed_norm(self.model.embed_tokens(tokens_BS))
        head_width = config.d_model // config.num_heads
        cos_SF, sin_SF = rope_tables(tokens_BS.shape[1], head_width, config.rope_theta, tokens_BS.device)
        mask = mask_of(tokens_BS, config.document_end, head_width, compute_dtype(x_BSD))
        routings = []
        for block in self.model.layers:
            x_BSD, routing = block(x_BSD, cos_SF, sin_SF, mask)
            routings.append(routing)
        balance, locality = router_losses([block.mlp.gate for block in self.blocks], routings)
        # A branch's gradient shrinks with depth by CompleteP; the balancing of each router shrinks alike.
        coefficient = LOAD_BALANCE if config.load_balance is None else config.load_balance
        loss = coefficient * config.base_num_layers * balance
        if config.locality == "loss":
            loss = loss + config.locality_coefficient * config.base_num_layers * locality
        return self.model.norm(x_BSD), loss

    def head(self) -> tuple[Tensor, float]:
        # The embedding is tied.
        return self.model.embed_tokens.weight, logit_multiplier(self.config)
