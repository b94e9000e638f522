"""Mixtral (arXiv 2401.04088): softmax over the chosen; names of its own on disk."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from fomoe_flwr.model.families.family import Family, switch_balance

_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _weigh(config: Any, logits_TC: Tensor, scores_TC: Tensor, chosen_TK: Tensor) -> Tensor:
    weights_TK = scores_TC.gather(1, chosen_TK)
    return weights_TK / weights_TK.sum(-1, keepdim=True)


def _to_disk(name: str) -> str:
    name = name.replace(".mlp.", ".block_sparse_moe.")
    return (
        re.sub(r"\b(gate|up|down)_proj\b", lambda part: _PARTS[part[0]], name)
        if ".experts." in name
        else name
    )


MIXTRAL = Family("mixtral", _weigh, switch_balance, to_disk=_to_disk)
