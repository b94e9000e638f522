"""Averaging the replies of a round: ours against Flower's own. `python -m benchmarks.aggregation`

Time is taken with the replies in memory, as Flower has them. Memory is taken in a process of its own for each
case, with replies that arrive one after the other (read from a file), as they do in a run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from benchmarks.harness import options, paired, ratio, write_result
from fomoe_flwr import wire
from fomoe_flwr.outer import OrderedFold, RunningMean

MIB = 2**20
MODEL_MIB = 208  # the 54 M-parameter proxy in fp32
TENSORS = 26


def model() -> dict[str, Tensor]:
    """Parameters of the proxy's size: one large embedding and smaller rest, made-up names."""
    generator = torch.Generator().manual_seed(0)
    rest = 10 * MIB // 4 // (TENSORS - 1)
    sizes = [MODEL_MIB * MIB // 4 - rest * (TENSORS - 1)] + [rest] * (TENSORS - 1)
    return {f"model.tensor_{i}.weight": torch.randn(n, generator=generator) for i, n in enumerate(sizes)}


def flower_records(state: dict[str, Tensor], count: int) -> list[RecordDict]:
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})
    return [
        RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1 + i})}) for i in range(count)
    ]


def ours(blobs: list[bytes]) -> dict[str, Tensor]:
    mean = RunningMean()
    for index, blob in enumerate(blobs):
        mean.add(wire.from_blobs([blob]), lambda name, w=1.0 + index: w)
    return mean.finish()


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process. Not getrusage: its peak is inherited from the parent (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(who: str, sites: int, folder: Path) -> None:
    """In a process of its own: print the peak above what stood before the first reply, in models."""
    if who == "ours":
        mean = RunningMean()
        fold = OrderedFold(
            list(range(sites)), lambda _, blobs: mean.add(wire.from_blobs(blobs), lambda name: 1.0)
        )
        forget_peak()
        before = resident_mib("VmRSS")
        for site in (
            [*range(1, sites), 0] if sites > 2 else range(sites)
        ):  # the worst order: the first comes last
            fold.add(site, [(folder / "reply").read_bytes()])
        fold.close()
        mean.finish()
    else:
        forget_peak()
        before = resident_mib("VmRSS")
        records = []
        for site in range(sites):
            state = wire.decode((folder / "reply").read_bytes())
            arrays = ArrayRecord({name: Array(np.array(tensor.numpy())) for name, tensor in state.items()})
            records.append(
                RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1 + site})})
            )
            del state
        aggregate_arrayrecords(records, "num-examples")
    print(json.dumps((resident_mib("VmHWM") - before) / MODEL_MIB))


def memory(who: str, sites: int, folder: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.aggregation", "--memory", who, str(sites), str(folder)]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    chosen = options(__doc__ or "", repeats=7)
    state = model()
    blob = wire.encode(state, torch.float32)
    blobs = [bytes(bytearray(blob)) for _ in range(4)]
    records = flower_records(state, 4)
    averaged, theirs = ours(blobs), aggregate_arrayrecords(records, "num-examples")
    for name, value in averaged.items():
        torch.testing.assert_close(value, torch.from_numpy(theirs[name].numpy().copy()), rtol=1e-5, atol=1e-6)
    del averaged, theirs
    times = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        seconds = paired(
            {"ours": lambda: ours(blobs), "flower": lambda: aggregate_arrayrecords(records, "num-examples")},
            chosen.repeats,
        )
        median = {name: statistics.median(values) for name, values in seconds.items()}
        quotient = ratio(seconds["flower"], seconds["ours"])
        times.append(f"| {threads} | {median['ours']:.3f} | {median['flower']:.3f} | {quotient} |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "reply").write_bytes(blob)
        rows = [
            f"| {sites} | {memory('ours', sites, folder):.2f} | {memory('flower', sites, folder):.2f} |"
            for sites in (2, 4, 8, 16)
        ]
    write_result(
        "aggregation",
        "Averaging 4 replies of 208 MiB, against Flower's aggregate_arrayrecords",
        f"Bytes in, mean out (fp32, {TENSORS} tensors, weights 1 to 4), seconds, median of {chosen.repeats} runs "
        "taken in turn. The server averages with PyTorch's default, all cores; Flower's is NumPy, on one.\n\n"
        "| PyTorch's threads | ours | Flower | Flower / ours |\n|---|---|---|---|\n"
        + "\n".join(times)
        + "\n\n"
        "Peak memory above the start, in models (208 MiB), replies arriving one by one, for ours in the worst order "
        "(the first site's reply comes last, so all others wait on disk):\n\n"
        "| sites | ours | Flower |\n|---|---|---|\n" + "\n".join(rows),
        "the outer optimizer's step, and the transport.",
    )


if __name__ == "__main__":
    main()
