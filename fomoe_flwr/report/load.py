"""Read a run directory: `config.yaml` and `metrics.jsonl` as typed values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fomoe_flwr.compose import from_tree, one_line
from fomoe_flwr.config import PLANNED, RunConfig
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.placement import Placement, draw_for_round, draw_placement
from fomoe_flwr.plan.planner import plan_placement
from fomoe_flwr.plan.record import Plan, load_plan
from fomoe_flwr.records import read_placements

CLASSES = ("dense", "expert", "other")  # of bytes; other is what is no tensor


@dataclass(frozen=True)
class SiteRound:
    """What one site did in one round."""

    site: str  # its name in federation.sites
    tokens: int
    bytes_down: int
    bytes_up: int
    # What the site itself reports; a ClientApp of another make may report less.
    train_loss: float | None = None
    tokens_per_second: float | None = None
    resident_share: float | None = None  # of the router's choices, those whose expert the site holds
    memory_bytes: float | None = None  # the most that its state took


ByLayer = list[float | None]


@dataclass(frozen=True)
class Routing:
    """How healthy routing was in one round; what each figure means stands in `fomoe_flwr/health.py`.

    Means over the layers, and `by_layer` under the same names; None is what was not defined.
    """

    by_layer: dict[str, ByLayer]
    load_entropy: float | None = None
    dead_experts: int | None = None  # in all layers
    agreement: float | None = None
    js_distance: float | None = None
    drift: float | None = None
    expert_similarity: float | None = None
    spike: float | None = None
    resident_share_by_layer: ByLayer | None = None
    load: list[list[int]] | None = None  # assignments, layers x experts
    residents: dict[str, ByLayer] | None = None  # site -> share of its assignments resident, by layer


@dataclass(frozen=True)
class Round:
    """A line of `metrics.jsonl`. Round 0 is the evaluation before training."""

    round: int
    tokens: int  # since the beginning, all sites
    train_loss: float | None  # nats a token
    val_loss: float | None
    val_bpb: float | None  # bits per byte of text
    bytes_down: int  # in this round, all sites
    bytes_up: int
    bytes_by_class: dict[str, int]  # by `CLASSES`; down + up
    resident_share: float | None
    seconds: float  # the whole round
    committed: bool  # False: discarded, below the quorum
    failures: dict[str, str]  # site -> why its reply is not part of the model
    refused: dict[str, str]  # site -> kind of bad reply; the others of `failures` never came
    sites: tuple[SiteRound, ...]
    virtual: dict[str, Any] | None = None  # simulated sites: the round by their own devices and links
    routing: Routing | None = None  # runs of older versions have none

    @property
    def site_bytes(self) -> float | None:
        """Bytes down + up for each site that took part; None where none did."""
        return (self.bytes_down + self.bytes_up) / len(self.sites) if self.sites else None


@dataclass(frozen=True)
class Run:
    """A run directory; `rounds` ascend and are never empty."""

    directory: Path
    config: RunConfig
    rounds: tuple[Round, ...]
    plan: Plan | None = None
    placements: dict[int, Placement] = dataclasses.field(
        default_factory=dict
    )  # by the round from which they held

    def placement(self, round_: int) -> Placement:
        """Who held what in a round, as it was recorded; of an older run, as configuration and plan have it."""
        recorded = [start for start in self.placements if start <= max(round_, 1)]
        if recorded:
            return self.placements[max(recorded)]
        config, strategy = self.config, self.config.strategy
        if strategy.placement in PLANNED and self.plan is not None:
            return plan_placement(config, self.plan)
        draw = draw_for_round(strategy.placement, strategy.reshuffle_every, max(round_, 1))
        return draw_placement(
            len(config.federation.sites),
            config.model.num_experts,
            config.overlap,
            config.model.num_layers,
            config.seed,
            draw,
        )

    def residents(self, round_: int) -> list[float]:
        """Experts a layer at each site in a round, mean over the layers."""
        held_M = self.placement(round_).holds_LEM.sum(axis=(0, 1)) / self.config.model.num_layers
        return [float(held) for held in held_M]

    @property
    def held_share(self) -> float:
        """Share of the experts that a site holds in the last round, mean over the sites."""
        return self.mean_residents / self.config.model.num_experts

    @property
    def mean_residents(self) -> float:
        """Experts a layer at a site in the last round, mean over the sites."""
        held = self.residents(self.rounds[-1].round)
        return sum(held) / len(held)


def load_run(directory: Path) -> Run:
    """Read a run that is finished, under way or cut short.

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
        # An empty tree would pass for a run with every value at its default.
        if not isinstance(tree, DictConfig) or not tree:
            raise ConfigError("empty or not a mapping")
        return from_tree(tree, saved=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except (ConfigError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error


def read_rounds(path: Path, config: RunConfig) -> tuple[Round, ...]:
    """The rounds in the order written. A half-written last line is what a crash leaves and does not count.

    Raises:
        RunError: see `load_run`.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file; the run ended before its first evaluation")
    # A crash may also cut a character in two; its line is then no JSON, as it should be.
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
        except KeyError as error:
            raise RunError(
                f"{path}, line {number}: not the metrics of a round: {error} is missing"
            ) from error
        except (TypeError, ValueError) as error:
            raise RunError(f"{path}, line {number}: not the metrics of a round: {error}") from error
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
        "routing": None if routing is None else Routing(**_known(Routing, routing)),
        "seconds": float(values["seconds"]["round"]),
        "bytes_by_class": {name: int(values["bytes_by_class"][name]) for name in CLASSES},
    }
    return Round(**_known(Round, values) | parsed)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass out of a line that may carry more."""
    return {
        spec.name: values[spec.name]
        for spec in dataclasses.fields(kind)
        if spec.name in values or spec.default is dataclasses.MISSING
    }
