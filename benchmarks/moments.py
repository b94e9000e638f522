"""What a site's optimizer and the type of its moments cost: `python -m benchmarks.moments --work WORK`.

First, of one run: how far a step is from the exact one where the same gradients are averaged in bf16. Then losses of
federations in which each expert is at half of the sites, one after the other in this process and of the same tokens.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import spread, write_result
from fomoe_flwr.compose import compose
from fomoe_flwr.data import TokenStream, prepare
from fomoe_flwr.engine.device import use_cpu
from fomoe_flwr.engine.optimizer import Schedule, StackedOptimizer
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.placement import full_residents
from fomoe_flwr.schedule import LrSchedule
from strategies.launch import launch
from tests.strategies.helpers import metrics

COMMON = (
    "wandb.mode=disabled", "runtime=local", "federation.num_sites=4", "strategy.overlap=2", "train.schedule=cosine",
    "train.eval_batches=64", "train.final_eval_batches=0", "checkpoint.every=0",
)  # fmt: skip
# The first is what the others are held against.
VARIANTS = {
    "adamw, fp32": (),
    "adamw, bf16": ("train.moments=bf16",),
    "muon, fp32": ("train.optimizer=muon",),
    "muon, bf16": ("train.optimizer=muon", "train.moments=bf16"),
}
LOOKED_AT = ("layers.1.mlp.experts.up_EHD", "layers.2.self_attn.q_proj.weight", "embed_tokens.weight")
STEPS = 400


# -- the same gradients, averaged in another type -------------------------------------------------------------


def nearest(value: Tensor) -> Tensor:
    """As the project does it."""
    return value.bfloat16().float()


def at_random(value: Tensor) -> Tensor:
    """Up or down by chance and in the mean right; bf16 is the upper half of fp32's bits."""
    bits = torch.randint(2**16, value.shape, dtype=torch.int32) + value.view(torch.int32)
    return (bits & -(2**16)).view(torch.float32)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda value: value,
    "nearest": nearest,
    "at random": at_random,
}


class Shadow:
    """AdamW's averages of a parameter's gradients, rounded after each step."""

    def __init__(self, parameter: nn.Parameter, beta2: float, rounding: Callable[[Tensor], Tensor]) -> None:
        self.parameter, self.beta2, self.rounding = parameter, beta2, rounding
        self.average, self.square = (torch.zeros_like(parameter.data) for _ in range(2))

    def see(self) -> None:
        assert self.parameter.grad is not None
        self.average = self.rounding(self.average.lerp(self.parameter.grad, 0.1))
        self.square = self.rounding(self.square.lerp(self.parameter.grad.square(), 1 - self.beta2))

    def step(self, number: int) -> Tensor:
        square = self.square / (1 - self.beta2**number)
        return self.average / (1 - 0.9**number) / (square.sqrt() + 1e-8)


def errors(seq_len: int) -> list[str]:
    """Rows of a table: ‖step - exact step‖ / ‖exact step‖, and the sum of the second moment over the exact one."""
    config = compose([f"train.seq_len={seq_len}"]).config
    corpus = prepare(config.data)
    stream = TokenStream(corpus, corpus.train_documents, seq_len, config.seed)
    residents = full_residents(config.model.num_layers, config.model.num_experts)
    shard = initial_state(config.model, residents, "skip", config.seed)
    module = build(config.model, residents, "skip", shard, "cpu")
    optimizer = StackedOptimizer(module, config.train, Schedule(0, 1.0, LrSchedule(50), 0), {})
    torch.manual_seed(0)
    shadows = {
        (beta2, rounding): [
            Shadow(parameter, beta2, ROUNDINGS[rounding])
            for path, parameter in module.named_parameters()
            if path.endswith(LOOKED_AT)
        ]
        for beta2 in (0.95, 0.98, 0.99, 0.999)
        for rounding in ROUNDINGS
    }
    for step in range(STEPS):
        losses = module(stream.batch(step * 8, 8))
        (losses.cross_entropy + losses.balance).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for shadow in [shadow for one in shadows.values() for shadow in one]:
            shadow.see()
        optimizer.step()
        module.zero_grad(set_to_none=True)
    rows = []
    for (beta2, rounding), found in shadows.items():
        exact = shadows[beta2, "exact"]
        if found is exact:
            continue
        off = [
            float((a.step(STEPS) - b.step(STEPS)).norm() / b.step(STEPS).norm())
            for a, b in zip(found, exact, strict=True)
        ]
        sums = [float(a.square.sum() / b.square.sum()) for a, b in zip(found, exact, strict=True)]
        cells = [f"{100 * value:.1f} %" for value in off] + [f"{value:.3f}" for value in sums]
        rows.append(f"| {beta2:g} | {rounding} | {' | '.join(cells)} |")
    return rows


# -- losses ---------------------------------------------------------------------------------------------------


def figures(work: Path, name: str, seed: int, *overrides: str) -> dict[str, float]:
    """Validation loss at the end, and what a site needs for weights, gradients, moments and the shard as sent, in MB.

    A run that is there is not made again.
    """
    folder = work / "".join(c if c.isalnum() else "_" for c in f"{name} {seed}")
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        launch(compose([*COMMON, *overrides, f"seed={seed}", f"hydra.run.dir={folder}"]))
    line = metrics(folder)[-1]
    found = {"loss": line["val_loss"], "memory": max(site["memory_bytes"] for site in line["sites"]) / 1e6}
    print(name, seed, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="local ones")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument(
        "--lrs", type=float, nargs="+", default=[0.0015, 0.006, 0.012], help="beside the usual one, in fp32"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="folder in which the runs stay")
    chosen = parser.parse_args()
    use_cpu(1)
    work = chosen.work.resolve()
    size = (
        f"train.seq_len={chosen.seq_len}", f"train.rounds={chosen.rounds}", f"train.eval_every={chosen.rounds}",
        f"train.local_steps={chosen.steps}",
    )  # fmt: skip
    wanted = [(name, 0.003) for name in VARIANTS]
    wanted += [(name, lr) for lr in chosen.lrs for name in VARIANTS if "fp32" in name]
    found: dict[str, list[dict[str, float]]] = {}
    for seed in chosen.seeds:
        for name, lr in wanted:
            label = f"{name}, lr {lr:g}"
            runs = found.setdefault(label, [])
            runs.append(figures(work, label, seed, *size, f"train.lr={lr:g}", *VARIANTS[name]))
    base = next(iter(found.values()))
    rows = []
    for label, runs in found.items():
        more = [own["loss"] - other["loss"] for own, other in zip(runs, base, strict=True)]
        rows.append(
            f"| {label} | {spread([run['loss'] for run in runs])} | {spread(more, '+.3f')} | "
            f"{statistics.median(run['memory'] for run in runs):.1f} |"
        )
    names = " | ".join(path.removesuffix(".weight").rpartition(".")[2] for path in LOOKED_AT)
    write_result(
        "moments",
        "A site's optimizer and the type of its moments",
        f"Of `model=tiny` at one site with all experts, 8 x {chosen.seq_len} tokens a step: AdamW's averages of the "
        f"same gradients kept in bf16, after {STEPS} steps. First by how much the next step differs from that of "
        "averages in fp32, of three tensors, then the sum of the second moments over the exact sum. "
        "train.moments=bf16 rounds to the nearest number.\n\n"
        f"| beta2 | rounding | {names} | {names} |\n|---|---|{'---|' * 2 * len(LOOKED_AT)}\n"
        + "\n".join(errors(chosen.seq_len))
        + f"\n\nLosses: model=tiny, 4 sites, each expert at 2 of them, {chosen.rounds} rounds of {chosen.steps} steps "
        f"of 8 x {chosen.seq_len} tokens of the standard library's source, cosine; seeds {chosen.seeds}, medians and "
        "ranges of the validation loss at the end, and of what it differs from the first line's with the same seed. "
        "MB: weights, gradients, moments, and the shard as it was sent.\n\n"
        "| optimizer, moments | loss | difference | MB at a site |\n|---|---|---|---|\n" + "\n".join(rows),
        "larger models, longer runs, larger batches, weight decay, GPUs.",
    )


if __name__ == "__main__":
    main()
