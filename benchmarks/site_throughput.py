"""Tokens per second of a site inside a federated run, against a bare loop. `python -m benchmarks.site_throughput`

Both train the same model (a site's residents) on the same batches with one thread. The federated figure is the
whole round divided by its sites: messages, building the model, K steps, saving the site's state, averaging, outer
step and checkpoint included; evaluation is off, for a bare loop has none.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import options, write_result
from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.data import TokenStream, deal_documents, prepare
from fomoe_flwr.engine.device import use_cpu
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.policies import POLICIES
from strategies.launch import launch


def bare(config: RunConfig) -> float:
    """Tokens per second of a loop of K steps that anybody would write, with PyTorch's AdamW on the stacked experts."""
    train = config.train
    corpus = prepare(config.data)
    dealt = deal_documents(corpus, config.federation.sites, config.data, config.seed, train.seq_len)
    stream = TokenStream(corpus, dealt[0], train.seq_len, config.seed)
    residents = POLICIES[config.strategy.placement](config).intended(1).placement.residents(0)
    shard = initial_state(config.model, residents, config.strategy.routing, config.seed)
    module = build(config.model, residents, config.strategy.routing, shard, "cpu").train()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    use_cpu(train.threads)  # the bare loop gets the same processor settings
    started = time.perf_counter()
    for step in range(train.local_steps):
        losses = module(stream.batch(step * train.batch_size, train.batch_size))
        (losses.cross_entropy + losses.balance).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return train.local_steps * train.batch_size * train.seq_len / (time.perf_counter() - started)


def federated(overrides: list[str], rounds: int) -> tuple[list[float], list[float]]:
    """Tokens per second by whole rounds, and by the sites' own count of their loops."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        composed = compose([*overrides, f"train.rounds={rounds}", f"hydra.run.dir={name}/run"])
        launch(composed)
        lines = [json.loads(line) for line in (Path(name) / "run/metrics.jsonl").read_text().splitlines()][1:]
    whole = [sum(site["tokens"] for site in line["sites"]) / line["seconds"]["round"] for line in lines]
    loops = [statistics.mean(site["tokens_per_second"] for site in line["sites"]) for line in lines]
    return whole, loops


def main() -> None:
    chosen = options(__doc__ or "", repeats=3)
    logging.getLogger("fomoe").setLevel(logging.WARNING)
    overrides = [
        "runtime=local", "runtime.workers=1", "train.local_steps=100", "train.eval_batches=0", "wandb.mode=disabled",
        f"train.threads={chosen.threads}", "federation.num_sites=2", "strategy.overlap=1",
    ]  # fmt: skip
    config = compose(overrides).config
    bare(config)
    pairs = []
    for _ in range(chosen.repeats):
        before, (whole, loops), after = bare(config), federated(overrides, 1), bare(config)
        pairs.append((statistics.mean([before, after]), whole[-1], loops[-1]))
    rows = [
        f"| {plain:,.0f} | {whole:,.0f} | {whole / plain:.1%} | {loop:,.0f} | {loop / plain:.1%} |"
        for plain, whole, loop in pairs
    ]
    median = statistics.median(whole / plain for plain, whole, _ in pairs)
    write_result(
        "site_throughput",
        "Tokens/s of a site in a federated run against a bare loop, K = 100",
        f"model=tiny, 2 sites with half of the experts each, {config.train.batch_size} x {config.train.seq_len} "
        f"tokens a step, fp32, runtime=local one site at a time. The bare loop runs before and after each "
        f"federated run. Median of the whole-round ratio: {median:.1%}.\n\n"
        "| bare loop | site, whole round | ratio | site, its loop alone | ratio |\n|---|---|---|---|---|\n"
        + "\n".join(rows),
        "a GPU, the simulation engine, several sites at a time.",
    )


if __name__ == "__main__":
    main()
