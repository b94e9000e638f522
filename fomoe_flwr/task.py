"""What a site is told besides tensors: its part of the configuration, resolved, as JSON in the message."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass

from fomoe_flwr.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SiteConfig,
    StrategyConfig,
    TrainConfig,
    from_dict,
)
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.load import Shares


@dataclass(frozen=True)
class SiteTask:
    """One site's work for one round."""

    run: str  # identity of the run, the same after a resume
    run_dir: str  # where the server keeps the run; a simulated site keeps its state below it
    round: int  # counted from 1
    after: int  # the last round of this site that counts: its state after that is where it begins; 0: afresh
    site: int  # position in `sites`
    residents: list[list[int]]  # experts held, one list a layer
    first_step: int  # of the run's schedule, at which the round begins
    pace: float  # steps of the schedule for each step of this site
    model: ModelConfig
    train: TrainConfig  # with this site's own local_steps and batch_size
    strategy: StrategyConfig
    data: DataConfig
    sites: list[SiteConfig]
    warmup_steps: int
    checkpoint_every: int
    keep: int  # states of earlier rounds that the server may come back to
    seed: int
    global_load: Shares | None = None  # of the federation in the rounds before, with balance=global

    @property
    def name(self) -> str:
        return self.sites[self.site].name

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SiteTask:
        """Raises ConfigError where server and site differ in version."""
        sections = {
            "model": ModelConfig,
            "train": TrainConfig,
            "strategy": StrategyConfig,
            "data": DataConfig,
        }
        try:
            values = json.loads(text)
            for key, section in sections.items():
                values[key] = from_dict(section, values[key])
            values["sites"] = [from_dict(SiteConfig, site) for site in values["sites"]]
            task = cls(**values)
            if not re.fullmatch(r"[\w-]{1,64}", task.run):  # it becomes the name of a folder at the site
                raise ValueError(f"run {task.run[:80]!r}: letters, digits, _ and -")
            return task
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"task: {error!r}; server and site differ in version") from error


def make_task(
    config: RunConfig,
    run: str,
    run_dir: str,
    round_: int,
    site: int,
    residents: list[list[int]],
    after: int,
    local_steps: int | None = None,
    global_load: Shares | None = None,
    model: ModelConfig | None = None,
) -> SiteTask:
    """The part of the configuration that a site needs in a round.

    Args:
        local_steps: of this site, if not the configuration's; the schedule of the learning rate is the run's all
            the same, so a site that takes fewer steps goes through it faster.
        global_load: of the federation, if it is known.
        model: as this site is told of it, if not the configuration's.
    """
    nominal, steps = config.train.local_steps, local_steps or config.train.local_steps
    batch_size = config.federation.sites[site].batch_size or config.train.batch_size
    return SiteTask(
        run=run,
        run_dir=run_dir,
        round=round_,
        after=after,
        site=site,
        residents=residents,
        first_step=(round_ - 1) * nominal,
        pace=nominal / steps,
        model=model or config.model,
        train=dataclasses.replace(config.train, local_steps=steps, batch_size=batch_size),
        strategy=config.strategy,
        data=config.data,
        sites=config.federation.sites,
        warmup_steps=config.warmup_steps,
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        seed=config.seed,
        global_load=global_load if config.model.balance == "global" else None,
    )
