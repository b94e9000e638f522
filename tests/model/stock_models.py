"""Six small configurations, one a family, each with what makes the family different from the others."""

from __future__ import annotations

from typing import Any

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.stock import sizes_of

_COMMON: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4, "num_experts_per_tok": 3, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 4,
    "n_routed_experts": 8, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts": 8},
    "qwen3_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "head_dim": 24, "num_experts": 8, "mlp_only_layers": [1], "norm_topk_prob": True, "tie_word_embeddings": True,
    },
    "mixtral": {"intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 8},
    "deepseek_v2": _MLA
    | {"n_shared_experts": 2, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
    "deepseek_v3": _MLA
    | {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "gpt_oss": {
        "intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 8, "sliding_window": 8, "swiglu_limit": 0.7,
    },
}  # fmt: skip


def stock(family: str, **changes: Any) -> ModelConfig:
    """The family's small model; changes are keys of its config.json."""
    hf = {"model_type": family, **_COMMON, **CONFIGS[family], **changes}
    return ModelConfig(name=family, hf=hf, **sizes_of(hf))
