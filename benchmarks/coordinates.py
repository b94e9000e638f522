"""The coordinate check of muP (arXiv 2203.03466): by how much a few steps change what a block gives, at every width.

`python -m benchmarks.coordinates`; `tests/model/test_transfer.py` runs the smaller widths.
"""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor

from benchmarks.harness import options, write_result
from fomoe_flwr.config import ModelConfig, TrainConfig
from fomoe_flwr.engine.device import use_cpu
from fomoe_flwr.engine.optimizer import Schedule, StackedOptimizer
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.placement import full_residents
from fomoe_flwr.schedule import LrSchedule

WIDTHS = (64, 128, 256, 512)
SEEDS = (0, 1)
STEPS = 5
# What is trained, and which branch of the block it changes. "" is everything.
PARTS = {
    "q_proj k_proj v_proj o_proj": "post_attention_layernorm",
    "up_EHD": "post_feedforward_layernorm",
    "down_EDH": "post_feedforward_layernorm",
    "gate": "post_feedforward_layernorm",
    "": "post_feedforward_layernorm",
}


def ladder(width: int) -> ModelConfig:
    """A step of the paper's ladder, where k and N_e grow with d_model: k = N_e/4, one layer, four words."""
    return ModelConfig(
        vocab_size=4,
        d_model=width,
        num_layers=1,
        num_heads=width // 32,
        num_experts=width // 16,
        d_expert=32,
        top_k=width // 64,
        base_d_model=128,
        base_num_layers=1,
        base_d_expert=32,
    )


def change(model: ModelConfig, part: str, branch: str, seed: int, optimizer_name: str = "adamw") -> float:
    """Root mean square change of a branch's output, which starts at 1, by steps that train one part alone.

    The batch is always the same, of a few words that follow each other in a fixed order: what is to be learnt is then
    the same direction for all tokens, and the noise of many small differences does not hide how it grows. The mean
    square and not the mean of |x|: where a router changes its mind about one expert of k, a token in k times as many
    moves by 1/√k as far, and only the mean square is the same for all k.
    """
    residents = full_residents(model.num_layers, model.num_experts)
    module = build(model, residents, "skip", initial_state(model, residents, "skip", seed), "cpu")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(word in name for word in part.split(" ")))
    train = TrainConfig(lr=0.001, optimizer=optimizer_name)
    optimizer = StackedOptimizer(module, train, Schedule(0, 1.0, LrSchedule(0), 0), {})
    order = torch.arange(65) + torch.arange(8).unsqueeze(1)
    tokens_BT = order % model.vocab_size
    outputs: list[Tensor] = []
    norm = module.model.layers[0].get_submodule(branch)
    norm.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach()))
    for _ in range(STEPS):
        losses = module(tokens_BT)
        (losses.cross_entropy + losses.balance).backward()
        optimizer.step()
        module.zero_grad(set_to_none=True)
    module(tokens_BT)
    return float((outputs[-1] - outputs[0]).square().mean().sqrt())


def mean_change(model: ModelConfig, part: str, branch: str, optimizer: str = "adamw") -> float:
    """Over the seeds."""
    return mean(change(model, part, branch, seed, optimizer) for seed in SEEDS)


def main() -> None:
    use_cpu(options(__doc__ or "", repeats=1).threads)
    rows = []
    for optimizer in ("adamw", "muon"):
        for part, branch in PARTS.items():
            changes = [mean_change(ladder(width), part, branch, optimizer) for width in WIDTHS]
            rows.append(
                f"| {optimizer} | {part or 'everything'} | "
                + " | ".join(f"{value:.3f}" for value in changes)
                + f" | {max(changes) / min(changes):.2f} |"
            )
    write_result(
        "coordinates",
        "Change of a block's branch after a few steps, by width",
        f"Root mean square change of the branch's output (it starts at 1) after {STEPS} steps of lr 0.001 that train "
        f"the named part alone; one layer, experts 32 wide, k = d/64 of N_e = d/16, means over {len(SEEDS)} seeds "
        "(`benchmarks/coordinates.py`). What transfers is flat.\n\n"
        f"| train.optimizer | trained | {' | '.join(f'd = {width}' for width in WIDTHS)} | greatest / least |\n"
        f"|---|---|{'---|' * (len(WIDTHS) + 1)}\n" + "\n".join(rows),
        "losses, more layers (CompleteP's depth), real text.",
    )


if __name__ == "__main__":
    main()
