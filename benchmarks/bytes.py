"""How many bytes a round needs, and what they cost in loss: `python -m benchmarks.bytes --work WORK`.

One run after the other in this process, of the same tokens: full-replica DiLoCo in bf16, which everything is held
against, and federations in which each expert is at half of the sites, with fewer and fewer bits both ways.
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
    "wandb.mode=disabled", "runtime=local", "federation.num_sites=4", "train.seq_len=128", "train.eval_batches=64",
    "train.final_eval_batches=0", "checkpoint.every=0",
)  # fmt: skip
HALF = ("strategy.overlap=2", "strategy.routing=partitioned")
BOTH_TOPK = ("strategy.up=topk", "strategy.down=topk")
# The first is what the others are held against.
VARIANTS: dict[str, tuple[str, ...]] = {
    "full replica, bf16": ("strategy=diloco",),
    "half of the experts, bf16": HALF,
    "half, int4 both ways": (*HALF, "strategy.up=int4", "strategy.down=int4"),
    "half, int4 both ways, no feedback upwards": (
        *HALF, "strategy.up=int4", "strategy.down=int4", "strategy.feedback=0",
    ),
    "half, topk 1/16 both ways": (*HALF, *BOTH_TOPK, "strategy.density=0.0625"),
    "half, topk 1/64 up, int4 down": (*HALF, "strategy.up=topk", "strategy.down=int4"),
    "half, topk 1/64 both ways": (*HALF, *BOTH_TOPK),
    "half, topk 1/64 both ways, outer step 1 without momentum": (
        *HALF, *BOTH_TOPK, "strategy.outer_momentum=0", "strategy.outer_lr=1",
    ),
    "half, topk 1/64 both ways, no feedback upwards": (*HALF, *BOTH_TOPK, "strategy.feedback=0"),
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
    }
    kept.write_text(json.dumps(found))
    print(name, seed, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="local ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="folder in which what is done is kept")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    size = (f"model={chosen.model}", f"train.rounds={chosen.rounds}", f"train.local_steps={chosen.steps}")
    found = {
        name: [figures(work, f"{chosen.model} {name}", seed, *size, *how) for seed in chosen.seeds]
        for name, how in VARIANTS.items()
    }
    base = found[next(iter(VARIANTS))]
    rows = []
    for name, runs in found.items():
        worse = [100 * (own["loss"] / other["loss"] - 1) for own, other in zip(runs, base, strict=True)]
        down, up = runs[0]["down"], runs[0]["up"]
        ratio = (base[0]["down"] + base[0]["up"]) / (down + up)
        rows.append(
            f"| {name} | {down / 1e6:.2f} | {up / 1e6:.2f} | {base[0]['up'] / up:.1f} x | {ratio:.1f} x | "
            f"{spread([own['loss'] for own in runs])} | {spread(worse, '+.1f')} % |"
        )
    write_result(
        f"bytes_{chosen.model}",
        f"Bytes and loss ({chosen.model})",
        f"Four sites, {chosen.rounds} rounds of {chosen.steps} steps of 8 x 128 bytes of Python's standard library, "
        "the same tokens in all runs. Validation loss with all experts; median and range of "
        f"{len(chosen.seeds)} seed(s). Bytes: of the last round, all sites, with headers.\n\n"
        "| | MB down | MB up | fewer up | fewer both ways | loss | against the first |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(rows),
        "larger models, longer runs.",
    )


if __name__ == "__main__":
    main()
