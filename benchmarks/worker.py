"""What a worker that lives between messages saves a site. `python -m benchmarks.worker`

As in a deployment, each message gets a new process. It either hands its message to the site's worker (which is there
already: warm; or must be started: cold), or does the work itself, as it would have to without a worker. Taken is the
time from the start of that process to its end, less the time of the one training step: what stands before the
first step and after the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.harness import EMPTY, HUNDRED, write_result
from fomoe_flwr.site.identity import node_settings

STEP = (
    "train.local_steps=1",
    "train.batch_size=1",
    "train.seq_len=32",
    "strategy.overlap=1",
    "federation.num_sites=2",
)
NODE = {"site": "site-0"}


def do_message(folder: Path, way: str, round_: int) -> None:
    """In a process of its own: one message, handed over or worked on right here."""
    settings = node_settings({**NODE, "state-dir": str(folder / "state")})
    task = json.loads((folder / "task.json").read_text()) | {"round": round_, "counted_round": round_ - 1}
    blobs = {path.name: path.read_bytes() for path in sorted((folder / "bundles").iterdir())}
    if way == "relay":
        from clients.relay import hand_over

        header = hand_over("train", json.dumps(task), blobs.items(), settings, 600.0).header
    else:
        from fomoe_flwr.site.memory import Memory
        from fomoe_flwr.site.work import perform

        _, reply = perform("train", json.dumps(task), blobs, settings, Memory(), lambda phase: None)
        header = reply.to_json()
    print(json.dumps(json.loads(header)["metrics"]))


def prepare(folder: Path, overrides: Sequence[str]) -> int:
    """The message that a server would send, as files; the bytes of its bundles."""
    from fomoe_flwr.compose import compose
    from fomoe_flwr.model.build import initial_state
    from tests.clients.helpers import bundled, task_of

    config = compose([*overrides, *STEP, f"data.cache_dir={folder / 'cache'}"]).config
    task = task_of(config, 0)
    (folder / "task.json").write_text(json.dumps(dataclasses.asdict(task)))
    (folder / "bundles").mkdir()
    shard = initial_state(config.model, task.residents, config.strategy.routing, config.seed)
    size = 0
    for key, blob in bundled(shard, config).items():
        (folder / "bundles" / key).write_bytes(blob)
        size += len(blob)
    return size


def message(folder: Path, way: str, round_: int) -> float:
    """Seconds of a message, without the training step."""
    command = [sys.executable, "-m", "benchmarks.worker", "--message", str(folder), way, str(round_)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken = time.perf_counter() - started
    return taken - float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def end_workers(folder: Path) -> None:
    from fomoe_flwr.deploy.processes import Marked, end_marked

    end_marked(Marked("FOMOE_BENCHMARK", str(folder)))


def measure(overrides: Sequence[str], repeats: int) -> tuple[int, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory(prefix="fomoe-worker-") as name:
        folder = Path(name)
        os.environ["FOMOE_BENCHMARK"] = name
        size = prepare(folder, overrides)
        seconds: dict[str, list[float]] = {"alone": [], "cold": [], "warm": []}
        message(folder, "here", 1)  # prepares the data
        round_ = 1
        try:
            for _ in range(repeats):
                for way in ("alone", "cold", "warm"):
                    round_ += 1
                    if way == "cold":
                        end_workers(folder)
                    seconds[way].append(message(folder, "here" if way == "alone" else "relay", round_))
        finally:
            with suppress(OSError):
                end_workers(folder)
    return size, seconds


def main() -> None:
    if sys.argv[1:2] == ["--message"]:
        do_message(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows = []
    for overrides in (EMPTY, HUNDRED):
        size, seconds = measure(overrides, repeats)
        cells = " | ".join(
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for values in seconds.values()
        )
        ratio = statistics.median(seconds["alone"]) / statistics.median(seconds["warm"])
        rows.append(f"| {size / 1e6:.1f} MB | {cells} | {ratio:.1f}x |")
    write_result(
        "worker",
        "A message at a site: without a worker, with a cold one, with a warm one",
        f"Seconds from the start of the ClientApp's process to its end, less the training step; median and range of "
        f"{repeats}, taken in turn. Included: Python and Flower's imports, the hand-over, decoding, loading, digests, "
        "the optimizer's state on the disk, encoding. Half of the experts, AdamW's moments kept.\n\n"
        "| bundles (bf16) | without a worker | cold | warm | without / warm |\n|---|---|---|---|---|\n"
        + "\n".join(rows),
        "GPUs (where a cold start also builds the CUDA context), torch.compile.",
    )


if __name__ == "__main__":
    main()
