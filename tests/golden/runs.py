"""The small runs behind the golden traces, and what is kept of each."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fomoe_flwr.compose import compose
from tests.strategies.helpers import metrics, run

TRACES = Path(__file__).parent / "traces"
ROUNDS = 3
DIGITS = 4  # significant, in the traces

SMALL = (
    "model=tiny", "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.num_experts=8",
    "model.d_expert=16", "federation.num_sites=4", "strategy.overlap=2", "strategy.up=bf16", "strategy.down=bf16",
    "train.rounds=3", "train.local_steps=4", "train.batch_size=2", "train.seq_len=32", "train.warmup_steps=4",
    "train.expert_warmup_steps=3", "train.eval_batches=2", "train.final_eval_batches=1", "train.device=cpu",
    "runtime=local", "wandb.mode=disabled", "checkpoint.keep=1",
)  # fmt: skip

# Each is SMALL with these overrides.
SETTINGS: dict[str, tuple[str, ...]] = {
    "skip_nesterov": (),
    "partitioned_nesterov": ("strategy.routing=partitioned",),
    "skip_local_adamw": ("strategy.outer=local_adamw",),
    "partitioned_local_adamw": ("strategy.routing=partitioned", "strategy.outer=local_adamw"),
    "ddp": ("strategy=ddp", "strategy.overlap=null"),
    "random_moves": ("strategy.placement=random", "strategy.reshuffle_every=1"),
    "planned_hetero": ("federation=hetero", "federation.num_sites=null", "strategy.placement=planned"),
    "locality_bias": ("model.locality=bias", "model.locality_target=0.7", "model.balance=global"),
}


def write_corpus(folder: Path) -> Path:
    """Four domains of made-up prose; the same on every machine."""
    rng = random.Random(0)
    text = "site expert token router dense wire round loss gate model shard bundle link update mean outer"
    words = text.split()
    for domain in ("anatomy", "botany", "chemistry", "dance"):
        (folder / domain).mkdir(parents=True)
        for index in range(12):
            text = " ".join(rng.choice(words) for _ in range(200))
            (folder / domain / f"{index}.txt").write_text(f"{domain} {text}\n")
    return folder


def trained(name: str, folder: Path) -> Path:
    """Run a setting below the folder; the run's directory."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    run_dir = folder / name
    given = {item.partition("=")[0] for item in SETTINGS[name]}
    overrides = [item for item in SMALL if item.partition("=")[0] not in given] + list(SETTINGS[name])
    overrides += ["data=text", f"data.path={corpus}", f"data.cache_dir={folder / 'cache'}"]
    with contextlib.redirect_stdout(io.StringIO()):  # the report
        return run(compose([*overrides, f"hydra.run.dir={run_dir}"]))


def trace(run_dir: Path) -> list[dict[str, Any]]:
    """What each round gave, rounded, without what depends on the clock."""
    return [_traced(line) for line in metrics(run_dir)]


def _traced(line: dict[str, Any]) -> dict[str, Any]:
    return {
        "round": line["round"],
        "tokens": line["tokens"],
        "train_loss": _rounded(line["train_loss"]),
        "val_loss": _rounded(line["val_loss"]),
        "resident_share": _rounded(line["resident_share"]),
        "committed": line["committed"],
        # Without "other": headers and configuration are no tensors.
        "payload_bytes": {name: line["bytes_by_class"][name] for name in ("dense", "expert")},
        "sites": {
            site["site"]: [site["tokens"], _rounded(site["train_loss"]), _rounded(site["resident_share"])]
            for site in line["sites"]
        },
        "routing": {name: _rounded(line["routing"][name]) for name in ("load_entropy", "agreement", "drift")},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def digest(run_dir: Path) -> str:
    """SHA-256 of every bit that a run leaves: losses, the model, the outer optimizer, what each site keeps."""
    digest = hashlib.sha256()
    for line in metrics(run_dir):
        kept = [line["round"], line["tokens"], line["train_loss"], line["val_loss"], line["resident_share"]]
        kept += [[site["site"], site["tokens"], site["train_loss"]] for site in line["sites"]]
        digest.update(json.dumps(kept).encode())  # JSON keeps a float to the last bit
    checkpoint = run_dir / "checkpoints" / f"round_{ROUNDS:05d}"
    for file in (checkpoint / "parameters.safetensors", checkpoint / "outer.safetensors"):
        _add(digest, load_file(file).items())
    for file in sorted(run_dir.glob(f"sites/*/round_{ROUNDS:05d}.safetensors")):
        digest.update(file.parent.name.encode())
        _add(digest, load_file(file).items())
    return digest.hexdigest()


def _add(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in sorted(tensors):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
