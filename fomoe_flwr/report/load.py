"""Read a run directory: `config.yaml`, `metrics.jsonl`, `placements.jsonl` and `plan.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fomoe_flwr.compose import from_tree, one_line
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.inputs import UNKNOWN, Inputs, inputs_of
from fomoe_flwr.placement import Placement
from fomoe_flwr.plan.record import Plan, load_plan
from fomoe_flwr.records import read_placements

CLASSES = ("dense", "expert", "other")  # of bytes; "other" is everything that is not a tensor


@dataclass(frozen=True)
class SiteRound:
    """What one site did in one round."""

    site: str  # its name in federation.sites
    tokens: int
    bytes_down: int
    bytes_up: int
    # Reported by the site itself. A ClientApp that is not ours may report less.
    train_loss: float | None = None
    tokens_per_second: float | None = None
    resident_share: float | None = None  # share of the router's choices whose expert the site holds
    memory_bytes: float | None = None  # most memory that the round needed


@dataclass(frozen=True)
class Round:
    """A line of `metrics.jsonl`. Round 0 is the evaluation before training."""

    round: int
    tokens: int  # of all sites, since the beginning
    train_loss: float | None  # nats a token
    val_loss: float | None
    val_bpb: float | None  # bits per byte of text
    bytes_down: int  # of all sites, in this round
    bytes_up: int
    bytes_by_class: dict[str, int]  # by `CLASSES`; down + up
    resident_share: float | None
    seconds: float  # the whole round
    committed: bool  # False: too few sites answered, so the round was discarded
    failures: dict[str, str]  # site -> why its reply is not part of the model
    refused: dict[str, str]  # site -> what was wrong with its reply; other sites in `failures` sent none
    sites: tuple[SiteRound, ...]
    virtual: dict[str, Any] | None = None  # simulated sites: times computed for their own devices and links
    routing: dict[str, Any] | None = None  # see docs/routing.md; a figure that is not defined is None
    inputs: Inputs = UNKNOWN

    @property
    def site_bytes(self) -> float | None:
        """Bytes down + up, mean over the sites that took part; None if there were none."""
        return (self.bytes_down + self.bytes_up) / len(self.sites) if self.sites else None


@dataclass(frozen=True)
class Run:
    """A run directory. `rounds` are in ascending order; there is at least one."""

    directory: Path
    config: RunConfig
    rounds: tuple[Round, ...]
    plan: Plan | None = None
    placements: Mapping[int, Placement] = field(default_factory=dict)  # by the first round that used it

    def placement(self, round_: int) -> Placement | None:
        """Which site held which expert in a round; None if it is not recorded."""
        # Before training: what round 1 uses, if it has begun.
        recorded = [start for start in self.placements if start <= max(round_, 1)]
        return self.placements[max(recorded)] if recorded else None

    def residents(self, round_: int) -> list[float]:
        """Experts of a layer at each site in a round, mean over the layers; as planned if it is not recorded."""
        placement = self.placement(round_)
        if placement is None:
            sites = len(self.config.federation.sites)
            equal = self.config.model.num_experts * self.config.overlap / sites
            return [equal if self.plan is None else self.plan.mean_residents] * sites
        held_M = placement.holds_LEM.sum(axis=(0, 1)) / self.config.model.num_layers
        return [float(held) for held in held_M]

    @property
    def mean_residents(self) -> float:
        """Experts of a layer at a site in the last round, mean over the sites."""
        held = self.residents(self.rounds[-1].round)
        return sum(held) / len(held)

    @property
    def held_share(self) -> float:
        """Share of the experts that a site holds in the last round, mean over the sites."""
        return self.mean_residents / self.config.model.num_experts


def load_run(directory: Path) -> Run:
    """Read a run that is finished, still running or was stopped early.

    Raises:
        ConfigError: `config.yaml` is missing, empty or not a run's configuration.
        RunError: `metrics.jsonl` is missing, damaged or without a complete round; `plan.json` is damaged.
    """
    config = read_config(directory / "config.yaml")
    rounds = read_rounds(directory / "metrics.jsonl", config)
    names = [site.name for site in config.federation.sites]
    placements = read_placements(directory, names, config.model.num_experts)
    return Run(directory, config, rounds, load_plan(directory), placements)


def read_config(path: Path) -> RunConfig:
    """The checked configuration of a run.

    Raises:
        ConfigError: see `load_run`.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; is this the directory of a run?")
    try:
        tree = OmegaConf.load(path)
        # from_tree would take an empty file as a run with all values at their defaults.
        if not isinstance(tree, DictConfig) or not tree:
            raise ConfigError("empty or not a mapping")
        return from_tree(tree, saved=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except (ConfigError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error


def read_rounds(path: Path, config: RunConfig) -> tuple[Round, ...]:
    """The rounds in the order written. A crash may leave half a line at the end, which is ignored.

    Raises:
        RunError: see `load_run`.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file; the run ended before its first evaluation")
    # A crash may cut a character in two. With errors="replace" that line is not JSON, and so is ignored.
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    site_names = {site.name for site in config.federation.sites}
    rounds = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number}: not JSON: {error}") from error
        try:
            rounds.append(_round(values, site_names))
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise RunError(f"{path}, line {number}: not the metrics of a round: {what}") from error
    if not rounds:
        raise RunError(f"{path}: no complete round in it")
    return tuple(rounds)


def _round(values: dict[str, Any], site_names: Collection[str]) -> Round:
    sites = tuple(SiteRound(**_known(SiteRound, site)) for site in values["sites"])
    for site in sites:
        if site.site not in site_names:
            raise ValueError(f"site {site.site!r} is not in config.yaml")
    routing = values.get("routing")
    parsed = {
        "sites": sites,
        "routing": None if routing is None else {**routing, "by_layer": routing["by_layer"]},
        "seconds": float(values["seconds"]["round"]),
        "inputs": inputs_of(values.get("inputs", {})),
        "bytes_by_class": {name: int(values["bytes_by_class"][name]) for name in CLASSES},
    }
    return Round(**_known(Round, values) | parsed)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass. A line may have more keys, and may lack those that have a default."""
    return {
        spec.name: values[spec.name]
        for spec in dataclasses.fields(kind)
        if spec.name in values or spec.default is dataclasses.MISSING
    }
