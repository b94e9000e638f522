"""How many bytes a round needs, and what they cost in loss: `python -m benchmarks.bytes --work WORK`.

One run after the other in this process, of the same tokens: full replicas in bf16, with DiLoCo's outer step and with a
plain average, and federations in which each expert is at half of the sites, with fewer and fewer bits both ways.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

import torch

from benchmarks.harness import spread, write_result
from fomoe_flwr.compose import compose
from strategies.launch import launch
from tests.strategies.helpers import metrics

COMMON = (
    "wandb.mode=disabled", "runtime=local", "federation.num_sites=4", "train.schedule=cosine", "train.eval_batches=64",
    "train.final_eval_batches=0", "checkpoint.every=0",
)  # fmt: skip
HALF = ("strategy.overlap=2", "strategy.routing=partitioned")
AVERAGE = ("strategy.outer=average",)


def both_ways(codec: str, *more: str) -> tuple[str, ...]:
    return (*HALF, *AVERAGE, f"strategy.up={codec}", f"strategy.down={codec}", *more)


# The first two are what the others are held against.
VARIANTS: dict[str, tuple[str, ...]] = {
    "full replica, bf16, DiLoCo (nesterov)": ("strategy=diloco",),
    "full replica, bf16, average": ("strategy=diloco", *AVERAGE),
    "half of the experts, bf16, nesterov": HALF,
    "half, bf16, average": both_ways("bf16"),
    "half, int4 both ways": both_ways("int4"),
    "half, int4 both ways, no feedback": both_ways("int4", "strategy.feedback=0"),
    "half, topk 1/16 up, int4 down": (
        *HALF, *AVERAGE, "strategy.up=topk", "strategy.down=int4", "strategy.density=0.0625",
    ),
    "half, topk 1/16 both ways": both_ways("topk", "strategy.density=0.0625"),
    "half, topk 1/64 both ways": both_ways("topk"),
    "half, topk 1/128 both ways": both_ways("topk", "strategy.density=0.0078125"),
    "half, topk 1/64 both ways, no feedback": both_ways("topk", "strategy.feedback=0"),
    "half, bf16, average, delay 1": both_ways("bf16", "strategy.delay=1"),
    "half, bf16, average, 2 fragments, K/2": both_ways("bf16", "strategy.fragments=2"),
    "half, bf16, average, 2 fragments, K/2, delay 1": both_ways("bf16", "strategy.fragments=2", "strategy.delay=1"),
    "experts at one site, bf16, average": both_ways("bf16", "strategy.overlap=1"),
    "experts at one site, bf16, average, sole_every 4": both_ways(
        "bf16", "strategy.overlap=1", "strategy.sole_every=4"
    ),
}  # fmt: skip


def figures(work: Path, name: str, seed: int, rounds: int, *overrides: str) -> dict[str, float]:
    """Validation loss at the end, and MB of tensors and headers of all sites: down and up in a round in the mean, the
    most of one (both without the first and the last round), and of the whole run.

    A run that is there is not made again.
    """
    folder = work / "".join(c if c.isalnum() else "_" for c in f"{name} {seed}")
    if not (folder / "metrics.jsonl").exists() or len(metrics(folder)) <= rounds:
        shutil.rmtree(folder, ignore_errors=True)
        launch(compose([*COMMON, *overrides, f"seed={seed}", f"hydra.run.dir={folder}"]))
    lines = metrics(folder)
    down, up = ([line[f"bytes_{way}"] / 1e6 for line in lines] for way in ("down", "up"))
    both = [sum(pair) for pair in zip(down, up, strict=True)]
    found = {
        "loss": lines[-1]["val_loss"],
        "down": statistics.mean(down[2:-1]),
        "up": statistics.mean(up[2:-1]),
        "most": max(both[2:-1]),
        "all": sum(both),
    }
    print(name, seed, found, flush=True)
    return found


def draw(path: Path, name: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Loss by bytes: who has none below it and to its left has the least loss for its bytes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    for index, (label, runs) in enumerate(found.items()):
        losses = [run["loss"] for run in runs]
        middle = statistics.median(losses)
        axes.errorbar(
            runs[0]["down"] + runs[0]["up"],
            middle,
            [[middle - min(losses)], [max(losses) - middle]],
            label=label,
            color=pyplot.get_cmap("tab20")(index),
            marker="osD^v"[index % 5],
            capsize=3,
            linestyle="",
        )
    axes.set_xscale("log")
    axes.set_xlabel("MB of a round, all sites, both ways")
    axes.set_ylabel("validation loss")
    axes.set_title(f"{name}: median and range of {len(next(iter(found.values())))} seed(s)", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument(
        "--with", dest="more", nargs="*", default=[], help="overrides of all runs: another size"
    )
    parser.add_argument("--name", default="tiny", help="of the result")
    parser.add_argument(
        "--only", nargs="*", default=list(VARIANTS), help="variants; the first two are needed"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="local ones")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="folder in which the runs stay")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    work = chosen.work.resolve()
    size = (f"model={chosen.model}", f"train.seq_len={chosen.seq_len}", *chosen.more)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS if name in chosen.only}
    # Seed by seed, so that what is stopped early has all variants of some.
    for seed in chosen.seeds:
        for name, runs in found.items():
            # A round of a part has so many steps fewer that each tensor is synchronised as often.
            parts = 2 if "K/2" in name else 1
            rounds = parts * chosen.rounds
            turns = (
                f"train.rounds={rounds}", f"train.eval_every={rounds}", f"train.local_steps={chosen.steps // parts}",
            )  # fmt: skip
            runs.append(figures(work, f"{chosen.name} {name}", seed, rounds, *size, *turns, *VARIANTS[name]))
    diloco, average = (found[name] for name in list(VARIANTS)[:2])
    rows = []
    for name, runs in found.items():
        against = [
            spread(
                [100 * (own["loss"] / other["loss"] - 1) for own, other in zip(runs, base, strict=True)],
                "+.1f",
            )
            for base in (diloco, average)
        ]
        own = runs[0]
        rows.append(
            f"| {name} | {own['down']:.2f} | {own['up']:.2f} | "
            f"{(diloco[0]['down'] + diloco[0]['up']) / (own['down'] + own['up']):.1f} x | "
            f"{diloco[0]['most'] / own['most']:.1f} x | {diloco[0]['all'] / own['all']:.1f} x | "
            f"{spread([run['loss'] for run in runs])} | "
            f"{against[0]} % | {against[1]} % |"
        )
    result = write_result(
        f"bytes_{chosen.name}",
        f"Bytes and loss ({chosen.name})",
        f"Four sites, {chosen.rounds} rounds of K = {chosen.steps} steps of 8 x {chosen.seq_len} bytes of Python's "
        "standard library, the same tokens in all runs, a cosine schedule. Validation loss with all experts; median "
        f"and range of {len(chosen.seeds)} seed(s). MB of a round in the mean, all sites, with headers. Fewer bytes "
        "than full-replica DiLoCo: in a round in the mean, in the round with the most (both without the first and the "
        "last, in which all is sent), and in the whole run.\n\n"
        "| | MB down | MB up | fewer in a round | at its most | in the whole run | loss | against DiLoCo | "
        "against the average |\n"
        "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows),
        "larger models, longer runs, sites with other text.",
    )
    draw(result.with_suffix(".png"), chosen.name, found)


if __name__ == "__main__":
    main()
