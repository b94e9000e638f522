"""`fomoe bench [OVERRIDE ...]`: a site's training step alone, on made-up tokens, and where its time goes.

What a site's admin runs first. No text, server or other site is needed: the model and the experts that the first site
of the federation would hold are those of the configuration, and so are train.device, dtype, compile, micro_batches and
recompute. Weights are random: the time of a step does not depend on them, but for how many tokens meet ghosts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.console import Parser, at_least_1, print_whole
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.overrides import read_overrides
from fomoe_flwr.units import count, in_bytes, percent

WARM_UP = 2  # steps
# Names of PyTorch's events in the forward pass, and parts of names in the backward pass. None of them is inside of
# another. Compiled kernels have names of their own, and are in no part.
_PARTS = {
    "experts": (("_ExpertsOfTokens",), ("_ExpertsOfTokensBackward",)),
    "attention": (("aten::scaled_dot_product_attention",), ("ScaledDotProduct",)),
    "logits and their loss": (("_LinearCrossEntropy",), ("_LinearCrossEntropyBackward",)),
    "projections": (("aten::linear",), ("MmBackward", "AddmmBackward", "LinearBackward")),
    "router": (("aten::topk", "aten::sort", "aten::searchsorted"), ("TopkBackward",)),
    "norms": (("aten::layer_norm", "aten::rms_norm"), ("NormBackward",)),
    "optimizer": (("aten::_fused_adamw_", "aten::_foreach_norm", "aten::baddbmm"), ()),
}
_BACKWARD = "autograd::engine::evaluate_function: "


def bench_command(arguments: Sequence[str], console: Console | None = None) -> None:
    """Measure and print.

    Raises:
        ConfigError: an argument is wrong, or the device is not there.
    """
    parser = Parser(prog="fomoe bench", description="A site's training step alone, on made-up tokens.")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for fomoe train")
    parser.add_argument("--steps", metavar="N", type=at_least_1, default=10, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_intermixed_args(list(arguments))
    config = compose(read_overrides(options.overrides)).config
    found = measure(config, options.steps)
    if options.json:
        print(json.dumps(found, allow_nan=False))
        return
    show(found, console or Console())


def measure(config: RunConfig, steps: int) -> dict[str, Any]:
    """Figures of a step; JSON values. Times are in seconds, and medians.

    Raises:
        ConfigError: the device is not there, or the model does not fit into its memory.
    """
    import torch

    from fomoe_flwr.engine import EngineState, engine_on
    from fomoe_flwr.engine.device import use_cpu
    from fomoe_flwr.engine.speed import known_peak, measured_peak
    from fomoe_flwr.inputs import UNKNOWN
    from fomoe_flwr.messages import Deal, make_task
    from fomoe_flwr.model.build import initial_state
    from fomoe_flwr.plan.memory import memory_bytes
    from fomoe_flwr.plan.planner import make_plan
    from fomoe_flwr.plan.system import plan_sites
    from fomoe_flwr.policies import POLICIES
    from fomoe_flwr.site.devices import devices_of
    from fomoe_flwr.site.identity import node_settings

    use_cpu(config.train.threads)
    residents = (
        POLICIES[config.strategy.placement](config, make_plan(config)).intended(1).placement.residents(0)
    )
    task = make_task(
        config, 0, run="bench", run_dir="", round_=1, counted_round=0, deal=Deal(0, 1), inputs=UNKNOWN,
        residents=residents, local_steps=config.train.local_steps,
    )  # fmt: skip
    devices = devices_of(task, node_settings({}))
    device = devices.device
    generator = torch.Generator().manual_seed(config.seed)
    size = (task.train.batch_size, task.train.seq_len + 1)
    ends: list[float] = []

    def batches(number: int) -> Iterator[torch.Tensor]:
        for _ in range(number):
            # A batch is asked for when the step before it is done, as far as the host knows.
            wait()
            ends.append(time.perf_counter())
            yield torch.randint(config.model.vocab_size, size, generator=generator)
        wait()
        ends.append(time.perf_counter())

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    try:
        engine = engine_on(devices, config.model, residents, config.strategy.routing)
        shard = initial_state(config.model, residents, config.strategy.routing, config.seed)
        engine.load(task, shard, EngineState())
        engine.train(batches(WARM_UP))
        engine.load(task, shard, EngineState())
        ends.clear()
        report = engine.train(batches(steps))
        seconds = [after - before for before, after in itertools.pairwise(ends)]
        engine.load(task, shard, EngineState())
        parts = _parts(engine, batches, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "fomoe bench: does not fit into the device's memory; try train.micro_batches, train.recompute, a smaller "
            "train.batch_size, or fewer experts (strategy.overlap)"
        ) from error
    step_s = statistics.median(seconds)
    tokens = task.train.batch_size * task.train.seq_len
    flops = report.metrics["flops"] / steps
    peak = known_peak(device, task.train.dtype)
    here = dataclasses.replace(plan_sites(config)[0], device=device)
    return {
        "model": config.model.name,
        "experts_per_layer": len(residents[0]),
        "num_experts": config.model.num_experts,
        "routing": config.strategy.routing,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "devices": devices.number,
        "parallel": devices.parallel,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": task.train.dtype,
        "compile": task.train.compile,
        "micro_batches": task.train.micro_batches,
        "recompute": task.train.recompute,
        "batch": list(size),
        "step_s": step_s,
        "step_s_range": [min(seconds), max(seconds)],
        "tokens_per_second": tokens / step_s,
        "resident_share": report.metrics["resident_share"],
        "flops_per_step": flops,
        "flops_per_second": flops / step_s,
        "peak_flops": devices.number * (peak or measured_peak(device, task.train.dtype)),
        "peak_from": "data sheet" if peak else "measured with square matrices",
        "memory_bytes": report.metrics["memory_bytes"],
        "planned_memory_bytes": float(memory_bytes(config, here, float(len(residents[0])))),
        "parts": parts,
    }


def _parts(engine: Any, batches: Any, device: str) -> dict[str, float]:
    """Shares of a step's time, of one that was looked at closely; what is in no part is `rest`."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        engine.train(batches(1))
    seconds, total = dict.fromkeys(_PARTS, 0.0), 0.0
    for event in profiler.key_averages():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        whole = event.device_time_total if gpu else event.cpu_time_total
        total += own
        for part, (forward, backward) in _PARTS.items():
            on_its_way_back = event.key.startswith(_BACKWARD) and any(name in event.key for name in backward)
            if event.key in forward or on_its_way_back:
                seconds[part] += whole
                break
    known = sum(seconds.values())
    shares = {part: value / max(total, known, 1e-12) for part, value in seconds.items()}
    return {
        **dict(sorted(shares.items(), key=lambda item: -item[1])),
        "rest": max(0.0, 1 - sum(shares.values())),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print the figures as tables."""
    table = Table(title="a training step", box=SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    batch, positions = found["batch"]
    least, most = found["step_s_range"]
    mfu = found["flops_per_second"] / found["peak_flops"]
    table.add_row(
        "model",
        f"{found['model']}, {found['experts_per_layer']} of {found['num_experts']} experts a layer, "
        f"{found['routing']} routing",
    )
    table.add_row(
        "device",
        (f"{found['devices']} x " if found["devices"] > 1 else "")
        + f"{found['device']}, "
        + (f"{found['parallel']}, " if found["devices"] > 1 else "")
        + f"{found['threads']} thread(s), torch {found['torch']}, {found['dtype']}"
        + (", compiled" if found["compile"] else ""),
    )
    table.add_row(
        "step",
        f"{1e3 * found['step_s']:.1f} ms ({1e3 * least:.1f} to {1e3 * most:.1f}) for {batch} sequences of "
        f"{positions - 1} tokens, in {found['micro_batches']} piece(s), recompute {found['recompute']}",
    )
    table.add_row("speed", f"{count(found['tokens_per_second'])} tokens/s")
    table.add_row(
        "MFU",
        f"{percent(mfu)}: {found['flops_per_second'] / 1e12:.3g} of {found['peak_flops'] / 1e12:.3g} Tflop/s "
        f"({found['peak_from']}); resident share {percent(found['resident_share'])}",
    )
    table.add_row(
        "memory",
        in_bytes(found["memory_bytes"])
        + ("" if found["device"] != "cpu" else ", activations not counted")
        + f"; by plan {in_bytes(found['planned_memory_bytes'])} at the peak of a step",
    )
    print_whole(table, console)
    parts = Table(title="where its time goes", box=SIMPLE, show_header=False, pad_edge=False)
    parts.add_column(no_wrap=True)
    parts.add_column(justify="right")
    for part, share in found["parts"].items():
        parts.add_row(part, percent(share))
    print_whole(parts, console)
