"""What a round costs besides training, in a deployment of two sites: ours against plain Flower.

`python -m benchmarks.rounds`: real SuperLink, SuperNodes and apps on the loopback address, without TLS on both
sides. Flower's clients send back what they got; ours take one step on 32 tokens. Peak memory is that of the
processes themselves, minus what they need for a model of next to nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import EMPTY, HUNDRED, write_result
from fomoe_flwr.compose import compose
from fomoe_flwr.deploy.processes import program_of
from fomoe_flwr.model.spec import parameter_counts
from tests.e2e.deployment import Deployment, free_port, until
from tests.store.servers import BUCKET, KEY, SECRET, environment

APP = Path(__file__).resolve().parent / "plain_flower"
SITES = ("a", "b")

# Of about the same size as HUNDRED, in which one tensor, the embedding, is four fifths.
MANY_TENSORS = (
    "model.d_model=512", "model.num_layers=8", "model.num_heads=8", "model.num_experts=32", "model.d_expert=256",
    "model.vocab_size=32768",
)  # fmt: skip
MANY = "of many tensors"

STEP = (
    "train.local_steps=1", "train.batch_size=1", "train.seq_len=32", "train.eval_batches=0", "wandb.mode=disabled",
    "checkpoint.every=0",
)  # fmt: skip
PROGRAMS = ("flwr-serverapp", "flwr-clientapp", "clients.worker", "flower-supernode", "flower-superlink")


class Cost(NamedTuple):
    """Seconds of each round after the first two, and peak memory by program in MiB."""

    seconds: list[float]
    peak_mib: dict[str, float]


class Peaks(threading.Thread):
    """Looks at the peak memory of a deployment's processes, by program, until told to stop."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(daemon=True)
        self.deployment, self.peak_mib, self.stopped = (
            deployment,
            dict.fromkeys(PROGRAMS, 0.0),
            threading.Event(),
        )

    def run(self) -> None:
        while not self.stopped.wait(0.2):
            for process in self.deployment.marked.look():
                with suppress(OSError, ValueError, StopIteration):
                    program = program_of(process.pid)
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    mib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
                    if program in self.peak_mib:
                        self.peak_mib[program] = max(self.peak_mib[program], mib)


def ours(folder: Path, overrides: Sequence[str], rounds: int, through_store: bool = False) -> Cost:
    """Our own processes.

    Args:
        through_store: bundles travel through an S3 server on the same machine, in a process of its own.
    """
    with ExitStack() as stack:
        environment = None
        if through_store:
            environment = stack.enter_context(object_store(folder / "s3"))
            overrides = [*overrides, f"store=s3://{BUCKET}"]
        deployment = stack.enter_context(Deployment(folder, SITES, environment=environment))
        peaks = Peaks(deployment)
        peaks.start()
        run = deployment.submit([*overrides, *STEP, f"train.rounds={rounds + 2}"], folder / "run")
        assert run.wait(900) == 0, deployment.logs()
        peaks.stopped.set()
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        assert not any(line["failures"] for line in lines)
        for line in lines[3:]:
            print({key: round(value, 2) for key, value in line["seconds"].items()}, flush=True)
    return Cost([line["seconds"]["round"] for line in lines[3:]], peaks.peak_mib)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def object_store(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server; yields the environment by which it is found."""
    port = free_port()
    (folder / BUCKET).mkdir(parents=True)
    command = [
        str(Path(sys.executable).parent / "nanio"), "serve", "--data-dir", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--no-access-log", "--log-level", "error",
    ]  # fmt: skip
    keys = {"NANIO_ACCESS_KEY": KEY, "NANIO_SECRET_KEY": SECRET}
    process = subprocess.Popen(command, env=os.environ | keys)
    try:
        until(lambda: listens(port), 20)
        yield environment(port)
    finally:
        process.terminate()
        process.wait()


def flowers(folder: Path, millions: float, rounds: int) -> Cost:
    """Flower's own commands, with their own settings."""
    environment = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1.0"}
    with Deployment(folder, SITES, supervised=False, environment=environment) as deployment:
        peaks = Peaks(deployment)
        peaks.start()
        result = folder / "result.json"
        config = f'millions={millions} rounds={rounds + 2} result="{result}"'
        run = deployment.start("run", ["flwr", "run", APP, "test", "--stream", "--run-config", config])
        until(lambda: result.exists() or run.poll(), 1800, deployment.logs)
        assert result.exists(), deployment.logs()
        time.sleep(1)  # until it is written
        run.wait(60)
        peaks.stopped.set()
        times = json.loads(result.read_text())["times"]
    return Cost([after - before for before, after in itertools.pairwise(times[2:])], peaks.peak_mib)


def parameters(overrides: Sequence[str]) -> int:
    return parameter_counts(compose([*overrides, "federation.num_sites=2"]).config.model).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases with this in their name; no result is written then")
    chosen = parser.parse_args()
    rounds = chosen.rounds
    os.environ.setdefault("FOMOE_CACHE", tempfile.mkdtemp(prefix="fomoe-benchmark-cache-"))
    count = parameters(HUNDRED)
    model_mib, many_mib = 4 * count / 2**20, 4 * parameters(MANY_TENSORS) / 2**20
    full = ("strategy=fedavg", *HUNDRED)
    cases = {
        "ours, empty": lambda f: ours(f, (*EMPTY, "strategy.overlap=1"), rounds),
        "Flower, empty": lambda f: flowers(f, 0.001, rounds),
        "ours, full replica, fp32": lambda f: ours(
            f, (*full, "strategy.up=fp32", "strategy.down=fp32"), rounds
        ),
        "ours, full replica, bf16": lambda f: ours(
            f, (*full, "strategy.up=bf16", "strategy.down=bf16"), rounds
        ),
        "ours, each expert at one site, bf16, nesterov, moments and a checkpoint kept on disk each round": lambda f: (
            ours(f, (*HUNDRED, "strategy.overlap=1", "checkpoint.every=1"), rounds)
        ),
        "ours, full replica, bf16, through an object store": lambda f: ours(
            f, (*full, "strategy.up=bf16", "strategy.down=bf16"), rounds, through_store=True
        ),
        "ours, full replica, int4, through an object store": lambda f: ours(
            f, (*full, "strategy.up=int4", "strategy.down=int4"), rounds, through_store=True
        ),
        "Flower, fp32": lambda f: flowers(f, count / 1e6, rounds),
        **{
            f"ours, full replica {MANY}, {codec}, through an object store": partial(
                ours,
                overrides=(
                    "strategy=fedavg",
                    *MANY_TENSORS,
                    f"strategy.up={codec}",
                    f"strategy.down={codec}",
                ),
                rounds=rounds,
                through_store=True,
            )
            for codec in ("bf16", "int4")
        },
    }
    costs: dict[str, Cost] = {}
    for name, case in cases.items():
        if chosen.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="fomoe-rounds-") as folder:
            costs[name] = case(Path(folder))
        print(name, costs[name], flush=True)
    if chosen.only:
        return
    rows = []
    for name, cost in costs.items():
        base = costs["Flower, empty" if name.startswith("Flower") else "ours, empty"].peak_mib
        extra = {
            program: (cost.peak_mib[program] - base[program]) / (many_mib if MANY in name else model_mib)
            if "empty" not in name
            else 0.0
            for program in PROGRAMS
        }
        cells = " | ".join(f"{extra[program]:.2f}" if extra[program] else "" for program in PROGRAMS)
        seconds = (
            f"{statistics.median(cost.seconds):.1f} ({min(cost.seconds):.1f} to {max(cost.seconds):.1f})"
        )
        rows.append(f"| {name} | {seconds} | {cells} |")
    write_result(
        "rounds",
        f"A round of two sites in a deployment: next to nothing, and {count / 1e6:.1f} M parameters",
        f"Seconds a round: median and range of {rounds} rounds after two that warm up; the processes of both sites, "
        "server and clients share the machine. Memory: peak of each process above that of the empty case, in models "
        f"({model_mib:.0f} MiB in fp32; {MANY} {many_mib:.0f} MiB), the larger of the two sites.\n\n"
        f"| case | seconds a round | {' | '.join(PROGRAMS)} |\n|---|---|{'---|' * len(PROGRAMS)}\n"
        + "\n".join(rows),
        "TLS, real links, more than two sites, GPUs.",
    )


if __name__ == "__main__":
    main()
