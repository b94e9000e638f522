"""Placement policies: who holds which expert and takes how many local steps in a round. One registry, `POLICIES`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.config import PLANNED, ModelConfig, RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.load import Shares, averaged
from fomoe_flwr.placement import Placement, adopt, draw_for_round, draw_placement, from_residents, uncovered
from fomoe_flwr.plan.planner import make_plan, plan_placement, replan
from fomoe_flwr.plan.record import Plan
from fomoe_flwr.plan.system import held_share

log = logging.getLogger("fomoe")


class Assignment(NamedTuple):
    """A round's placement, and the local steps of each site; a site with none takes no part."""

    placement: Placement
    steps_M: tuple[int, ...]


class Policy:
    """Equal shares, drawn from the seed: once (`fixed`), or anew every T rounds (`random`). Other policies build on it.

    Only a random placement gives an expert without a connected holder to another site; a fixed one keeps it as it is.

    Args:
        plan: of the run, for the policies that go by one; None: they make it.
    """

    def __init__(self, config: RunConfig, plan: Plan | None = None) -> None:
        self._config = config

    def intended(self, round_: int) -> Assignment:
        """What a round (counted from 1) would be if all sites were there."""
        config, sites = self._config, len(self._config.federation.sites)
        placement = draw_placement(
            sites,
            config.model.num_experts,
            config.overlap,
            config.model.num_layers,
            config.seed,
            draw_for_round(config.strategy.placement, config.strategy.reshuffle_every, max(round_, 1)),
        )
        return Assignment(placement, (config.train.local_steps,) * sites)

    def for_round(self, round_: int, alive: Sequence[int]) -> Assignment:
        """What the round is with these sites. Called once a round, in order."""
        placement, steps_M = self.intended(round_)
        if self._config.strategy.placement == "random" and uncovered(placement, alive):
            log.info("round %d: experts without a connected holder are given to other sites", round_)
            placement = adopt(placement, alive)
        return Assignment(placement, steps_M)

    def holders_until(self, round_: int, placement: Placement) -> NDArray[np.int64]:
        """The last round in which each expert's holders are those of this round's placement, as far as is known; 0: no
        end is known (layers x experts).
        """
        strategy = self._config.strategy
        until_LE = np.zeros(placement.holds_LEM.shape[:2], dtype=np.int64)

        def differ(round_: int) -> NDArray[np.bool_]:
            others_LE: NDArray[np.bool_] = np.any(
                self.intended(round_).placement.holds_LEM != placement.holds_LEM, axis=2
            )
            return others_LE

        if strategy.placement == "random":
            last = (draw_for_round("random", strategy.reshuffle_every, round_) + 1) * strategy.reshuffle_every
            until_LE[differ(last + 1)] = last
        # An expert that another site holds for one that is away goes back when that site does.
        until_LE[differ(round_)] = round_
        return until_LE

    @property
    def surveys(self) -> bool:
        """Whether the sites shall say before round 1 what their text asks for (`surveyed`)."""
        return False

    def surveyed(self, loads: Mapping[str, NDArray[np.int64]]) -> None:
        """By site, what routers over all experts chose before round 1 (layers x experts, ghosts too)."""

    def heard(self, loads: Mapping[str, NDArray[np.int64]]) -> None:
        """By site, what its routers chose in a committed round (layers x experts, ghosts too)."""

    def model(self, site: int) -> ModelConfig:
        """The model's configuration with values for this site alone."""
        return self._config.model

    def memory(self) -> dict[str, Any] | None:
        """What `remember` needs to go on as if nothing had happened; JSON values."""
        return None

    def remember(self, memory: Mapping[str, Any], residents: Sequence[Sequence[Sequence[int]]]) -> None:
        """Take over what `memory` gave, and who held what then."""


class Planned(Policy):
    """By a plan of the kind that strategy.placement names, made anew when sites leave, return, or ask for others."""

    def __init__(self, config: RunConfig, plan: Plan | None = None) -> None:
        super().__init__(config)
        self.plan = plan or make_plan(config)
        self._placement = plan_placement(config, self.plan)
        self._seen: list[int] = []  # sites of the round before, where they are not the plan's
        # Shares of each site's assignments, ghosts too: what its tokens ask for. Empty where no plan goes by it.
        self._demand: dict[str, Shares] = {}

    def intended(self, round_: int) -> Assignment:
        steps_M = tuple(site.local_steps if site.experts_per_layer else 0 for site in self.plan.sites)
        return Assignment(self._placement, steps_M)

    def for_round(self, round_: int, alive: Sequence[int]) -> Assignment:
        """A new plan before this round, if there is reason for one and it pays for itself.

        One reason is that other sites are there than it was made for, for the second time (a site that misses one
        round is no reason to move experts), or that nobody holds an expert. The other, every plan.demand_every rounds,
        is what the tokens ask for.
        """
        present = list(alive)
        planned = [index for index, site in enumerate(self.plan.sites) if site.experts_per_layer]
        again, self._seen = present == self._seen, present
        every = self._config.plan.demand_every
        shifted = bool(self._demand) and every > 0 and (round_ - 1) % every == 0
        at_once = bool(uncovered(self._placement, alive))
        if shifted if present == planned else again or at_once:
            self._replan(round_, present)
        return self.intended(round_)

    def _replan(self, round_: int, present: list[int]) -> None:
        config = self._config
        rounds_left = max(config.train.rounds - round_ + 1, 1)
        if round_ == 1:
            # Nobody has moments yet, so no expert warms up because it moved.
            config = dataclasses.replace(
                config, train=dataclasses.replace(config.train, expert_warmup_steps=0)
            )
        try:
            new = replan(config, self.plan, self._placement, present, rounds_left, self._demand_by_site())
        except ConfigError as error:
            log.warning("round %d: the plan stays as it is: %s", round_, error)
            return
        if new is not None:
            self.plan, self._placement = new.plan, new.placement
            log.info("round %d: a new plan for %d sites, %d experts move", round_, len(present), new.moved)

    @property
    def _by_demand(self) -> bool:
        return self._config.strategy.placement in ("planned", "affine") and self._config.plan.demand_every > 0

    @property
    def surveys(self) -> bool:
        # Routers at random ask for nothing.
        return self._by_demand and self._config.trained_before

    def surveyed(self, loads: Mapping[str, NDArray[np.int64]]) -> None:
        self._listen(loads)

    def heard(self, loads: Mapping[str, NDArray[np.int64]]) -> None:
        # A partitioned router chooses among residents.
        if self._by_demand and self._config.strategy.routing != "partitioned":
            self._listen(loads)

    def _listen(self, loads: Mapping[str, NDArray[np.int64]]) -> None:
        for site, load_LE in loads.items():
            if shares := averaged(self._demand.get(site), load_LE):
                self._demand[site] = shares

    def _demand_by_site(self) -> NDArray[np.float64] | None:
        """Shares demand_MLE; all experts alike at a site that was not heard of."""
        if not self._demand:
            return None
        model = self._config.model
        alike = np.full((model.num_layers, model.num_experts), 1 / model.num_experts)
        sites = self._config.federation.sites
        return np.array([self._demand.get(site.name, alike) for site in sites], dtype=np.float64)

    def model(self, site: int) -> ModelConfig:
        """With a share of its own for its residents, if they are preferred."""
        model = self._config.model
        if model.locality != "bias":
            return model
        share = held_share(self._config, self.plan.sites[site].experts_per_layer)
        return dataclasses.replace(model, locality_target=share)

    def memory(self) -> dict[str, Any]:
        return {"plan": self.plan.to_dict(), "demand": self._demand}

    def remember(self, memory: Mapping[str, Any], residents: Sequence[Sequence[Sequence[int]]]) -> None:
        self.plan, self._demand = Plan.from_dict(memory["plan"]), dict(memory["demand"])
        self._placement = from_residents(residents, self._config.model.num_experts)


# By strategy.placement.
POLICIES: dict[str, type[Policy]] = {"fixed": Policy, "random": Policy, **dict.fromkeys(PLANNED, Planned)}
