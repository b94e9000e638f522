"""AdamW over stacks of experts, beside PyTorch's own with a parameter for each expert's tensor.

    python -m benchmarks.optimizer [--repeats 20]

A site's optimizer once had a parameter an expert tensor, sharing memory with its slice of the stack. Now a stack is
updated at once as long as its experts are of one age, and in runs of equal age else.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import torch

from benchmarks.harness import paired, ratio, write_result
from fomoe_flwr.config import ModelConfig, TrainConfig
from fomoe_flwr.engine.optimizer import Moments, Schedule, StackedOptimizer
from fomoe_flwr.model.base import named_views
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.placement import full_residents
from fomoe_flwr.schedule import LrSchedule

SIZES = {
    "tiny: 4 layers x 16 experts": ModelConfig(),
    "16 layers x 128 experts of 64 x 64": dataclasses.replace(
        ModelConfig(), d_model=64, num_heads=1, num_layers=16, num_experts=128, d_expert=64
    ),
    "8 layers x 32 experts of 512 x 128": dataclasses.replace(
        ModelConfig(), d_model=512, num_heads=8, num_layers=8, num_experts=32
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    chosen = parser.parse_args()
    train, rows = TrainConfig(), []
    for name, model in SIZES.items():
        residents = full_residents(model.num_layers, model.num_experts)
        module = build(model, residents, "skip", initial_state(model, residents, "skip", 0), "cpu")
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        views = named_views(module)
        leaves = [torch.nn.Parameter(view.of(view.parameter.data)) for view in views]
        for view, leaf in zip(views, leaves, strict=True):
            leaf.grad = view.of(view.parameter.grad)
        reference = torch.optim.AdamW(leaves, lr=1e-3, betas=(0.9, 0.95), fused=True)
        schedule = Schedule(0, 1.0, LrSchedule(50), 0)
        stacked = StackedOptimizer(module, train, schedule, {})
        # A quarter of the experts came a round later: runs of two ages.
        moments = {
            view.name: Moments(torch.zeros_like(leaf), torch.zeros_like(leaf), 40, 0)
            for view, leaf in zip(views, leaves, strict=True)
            if view.slot is None or view.slot % 4
        }
        mixed = StackedOptimizer(module, train, dataclasses.replace(schedule, newcomer_reset_at=40), moments)
        seconds = paired(
            {"one each": reference.step, "stacked": stacked.step, "two ages": mixed.step}, chosen.repeats
        )
        median = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
        rows.append(
            f"| {name} | {len(leaves)} | {median['one each']:.2f} | {median['stacked']:.2f} | "
            f"{ratio(seconds['one each'], seconds['stacked'])} | {median['two ages']:.2f} | "
            f"{ratio(seconds['one each'], seconds['two ages'])} |"
        )
    write_result(
        "optimizer",
        "AdamW over stacks of experts beside a parameter for each expert's tensor",
        f"fp32, ms a step, median of {chosen.repeats} taken in turn; both are PyTorch's fused AdamW and give the same "
        "bits (tests/engine/test_optimizer.py). 'Two ages': every fourth expert of each stack is new to the site.\n\n"
        "| model | tensors | one each | stacked | ratio | two ages | ratio |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(rows),
        "a GPU, where each tensor also costs a kernel's start; the host's part of a training step.",
    )


if __name__ == "__main__":
    main()
