"""What a family says of itself beside its class, and the parts that several share.

Letters: T tokens, C candidates of the router, K experts a token, H d_expert, P token-expert pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def softmax_scores(logits_TC: Tensor) -> Tensor:
    """Over all candidates."""
    return logits_TC.softmax(-1)


def chosen_scores(config: Any, logits_TC: Tensor, scores_TC: Tensor, chosen_TK: Tensor) -> Tensor:
    """The chosen candidates' scores, by `norm_topk_prob` as shares of their sum."""
    weights_TK = scores_TC.gather(1, chosen_TK)
    return weights_TK / weights_TK.sum(-1, keepdim=True) if config.norm_topk_prob else weights_TK


def switch_balance(config: Any) -> float:
    """`router_aux_loss_coef`, of a loss in which the shares of assignments come to k and not to 1.

    transformers counts expert 3 of all layers as one expert; here it is the mean of the layers' own losses, as the
    papers have it.
    """
    return float(config.router_aux_loss_coef * config.num_experts_per_tok)


@functools.cache
def _activation(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found


def gated(config: Any, gate_PH: Tensor, up_PH: Tensor) -> Tensor:
    """SwiGLU, or with another `hidden_act`."""
    return _activation(config.hidden_act)(gate_PH) * up_PH


def always(config: Any) -> bool:
    """True."""
    return True


def same_name(name: str) -> str:
    """The name as it is."""
    return name


def whole(name: str, on_disk: Tensor) -> Tensor:
    """All of it."""
    return on_disk


def only(parts: Mapping[str, Tensor]) -> Tensor:
    """The one there is."""
    (tensor,) = parts.values()
    return tensor


@dataclass(frozen=True)
class Family:
    """A family of architectures; `config` is transformers' configuration object, of this family.

    Args:
        model_type: as config.json has it.
        weigh: by what the outputs of chosen candidates are multiplied, weights_TK, from config, logits_TC, scores_TC
            and chosen_TK: what the stock router computes for its own choice.
        balance: coefficient of the load-balancing loss `C · Σ f_c · P_c` (`moe.Router`).
        scores: from logits_TC, scores_TC.
        router: name of the router in a block of the stock class.
        by_logits: whether the candidates with the k largest logits are chosen, and nothing else counts.
        fewest: residents that a partitioned router needs to choose from.
        activation: what an expert makes of its two projections, hidden_PH from config, gate_PH and up_PH.
        biases: whether experts have them.
        to_disk: the name in a checkpoint of Hugging Face, from the name here; several may be in one tensor there.
        cut: the tensor of a name here, as a view of the one on disk.
        join: the tensor on disk, from all that are in it by their names here.
    """

    model_type: str
    weigh: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    balance: Callable[[Any], float]
    scores: Callable[[Tensor], Tensor] = softmax_scores
    router: str = "gate"
    by_logits: Callable[[Any], bool] = always
    fewest: int = 1
    activation: Callable[[Any, Tensor, Tensor], Tensor] = gated
    biases: bool = False
    to_disk: Callable[[str], str] = same_name
    cut: Callable[[str, Tensor], Tensor] = whole
    join: Callable[[Mapping[str, Tensor]], Tensor] = only
