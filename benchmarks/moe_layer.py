"""The MoE layer, forward and backward: ours against the loops people write. `python -m benchmarks.moe_layer`"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import options, paired, ratio, write_result
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.moe import MoE

EXPERTS, TOP_K, D_MODEL, D_EXPERT, TOKENS = 64, 8, 512, 128, 2048


def loop_layer(moe: MoE, x_TD: Tensor, indexed: bool) -> Tensor:
    """Route, then one expert after the other, by a mask over tokens."""
    routing = moe.gate(x_TD)
    ups = None if indexed else moe.experts.up_EHD.unbind(0)
    downs = None if indexed else moe.experts.down_EDH.unbind(0)
    y_TD = torch.zeros_like(x_TD)
    for slot, expert in enumerate(moe.resident_experts):
        tokens, choice = torch.where(routing.chosen_TK == expert)
        up_HD = moe.experts.up_EHD[slot] if ups is None else ups[slot]
        down_DH = moe.experts.down_EDH[slot] if downs is None else downs[slot]
        y_PD = F.silu(x_TD.index_select(0, tokens) @ up_HD.T) @ down_DH.T
        y_TD = y_TD.index_add(0, tokens, y_PD * routing.weights_TK[tokens, choice].unsqueeze(1))
    return y_TD


def step(forward: Callable[[MoE, Tensor], Tensor], moe: MoE, x_TD: Tensor, upstream_TD: Tensor) -> None:
    torch.autograd.grad(forward(moe, x_TD), [x_TD, *moe.parameters()], upstream_TD)
    if x_TD.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    chosen = options(__doc__ or "", repeats=5)
    config = ModelConfig(d_model=D_MODEL, d_expert=D_EXPERT, num_experts=EXPERTS, top_k=TOP_K)
    rows = []
    for residents in (64, 32, 16):
        torch.manual_seed(0)
        moe = MoE(config, list(range(0, EXPERTS, EXPERTS // residents)), "skip").to(chosen.device)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=D_MODEL**-0.5)
        x_TD = torch.randn(TOKENS, D_MODEL, device=chosen.device, requires_grad=True)
        upstream_TD = torch.randn(TOKENS, D_MODEL, device=chosen.device)

        forwards = {
            "ours": lambda moe, x_TD: moe(x_TD)[0],
            "unbind": lambda moe, x_TD: loop_layer(moe, x_TD, indexed=False),
            "indexed": lambda moe, x_TD: loop_layer(moe, x_TD, indexed=True),
        }
        steps = {name: partial(step, forward, moe, x_TD, upstream_TD) for name, forward in forwards.items()}
        seconds = paired(steps, chosen.repeats)
        median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        rows.append(
            f"| {residents} of {EXPERTS} | {median['ours']:.0f} | {median['unbind']:.0f} | {median['indexed']:.0f} "
            f"| {ratio(seconds['unbind'], seconds['ours'])} | {ratio(seconds['indexed'], seconds['ours'])} |"
        )
    write_result(
        f"moe_layer_{chosen.device}",
        "One MoE layer, forward and backward, against a loop over experts",
        f"{TOKENS} tokens, d_model {D_MODEL}, {EXPERTS} experts of width {D_EXPERT}, top-{TOP_K}, fp32, skip mode; "
        f"median of {chosen.repeats} runs taken in turn, in ms; ratios pair by pair, above 1: ours is faster.\n\n"
        "| resident | ours | unbind loop | indexed loop | unbind / ours | indexed / ours |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows),
        "bf16, other widths, torch.compile.",
    )


if __name__ == "__main__":
    main()
