"""From a run's configuration to its plan: who holds how much, takes how many steps, and when each is done."""

from __future__ import annotations

import numpy as np

from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.placement import Placement, draw_placement
from fomoe_flwr.plan.cost import TokenCost, token_cost
from fomoe_flwr.plan.record import Plan, SitePlan
from fomoe_flwr.plan.sites import BYTES_A_GIB, PlanSite, plan_sites
from fomoe_flwr.plan.solver import Floats, Ints, Options, finish_s, place_in_circle, solve, useful_tokens
from fomoe_flwr.plan.system import Split, split_parameters, star_bytes, state_bytes, transfer_s
from fomoe_flwr.plan.traffic import BYTES_PER_NUMBER, copies_sent


def make_plan(config: RunConfig, policy: str | None = None, cost: TokenCost | None = None) -> Plan:
    """The plan of the run that this configuration describes.

    Args:
        policy: another one than the configuration's.
        cost: `token_cost` of the configuration, for who has it already (it may have to read a run).

    Raises:
        ConfigError: a site on which no expert fits, or which constraint cannot be met.
    """
    if policy is None:
        policy = config.plan.policy if config.strategy.placement == "planned" else "equal"
    sites = plan_sites(config)
    options = site_options(config, sites, cost or token_cost(config))
    return describe(config, policy, sites, options, *choose(config, policy, options))


def choose(config: RunConfig, policy: str, options: Options) -> tuple[Ints, Ints]:
    """How many experts a layer each site holds and how many local steps it takes: residents_M, steps_M.

    Raises:
        ConfigError: which constraint cannot be met.
    """
    if policy == "solver":
        choice = solve(options, useful_target(config, options), config.plan.holders)
        return choice.residents_M, choice.steps_M
    residents_M = _by_memory(config, options) if policy == "memory" else _equal(config, options)
    return residents_M, np.full_like(residents_M, config.train.local_steps)


def held_share(config: RunConfig, residents: float) -> float:
    """Share of the router's choices that so many residents a layer are expected to be.

    Without locality the share of the experts that they are. model.locality_target is what a site with equal shares
    comes to, `1 - target = κ (1 - O_e/M)`; at one that holds more or less, the same part κ of what would go to ghosts
    still does (ours). More than it can choose a site cannot have.
    """
    model = config.model
    share, equal = residents / model.num_experts, config.overlap / len(config.federation.sites)
    if model.locality != "bias" or model.locality_target is None or equal == 1:
        return share
    local = 1 - (1 - share) * (1 - model.locality_target) / (1 - equal)
    return max(0.0, min(local, 1.0, residents / model.top_k))


def plan_placement(config: RunConfig, plan: Plan) -> Placement:
    """Which experts the sites of a plan hold, as long as nobody knows what their tokens ask for."""
    model = config.model
    if plan.policy in ("equal", "affine"):
        return draw_placement(
            len(plan.sites), model.num_experts, config.overlap, model.num_layers, config.seed
        )
    residents_M = np.array([site.experts_per_layer for site in plan.sites])
    return place_in_circle(residents_M, model.num_layers, model.num_experts, config.seed)


def site_options(config: RunConfig, sites: list[PlanSite], cost: TokenCost) -> Options:
    """What each site could do with 1 to N_e residents a layer.

    Raises:
        ConfigError: a site on which no expert fits.
    """
    model, strategy, plan = config.model, config.strategy, config.plan
    split = split_parameters(model, strategy.routing)
    width = BYTES_PER_NUMBER[strategy.wire_dtype]
    counts = range(1, model.num_experts + 1)
    held_R = np.array([split.held(model.num_layers * count) for count in counts])
    memory_R = state_bytes(held_R, plan.bytes_per_parameter)  # type: ignore[arg-type]
    token_s_R = np.array([cost.seconds(model, strategy.routing, count) for count in counts])
    share_R = np.array([held_share(config, count) for count in counts])
    worth_R = 1 - config.skip_price * (1 - share_R)
    shape = (len(sites), model.num_experts)
    fits, step_s, communication_s = np.zeros(shape, bool), np.zeros(shape), np.zeros(shape)
    for row, site in enumerate(sites):
        fits[row] = memory_R <= site.memory_bytes
        if not fits[row, 0]:
            raise ConfigError(_no_expert_fits(site, split, model.num_layers, plan.bytes_per_parameter))
        step_s[row] = token_s_R * site.step_tokens / site.speed
        one_way = star_bytes(held_R, width, copies_sent(strategy))  # type: ignore[arg-type]
        communication_s[row] = transfer_s(one_way, site.down_bytes_per_s, site.latency_s) + transfer_s(
            one_way, site.up_bytes_per_s, site.latency_s
        )
    return Options(
        fits_MR=fits,
        step_s_MR=step_s,
        communication_s_MR=communication_s,
        worth_MR=np.broadcast_to(worth_R, shape),
        step_tokens_M=np.array([site.step_tokens for site in sites]),
        max_steps=int(plan.max_steps_ratio * config.train.local_steps),
    )


def describe(
    config: RunConfig,
    policy: str,
    sites: list[PlanSite],
    options: Options,
    residents_M: Ints,
    steps_M: Ints,
    hit_M: Floats | None = None,
) -> Plan:
    """A choice in numbers.

    Args:
        hit_M: share of each site's choices that its residents get; None: `held_share`.
    """
    if hit_M is None:
        hit_M = np.array([held_share(config, residents) for residents in residents_M.tolist()])
    model, strategy = config.model, config.strategy
    split = split_parameters(model, strategy.routing)
    width, copies = BYTES_PER_NUMBER[strategy.wire_dtype], copies_sent(strategy)
    done_s = finish_s(options, residents_M, steps_M)
    planned = []
    for row, site in enumerate(sites):
        residents, steps = int(residents_M[row]), int(steps_M[row])
        parameters = split.held(model.num_layers * residents)
        one_way = int(star_bytes(parameters, width, copies))
        communication_s = float(options.communication_s_MR[row, residents - 1])
        planned.append(
            SitePlan(
                site=site.name,
                experts_per_layer=residents,
                local_steps=steps,
                batch_size=site.batch_size,
                tokens=steps * site.step_tokens,
                memory_bytes=state_bytes(parameters, config.plan.bytes_per_parameter),
                bytes_down=one_way,
                bytes_up=one_way,
                compute_s=float(done_s[row]) - communication_s,
                communication_s=communication_s,
                round_s=float(done_s[row]),
                resident_share=float(hit_M[row]) if config.strategy.routing == "skip" else 1.0,
            )
        )
    round_s, tokens = float(done_s.max()), sum(site.tokens for site in planned)
    useful = useful_tokens(options, residents_M, steps_M)
    return Plan(policy, tuple(planned), round_s, tokens, tokens / round_s, useful / round_s)


def useful_target(config: RunConfig, options: Options) -> float:
    """The useful work of a round with local_steps at each of these sites and each expert on `overlap` of all."""
    share = held_share(config, config.model.num_experts * config.overlap / len(config.federation.sites))
    worth = 1 - config.skip_price * (1 - share)
    return float(config.train.local_steps * options.step_tokens_M.sum() * worth)


def _equal(config: RunConfig, options: Options) -> Ints:
    """The paper's: the same number of experts at every site, whatever it costs in memory there."""
    num_sites, num_experts = len(options.step_tokens_M), config.model.num_experts
    share = -(-num_experts * config.overlap // num_sites)  # where sites have left, it may not divide
    return np.full(num_sites, min(share, num_experts), dtype=np.int64)


def _by_memory(config: RunConfig, options: Options) -> Ints:
    """As many copies as equal shares would make, in proportion to what fits at each site.

    Raises:
        ConfigError: all sites full, and still an expert without a holder.
    """
    most_M: Ints = options.fits_MR.sum(axis=1).astype(np.int64)
    wanted = min(config.model.num_experts * config.overlap, int(most_M.sum()))
    needed = config.plan.holders * config.model.num_experts
    if most_M.sum() < needed:
        raise ConfigError(
            f"plan.holders={config.plan.holders}: {needed} experts a layer must be held, and all sites' memory "
            f"together has room for {int(most_M.sum())}"
        )
    for scale in np.unique(np.outer(1 / most_M, np.arange(1, config.model.num_experts + 1))):
        residents_M: Ints = np.clip(np.floor(scale * most_M + 1e-9).astype(np.int64), 1, most_M)
        if residents_M.sum() >= max(wanted, needed):
            break
    else:
        residents_M = most_M
    return residents_M


def _no_expert_fits(site: PlanSite, split: Split, num_layers: int, bytes_per_parameter: float) -> str:
    least = state_bytes(split.held(num_layers), bytes_per_parameter) / BYTES_A_GIB
    return (
        f"federation: site {site.name} has memory_gib={site.memory_bytes / BYTES_A_GIB:.4g}, but the dense part "
        f"and one expert a layer need {least:.4g} GiB (plan.bytes_per_parameter={bytes_per_parameter:g})"
    )
