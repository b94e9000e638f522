"""What only a GPU can say, in one call under nine minutes: `benchmarks/gpu.sh`, or `python -m benchmarks.gpu`.

It needs PyTorch with Triton, transformers and this folder; neither Flower nor Hydra. Each part runs in a process of its
own with a time limit of its own, and writes each figure as soon as it has it: what fails or hangs loses its own rest
and nothing else. `--cpu` tries all of it with tiny shapes, where no figure means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.harness import RESULTS, write_result
from fomoe_flwr.config import (
    FederationConfig,
    ModelConfig,
    RunConfig,
    SiteConfig,
    StrategyConfig,
    TrainConfig,
)
from fomoe_flwr.engine import Engine, EngineState
from fomoe_flwr.engine.local import _Losses
from fomoe_flwr.engine.speed import known_peak, measured_peak
from fomoe_flwr.inputs import UNKNOWN
from fomoe_flwr.messages import Deal, make_task
from fomoe_flwr.model.documents import added, allowed, attend, documents_of, mask_of
from fomoe_flwr.model.spec import parameter_counts, parameters
from fomoe_flwr.plan.memory import memory
from fomoe_flwr.plan.system import plan_sites

CONF = Path(__file__).parent.parent / "conf" / "model"
PAPER = {0: 1.00, 8: 1.16, 16: 1.43}  # ghosts of 16: tokens/s of medium on an H100 (FoMoE), relative to none
GOAL = 0.35  # MFU of the larger shape
TINY = ModelConfig(name="tiny", d_model=64, num_layers=2, num_heads=2, num_experts=16, d_expert=32, top_k=4)
# 1.13 B parameters, of which a token passes 0.29 B.
LARGER = ModelConfig(
    name="1B-A0.3B", vocab_size=50_304, d_model=1024, num_layers=16, num_heads=16, num_experts=48, d_expert=640, top_k=8
)  # fmt: skip

Row = dict[str, Any]
Told = Callable[[Row], None]


def medium() -> ModelConfig:
    """As in conf/model, without Hydra."""
    return ModelConfig(**yaml.safe_load((CONF / "medium.yaml").read_text()))


def sizes(cpu: bool) -> dict[str, tuple[ModelConfig, int, int]]:
    """Models with a batch: sequences and their tokens."""
    if cpu:
        return {
            "medium": (TINY, 2, 32),
            "larger": (dataclasses.replace(TINY, name="less tiny", num_layers=3), 2, 32),
        }
    return {"medium": (medium(), 16, 1024), "larger": (LARGER, 8, 2048)}


# ----- a site


def config_of(model: ModelConfig, batch: int, seq_len: int, device: str, **train: Any) -> RunConfig:
    """Of a site alone, in bf16."""
    keys = {
        "dtype": "bf16",
        "batch_size": batch,
        "seq_len": seq_len,
        "device": device,
        "lr": 1e-4,
        **train,
    }
    return RunConfig(
        model=model,
        federation=FederationConfig(num_sites=1, sites=[SiteConfig()]),
        strategy=StrategyConfig(overlap=1),
        train=TrainConfig(**keys),
    )


def engine_of(config: RunConfig, residents: int) -> Engine:
    """With the first so many experts of each layer, and random weights."""
    model, device = config.model, config.train.device
    held = [list(range(residents))] * model.num_layers
    task = make_task(
        config, 0, run="gpu", run_dir="", round_=1, counted_round=0, deal=Deal(0, 1), inputs=UNKNOWN,
        residents=held, local_steps=1,
    )  # fmt: skip
    engine = Engine(model, held, "skip", device)
    torch.manual_seed(0)
    shard = {
        name: torch.ones(param.shape)
        if param.init_std is None
        else torch.empty(param.shape, device=device).normal_(0.0, param.init_std).bfloat16().cpu()
        for name, param in parameters(model, held, "skip").items()
    }
    engine.load(task, shard, EngineState())
    # Otherwise an update would be made in the place of the weights, and the next steps be taken from that.
    engine._sent = {}
    return engine


def tokens_of(config: RunConfig) -> Tensor:
    size = (config.train.batch_size, config.train.seq_len + 1)
    tokens_BT = torch.randint(config.model.vocab_size, size, generator=torch.Generator().manual_seed(1))
    return tokens_BT.to(config.train.device)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(
    engine: Engine, config: RunConfig, steps: int, warm_up: int = 3
) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step after the warm-up, and what the engine reports of these."""
    tokens_BT, ends = tokens_of(config), list[float]()

    def batches(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            wait(engine.device)
            ends.append(time.perf_counter())
            yield tokens_BT
        wait(engine.device)
        ends.append(time.perf_counter())

    engine.train(batches(warm_up))
    ends.clear()
    report = engine.train(batches(steps))
    return [after - before for before, after in itertools.pairwise(ends)], report.metrics


def drop(engine: Engine) -> None:
    engine.module.to("meta")
    engine._optimizer = None
    # What was compiled holds its parameters.
    torch._dynamo.reset()
    if engine.device.startswith("cuda"):
        torch.cuda.empty_cache()


# ----- parts


def syncs(cpu: bool, device: str, tell: Told) -> None:
    """Whether the host waits for the device within a step."""
    model, batch, seq_len = sizes(cpu)["medium"]
    cases: list[dict[str, Any]] = [{}, {"recompute": "full"}]
    if not cpu:
        cases.append({"compile": True})
    for train in cases:
        config = config_of(model, batch, seq_len, device, **train)
        engine = engine_of(config, model.num_experts // 2)
        tokens_BT = tokens_of(config)
        engine.train([tokens_BT] * 2)
        called = torch.compile(engine.module) if config.train.compile else engine.module
        assert engine._optimizer is not None

        def step(engine: Engine = engine, called: Any = called, tokens_BT: Tensor = tokens_BT) -> None:
            losses = _Losses(torch.zeros((), device=device))
            engine._backward(called, tokens_BT, losses)
            assert engine._optimizer is not None
            engine._step(engine._optimizer, losses, tokens_BT.numel())

        step()
        row: Row = {"case": ", ".join(f"{key}={value}" for key, value in train.items()) or "as it is"}
        if cpu:
            step()
            tell({**row, "waits": "needs a GPU", "calls that wait": "needs a GPU"})
            continue
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
            row["waits"] = "never"
        except RuntimeError as error:
            row["waits"] = " ".join(str(error).split())[:200]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
        found = {
            event.key: event.count
            for event in profiler.key_averages()
            if "Synchronize" in event.key or "DtoH" in event.key or event.key == "aten::_local_scalar_dense"
        }
        # The profiler waits once itself, at its end.
        tell(
            {
                **row,
                "calls that wait": ", ".join(f"{name} {count}" for name, count in found.items()) or "none",
            }
        )
        drop(engine)


def ghosts(cpu: bool, device: str, tell: Told) -> None:
    """Tokens/s where so many of 16 experts are elsewhere."""
    model, batch, seq_len = sizes(cpu)["medium"]
    for compiled in (False,) if cpu else (False, True):
        whole = None
        for count, paper in PAPER.items():
            config = config_of(model, batch, seq_len, device, compile=compiled)
            # A stack is never empty: one expert is there, but its place in the router says that it is not.
            engine = engine_of(config, max(model.num_experts - count, 1))
            if count == model.num_experts:
                for block in engine.module.blocks:  # type: ignore[attr-defined]
                    block.mlp.slot_C.fill_(1)
            seconds, _ = timed(engine, config, 2 if cpu else 10)
            speed = batch * seq_len / statistics.median(seconds)
            whole = whole or speed
            tell(
                {
                    "ghosts": count, "compiled": compiled, "tokens/s": round(speed),
                    "ratio": round(speed / whole, 3), "paper": paper,
                }
            )  # fmt: skip
            drop(engine)


def mfu(cpu: bool, device: str, tell: Told) -> None:
    """Of the needed FLOPs, see docs/sites.md."""
    peak = known_peak(device, "bf16") or measured_peak(device, "bf16")
    for name, compiled in itertools.product(("larger", "medium"), (False,) if cpu else (False, True)):
        model, batch, seq_len = sizes(cpu)[name]
        config = config_of(model, batch, seq_len, device, compile=compiled)
        engine = engine_of(config, model.num_experts)
        steps = 2 if cpu else 10
        seconds, metrics = timed(engine, config, steps)
        per_step = metrics["flops"] / steps
        tell(
            {
                "model": f"{model.name}, {parameter_counts(model).total / 1e9:.2f} B", "compiled": compiled,
                "batch": f"{batch} x {seq_len}", "ms": round(1e3 * statistics.median(seconds), 1),
                "tokens/s": round(batch * seq_len / statistics.median(seconds)),
                "MFU": f"{per_step / statistics.median(seconds) / peak:.1%}",
                "goal": f"{GOAL:.0%}" if name == "larger" else "",
            }
        )  # fmt: skip
        drop(engine)


def memories(cpu: bool, device: str, tell: Told) -> None:
    """The allocator's peak beside the plan's."""
    settings = (("none", 1), ("selective", 1), ("full", 1), ("none", 2), ("full", 2))
    for name, (recompute, pieces) in itertools.product(("medium", "larger"), settings):
        model, batch, seq_len = sizes(cpu)[name]
        config = config_of(model, batch, seq_len, device, recompute=recompute, micro_batches=pieces)
        residents = model.num_experts // 2
        planned = memory(config, plan_sites(config)[0], float(residents))
        engine = engine_of(config, residents)
        report = engine.train([tokens_of(config)] * 2)
        measured = report.metrics["memory_bytes"]
        tell(
            {
                "model": model.name, "recompute": recompute, "micro_batches": pieces,
                "plan, GB": round(planned.total / 1e9, 2),
                "of it activations": round(planned.activations.total / 1e9, 2),
                "in passing": round(planned.passing / 1e9, 2), "measured, GB": round(measured / 1e9, 2),
                "measured / plan": "needs a GPU" if cpu else round(measured / planned.total, 3),
            }
        )  # fmt: skip
        drop(engine)


def documents(cpu: bool, device: str, tell: Told) -> None:
    """Attention within documents: FlexAttention against a mask, and what a step with it takes."""
    model, batch, seq_len = sizes(cpu)["medium"]
    width = model.d_model // model.num_heads
    tokens_BS = torch.randint(100, (batch, seq_len), device=device)
    size = (batch, model.num_heads, seq_len, width)
    inputs = [torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    masks = (
        mask_of(tokens_BS, 0, width, torch.bfloat16),
        added(allowed(documents_of(tokens_BS, 0)), torch.bfloat16),
    )
    found = []
    for mask in masks:
        out = attend(inputs[0], inputs[1], inputs[2], mask)
        found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)])
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    tell({"what": f"{type(masks[0]).__name__} against a mask", "largest difference": f"{off:.1e}", "ms": ""})
    for end in (None, 0):
        config = config_of(dataclasses.replace(model, document_end=end), batch, seq_len, device)
        engine = engine_of(config, model.num_experts)
        seconds, _ = timed(engine, config, 2 if cpu else 10)
        what = "a step of medium" + ("" if end is None else ", within documents")
        tell({"what": what, "largest difference": "", "ms": round(1e3 * statistics.median(seconds), 1)})
        drop(engine)


PARTS: dict[str, tuple[Callable[[bool, str, Told], None], int, str]] = {
    "syncs": (syncs, 80, "Does the host wait for the device within a step? (medium, half of the experts)"),
    "memory": (memories, 110, "Peak memory against the plan (half of the experts)"),
    "mfu": (mfu, 150, "MFU"),
    "ghosts": (ghosts, 130, "Skip-token: speed by ghosts, beside the paper's"),
    "documents": (documents, 60, "Attention within documents"),
}  # fmt: skip


# ----- all of them, one after the other


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    if not rows:
        return "nothing was measured"
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_part(name: str, cpu: bool, limit_s: float) -> str:
    """A part in a process of its own; its section of the result."""
    _, _, title = PARTS[name]
    with tempfile.TemporaryDirectory() as folder:
        lines, errors = Path(folder) / "rows.jsonl", Path(folder) / "errors.txt"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--rows", str(lines)]
        began = time.perf_counter()
        with errors.open("w") as stream:
            # With processes of its own, as compilers have, which would outlive it.
            process = subprocess.Popen(
                [*command, *(["--cpu"] if cpu else [])], stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                ended = "" if process.wait(limit_s) == 0 else f"failed with {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                ended = f"stopped after its {limit_s:.0f} s"
        rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        said = errors.read_text(errors="replace").strip().splitlines()[-3:]
    print(f"{name}: {len(rows)} rows in {time.perf_counter() - began:.0f} s {ended}", flush=True)
    text = f"## {title}\n\n{table(rows)}\n"
    return text + (f"\n**{ended}**: `{' / '.join(said)[:600]}`\n" if ended else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on a CPU, to try it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default: all parts")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="of the result")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if not chosen.cpu and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --cpu tries it with tiny shapes")
    if chosen.part is None:
        sections = [run_part(name, chosen.cpu, PARTS[name][1]) for name in chosen.only]
        head = "Tiny shapes on a CPU: no figure means anything.\n\n" if chosen.cpu else ""
        write_result(
            "gpu_tried" if chosen.cpu else "gpu",
            "A site's step on one GPU",
            head + "bf16 over fp32 weights; σ-MoE; medians of steps.\n\n" + "\n".join(sections),
            "several devices, stock architectures, other GPUs.",
            chosen.out,
        )
        return
    torch.set_num_threads(1 if chosen.cpu else torch.get_num_threads())

    def tell(row: Row) -> None:
        with chosen.rows.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    PARTS[chosen.part][0](chosen.cpu, "cpu" if chosen.cpu else "cuda", tell)


if __name__ == "__main__":
    main()
