"""Read a run directory: `config.yaml`, `metrics.jsonl`, `placements.jsonl` and `plan.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from omegaconf import OmegaConf

from fomoe_flwr.compose import from_tree, one_line
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.inputs import UNKNOWN, Inputs, inputs_of
from fomoe_flwr.placement import Placement
from fomoe_flwr.plan.record import NAME as PLAN
from fomoe_flwr.plan.record import Plan, load_plan
from fomoe_flwr.reading import Amount, Number, as_type, read_lines, read_yaml
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
    activations_counted: float | None = None  # 1: among memory_bytes; earlier versions did not say


class _SiteClock(TypedDict):
    compute_s: Amount
    communication_s: Amount


class SiteClock(_SiteClock, total=False):
    hidden_s: Amount  # of communication, behind compute; earlier versions had none


class _Virtual(TypedDict):
    round_s: Amount
    sites: dict[str, SiteClock]


class Virtual(_Virtual, total=False):
    """Times of simulated sites, computed for their own devices and links."""

    utilisation: Amount


class _Routing(TypedDict):
    by_layer: dict[str, list[Number | None]]


class Routing(_Routing, total=False):
    """See docs/routing.md; a figure that is not defined is None."""

    load_entropy: Number | None
    dead_experts: Number | None
    agreement: Number | None
    js_distance: Number | None
    drift: Number | None
    expert_similarity: Number | None
    spike: Number | None
    load: list[list[Amount]] | None
    residents: dict[str, list[Number | None]]


class _Seconds(TypedDict):
    round: Amount


class _Line(TypedDict):
    seconds: _Seconds


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
    resident_share: Number | None
    seconds: Amount  # the whole round
    committed: bool  # False: too few sites answered, so the round was discarded
    failures: dict[str, str]  # site -> why its reply is not part of the model
    refused: dict[str, str]  # site -> what was wrong with its reply; other sites in `failures` sent none
    sites: tuple[SiteRound, ...]
    virtual: Virtual | None = None
    routing: Routing | None = None
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
        RunError: `metrics.jsonl` is missing or without a whole line; `placements.jsonl` or `plan.json` cannot be read.
    """
    config = read_config(directory / "config.yaml")
    rounds = read_rounds(directory / "metrics.jsonl", config)
    names = [site.name for site in config.federation.sites]
    placements = read_placements(directory, names, config.model.num_experts)
    plan = load_plan(directory)
    if plan is not None and [site.site for site in plan.sites] != names:
        raise RunError(f"{directory / PLAN}: is of other sites than config.yaml")
    return Run(directory, config, rounds, plan, placements)


def read_config(path: Path) -> RunConfig:
    """The checked configuration of a run.

    Raises:
        ConfigError: see `load_run`.
    """
    try:
        if not path.exists():
            raise ConfigError("no such file; is this the directory of a run?")
        values = read_yaml(path, Any)
        # from_tree would take an empty file as a run with all values at their defaults.
        if not isinstance(values, dict) or not values:
            raise ConfigError("empty or not a mapping")
        return from_tree(OmegaConf.create(values), saved=True)
    except RunError as error:  # it names the file
        raise ConfigError(str(error)) from error
    # A value of another type gives all sorts of errors inside OmegaConf.
    except Exception as error:
        raise ConfigError(f"{path}: {one_line(error):.400}") from error


def read_rounds(path: Path, config: RunConfig) -> tuple[Round, ...]:
    """The rounds in ascending order, without damaged lines (`read_lines`). Of two lines of a round the later counts.

    Raises:
        RunError: see `load_run`.
    """
    if not path.exists():
        raise RunError(f"{path}: no such file; the run ended before its first evaluation")
    rounds = {
        found.round: found for found in read_lines(path, lambda line: _round(line, config), needed=True)
    }
    return tuple(rounds[number] for number in sorted(rounds))


def _round(line: Any, config: RunConfig) -> Round:
    values = as_type(_Line, line)
    found: Round = as_type(Round, {**values, "seconds": values["seconds"]["round"]})
    if found.round > config.train.rounds:
        raise ValueError(f"round {found.round} of {config.train.rounds}")
    names = {site.name for site in config.federation.sites}
    for site in found.sites:
        if site.site not in names:
            raise ValueError(f"site {site.site!r:.80} is not in config.yaml")
        if found.virtual and site.site not in found.virtual["sites"]:
            raise ValueError(f"virtual.sites.{site.site:.80} is missing")
    for name in CLASSES:
        if name not in found.bytes_by_class:
            raise ValueError(f"bytes_by_class.{name} is missing")
    _check_shapes(found.routing, config.model.num_layers, config.model.num_experts)
    # What a site reports of itself need not be a number that can be drawn.
    sites = tuple(dataclasses.replace(site, **_reported(site)) for site in found.sites)
    return dataclasses.replace(found, sites=sites, inputs=inputs_of(values.get("inputs", {})))


def _reported(site: SiteRound) -> dict[str, Any]:
    values = {
        spec.name: getattr(site, spec.name) for spec in dataclasses.fields(site) if spec.default is None
    }
    return {
        key: value if value is not None and math.isfinite(value) else None for key, value in values.items()
    }


def _check_shapes(routing: Routing | None, num_layers: int, num_experts: int) -> None:
    if routing is None:
        return
    for name in ("load_entropy", "dead_experts"):
        if name not in routing["by_layer"]:
            raise ValueError(f"routing.by_layer.{name} is missing")
    load_LE = routing.get("load")
    lengths = [
        len(values) for values in (*routing["by_layer"].values(), *routing.get("residents", {}).values())
    ]
    if load_LE is not None:
        lengths.append(len(load_LE))
    if any(length != num_layers for length in lengths):
        raise ValueError(f"routing has not {num_layers} layers everywhere")
    if any(len(load_E) != num_experts for load_E in load_LE or []):
        raise ValueError(f"routing.load has not {num_experts} experts everywhere")
