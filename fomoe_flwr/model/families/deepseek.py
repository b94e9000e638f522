"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): dense first layers, shared experts, choice within groups.

V3 chooses by sigmoid scores and a bias for each expert that no gradient trains. It stays what it is in the checkpoint,
which is what V3 did at the end of its own training (section 4.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.model.families.family import Family


def _weigh_v2(config: Any, logits_TC: Tensor, scores_TC: Tensor, chosen_TK: Tensor) -> Tensor:
    weights_TK: Tensor = scores_TC.gather(1, chosen_TK) * config.routed_scaling_factor
    return weights_TK


def _weigh_v3(config: Any, logits_TC: Tensor, scores_TC: Tensor, chosen_TK: Tensor) -> Tensor:
    weights_TK = scores_TC.gather(1, chosen_TK)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    scaled_TK: Tensor = weights_TK * config.routed_scaling_factor
    return scaled_TK


def _balance(config: Any) -> float:
    # A key of DeepSeek's own code, which transformers keeps.
    return float(getattr(config, "aux_loss_alpha", None) or 0.0)


def _greedy(config: Any) -> bool:
    return bool(config.topk_method == "greedy")


def _never(config: Any) -> bool:
    return False


DEEPSEEK_V2 = Family("deepseek_v2", _weigh_v2, _balance, by_logits=_greedy)
# It ranks a group by its two best.
DEEPSEEK_V3 = Family("deepseek_v3", _weigh_v3, _balance, torch.sigmoid, by_logits=_never, fewest=2)
