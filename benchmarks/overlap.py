"""Whether sites wait, with and without a delay: `python -m benchmarks.overlap`.

Real processes of two sites, whose links to the object store are slow, with strategy.delay=0 and 1 one after the other;
and eight simulated sites with such links, by the virtual clock. Utilisation is the time in local steps over the time of
rounds, from the second on. With a delay it may be above 1, for the first steps of a round are taken before it begins.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import write_result
from benchmarks.rounds import object_store
from benchmarks.slow_link import Link, slow_links
from fomoe_flwr.compose import compose
from strategies.launch import launch
from tests.e2e.deployment import SITE_MARK, Deployment
from tests.store.servers import BUCKET, environment
from tests.strategies.helpers import metrics

SITES = ("a", "b")
COMMON = (
    "strategy.overlap=1", "strategy.routing=partitioned", "train.eval_batches=0", "checkpoint.every=0",
    "wandb.mode=disabled", "train.threads=1", "train.seq_len=64",
)  # fmt: skip


def rounds(folder: Path, mbps: float, latency_s: float, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of metrics of a run over such links."""
    links = {name: Link(mbps, latency_s) for name in SITES}

    def link_of(process: psutil.Process) -> Link | None:
        return links.get(process.environ().get(SITE_MARK, "").rpartition("-")[2])

    with ExitStack() as stack:
        port = int(stack.enter_context(object_store(folder / "s3"))["AWS_ENDPOINT_URL"].rpartition(":")[2])
        slow = stack.enter_context(slow_links(port, link_of))
        deployment = stack.enter_context(Deployment(folder, SITES, environment=environment(slow)))
        run = deployment.submit([*COMMON, *overrides, f"store=s3://{BUCKET}"], folder / "run")
        assert run.wait(1800) == 0, deployment.logs()
    lines = metrics(folder / "run")
    assert not any(line["failures"] for line in lines)
    return lines


def eight_sites(
    folder: Path, mbps: float, latency_ms: float, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """The lines of metrics of a simulation with such links, each expert at four sites."""
    federation = folder / "eight.yaml"
    federation.write_text(
        f"sites: [{{name: site, count: 8, up_mbps: {mbps}, down_mbps: {mbps}, latency_ms: {latency_ms}}}]\n"
    )
    size = (
        "runtime=local",
        f"federation={federation}",
        "strategy.overlap=4",
        f"hydra.run.dir={folder / 'run'}",
    )
    launch(compose([*COMMON, *overrides, *size]))
    return metrics(folder / "run")


def utilisation(lines: list[dict[str, Any]]) -> float:
    """Of the sites in the mean, from the second round on."""
    trained = [statistics.mean(site["seconds"] for site in line["sites"]) for line in lines[2:]]
    return sum(trained) / sum(line["seconds"]["round"] for line in lines[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs=2, default=[260, 200], help="local ones, by link")
    parser.add_argument("--simulated-steps", type=int, default=100, help="of eight sites, at 20 Mbit/s")
    parser.add_argument("--latency-ms", type=float, default=50.0)
    chosen = parser.parse_args()
    rows, simulated = [], []
    for mbps, steps in zip((20.0, 100.0), chosen.steps, strict=True):
        for delay in (0, 1):
            size = (f"train.rounds={chosen.rounds}", f"strategy.delay={delay}")
            with tempfile.TemporaryDirectory(prefix="fomoe-overlap-") as folder:
                lines = rounds(
                    Path(folder), mbps, chosen.latency_ms / 1000, (*size, f"train.local_steps={steps}")
                )
            seconds = statistics.median(line["seconds"]["round"] for line in lines[2:])
            train = statistics.median(line["seconds"]["train"] for line in lines[2:])
            rows.append(
                f"| {mbps:g} | {delay} | {steps} | {seconds:.1f} | {train:.1f} | {100 * utilisation(lines):.1f} % |"
            )
            print(rows[-1], flush=True)
            own = max(round(chosen.simulated_steps * 20 / mbps), 1)
            with tempfile.TemporaryDirectory(prefix="fomoe-overlap-") as folder:
                lines = eight_sites(
                    Path(folder), mbps, chosen.latency_ms, (*size, f"train.local_steps={own}")
                )
            seconds = statistics.median(line["virtual"]["round_s"] for line in lines[2:])
            share = statistics.median(line["virtual"]["utilisation"] for line in lines[2:])
            simulated.append(f"| {mbps:g} | {delay} | {own} | {seconds:.2f} | {100 * share:.1f} % |")
            print(simulated[-1], flush=True)
    write_result(
        "overlap",
        "Two sites behind slow links, with and without a delay",
        f"A link carries so many Mbit/s each way, {chosen.latency_ms:g} ms later; `tiny`, each expert at one site, "
        f"bf16 both ways through an object store, {chosen.rounds} rounds. Medians from the second round on.\n\n"
        "| Mbit/s | delay | local steps | seconds a round | of them local steps | utilisation |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "Eight simulated sites with such links, each expert at four of them: by the virtual clock, with measured "
        "steps.\n\n"
        "| Mbit/s | delay | local steps | seconds a round | utilisation |\n|---|---|---|---|---|\n"
        + "\n".join(simulated),
        "real links, more than two sites in real processes, GPUs.",
    )


if __name__ == "__main__":
    main()
