"""The plan in force (strategy.placement=planned): made anew when sites leave, return, or ask for other experts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.config import ModelConfig, RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.load import Shares, averaged
from fomoe_flwr.placement import from_residents
from fomoe_flwr.plan.planner import held_share, make_plan, plan_placement
from fomoe_flwr.plan.record import Plan
from fomoe_flwr.plan.replan import replan
from strategies.round import SiteResult

log = logging.getLogger("fomoe")


class LivingPlan:
    """Who holds what and takes how many steps, from round to round.

    Args:
        plan: to begin with; None: it is made here.
    """

    def __init__(self, config: RunConfig, plan: Plan | None) -> None:
        self._config = config
        self.plan = plan or make_plan(config)
        self.placement = plan_placement(config, self.plan)
        self._seen: list[int] = []  # sites of the round before, where they are not the plan's
        # Shares of each site's assignments, ghosts too: what its tokens ask for. Empty where no plan goes by it.
        self._demand: dict[str, Shares] = {}

    def model(self, site: int) -> ModelConfig:
        """The model as this site is told of it: with a share of its own for its residents, if they are preferred."""
        model, residents = self._config.model, self.plan.sites[site].experts_per_layer
        if self._config.strategy.placement != "planned" or model.locality != "bias":
            return model
        return dataclasses.replace(model, locality_target=held_share(self._config, residents))

    def follow(self, round_: int, alive: list[int], at_once: bool) -> None:
        """A new plan before this round, if there is reason for one and it pays for itself.

        One reason is that other sites are there than it was made for, for the second time: a site that misses one
        round is no reason to move experts. The other, every plan.demand_every rounds, is what the tokens ask for.

        Args:
            alive: the sites that are there.
            at_once: without waiting for the second time, because somebody must take an expert that nobody holds.
        """
        planned = [index for index, site in enumerate(self.plan.sites) if site.experts_per_layer]
        again, self._seen = alive == self._seen, alive
        every = self._config.plan.demand_every
        shifted = bool(self._demand) and every > 0 and (round_ - 1) % every == 0
        if not (shifted if alive == planned else again or at_once):
            return
        rounds_left = max(self._config.train.rounds - round_ + 1, 1)
        try:
            new = replan(self._config, self.plan, self.placement, alive, rounds_left, self._demand_by_site())
        except ConfigError as error:
            log.warning("round %d: the plan stays as it is: %s", round_, error)
            return
        if new is not None:
            self.plan, self.placement = new.plan, new.placement
            log.info("round %d: a new plan for %d sites, %d experts move", round_, len(alive), new.moved)

    def heard(self, results: Collection[SiteResult]) -> None:
        """What these sites' routers chose in a round."""
        strategy, plan = self._config.strategy, self._config.plan
        if plan.policy not in ("solver", "affine") or not plan.demand_every or strategy.routing != "skip":
            return
        for result in results:
            if shares := averaged(self._demand.get(result.site), result.load_LE):
                self._demand[result.site] = shares

    def _demand_by_site(self) -> NDArray[np.float64] | None:
        """Shares demand_MLE; all experts alike at a site that was not heard of."""
        if not self._demand:
            return None
        model = self._config.model
        alike = np.full((model.num_layers, model.num_experts), 1 / model.num_experts)
        sites = self._config.federation.sites
        return np.array([self._demand.get(site.name, alike) for site in sites], dtype=np.float64)

    def memory(self) -> dict[str, Any]:
        """What `load` needs to go on as if nothing had happened; JSON values."""
        return {"plan": self.plan.to_dict(), "demand": self._demand}

    def load(self, memory: Mapping[str, Any], residents: list[list[list[int]]]) -> None:
        """Take over what `memory` gave, and who held what then."""
        self.plan, self._demand = Plan.from_dict(memory["plan"]), dict(memory["demand"])
        self.placement = from_residents(residents, self._config.model.num_experts)
