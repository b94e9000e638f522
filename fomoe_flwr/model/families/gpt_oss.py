"""gpt-oss (arXiv 2508.10925): biases everywhere, softmax over the chosen, a clamped activation; experts fused on disk.

On disk all experts of a layer are in one tensor, [E, D, 2H], in which columns of both projections alternate. OpenAI's
own checkpoints have them in MXFP4 (`hf_files.py`).

Letters: E experts, H d_expert, D d_model, P token-expert pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.model.families.family import Family, only, switch_balance

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")


def _weigh(config: Any, logits_TC: Tensor, scores_TC: Tensor, chosen_TK: Tensor) -> Tensor:
    return logits_TC.gather(1, chosen_TK).softmax(-1)


def _activation(config: Any, gate_PH: Tensor, up_PH: Tensor) -> Tensor:
    gate_PH = gate_PH.clamp(max=config.swiglu_limit)
    up_PH = up_PH.clamp(-config.swiglu_limit, config.swiglu_limit)
    return (up_PH + 1) * gate_PH * torch.sigmoid(gate_PH * config.swiglu_alpha)


def _to_disk(name: str) -> str:
    if not (match := _EXPERT.fullmatch(name)):
        return name.replace(".mlp.gate.", ".mlp.router.")
    projection = "down_proj" if match[3] == "down" else "gate_up_proj"
    return f"{match[1]}.{projection}{'_bias' if match[4] == 'bias' else ''}"


def _cut(name: str, on_disk: Tensor) -> Tensor:
    if not (match := _EXPERT.fullmatch(name)):
        return on_disk
    expert = on_disk[int(match[2])]
    if match[3] != "down":
        expert = expert[..., 0 if match[3] == "gate" else 1 :: 2]
    return expert.T if expert.ndim == 2 else expert


def _join(parts: Mapping[str, Tensor]) -> Tensor:
    found = {(int(match[2]), match[3]): parts[name] for name in parts if (match := _EXPERT.fullmatch(name))}
    if not found:
        return only(parts)
    by_expert = []
    for expert in range(1 + max(number for number, _ in found)):
        if (down := found.get((expert, "down"))) is not None:
            by_expert.append(down.T if down.ndim == 2 else down)
        else:
            pair = torch.stack((found[expert, "gate"], found[expert, "up"]), dim=-1)
            # [H, D, 2] or [H, 2].
            by_expert.append(pair.transpose(0, 1).flatten(1) if pair.ndim == 3 else pair.flatten())
    return torch.stack(by_expert)


GPT_OSS = Family(
    "gpt_oss", _weigh, switch_balance, router="router", activation=_activation, biases=True, to_disk=_to_disk,
    cut=_cut, join=_join,
)  # fmt: skip
