"""A model of a few numbers, a task for it, and gradients and tokens for its training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fomoe_flwr.config import DataConfig, ModelConfig, SiteConfig, StrategyConfig, TrainConfig
from fomoe_flwr.inputs import Inputs
from fomoe_flwr.messages import Deal, Task
from fomoe_flwr.placement import full_residents
from fomoe_flwr.schedule import LrSchedule

# Learning-rate multipliers: 3/2 for what reads d_model, 4 for what reads d_expert, 1 for embedding and norms.
MODEL = ModelConfig(
    vocab_size=29,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_experts=4,
    d_expert=8,
    top_k=2,
    base_d_model=24,
    base_num_layers=2,
    base_d_expert=32,
    init_std=0.5,
)
TRAIN = TrainConfig(
    lr=0.01,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    expert_warmup_steps=5,
    grad_clip=0,
    device="cpu",
)
FULL = full_residents(MODEL.num_layers, MODEL.num_experts)
SOME = [[0, 2], [1, 3]]
WARMUP = 4


def multiplier_of(name: str) -> float:
    """By hand, of a tensor's name or of a module's path."""
    if name.endswith(("down_EDH", "down_proj.weight")):
        return 32 / 8
    return 1.0 if "norm" in name or "embed" in name else 24 / 16


def is_hidden(name: str) -> bool:
    """Whether Muon steps this tensor where it is chosen, by name."""
    return "_proj" in name


def muon_multiplier_of(name: str) -> float:
    """By hand: reach is √(longer side · fan-in / rows), of the base's shape and of MODEL's."""
    if "down_proj" in name:
        return math.sqrt((32 * 32 / 24) / (16 * 8 / 16))
    return math.sqrt((32 * 24 / 32) / (16 * 16 / 8)) if "up_proj" in name else math.sqrt(24 / 16)


def decay_of(name: str) -> float:
    """TRAIN's weight decay by hand, such that lr times decay is the same for all but norms, which have none."""
    return 0.0 if "norm" in name else 0.1 / multiplier_of(name)


def task_of(**changes: Any) -> Task:
    """A task of the first round; keys of `model`, `train` and `strategy` as dicts."""
    sections: dict[str, Any] = {
        "model": MODEL,
        "train": TRAIN,
        "strategy": StrategyConfig(up="fp32", down="fp32"),
    }
    for name, section in sections.items():
        sections[name] = dataclasses.replace(section, **changes.pop(name, {}))
    values: dict[str, Any] = {
        "run": "run",
        "run_dir": "",
        "round": 1,
        "counted_round": 0,
        "site": SiteConfig(),
        "deal": Deal(0, 1),
        "inputs": Inputs(),
        "residents": SOME,
        "first_step": 0,
        "lr_stride": 1.0,
        "data": DataConfig(),
        "schedule": LrSchedule(WARMUP),
        "checkpoint_every": 1,
        "keep": 1,
        "seed": 0,
    }
    return Task(**(values | sections | changes))


def set_gradients(module: nn.Module, step: int) -> None:
    """Gradients that depend on the parameter and the step, without a forward pass."""
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def batches(count: int, seed: int = 0, sequences: int = 2, length: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(MODEL.vocab_size, (sequences, length), generator=generator) for _ in range(count)]
