"""How many bytes a round needs, and what they cost in loss: `python -m benchmarks.bytes --work WORK`.

One run after the other in this process, of the same tokens: full replicas in bf16, with DiLoCo's outer step and with a
plain average, and federations in which each expert is at half of the sites, with fewer and fewer bits both ways.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.continued import spread
from benchmarks.harness import write_result
from fomoe_flwr.compose import compose
from strategies.launch import launch

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
    "half, topk 1/64 both ways, no feedback": both_ways("topk", "strategy.feedback=0"),
    "half, bf16, average, delay 1": both_ways("bf16", "strategy.delay=1"),
}  # fmt: skip


def figures(work: Path, name: str, seed: int, *overrides: str) -> dict[str, Any]:
    """Validation loss at the end, and bytes of tensors a round, all sites. Kept, so that a script goes on."""
    slug = "".join(c if c.isalnum() else "_" for c in f"{name} {seed}")
    kept = work / f"{slug}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    folder = work / slug
    launch(compose([*COMMON, *overrides, f"seed={seed}", f"hydra.run.dir={folder}"]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    found = {
        "loss": last["val_loss"],
        "down": last["bytes_down"],
        "up": last["bytes_up"],
        "all": sum(line["bytes_down"] + line["bytes_up"] for line in lines),
    }
    kept.write_text(json.dumps(found))
    print(name, seed, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10, help="local ones")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument(
        "--with", dest="more", nargs="*", default=[], help="overrides of all runs: a larger model"
    )
    parser.add_argument("--name", help="of the result, if not the model's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="folder in which what is done is kept")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    size = (f"model={chosen.model}", f"train.rounds={chosen.rounds}", f"train.local_steps={chosen.steps}")
    size += (f"train.seq_len={chosen.seq_len}", f"train.eval_every={chosen.rounds}", *chosen.more)
    # Seed by seed, so that what is stopped early has all variants of some.
    runs = [
        (name, figures(work, f"{chosen.model} {name}", seed, *size, *how))
        for seed in chosen.seeds
        for name, how in VARIANTS.items()
    ]
    found = {name: [figures for of, figures in runs if of == name] for name in VARIANTS}
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
        down, up = runs[0]["down"], runs[0]["up"]
        ratio = (diloco[0]["down"] + diloco[0]["up"]) / (down + up)
        whole = diloco[0]["all"] / runs[0]["all"]
        rows.append(
            f"| {name} | {down / 1e6:.2f} | {up / 1e6:.2f} | {ratio:.1f} x | {whole:.1f} x | "
            f"{spread([own['loss'] for own in runs])} | {against[0]} % | {against[1]} % |"
        )
    write_result(
        f"bytes_{chosen.model}",
        f"Bytes and loss ({chosen.model})",
        f"Four sites, {chosen.rounds} rounds of {chosen.steps} steps of 8 x {chosen.seq_len} bytes of Python's "
        "standard library, the same tokens in all runs, a cosine schedule. Validation loss with all experts; median "
        f"and range of {len(chosen.seeds)} seed(s). MB: of the last round, all sites, with headers; fewer: both ways, "
        "in that round, and in the whole run with its first round, in which all is whole.\n\n"
        "| | MB down | MB up | fewer | in the whole run | loss | against DiLoCo | against the average |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows),
        "larger models, longer runs.",
    )


if __name__ == "__main__":
    main()
