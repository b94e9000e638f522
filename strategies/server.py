"""A run, from configuration to report: what our ServerApp does around the Strategy."""

from __future__ import annotations

import dataclasses
import logging
import uuid

from flwr.serverapp import Grid
from omegaconf import OmegaConf
from rich.console import Console

from fomoe_flwr.checkpoint import Checkpoint, forget_later, resume_from
from fomoe_flwr.compose import Composed
from fomoe_flwr.config import ModelConfig, RunConfig, StrategyConfig
from fomoe_flwr.data import TokenCorpus, check_vocabulary, load_tokenizer, prepare
from fomoe_flwr.errors import CheckpointError, ConfigError
from fomoe_flwr.files import write_atomically
from fomoe_flwr.model.scaling import initial_state
from fomoe_flwr.placement import full_residents
from fomoe_flwr.plan.file import plan_for_run
from fomoe_flwr.plan.record import Plan, load_plan
from fomoe_flwr.plan.sites import BYTES_A_GIB
from fomoe_flwr.report import report
from fomoe_flwr.telemetry import Telemetry
from strategies.book import RoundBook
from strategies.fomoe import FoMoE

log = logging.getLogger("fomoe")


def run_server(grid: Grid, composed: Composed) -> None:
    """Run the federation that the configuration describes, and leave everything in its run directory.

    Raises:
        FomoeError: nothing can be trained, or the run cannot go on.
    """
    config, run_dir = composed.config, composed.run_dir
    checkpoint = resume_from(config.resume)[1] if config.resume else None
    if checkpoint is not None:
        check_resumable(checkpoint, config)
        forget_later(checkpoint)
    else:
        check_unused(composed)
    run = checkpoint.manifest["run"] if checkpoint else uuid.uuid4().hex[:12]
    corpus = open_validation(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
    write_atomically(run_dir / "config.yaml", lambda path: path.write_text(text))
    log.info("run directory: %s", run_dir)

    planned, plan = load_plan(run_dir), plan_for_run(run_dir, config)
    warn_of_memory(plan, config)
    telemetry = Telemetry(config, run_dir, run, checkpoint.manifest["metrics"] if checkpoint else None)
    book = RoundBook(composed, run, corpus, telemetry, checkpoint.manifest["tokens"] if checkpoint else 0)
    strategy = FoMoE(config, run=run, run_dir=str(run_dir), observer=book, plan=plan)
    if checkpoint is not None:
        log.info("resuming run %s after round %d", run, checkpoint.round)
        memory = checkpoint.manifest["memory"]
        if plan != planned:  # what was asked of the planner has changed since
            memory = {**memory, "plan": None}
        strategy.load(checkpoint.parameters, checkpoint.outer, checkpoint.round, memory)
    else:
        everything = full_residents(config.model.num_layers, config.model.num_experts)
        strategy.load(initial_state(config.model, everything, config.strategy.routing, config.seed))
    failed = True
    try:
        strategy.start(grid, num_rounds=config.train.rounds, timeout=config.strategy.timeout_s)
        book.conclude(strategy)
        failed = False
    finally:
        telemetry.close(failed)
    report(run_dir, Console())


def warn_of_memory(plan: Plan, config: RunConfig) -> None:
    """Say which sites are given more than they say they have; a planned placement never does."""
    for site, planned in zip(config.federation.sites, plan.sites, strict=True):
        if site.memory_gib is not None and planned.memory_bytes > site.memory_gib * BYTES_A_GIB:
            log.warning(
                "site %s: %d experts a layer need %.3g GiB, it has memory_gib=%g; fomoe plan says what fits",
                site.name,
                planned.experts_per_layer,
                planned.memory_bytes / BYTES_A_GIB,
                site.memory_gib,
            )


def check_unused(composed: Composed) -> None:
    """Refuse to begin a run where another one lives: its metrics and checkpoints would be lost.

    Raises:
        ConfigError: naming both ways out.
    """
    run_dir = composed.run_dir
    if (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists():
        raise ConfigError(
            f"hydra.run.dir={run_dir}: holds a run already; go on with it by resume={run_dir}, or choose another"
        )


def check_resumable(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to continue a checkpoint with what it cannot be continued with.

    Raises:
        CheckpointError: naming the key and both values.
    """
    saved = checkpoint.manifest["config"]
    current = dataclasses.asdict(config)
    default = {"model": ModelConfig(), "strategy": StrategyConfig()}
    fixed = [("model", key) for key in current["model"] if key not in ("experts_impl", "load_balance")]
    fixed += [("strategy", key) for key in ("routing", "outer", "overlap", "placement", "reshuffle_every")]
    for section, key in fixed:
        # A key that is newer than the checkpoint had what is now its default.
        before, now = saved[section].get(key, getattr(default[section], key)), current[section][key]
        if before != now:
            raise CheckpointError(
                f"resume={config.resume}: {section}.{key}={now}, but the checkpoint was made with {before}"
            )
    if len(saved["federation"]["sites"]) != len(config.federation.sites) or saved["seed"] != config.seed:
        raise CheckpointError(f"resume={config.resume}: other sites or another seed than the checkpoint's")


def open_validation(config: RunConfig) -> TokenCorpus | None:
    """The corpus for the server's evaluation; None where it is switched off.

    Raises:
        ConfigError, DataError: before anything starts.
    """
    check_vocabulary(load_tokenizer(config.data.tokenizer), config.model.vocab_size)
    return prepare(config.data) if config.train.eval_batches else None
