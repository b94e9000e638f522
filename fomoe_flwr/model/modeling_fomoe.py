# mypy: ignore-errors
"""The σ-MoE decoder of fomoe-flwr for `transformers`: `AutoModelForCausalLM`, with `trust_remote_code=True`.

This file is copied into each export and stands alone. Its module tree is that of the tensors' names, one module for
each expert: simple, and slow for a model of many experts. Letters: B sequences, S positions, T tokens, D width,
C cached positions, E experts, K chosen.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class FomoeConfig(PretrainedConfig):
    model_type = "fomoe"

    def __init__(
        self,
        vocab_size=264,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_experts=16,
        moe_intermediate_size=128,
        num_experts_per_tok=2,
        num_shared_experts=0,
        router="linear",
        rope_theta=10_000.0,
        norm_eps=1e-5,
        depth_multiplier=1.0,
        logit_multiplier=1.0,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_experts, self.moe_intermediate_size = num_experts, moe_intermediate_size
        self.num_experts_per_tok, self.num_shared_experts = num_experts_per_tok, num_shared_experts
        self.router, self.rope_theta, self.norm_eps = router, rope_theta, norm_eps
        # CompleteP's factors: of each branch, and of the logits.
        self.depth_multiplier, self.logit_multiplier = depth_multiplier, logit_multiplier
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def layer_norm(config):
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)


def rotate(x_BNSW, cos_BSF, sin_BSF):
    a, b = x_BNSW.chunk(2, dim=-1)
    cos, sin = cos_BSF.unsqueeze(1).to(x_BNSW.dtype), sin_BSF.unsqueeze(1).to(x_BNSW.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        width = config.hidden_size
        self.layer, self.num_heads = layer, config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD, cos_BSF, sin_BSF, mask_B1SC, cache):
        def heads(projected_BSD):
            return projected_BSD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q_BNSW = rotate(heads(self.q_proj(x_BSD)), cos_BSF, sin_BSF)
        k_BNSW = rotate(heads(self.k_proj(x_BSD)), cos_BSF, sin_BSF)
        v_BNSW = heads(self.v_proj(x_BSD))
        if cache is not None:
            k_BNSW, v_BNSW = cache.update(k_BNSW, v_BNSW, self.layer)
        y_BNSW = F.scaled_dot_product_attention(q_BNSW, k_BNSW, v_BNSW, attn_mask=mask_B1SC)
        return self.o_proj(y_BNSW.transpose(1, 2).flatten(2))


class Gate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.router != "grap":
            self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD):
        """Scores of all experts, fp32."""
        x_TD = x_TD.float()
        if self.config.router == "grap":
            slices_TEW = x_TD.view(len(x_TD), self.config.num_experts, -1)
            logits_TE = slices_TEW.mean(2) * math.sqrt(slices_TEW.shape[2])
        elif self.config.router == "orthogonal":
            rows_ED = F.normalize(self.weight.float(), dim=1)
            logits_TE = math.sqrt(x_TD.shape[1]) * (F.normalize(x_TD, dim=1) @ rows_ED.T)
        else:
            logits_TE = x_TD @ self.weight.float().T
        return torch.sigmoid(logits_TE)


class Mlp(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x_TD):
        return self.down_proj(F.silu(self.up_proj(x_TD)))


class SigmaMoE(nn.Module):
    """Σ over the chosen experts of sigmoid score times output, plus the shared experts."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = Gate(config)
        self.experts = nn.ModuleList(
            Mlp(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        if config.num_shared_experts:
            self.shared_experts = Mlp(config, config.num_shared_experts * config.moe_intermediate_size)

    def forward(self, x_TD):
        weights_TK, chosen_TK = self.gate(x_TD).topk(self.top_k, dim=-1)
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.experts):
            tokens_P, places_P = (chosen_TK == index).nonzero(as_tuple=True)
            if len(tokens_P):
                y_PD = expert(x_TD[tokens_P]) * weights_TK[tokens_P, places_P].unsqueeze(1)
                y_TD.index_add_(0, tokens_P, y_PD.to(y_TD.dtype))
        if hasattr(self, "shared_experts"):
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD


class Block(nn.Module):
    """Peri-LN: `x + m · LN(F(LN(x)))` for attention and for the MoE."""

    def __init__(self, config, layer):
        super().__init__()
        self.multiplier = config.depth_multiplier
        self.input_layernorm = layer_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = layer_norm(config)
        self.pre_feedforward_layernorm = layer_norm(config)
        self.mlp = SigmaMoE(config)
        self.post_feedforward_layernorm = layer_norm(config)

    def forward(self, x_BSD, *attention):
        y_BSD = self.self_attn(self.input_layernorm(x_BSD), *attention)
        x_BSD = x_BSD + self.multiplier * self.post_attention_layernorm(y_BSD)
        y_TD = self.mlp(self.pre_feedforward_layernorm(x_BSD).flatten(0, 1))
        return x_BSD + self.multiplier * self.post_feedforward_layernorm(y_TD.view_as(x_BSD))


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = layer_norm(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = layer_norm(config)


class FomoeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FomoeConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = Backbone(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, cache=None, past_key_values=None, labels=None,
        use_cache=None, **kwargs,
    ):  # fmt: skip
        # Before transformers 5.24 `cache` is called `past_key_values`, there and in what is returned.
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        before = 0 if cache is None else cache.get_seq_length()
        length, device = input_ids.shape[1], input_ids.device
        place_S = before + torch.arange(length, device=device)
        mask_B1SC = (torch.arange(before + length, device=device) <= place_S[:, None])[None, None]
        if attention_mask is not None and attention_mask.dim() == 2:
            # A position of padding sees itself, or its softmax would be of nothing.
            own_SC = torch.arange(before + length, device=device) == place_S[:, None]
            mask_B1SC = (mask_B1SC & attention_mask[:, None, None].bool()) | own_SC
            if position_ids is None:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
        if position_ids is None:
            position_ids = place_S[None]
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        exponents_F = torch.arange(half, device=device, dtype=torch.float32) / half
        angles_BSF = position_ids[..., None].float() * self.config.rope_theta**-exponents_F
        x_BSD = self.model.embed_norm(self.model.embed_tokens(input_ids))
        for block in self.model.layers:
            x_BSD = block(x_BSD, angles_BSF.cos(), angles_BSF.sin(), mask_B1SC, cache)
        x_BSD = self.model.norm(x_BSD)
        logits_BSV = F.linear(x_BSD, self.model.embed_tokens.weight) * self.config.logit_multiplier
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        name = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, **{name: cache})
