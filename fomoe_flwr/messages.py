"""What server and site tell each other besides tensors: `Task` down, `Reply` up. The only place that knows their keys.

Both travel as one JSON text, beside the tensors' bundles.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fomoe_flwr.config import (
    NAME_RULE,
    DataConfig,
    ModelConfig,
    RunConfig,
    SiteConfig,
    StrategyConfig,
    TrainConfig,
    from_dict,
    is_name,
)
from fomoe_flwr.errors import ConfigError, NotFiniteError, WireError
from fomoe_flwr.inputs import UNKNOWN, Inputs, inputs_of
from fomoe_flwr.load import Shares
from fomoe_flwr.schedule import LrSchedule, lr_schedule
from fomoe_flwr.untrusted import parse_json

STATE_LOST = "state_lost"  # a metric of a site that begins without moments, for it has lost its state
AHEAD = "ahead"  # with strategy.delay=1, a metric: 1.0 if the site's start was known before the message came
MAX_METRICS = 64  # in a reply, and characters in the name of one
MAX_HEADER = 2**26  # characters of a reply's JSON


@dataclass(frozen=True)
class Deal:
    """What a site must know of the others to work out which documents are its own: how many, not who they are.

    Only sites that share the common corpus count; one with text of its own is dealt all of that (`OWN`). Sites are
    counted in one order: those that name a domain (data.partition=domain), domain by domain, then the rest.
    """

    place: int  # of this site
    sites: int
    claims: tuple[tuple[str, int], ...] = ()  # each domain that is named, and by how many sites

    def domains(self) -> list[str | None]:
        """The domain that each site names."""
        named: list[str | None] = [domain for domain, count in self.claims for _ in range(count)]
        return named + [None] * (self.sites - len(named))


OWN = Deal(0, 1)


def has_own_text(data: DataConfig, site: SiteConfig) -> bool:
    """Whether the configuration says so; its operator may have given it some all the same (`--data-path`)."""
    return data.partition == "own" or site.data_path is not None


def deals(data: DataConfig, sites: Sequence[SiteConfig]) -> list[Deal]:
    """What each site of the federation is told of the deal."""
    sharing = [index for index, site in enumerate(sites) if not has_own_text(data, site)]
    claims: tuple[tuple[str, int], ...] = ()
    if data.partition == "domain":
        counts = Counter(domain for index in sharing if (domain := sites[index].domain) is not None)
        claims, rank = tuple(counts.items()), {domain: number for number, domain in enumerate(counts)}
        sharing.sort(key=lambda index: rank.get(sites[index].domain or "", len(rank)))
    dealt = {index: Deal(place, len(sharing), claims) for place, index in enumerate(sharing)}
    return [dealt.get(index, OWN) for index in range(len(sites))]


@dataclass(frozen=True)
class Task:
    """One site's work for one round: its own part of the configuration, and nothing of other sites'."""

    run: str  # identity of the run, the same after a resume
    run_dir: str  # where the server keeps the run; a simulated site keeps its state below it
    round: int  # counted from 1; 0: before the first, to say what the site's text asks for
    counted_round: (
        int  # the last one of this site whose reply is in the model: it goes on from there; 0: afresh
    )
    site: SiteConfig
    deal: Deal  # which part of the corpus is this site's
    inputs: Inputs  # what the site must find: the run's, and of text of its own what it was before
    residents: list[list[int]]  # experts held, one list a layer
    first_step: int  # of the run's schedule, at which the round begins
    lr_stride: float  # steps of the run's schedule for each step of this site
    model: ModelConfig
    train: TrainConfig  # with this site's own local_steps and batch_size
    strategy: StrategyConfig
    data: DataConfig
    schedule: LrSchedule
    checkpoint_every: int
    keep: int  # states of earlier rounds that the server may come back to
    seed: int
    global_load: Shares | None = None  # of the federation in the rounds before, with balance=global
    # With strategy.delay=1: how many sites are asked in this round, and how many of them hold each expert of
    # `residents`, one list a layer.
    asked: int = 0
    holders: list[list[int]] = field(default_factory=list)
    # Where parts of the model take turns (turns.py), one list a layer: those of `residents` that no other site holds,
    # and for each of `residents` the last round in which its holders are these, as far as is known; 0: no end is known.
    sole: list[list[int]] = field(default_factory=list)
    until: list[list[int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def moments_travel(self) -> bool:
        """Whether AdamW's moments are averaged like parameters and come and go with them (LocalAdamW)."""
        return self.strategy.outer == "local_adamw"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The inverse of `to_json`.

        Raises:
            ConfigError: server and site differ in version.
        """
        sections: dict[str, type] = {
            "model": ModelConfig,
            "train": TrainConfig,
            "strategy": StrategyConfig,
            "data": DataConfig,
            "site": SiteConfig,
            "deal": Deal,
            "schedule": LrSchedule,
        }
        try:
            values = json.loads(text)
            for key, section in sections.items():
                values[key] = from_dict(section, values[key])
            claims = tuple((str(domain), int(count)) for domain, count in values["deal"].claims)
            values["deal"] = dataclasses.replace(values["deal"], claims=claims)
            values["inputs"] = inputs_of(values["inputs"])
            task = cls(**values)
            if not re.fullmatch(r"[\w-]{1,64}", task.run):  # it becomes the name of a folder at the site
                raise ValueError(f"run {task.run[:80]!r}: letters, digits, _ and -")
            if not is_name(task.name):
                raise ValueError(f"site {task.name[:80]!r}: a name has {NAME_RULE}")
            return task
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"task: {error!r}; server and site differ in version") from error


def make_task(
    config: RunConfig,
    site: int,
    *,
    run: str,
    run_dir: str,
    round_: int,
    counted_round: int,
    deal: Deal,
    inputs: Inputs,
    residents: list[list[int]],
    local_steps: int,
    global_load: Shares | None = None,
    model: ModelConfig | None = None,
    asked: int = 0,
    holders: list[list[int]] | None = None,
    sole: list[list[int]] | None = None,
    until: list[list[int]] | None = None,
    last_round: int | None = None,
) -> Task:
    """The part of the configuration that a site needs in a round.

    Args:
        site: its place in the federation.
        local_steps: of this site. The schedule of the learning rate is the run's all the same, so a site that takes
            fewer steps goes through it faster.
        global_load: of the federation, if it is known.
        model: with values for this site alone, if not the configuration's.
        asked, holders: as in `Task`; a site is told them with strategy.delay=1 alone.
        sole, until: as in `Task`.
        last_round: of the run, where it is not train.rounds.
    """
    nominal, own = config.train.local_steps, config.federation.sites[site]
    return Task(
        run=run,
        run_dir=run_dir,
        round=round_,
        counted_round=counted_round,
        site=own,
        deal=deal,
        inputs=inputs,
        residents=residents,
        first_step=max(round_ - 1, 0) * nominal,
        lr_stride=nominal / local_steps,
        model=model or config.model,
        train=dataclasses.replace(
            config.train,
            rounds=config.train.rounds if last_round is None else last_round,
            local_steps=local_steps,
            batch_size=own.batch_size or config.train.batch_size,
        ),
        strategy=config.strategy,
        data=config.data,
        schedule=lr_schedule(config.train),
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        seed=config.seed,
        global_load=global_load if config.model.balance == "global" else None,
        asked=asked if config.strategy.delay else 0,
        holders=holders or [] if config.strategy.delay else [],
        sole=sole or [],
        until=until or [],
    )


@dataclass(frozen=True)
class Reply:
    """What a site answers besides its update. `metrics` go whole into the run's metrics.jsonl."""

    run: str
    round: int
    site: str
    num_examples: int  # tokens trained on or evaluated; the weight of the site in means
    metrics: dict[str, float]  # finite numbers by name; a new one needs no change here
    start_digests: bytes = b""  # wire.digests of what the site started from, read back from its model
    load_LE: list[list[int]] = field(
        default_factory=list
    )  # choices of its routers, ghosts too; empty: not said
    bundle_digests: dict[str, str] = field(default_factory=dict)  # SHA-256 (hex) of each bundle, by key
    inputs: Inputs = UNKNOWN  # what the site found

    def to_json(self) -> str:
        """One text, whose length does not depend on the clock: a measured second takes as many characters as any."""
        values = dataclasses.asdict(self)
        metrics = values.pop("metrics")
        text = json.dumps({**values, "start_digests": self.start_digests.hex()}, separators=(",", ":"))
        numbers = (f"{json.dumps(key)}:{_number(value)}" for key, value in metrics.items())
        return f'{text[:-1]},"metrics":{{{",".join(numbers)}}}}}'

    @classmethod
    def from_json(cls, text: str, longest: int = MAX_HEADER) -> Reply:
        """The inverse of `to_json`, for a text that may come from anybody.

        Args:
            longest: characters that it may have.

        Raises:
            WireError: not a reply, or a figure that is no finite number.
        """
        try:
            values = parse_json(text, longest)
            values["start_digests"] = bytes.fromhex(values["start_digests"])
            values["inputs"] = inputs_of(values.get("inputs", {}))
            reply = cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"the reply's header is not one: {error!r:.200}") from error
        wanted: dict[str, type | tuple[type, ...]] = {
            "run": str, "round": int, "site": str, "num_examples": int, "metrics": dict, "load_LE": list,
            "bundle_digests": dict,
        }  # fmt: skip
        for key, kind in wanted.items():
            value: Any = getattr(reply, key)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise WireError(f"the reply's {key} is a {type(value).__name__}")
        if len(reply.metrics) > MAX_METRICS or any(len(key) > MAX_METRICS for key in reply.metrics):
            raise WireError(
                f"the reply has {len(reply.metrics)} metrics or long names; at most {MAX_METRICS}"
            )
        for key, value in reply.metrics.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            # Not isfinite, which some integers overflow.
            if not number or not abs(value) <= sys.float_info.max:
                raise NotFiniteError(f"metric {key!r:.80}={value!r:.80}: must be a finite number")
        return reply


def _number(value: float) -> str:
    """A float in as many characters as any other, to the last bit; what is not finite as JSON's NaN and Infinity."""
    exact = isinstance(value, int) or not math.isfinite(value)
    return json.dumps(value) if exact else format(value, ".17e")
