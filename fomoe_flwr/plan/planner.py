"""From a run's configuration to its plan: who holds how much, takes how many steps, and when each is done.

A plan is made again when sites leave, come back, or ask for other experts; it then moves only what pays (ours).
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fomoe_flwr.config import PLANNED, RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.files import write_atomically
from fomoe_flwr.placement import Placement, draw_placement, equal_shares
from fomoe_flwr.plan.memory import memory_bytes, state_bytes
from fomoe_flwr.plan.record import NAME, CostSeconds, Plan, SitePlan, read_content
from fomoe_flwr.plan.solver import (
    Floats,
    Ints,
    Options,
    finish_s,
    needed_copies,
    place_by_demand,
    place_in_circle,
    solve,
    useful_tokens,
)
from fomoe_flwr.plan.system import (
    BYTES_A_GIB,
    PlanSite,
    TokenCost,
    compute_source,
    down_bytes,
    exchange_s,
    held_share,
    hides_communication,
    plan_sites,
    token_cost,
    up_bytes,
)
from fomoe_flwr.turns import takes_turns
from fomoe_flwr.units import time_span


def make_plan(config: RunConfig, cost: TokenCost | None = None) -> Plan:
    """The plan of the run that this configuration describes.

    Args:
        cost: `token_cost` of the configuration, for who has it already (it may have to read a run).

    Raises:
        ConfigError: a site on which no expert fits, or which constraint cannot be met.
    """
    sites = plan_sites(config)
    cost = cost or token_cost(config)
    options = site_options(config, sites, cost)
    plan = describe(config, sites, options, *choose(config, options))
    return dataclasses.replace(plan, token_cost_s=_as_data(cost))


def _as_data(cost: TokenCost) -> CostSeconds:
    return CostSeconds(dense_s=cost.dense_s, experts_s=cost.experts_s, router_s=cost.router_s)


def choose(config: RunConfig, options: Options) -> tuple[Ints, Ints]:
    """How many experts a layer each site holds and how many local steps it takes: residents_M, steps_M.

    Raises:
        ConfigError: which constraint cannot be met.
    """
    if config.strategy.placement == "planned":
        choice = solve(options, useful_target(config, options), config.plan.holders)
        return choice.residents_M, choice.steps_M
    by_memory = config.strategy.placement == "memory"
    residents_M = _by_memory(config, options) if by_memory else _equal(config, options)
    return residents_M, np.full_like(residents_M, config.train.local_steps)


def plan_placement(config: RunConfig, plan: Plan) -> Placement:
    """Which experts the sites of a plan hold, as long as nobody knows what their tokens ask for."""
    model = config.model
    if plan.placement in ("equal", "affine"):
        return draw_placement(
            len(plan.sites), model.num_experts, config.overlap, model.num_layers, config.seed
        )
    residents_M = np.array([site.experts_per_layer for site in plan.sites])
    return place_in_circle(residents_M, model.num_layers, model.num_experts, config.seed)


def site_options(config: RunConfig, sites: Sequence[PlanSite], cost: TokenCost) -> Options:
    """What each site could do with 1 to N_e residents a layer.

    Raises:
        ConfigError: a site on which no expert fits.
    """
    model, routing = config.model, config.strategy.routing
    counts = range(1, model.num_experts + 1)
    counts_R = np.array(counts, dtype=np.float64)
    token_s_R = np.array([cost.seconds(model, routing, count) for count in counts])
    share_R = np.array([held_share(config, count) for count in counts])
    worth_R = 1 - config.skip_price * (1 - share_R)
    least = _fewest(config)
    needs = _needs(config, sites)
    for site in sites:
        if (needed := float(needs[_kind(site)][least - 1])) > site.memory_bytes:
            state = float(state_bytes(config, float(least), site.device))
            raise ConfigError(
                f"federation: site {site.name} has memory_gib={site.memory_bytes / BYTES_A_GIB:.4g}, but the dense "
                f"part and {'one expert' if least == 1 else f'{least} experts'} a layer need "
                f"{needed / BYTES_A_GIB:.4g} GiB, {state / BYTES_A_GIB:.4g} of them for weights, gradients, moments "
                "and shard; train.micro_batches and train.recompute lessen the rest"
            )
    down_R, up_R = down_bytes(config, counts_R), up_bytes(config, counts_R)
    return Options(
        fits_MR=np.array([(needs[_kind(site)] <= site.memory_bytes) & (counts_R >= least) for site in sites]),
        step_s_MR=np.array([token_s_R * site.step_tokens / site.speed for site in sites]),
        communication_s_MR=np.array([exchange_s(site, down_R, up_R) for site in sites]),
        worth_MR=np.broadcast_to(worth_R, (len(sites), len(worth_R))),
        step_tokens_M=np.array([site.step_tokens for site in sites]),
        max_steps=int(config.plan.max_steps_ratio * config.train.local_steps),
        hides=hides_communication(config),
    )


def _kind(site: PlanSite) -> tuple[int, str]:
    """What a step's memory depends on besides the run's configuration and the residents."""
    return site.batch_size, site.device


def _needs(config: RunConfig, sites: Sequence[PlanSite]) -> dict[tuple[int, str], Floats]:
    """Memory with 1 to N_e residents a layer, by kind of site: a thousand that are alike cost no more than one."""
    counts_R = np.arange(1.0, config.model.num_experts + 1)
    kinds = {_kind(site): site for site in sites}
    return {kind: memory_bytes(config, site, counts_R) for kind, site in kinds.items()}


def _fewest(config: RunConfig) -> int:
    """Residents a layer that a site needs to choose from."""
    if not config.model.hf or config.strategy.routing != "partitioned":
        return 1
    # Slow to import, as what has read model.hf was.
    from fomoe_flwr.model.families import family_of

    return family_of(config.model.hf).fewest


def describe(
    config: RunConfig,
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
    done_s = finish_s(options, residents_M, steps_M)
    # A table of tensors is read for each of these, so once for all sites.
    held_M = residents_M.astype(np.float64)
    needs = _needs(config, sites)
    states = {device: state_bytes(config, held_M, device) for device in {site.device for site in sites}}
    down_M, up_M = down_bytes(config, held_M), up_bytes(config, held_M)
    planned = []
    for row, site in enumerate(sites):
        residents, steps = int(residents_M[row]), int(steps_M[row])
        communication_s, hidden_s = float(options.communication_s_MR[row, residents - 1]), 0.0
        if options.hides:
            hidden_s = min(steps * float(options.step_s_MR[row, residents - 1]), communication_s)
        planned.append(
            SitePlan(
                site=site.name,
                experts_per_layer=residents,
                local_steps=steps,
                batch_size=site.batch_size,
                tokens=steps * site.step_tokens,
                memory_bytes=float(needs[_kind(site)][residents - 1]),
                state_bytes=float(states[site.device][row]),
                bytes_down=int(down_M[row]),
                bytes_up=int(up_M[row]),
                compute_s=float(done_s[row]) - (communication_s - hidden_s),
                communication_s=communication_s,
                round_s=float(done_s[row]),
                resident_share=float(hit_M[row]) if config.strategy.routing != "partitioned" else 1.0,
                hidden_s=hidden_s,
            )
        )
    round_s, tokens = float(done_s.max()), sum(site.tokens for site in planned)
    useful = useful_tokens(options, residents_M, steps_M)
    placement = config.strategy.placement if config.strategy.placement in PLANNED else "equal"
    return Plan(placement, tuple(planned), round_s, tokens, tokens / round_s, useful / round_s)


def useful_target(config: RunConfig, options: Options) -> float:
    """The useful work of a round with local_steps at each of these sites and each expert on `overlap` of all."""
    share = held_share(config, config.model.num_experts * config.overlap / len(config.federation.sites))
    worth = 1 - config.skip_price * (1 - share)
    return config.train.local_steps * float(options.step_tokens_M.sum()) * worth


def _equal(config: RunConfig, options: Options) -> Ints:
    """The paper's: the same number of experts at every site, or one more, whatever it costs in memory there."""
    num_sites, num_experts = len(options.step_tokens_M), config.model.num_experts
    if num_sites == len(config.federation.sites):
        return np.array(equal_shares(num_sites, num_experts, config.overlap), dtype=np.int64)
    # Where sites have left, one more at all: then fewer experts move from site to site.
    share = -(-num_experts * config.overlap // num_sites)
    return np.full(num_sites, min(share, num_experts), dtype=np.int64)


def _by_memory(config: RunConfig, options: Options) -> Ints:
    """As many copies as equal shares would make, in proportion to what fits at each site.

    Raises:
        ConfigError: all sites full, and still an expert without a holder.
    """
    most_M = options.most_M
    wanted = min(config.model.num_experts * config.overlap, int(most_M.sum()))
    needed = needed_copies(options, config.plan.holders)
    for scale in np.unique(np.outer(1 / most_M, np.arange(1, config.model.num_experts + 1))):
        residents_M: Ints = np.clip(np.floor(scale * most_M + 1e-9).astype(np.int64), options.least_M, most_M)
        if residents_M.sum() >= max(wanted, needed):
            break
    else:
        residents_M = most_M
    return residents_M


# ----- a new plan in the middle of a run


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
    # The cost that this run's plan was made from: what plan.measured names may be gone, or be this run, which goes on.
    cost = token_cost(config) if plan.token_cost_s is None else TokenCost(**plan.token_cost_s)
    options = _rows(site_options(config, sites, cost), present)
    held = Placement(placement.holds_LEM[:, :, list(present)])
    covered = held.holds_LEM.sum(axis=2).min() >= config.plan.holders
    before_M = np.array([plan.sites[site].experts_per_layer for site in present])
    residents_M, steps_M = choose(config, options)
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
    described = describe(config, rows, options, residents_M, steps_M, hit_M)
    holds_LEM = np.zeros_like(placement.holds_LEM)
    holds_LEM[:, :, list(present)] = new.holds_LEM
    by_index = dict(zip(present, described.sites, strict=True))
    everyone = tuple(by_index.get(index, _away(site)) for index, site in enumerate(plan.sites))
    made = dataclasses.replace(described, sites=everyone, token_cost_s=_as_data(cost))
    return Replanned(made, Placement(holds_LEM), int(moved_M.sum()))


def _rows(options: Options, present: Sequence[int]) -> Options:
    rows = list(present)
    return Options(
        options.fits_MR[rows],
        options.step_s_MR[rows],
        options.communication_s_MR[rows],
        options.worth_MR[rows],
        options.step_tokens_M[rows],
        options.max_steps,
        options.hides,
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
        state_bytes=0.0,
        bytes_down=0,
        bytes_up=0,
        compute_s=0.0,
        communication_s=0.0,
        round_s=0.0,
        resident_share=0.0,
        hidden_s=0.0,
    )


# ----- the clock of a plan

FAR_OFF = 2.0  # times as long as planned, or as short


def clock_note(config: RunConfig, plan: Plan, compute_s: Mapping[str, float], run_dir: Path) -> str | None:
    """One line where a round's steps take another time than planned; None where the plan was near enough.

    It changes nothing in the run: shares and steps that went by the clock would differ between two equal runs.

    Args:
        compute_s: of a round's steps at each site that took part.
    """
    planned = {site.site: site for site in plan.sites}
    ratios = {
        name: measured / planned[name].compute_s for name, measured in compute_s.items() if measured > 0
    }
    if not ratios or 1 / FAR_OFF <= (ratio := median(ratios.values())) <= FAR_OFF:
        return None
    took_s = max if hides_communication(config) else operator.add
    round_s = max(took_s(compute_s[name], planned[name].communication_s) for name in ratios)
    off = f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.2g} times"
    measured = f"plan.measured={run_dir}"
    remedy = f"{measured} plans by what this run measured"
    if plan.placement == "planned":
        remedy = (
            f"shares and steps stay as planned; resume={run_dir} {measured} plans the rest of the run anew"
        )
    return (
        f"steps take {off} what was planned from {compute_source(config)}, so a round takes about "
        f"{time_span(round_s)} instead of {time_span(plan.round_s)}; {remedy}"
    )


# ----- plan.json


def plan_for_run(run_dir: Path, config: RunConfig) -> Plan:
    """The plan of a run, written beside its metrics; a resumed run goes on by the one it has.

    Speeds that were measured for it may be gone by then, and another plan would move experts for nothing. Only where
    what was asked of the planner has changed is there a new one.

    Raises:
        ConfigError: there is no plan for this configuration.
    """
    request = _request(config)
    if (path := run_dir / NAME).exists():
        saved = read_content(path)
        if _renewed(saved["request"], request) == request:
            return Plan.from_dict(saved["plan"])
    cost = token_cost(config)
    plan = make_plan(config, cost=cost)
    content = {"plan": plan.to_dict(), "token_cost_s": cost._asdict(), "request": request}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1)))
    return plan


def _renewed(request: Any, wanted: dict[str, Any]) -> Any:
    """What an earlier version asked for, in the keys of this one."""
    if request is None:
        return request
    if "step" not in request:
        # It counted no activations, and had 18 bytes where nothing was given.
        request["step"] = wanted["step"]
        if request["plan"].get("bytes_per_parameter") == 18.0:
            request["plan"]["bytes_per_parameter"] = wanted["plan"]["bytes_per_parameter"]
    if (policy := request["plan"].pop("policy", None)) is None:
        return request
    if request["strategy"][0] == "planned" and policy != "solver":
        request["strategy"][0] = policy
    return request


def _request(config: RunConfig) -> dict[str, Any]:
    """What a plan is made from, as JSON gives it back."""
    train, strategy = config.train, config.strategy
    request: dict[str, Any] = {
        "model": dataclasses.asdict(config.model),
        "sites": [dataclasses.asdict(site) for site in config.federation.sites],
        "plan": dataclasses.asdict(config.plan),
        "train": [train.local_steps, train.batch_size, train.seq_len],
        "step": [train.dtype, train.micro_batches, train.recompute, train.device],
        "strategy": [
            strategy.placement, strategy.overlap, strategy.routing, strategy.outer, strategy.up, strategy.down,
            strategy.density, strategy.value_bits,
        ],
    }  # fmt: skip
    if strategy.down_density is not None:
        request["down_density"] = strategy.down_density
    if strategy.delay:
        # Not otherwise: a run of an earlier version goes on by its plan.
        request["delay"] = strategy.delay
    if takes_turns(strategy):
        request["turns"] = [strategy.fragments, strategy.sole_every]
    loaded: dict[str, Any] = json.loads(json.dumps(request))
    return loaded
