"""From the replies of a round to the new model: ours against Flower's own. `python -m benchmarks.aggregation`

Three times of ours: the mean alone with the replies in memory, as Flower has them; taking a reply in (digests,
finiteness, norm, to the inbox), which happens while others are still under way; and the commit (the mean from the
inbox and the outer step), for which the sites wait. Memory is taken in a process of its own for each case, with
replies that arrive one after the other (read from a file), as they do in a run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from benchmarks.harness import options, paired, ratio, write_result
from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.codecs import CASTS
from fomoe_flwr.codecs.cast import DIGEST_BYTES
from fomoe_flwr.config import RunConfig
from fomoe_flwr.messages import Reply
from fomoe_flwr.server.outer import Contribution, OuterOptimizer, RunningMean, commit
from fomoe_flwr.server.replies import Expected, Inbox, check_blobs, check_header, check_load

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


class Server:
    """What a server does with the replies of a round of `outer=average`."""

    def __init__(self, folder: Path, state: dict[str, Tensor], sites: int) -> None:
        self.config = RunConfig()
        settings = self.config.strategy
        settings.outer, settings.up, settings.down = "average", "fp32", "fp32"
        self.outer = OuterOptimizer(state, self.config.strategy, self.config.model, self.config.train)
        self.inbox, self.sites = Inbox(folder, CASTS["fp32"]), sites
        self.inbox.begin(1)
        self.contributions: dict[int, Contribution] = {}
        digests = dict.fromkeys(state, bytes(DIGEST_BYTES))
        shapes = {name: tensor.shape for name, tensor in state.items()}
        self.expected = Expected("run", 1, "site", digests, shapes, CASTS["fp32"], 10**9, 1, (1, 1))
        self.start = bytes(DIGEST_BYTES * len(state))

    def take_in(self, site: int, blobs: dict[str, bytes]) -> None:
        """As the server does with a good reply."""
        header = Reply("run", 1, "site", 1 + site, {}, self.start, [], self._digests(blobs)).to_json()
        reply = check_header(header, self.expected)
        checked = check_blobs(blobs, reply, self.expected)
        self.contributions[site] = Contribution(
            reply.num_examples, 1, check_load(reply, self.expected), np.ones((1, 1), bool), checked.by_name
        )
        self.inbox.put(site, header, blobs)

    def _digests(self, blobs: dict[str, bytes]) -> dict[str, str]:
        """The site's own work, so done once and not timed."""
        if not hasattr(self, "_known"):
            self._known = bundle_digests(blobs)
        return self._known

    def commit(self) -> None:
        commit(1, self.outer, self.inbox, self.config, self.contributions, {(0, 0)}, {})
        self.inbox.clear()
        self.inbox.begin(1)


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process. Not getrusage: its peak is inherited from the parent (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(who: str, sites: int, folder: Path) -> None:
    """In a process of its own: print the peak above what stood before the first reply, in models."""
    if who == "ours":
        state = model()
        server = Server(folder / "inbox", state, sites)
        forget_peak()
        before = resident_mib("VmRSS")
        for site in range(sites):
            server.take_in(site, {"all": (folder / "reply").read_bytes()})
        server.commit()
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
    parts, _ = CASTS["fp32"].encode(state, {})
    blob = wire.encode(parts)
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
        with tempfile.TemporaryDirectory() as name:
            server = Server(Path(name), model(), 4)
            steps = [step_times(server, blobs) for _ in range(chosen.repeats + 1)][1:]
        median = {name: statistics.median(values) for name, values in seconds.items()}
        taken, committed = (statistics.median(values) for values in zip(*steps, strict=True))
        quotient = ratio(seconds["flower"], seconds["ours"])
        means = f"{median['ours']:.3f} | {median['flower']:.3f} | {quotient}"
        times.append(f"| {threads} | {means} | {taken:.3f} | {committed:.3f} |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "reply").write_bytes(blob)
        rows = [
            f"| {sites} | {memory('ours', sites, folder):.2f} | {memory('flower', sites, folder):.2f} |"
            for sites in (2, 4, 8, 16)
        ]
    write_result(
        "aggregation",
        "4 replies of 208 MiB become the new model, against Flower's aggregate_arrayrecords",
        f"Bytes in, mean out (fp32, {TENSORS} tensors, weights 1 to 4), seconds, median of {chosen.repeats} runs "
        "taken in turn. The server averages with PyTorch's default, all cores; Flower's is NumPy, on one. Flower "
        "checks nothing of what it averages; 'taking one in' is our check of one reply (SHA-256, names, shapes, "
        "finiteness, norm) and its way to the disk, while others are still under way; 'commit' is the mean from the "
        "disk and the outer step (outer=average), for which the round waits.\n\n"
        "| PyTorch's threads | mean, ours | mean, Flower | Flower / ours | taking one in | commit of four |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(times) + "\n\n"
        "Peak memory above the start, in models (208 MiB), replies arriving one by one:\n\n"
        "| sites | ours, all of the above | Flower, the mean |\n|---|---|---|\n" + "\n".join(rows),
        "the transport.",
    )


def step_times(server: Server, blobs: list[bytes]) -> tuple[float, float]:
    """Seconds to take in one reply (the mean of four), and to commit four."""
    started = time.perf_counter()
    for site, blob in enumerate(blobs):
        server.take_in(site, {"all": blob})
    taken = time.perf_counter()
    server.commit()
    return (taken - started) / len(blobs), time.perf_counter() - taken


if __name__ == "__main__":
    main()
