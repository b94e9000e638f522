"""A run that goes on from a checkpoint: what it may ask for differently, and what it takes along."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from fomoe_flwr.checkpoint import Checkpoint, SavedConfig, checkpoint_path, copy_checkpoint
from fomoe_flwr.config import PLANNED, ModelConfig, RunConfig, SiteConfig, StrategyConfig, TrainConfig
from fomoe_flwr.data.corpus import name_some
from fomoe_flwr.errors import CheckpointError
from fomoe_flwr.files import write_atomically
from fomoe_flwr.inputs import FREE_MODEL_KEYS, Inputs, differences, inputs_of
from fomoe_flwr.overrides import spelled
from fomoe_flwr.plan.record import NAME as PLAN
from fomoe_flwr.reading import WrongTypeError, as_type
from fomoe_flwr.records import NAME as PLACEMENTS
from fomoe_flwr.schedule import lr_schedule

log = logging.getLogger("fomoe")


def check_resumable(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to continue a checkpoint with what it cannot be continued with.

    Raises:
        CheckpointError: naming the key and both values.
    """
    asked = spelled("resume", config.resume)
    try:
        saved = as_type(SavedConfig, checkpoint.manifest["config"])
    except WrongTypeError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path}: manifest.json: config: {error}") from error
    current = dataclasses.asdict(config)
    default = {"model": ModelConfig(), "strategy": StrategyConfig()}
    fixed = [("model", key) for key in current["model"] if key not in FREE_MODEL_KEYS]
    fixed += [
        ("strategy", key) for key in ("routing", "inner", "outer", "overlap", "placement", "reshuffle_every")
    ]
    for section, key in fixed:
        # A key that is newer than the checkpoint had what is now its default.
        before, now = saved[section].get(key, getattr(default[section], key)), current[section][key]
        if key == "placement" and before in PLANNED and now in PLANNED:
            continue  # then a new plan is made
        if before != now:
            raise CheckpointError(
                f"{asked}: {section}.{key}={now}, but the checkpoint was made with {before}"
            )
    if config.train.rounds < checkpoint.round:
        raise CheckpointError(f"{asked}: train.rounds={config.train.rounds}, but {checkpoint.round} are done")
    if saved["seed"] != config.seed:
        raise CheckpointError(f"{asked}: seed={config.seed}, the checkpoint's is {saved['seed']}")
    known = {site["name"] for site in saved["federation"]["sites"]}
    named = {site.name for site in config.federation.sites}
    if known != named:
        raise CheckpointError(
            f"{asked}: federation: the checkpoint's sites are not these; only there: "
            f"{name_some(sorted(known - named)) or 'none'}; only here: {name_some(sorted(named - known)) or 'none'}"
        )


def in_saved_order(checkpoint: Checkpoint, config: RunConfig) -> list[SiteConfig]:
    """The sites as they are configured now, each in the place that its name has in the checkpoint."""
    by_name = {site.name: site for site in config.federation.sites}
    return [by_name[site["name"]] for site in checkpoint.manifest["config"]["federation"]["sites"]]


def say_of_the_schedule(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Name a learning rate that goes on otherwise than the run before would have."""
    known = {spec.name for spec in dataclasses.fields(TrainConfig)}
    saved = {key: value for key, value in checkpoint.manifest["config"]["train"].items() if key in known}
    before = TrainConfig(**saved)
    step = checkpoint.round * config.train.local_steps
    was, now = (train.lr * lr_schedule(train).factor(step) for train in (before, config.train))
    if was != now:
        log.warning(
            "%s: the learning rate of round %d is %.3g, where the run before would have had %.3g (train.lr, "
            "train.schedule, train.decay_until, train.rounds)",
            spelled("resume", config.resume), checkpoint.round + 1, now, was,
        )  # fmt: skip


def with_other_text(checkpoint: Checkpoint, config: RunConfig) -> set[str]:
    """The sites to which this command gives other text of their own: only they can say which it is."""
    before = {
        site["name"]: site.get("data_path") for site in checkpoint.manifest["config"]["federation"]["sites"]
    }
    return {site.name for site in config.federation.sites if site.data_path != before.get(site.name)}


def check_inputs(checkpoint: Checkpoint, config: RunConfig, now: Inputs, asked: Collection[str] = ()) -> bool:
    """Hold text, tokenizer and the rest against those of the checkpoint; returns whether they differ.

    What the configuration says differently was asked for, and is named in a warning. What differs although the
    configuration is the same has changed on the disk.

    Args:
        asked: keys that the command gave: a text or tokenizer that it names is taken as it is now.

    Raises:
        CheckpointError: it has.
    """
    before = checkpoint.manifest["config"]
    other_text = any(
        value != getattr(config.data, key, value)
        for key, value in before["data"].items()
        if key not in ("cache_dir", "partition", "dirichlet_alpha", "val_fraction")
    )
    other_text = other_text or not {"data", "data.source", "data.path", "data.name"}.isdisjoint(asked)
    wanted = {
        "tokenizer": before["data"].get("tokenizer") != config.data.tokenizer or "data.tokenizer" in asked,
        "corpus": other_text,
        "split": other_text,
    }
    if "inputs" not in checkpoint.manifest:
        log.warning(
            "resume=%s: the checkpoint is of an earlier version, which did not keep what it was trained on and chose "
            "other documents for validation; losses before and after cannot be compared",
            config.resume,
        )
        return True
    try:
        found = differences(inputs_of(checkpoint.manifest["inputs"]), now)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path}: manifest.json: {error}") from error
    for difference in found:
        if not wanted.get(difference.part, True):
            raise CheckpointError(
                f"{spelled('resume', config.resume)}: {difference}, under the same name; put back what it was, or "
                f"take it as it is by giving {'data.tokenizer' if difference.part == 'tokenizer' else 'data.path'} anew"
            )
        log.warning(
            "%s: %s, as was asked; losses before and after differ by it",
            spelled("resume", config.resume),
            difference,
        )
    return bool(found)


def bring_history(origin: Path, run_dir: Path, checkpoint: Checkpoint) -> None:
    """Let a run that goes on in another directory have there what is recorded of its rounds, its plan and its sites,
    and the checkpoints that it speaks of: that from which it goes on, and the best.

    What is of rounds after the checkpoint goes when the first of them is over, as in its own directory.
    """
    log.info("metrics, placements, plan, sites and checkpoint so far are copied from %s", origin)
    for name in ("metrics.jsonl", PLACEMENTS, PLAN):
        if (origin / name).exists():
            # Copied aside, and so whole or not at all.
            write_atomically(run_dir / name, functools.partial(shutil.copyfile, origin / name))
    # Of simulated sites, whose optimizers' states are in the run directory, too.
    if (origin / "sites").is_dir():
        shutil.copytree(origin / "sites", run_dir / "sites", dirs_exist_ok=True)
    # Last: from here on the run can be resumed here.
    best = checkpoint.manifest["metrics"].get("best")
    rounds = {checkpoint.round: checkpoint.path}
    if best and checkpoint_path(origin, best["round"]).is_dir():
        rounds.setdefault(best["round"], checkpoint_path(origin, best["round"]))
    for round_, path in sorted(rounds.items()):
        copy_checkpoint(path, run_dir, round_)
