"""HybridEP over links of a given bandwidth: the time of a step for every domain size, and which one a site chooses.

    sudo python -m benchmarks.domains --name domains

Four processes, each in a network namespace of its own, whose one link the kernel throttles (`tc`, token bucket). They
train with train.parallel=ep; the sizes take turns. Instead of attention they pause, as if it were computed elsewhere:
else they would wait for this machine's cores and not for the links. Needs root, iproute2, and Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import spread, write_result
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.engine import EngineState, rank
from fomoe_flwr.engine.domain import best_size, layer_s
from fomoe_flwr.engine.several import Member
from fomoe_flwr.engine.team import join
from fomoe_flwr.model.build import initial_state
from fomoe_flwr.model.moe import SigmaRouter
from fomoe_flwr.model.sigma_moe import Attention
from fomoe_flwr.placement import full_residents
from fomoe_flwr.units import in_bytes
from tests.engine.helpers import task_of

DEVICES = 4
SIZES = (1, 2, 4)
# A device's experts of a layer are 0.5 MB, and so are its tokens' rows.
MODEL = ModelConfig(
    name="exchange",
    vocab_size=64,
    d_model=128,
    num_layers=4,
    num_heads=4,
    num_experts=8,
    d_expert=256,
    top_k=1,
)
SEQUENCES, POSITIONS = 4, 1024
STEPS = 3
# Of attention and what else comes before the experts, forward; backward takes twice as long.
PAUSE_S = 0.04
MBITS = (25, 80, 300)


def spread_evenly(router: SigmaRouter, x_TD: Tensor, scores_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Choices that are equally likely, as the stream model supposes: a router that is new has favourites."""
    chosen_TK = torch.rand_like(scores_TC).topk(router.top_k, dim=-1).indices
    return scores_TC.gather(1, chosen_TK), chosen_TK


class _Pause(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(PAUSE_S)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(2 * PAUSE_S)
        return grad


def pause(attention: Attention, x_BSD: Tensor, *_: Tensor) -> Tensor:
    """In the place of attention: a device that computes without this machine's cores, which all four share."""
    y_BSD: Tensor = _Pause.apply(x_BSD)  # type: ignore[no-untyped-call]
    # Every parameter has a gradient, as DistributedDataParallel wants it.
    return y_BSD + 0.0 * sum(parameter.sum() for parameter in attention.parameters())


# ----- namespaces, one a device, on a switch


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


@contextmanager
def network(mbit: float) -> Iterator[list[str]]:
    """Names of the namespaces; each one's link `eth` sends and receives at most so much."""
    names = [f"fomoe-{index}" for index in range(DEVICES)]
    hub = "fomoe-hub"
    with ExitStack() as stack:
        for name in (hub, *names):
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "delete", name)
        _run("ip", "-n", hub, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "switch", "up")
        for index, name in enumerate(names):
            port = f"port{index}"
            _run("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth", "netns", name)
            _run("ip", "-n", hub, "link", "set", port, "master", "switch", "up")
            _run("ip", "-n", name, "address", "add", f"10.77.0.{index + 1}/24", "dev", "eth")
            _run("ip", "-n", name, "link", "set", "eth", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            # A message begins at the link's rate, also after a pause.
            _run("ip", "-n", name, "route", "replace", "10.77.0.0/24", "dev", "eth", "initcwnd", "200")
            still = "net.ipv4.tcp_slow_start_after_idle=0"
            _run("ip", "netns", "exec", name, "sysctl", "--quiet", "--write", still)
            bucket = ("tbf", "rate", f"{mbit}mbit", "burst", "32kb", "latency", "4s")
            _run("tc", "-n", name, "qdisc", "add", "dev", "eth", "root", *bucket)
            _run("tc", "-n", hub, "qdisc", "add", "dev", port, "root", *bucket)
        yield names


# ----- the first device


def first(file: str, mbit: float, repeats: int) -> dict[str, Any]:
    """What the sizes take, and what the model says of them."""
    torch.set_num_threads(1)
    residents = full_residents(MODEL.num_layers, MODEL.num_experts)
    train = {"batch_size": SEQUENCES, "seq_len": POSITIONS, "grad_clip": 0.0, "lr": 0.0}
    task = task_of(residents=residents, train=train, model={**vars(MODEL)})
    team = join(0, DEVICES, "cpu", file)
    engine = Member(task.model, residents, "skip", "ep", "1", team=team)
    engine.load(task, initial_state(task.model, residents, "skip", 0), EngineState())
    with engine.all_do("exchange_case", task):
        case = engine.exchange_case(task)
    generator = torch.Generator().manual_seed(0)

    def steps(number: int) -> list[float]:
        """Seconds of each but the first: from one batch to the next."""
        asked: list[float] = []

        def batches() -> Iterator[Tensor]:
            for _ in range(number + 1):
                asked.append(time.perf_counter())
                yield torch.randint(MODEL.vocab_size, (SEQUENCES, POSITIONS + 1), generator=generator)
            asked.append(time.perf_counter())
            wire.append(_sent_by_link())

        engine.train(batches())
        return [after - before for before, after in pairwise(asked)][1:]

    def divide(size: int) -> None:
        with engine.all_do("divide_domains", size):
            engine.divide_domains(size)

    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    wire: list[int] = []
    sent: dict[int, list[int]] = {}
    for repeat in range(repeats + 1):
        for size in SIZES:
            divide(size)
            before = _sent_by_link()
            took = steps(STEPS)
            assert engine.domains is not None
            traffic = engine.domains.traffic
            sent[size] = [
                number // (STEPS + 1) for number in (traffic.tokens, traffic.experts, wire[-1] - before)
            ]
            if repeat:
                seconds[size] += took
    return {
        "mbit": mbit,
        "case": vars(case),
        "chosen": best_size(case),
        "model_s": {size: MODEL.num_layers * layer_s(case, size) for size in SIZES},
        "seconds": seconds,
        "sent": sent,
    }


def _sent_by_link() -> int:
    return int(Path("/sys/class/net/eth/statistics/tx_bytes").read_text())


# ----- all of it


def measure(mbit: float, repeats: int) -> dict[str, Any]:
    """One bandwidth."""
    with network(mbit) as names, tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(DEVICES),
            "FOMOE_RANKS": str(Path(folder) / "store"),
            "FOMOE_DEVICE": "cpu",
            "GLOO_SOCKET_IFNAME": "eth",
            "OMP_NUM_THREADS": "1",
        }
        others = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.domains", "--other"],
                stdin=subprocess.PIPE,
                env={**environment, "RANK": str(number)},
                # Each says at the end that the first is gone.
                stderr=subprocess.DEVNULL,
            )
            for number, name in enumerate(names)
            if number
        ]
        module = ["-m", "benchmarks.domains", "--first", str(mbit), "--repeats", str(repeats)]
        try:
            output = subprocess.run(
                ["ip", "netns", "exec", names[0], sys.executable, *module],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
            ).stdout
        finally:
            for process in others:
                assert process.stdin is not None
                process.stdin.close()
                process.wait()
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| link | S | step, ms | exchange by the model, ms | tokens, experts a device sends a step "
        "| all that its link sends | |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        medians = {size: statistics.median(one["seconds"][str(size)]) for size in SIZES}
        fastest = min(medians.values())
        for size in SIZES:
            milliseconds = [1e3 * second for second in one["seconds"][str(size)]]
            tokens, experts, all_bytes = one["sent"][str(size)]
            says = ""
            if size == one["chosen"]:
                says = f"**chosen**, {100 * (medians[size] / fastest - 1):.1f} % from the fastest"
            lines.append(
                f"| {one['mbit']:g} Mbit/s | {size} | {spread(milliseconds, '.0f')} | "
                f"{1e3 * one['model_s'][str(size)]:.0f} | {in_bytes(tokens)}, {in_bytes(experts)} "
                f"| {in_bytes(all_bytes)} | {says} |"
            )
        case = one["case"]
        lines.append(
            f"| | | | | measured: {in_bytes(case['dispatch_bytes'])} of tokens to dispatch and "
            f"{in_bytes(case['expert_bytes'])} of experts a layer, {in_bytes(case['bandwidth_bytes_per_s'])}/s, "
            f"{1e3 * case['pre_expert_s']:.1f} ms before the experts | | |"
        )
    return "\n".join(lines)


def picture(found: Sequence[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.2), layout="constrained")
    for panel, one in zip(axes, found, strict=True):
        medians = [1e3 * statistics.median(one["seconds"][str(size)]) for size in SIZES]
        model = [1e3 * one["model_s"][str(size)] for size in SIZES]
        # The model knows nothing of what is the same for every S.
        rest = min(medians) - model[medians.index(min(medians))]
        panel.plot(SIZES, medians, "o-", label="measured")
        panel.plot(
            SIZES, [value + rest for value in model], "x--", label="model, moved up by what it leaves out"
        )
        panel.axvline(one["chosen"], color="grey", linestyle=":", label="chosen")
        panel.set(title=f"{one['mbit']:g} Mbit/s", xlabel="devices of a domain, S", xticks=SIZES)
        panel.set_ylim(bottom=0)
    axes[0].set_ylabel("step, ms")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="domains")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mbits", type=float, nargs="+", default=MBITS)
    parser.add_argument("--first", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--other", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    SigmaRouter.choose, Attention.forward = spread_evenly, pause  # type: ignore[method-assign, assignment]
    if chosen.other:
        rank.main()
        return
    if chosen.first is not None:
        print(json.dumps(first(os.environ["FOMOE_RANKS"], chosen.first, chosen.repeats)))
        return
    if os.geteuid():
        raise SystemExit("network namespaces and tc need root")
    found = [measure(mbit, chosen.repeats) for mbit in chosen.mbits]
    body = (
        f"{DEVICES} processes on this machine, each in a network namespace whose link is throttled in both directions; "
        f"{MODEL.num_layers} layers, d {MODEL.d_model}, {MODEL.num_experts} experts of {MODEL.d_expert}, top "
        f"{MODEL.top_k}, {SEQUENCES} sequences of {POSITIONS} tokens a step, fp32. Tokens are spread evenly over the "
        f"experts; a pause of {1e3 * PAUSE_S:g} ms forward, and of twice that backward, stands for attention. Sizes in "
        f"turn, {STEPS * chosen.repeats} steps each, after a warm-up; median and range.\n\n" + table(found)
    )
    path = write_result(
        chosen.name, "Domains of experts over slow links", body, "GPUs; links between machines."
    )
    picture(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
