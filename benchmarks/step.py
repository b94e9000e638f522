"""A site's whole step, against loops that people write and against transformers: `python -m benchmarks.step`.

Variants are taken in turn in one process, and timed by the processor time that they took, so that what else the machine
does counts little. Before that their losses, and of transformers the logits, are held against each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import options, paired, ratio, write_result
from fomoe_flwr.compose import compose
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.engine.device import use_cpu
from fomoe_flwr.model.base import LanguageModel
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.sigma_moe import rope_tables, rotate
from fomoe_flwr.model.spec import depth_multiplier, logit_multiplier, token_flops

Step = Callable[[], float]  # takes a step and returns its loss

SIZES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "tiny": (("model=tiny",), 8, 256),
    "mid": (
        ("model=tiny", "model.d_model=384", "model.num_layers=6", "model.num_heads=6", "model.num_experts=64",
         "model.d_expert=128", "model.top_k=8", "model.vocab_size=8192"), 4, 512,
    ),
}  # fmt: skip
OLMOE: dict[str, tuple[tuple[str, ...], int, int]] = {
    "OLMoE, 2 M": (("model=olmoe_tiny",), 8, 256),
    "OLMoE, 45 M": (
        ("model=olmoe_tiny", "model.hf.hidden_size=384", "model.hf.intermediate_size=96",
         "model.hf.num_hidden_layers=6", "model.hf.num_attention_heads=6", "model.hf.num_key_value_heads=6",
         "model.hf.num_experts=64", "model.hf.num_experts_per_tok=8", "model.hf.vocab_size=8192"), 4, 512,
    ),
}  # fmt: skip


def model_of(overrides: tuple[str, ...]) -> ModelConfig:
    return compose(list(overrides)).config.model


def tokens_of(model: ModelConfig, batch: int, seq_len: int) -> Tensor:
    return torch.randint(model.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0))


def stepping(module: nn.Module, loss_of: Callable[[], tuple[Tensor, Tensor]], dtype: str) -> Step:
    """A step with PyTorch's own AdamW, the same for all variants.

    Args:
        loss_of: what is differentiated, and what is told.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss, told = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(told.detach())

    return step


def ours(model: ModelConfig, tokens_BT: Tensor, dtype: str, residents: int | None = None) -> Step:
    held = [list(range(residents or model.num_experts))] * model.num_layers
    module = build(model, held, "skip", initial_state(model, held, "skip", 0), "cpu").train()

    def loss_of() -> tuple[Tensor, Tensor]:
        losses = module(tokens_BT)
        return losses.cross_entropy + losses.balance, losses.cross_entropy

    return stepping(module, loss_of, dtype)


# ----- the loop that one would write


def plain(model: ModelConfig, tokens_BT: Tensor, dtype: str) -> Step:
    """The same model by PyTorch's own operators alone, one after the other, all experts here."""
    held = [list(range(model.num_experts))] * model.num_layers
    module = build(model, held, "skip", initial_state(model, held, "skip", 0), "cpu").train()
    return stepping(module, lambda: plain_loss(module, tokens_BT), dtype)


def plain_loss(module: LanguageModel, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    model, tree = module.config, module.model
    tokens_BS, heads = tokens_BT[:, :-1], model.num_heads
    batch, positions = tokens_BS.shape
    x = tree.embed_norm(tree.embed_tokens(tokens_BS))  # type: ignore[operator, union-attr]
    cos, sin = rope_tables(positions, model.d_model // heads, model.rope_theta, x.device)
    balance = x.new_zeros(())
    for block in tree.layers:  # type: ignore[union-attr]
        attention, h = block.self_attn, block.input_layernorm(x)
        q, k, v = (
            p(h).view(batch, positions, heads, -1).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        y = attention.o_proj(y.transpose(1, 2).flatten(2))
        x = x + depth_multiplier(model) * block.post_attention_layernorm(y)
        h = block.pre_feedforward_layernorm(x).flatten(0, 1)
        with torch.autocast("cpu", enabled=False):
            scores = torch.sigmoid(h.float() @ block.mlp.gate.weight.T)
        weights, chosen = scores.topk(model.top_k, dim=-1)
        experts, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=model.num_experts)
        ends, rows = counts.cumsum(0).to(torch.int32), order // model.top_k
        kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else h.dtype
        up, down = (
            w.to(kind).transpose(1, 2) for w in (block.mlp.experts.up_EHD, block.mlp.experts.down_EDH)
        )
        hidden = F.silu(F.grouped_mm(h.index_select(0, rows).to(kind), up, offs=ends))
        y = F.grouped_mm(hidden, down, offs=ends) * weights.flatten()[order, None]
        y = torch.zeros_like(h).index_add(0, rows, y.to(h.dtype)).view_as(x)
        x = x + depth_multiplier(model) * block.post_feedforward_layernorm(y)
        share = (scores / scores.sum(-1, keepdim=True)).mean(0)
        balance = balance + model.num_experts * (counts / chosen.numel() * share).sum()
    logits = F.linear(tree.norm(x), tree.embed_tokens.weight) * logit_multiplier(model)  # type: ignore[operator, union-attr, arg-type]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
    return loss + 0.01 * model.base_num_layers * balance / model.num_layers, loss


# ----- transformers


def theirs(model: ModelConfig, tokens_BT: Tensor, dtype: str, implementation: str) -> Step:
    """The class of transformers with the same weights, and its balancing loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(**model.hf)
    config.output_router_logits = True
    stock: Any = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    held = [list(range(model.num_experts))] * model.num_layers
    state = initial_state(model, held, "skip", 0)
    parameters = dict(stock.named_parameters())
    with torch.no_grad():
        for name, tensor in parameters.items():
            if ".experts." not in name:
                tensor.copy_(state[name])
                continue
            prefix, _, part = name.rpartition(".")
            of = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            for expert in range(model.num_experts):
                tensor[expert].copy_(torch.cat([state[f"{prefix}.{expert}.{p}.weight"] for p in of]))
    module = build(model, held, "skip", state, "cpu").eval()
    with torch.no_grad():
        hidden, _ = module.hidden(tokens_BT[:1, :-1])
        torch.testing.assert_close(
            stock.eval()(input_ids=tokens_BT[:1, :-1]).logits, module.logits(hidden), rtol=0, atol=1e-4
        )
    stock.train()

    def loss_of() -> tuple[Tensor, Tensor]:
        out = stock(input_ids=tokens_BT[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
        return loss + config.router_aux_loss_coef * out.aux_loss, loss

    return stepping(stock, loss_of, dtype)


# ----- times


def in_turn(variants: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of processor time of each variant, one after the other; the first losses must agree."""
    losses = {name: step() for name, step in variants.items()}
    if max(losses.values()) - min(losses.values()) > 2e-2:
        raise SystemExit(f"these are not the same model: {losses}")
    return paired(variants, repeats, time.process_time)


def main() -> None:
    chosen = options(__doc__ or "", repeats=7, dtypes=["fp32", "bf16"])
    use_cpu(chosen.threads)
    rows = []

    def add(name: str, dtype: str, found: Mapping[str, list[float]]) -> None:
        own = found["ours"]
        for other, seconds in found.items():
            if other != "ours":
                rows.append(
                    f"| {name}, {dtype} | {other} | {1e3 * min(own):.0f} | {1e3 * min(seconds):.0f} | "
                    f"{min(seconds) / min(own):.2f} | {ratio(seconds, own)} |"
                )
        print("\n".join(rows[1 - len(found) :]), flush=True)

    for dtype in chosen.dtypes:
        for name, (overrides, batch, seq_len) in SIZES.items():
            model = model_of(overrides)
            tokens_BT = tokens_of(model, batch, seq_len)
            variants = {"ours": ours(model, tokens_BT, dtype), "plain loop": plain(model, tokens_BT, dtype)}
            add(name, dtype, in_turn(variants, chosen.repeats))
        for name, (overrides, batch, seq_len) in OLMOE.items():
            model = model_of(overrides)
            tokens_BT = tokens_of(model, batch, seq_len)
            variants = {
                "ours": ours(model, tokens_BT, dtype),
                **{
                    f"transformers, {kind}": theirs(model, tokens_BT, dtype, kind)
                    for kind in ("grouped_mm", "eager")
                },
            }
            add(name, dtype, in_turn(variants, chosen.repeats))
    ghosts = []
    for name, (overrides, batch, seq_len) in SIZES.items():
        model = model_of(overrides)
        tokens_BT = tokens_of(model, batch, seq_len)
        flops = token_flops(model, seq_len)
        counts = {share: round(model.num_experts * (1 - share)) for share in (0.0, 0.25, 0.5, 0.75)}
        steps = {str(share): ours(model, tokens_BT, "fp32", held) for share, held in counts.items()}
        seconds = paired(steps, chosen.repeats, time.process_time)
        whole = sum(flops)
        for share, held in counts.items():
            if share:
                wanted = whole / (whole - flops.experts * (1 - held / model.num_experts))
                got = statistics.median(
                    a / b for a, b in zip(seconds["0.0"], seconds[str(share)], strict=True)
                )
                ghosts.append(f"| {name} | {share:.0%} | {got:.2f} | {wanted:.2f} | {got / wanted:.0%} |")
                print(ghosts[-1], flush=True)
    write_result(
        "step",
        "A whole training step",
        "Forward, backward, clipping and AdamW. `tiny`: 2.4 M parameters, 8 x 256 tokens; `mid`: 44.6 M, 4 x 512; "
        f"OLMoE: stock architecture, random weights. Processor time, minima of {chosen.repeats} steps taken in turn; "
        "above 1: ours is faster. All experts are here.\n\n"
        "| model | against | ours, ms | theirs, ms | ratio of minima | median of ratios |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nGhosts in skip mode, fp32: how many times as fast as with all experts, the ratio of FLOPs by formula "
        "(routers that choose evenly, which random ones nearly do), and the share of it that is reached.\n\n"
        "| model | ghosts | faster | FLOPs | reached |\n|---|---|---|---|---|\n" + "\n".join(ghosts),
        "a GPU, torch.compile, several threads.",
    )


if __name__ == "__main__":
    main()
