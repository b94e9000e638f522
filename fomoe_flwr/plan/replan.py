"""A new plan when sites leave, come back, or ask for other experts; it moves only what pays for itself (ours)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fomoe_flwr.config import RunConfig
from fomoe_flwr.placement import Placement
from fomoe_flwr.plan.cost import token_cost
from fomoe_flwr.plan.planner import choose, describe, site_options
from fomoe_flwr.plan.record import Plan, SitePlan
from fomoe_flwr.plan.sites import plan_sites
from fomoe_flwr.plan.solver import Floats, Ints, Options, finish_s, place_by_demand, useful_tokens


@dataclass(frozen=True)
class Replanned:
    """A plan for the sites that are there; the others have no experts and no steps in it."""

    plan: Plan
    placement: Placement
    moved: int  # experts that come to a site that did not hold them


def replan(
    config: RunConfig,
    plan: Plan,
    placement: Placement,
    present: Sequence[int],
    rounds_left: int,
    demand_MLE: Floats | None = None,
) -> Replanned | None:
    """The plan for these sites, or None if going on as before does more useful work in what is left of the run.

    An expert that is new to a site begins without moments and warms up: until then half of what it learns is lost.
    That is the price of a move, `expert_warmup_steps / 2` steps of its part of the site's tokens. An expert with
    too few holders is moved whatever it costs.

    Args:
        demand_MLE: of all sites, as `place_by_demand` has it; None: all experts alike.

    Raises:
        ConfigError: the sites that are left cannot hold all experts.
    """
    sites = plan_sites(config)
    options = _rows(site_options(config, sites, token_cost(config)), present)
    held = Placement(placement.holds_LEM[:, :, list(present)])
    covered = held.holds_LEM.sum(axis=2).min() >= config.plan.holders
    before_M = np.array([plan.sites[site].experts_per_layer for site in present])
    residents_M, steps_M = choose(config, plan.policy, options)
    if demand_MLE is None:
        asked, stay = np.zeros((len(present), *placement.holds_LEM.shape[:2])), 1.0
    else:
        asked, stay = demand_MLE[list(present)], _stay(config, rounds_left)
    new = place_by_demand(residents_M, asked, config.plan.holders, held, stay)
    moved_M = (new.holds_LEM & ~held.holds_LEM).sum(axis=(0, 1))
    if covered and (before_M > 0).all():
        steps_before_M = np.array([plan.sites[site].local_steps for site in present])
        if (residents_M == before_M).all() and (steps_M == steps_before_M).all() and not moved_M.any():
            return None
        known = None if demand_MLE is None else asked
        gain = _rate(config, options, residents_M, steps_M, new, known)
        gain -= _rate(config, options, before_M, steps_before_M, held, known)
        round_s = float(finish_s(options, residents_M, steps_M).max())
        if gain * round_s * rounds_left <= _moving(config, options, moved_M):
            return None
    hit_M = None if demand_MLE is None else _hits(asked, new)
    rows = [sites[site] for site in present]
    described = describe(config, plan.policy, rows, options, residents_M, steps_M, hit_M)
    holds_LEM = np.zeros_like(placement.holds_LEM)
    holds_LEM[:, :, list(present)] = new.holds_LEM
    by_index = dict(zip(present, described.sites, strict=True))
    everyone = tuple(by_index.get(index, _away(site)) for index, site in enumerate(plan.sites))
    return Replanned(dataclasses.replace(described, sites=everyone), Placement(holds_LEM), int(moved_M.sum()))


def _rows(options: Options, present: Sequence[int]) -> Options:
    rows = list(present)
    return Options(
        options.fits_MR[rows],
        options.step_s_MR[rows],
        options.communication_s_MR[rows],
        options.worth_MR[rows],
        options.step_tokens_M[rows],
        options.max_steps,
    )


def _rate(
    config: RunConfig,
    options: Options,
    residents_M: Ints,
    steps_M: Ints,
    placement: Placement,
    demand_MLE: Floats | None,
) -> float:
    """Useful tokens a second; with demand, what a token is worth follows what the site's tokens ask for."""
    round_s = float(finish_s(options, residents_M, steps_M).max())
    if demand_MLE is None:
        return useful_tokens(options, residents_M, steps_M) / round_s
    worth_M = 1 - config.skip_price * (1 - _hits(demand_MLE, placement))
    return float((steps_M * options.step_tokens_M * worth_M).sum()) / round_s


def _hits(demand_MLE: Floats, placement: Placement) -> Floats:
    """Share of each site's assignments whose expert it holds."""
    hit_M: Floats = np.einsum("mle,lem->m", demand_MLE, placement.holds_LEM / demand_MLE.shape[1])
    return hit_M


def _stay(config: RunConfig, rounds_left: int) -> float:
    """What keeping an expert is worth, as a share of a site's assignments: its warm-up over what is left."""
    steps_left = max(rounds_left, 1) * config.train.local_steps
    return config.train.expert_warmup_steps / 2 / steps_left / config.model.num_experts


def _moving(config: RunConfig, options: Options, moved_M: Ints) -> float:
    """Useful tokens that the moves lose."""
    part = config.skip_price / (config.model.num_layers * config.model.num_experts)
    return float((moved_M * options.step_tokens_M).sum() * config.train.expert_warmup_steps / 2 * part)


def _away(site: SitePlan) -> SitePlan:
    return dataclasses.replace(
        site,
        experts_per_layer=0,
        tokens=0,
        memory_bytes=0.0,
        bytes_down=0,
        bytes_up=0,
        compute_s=0.0,
        communication_s=0.0,
        round_s=0.0,
        resident_share=0.0,
    )
