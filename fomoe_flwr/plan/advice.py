"""What to change, in sentences with numbers. Every change is planned before it is recommended.

Four kinds, in this order: memory, time, placement and routing, what is not known. Loss is counted through
plan.skip_price alone; what more local steps cost in loss is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from fomoe_flwr.config import RECOMPUTE, SKIP_PRICES, RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.placement import equal_shares
from fomoe_flwr.plan.hybridep import break_even_hit_rate, exchange_bandwidth_threshold, exchanged_step_bytes
from fomoe_flwr.plan.memory import memory_bytes
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.record import Plan, SitePlan
from fomoe_flwr.plan.rivals import possible_overlaps, some, too_small, with_strategy, with_train
from fomoe_flwr.plan.system import (
    PlanSite,
    TokenCost,
    down_bytes,
    exchange_s,
    hides_communication,
    token_cost,
    up_bytes,
)
from fomoe_flwr.units import count, in_bits, in_bytes, percent, time_span

LEAST_GAIN = 1.05  # a change is recommended from this ratio of useful tokens a second on
LEAST_WAIT = 0.05  # share of a round; a shorter wait is not mentioned
MUCH_COMMUNICATION = 0.5  # share of a round from which on something should be done about it
LITTLE_COMMUNICATION = 0.4  # share of a round to which more local steps should bring it
STEP_FACTORS = (1.5, 2.0, 3.0, 5.0, 7.5, 10.0)  # of train.local_steps; more would be another experiment
DILOCO_STEPS = 20  # recommended to those who exchange at every step
MOST_OVERLAPS = 8  # tried
ACTIVATION_BYTES = 2  # bf16

Pairs = Sequence[tuple[PlanSite, SitePlan]]


def advise(config: RunConfig, plan: Plan, sites: list[PlanSite]) -> list[str]:
    """All advice for a plan, the most urgent first."""
    pairs = list(zip(sites, plan.sites, strict=True))
    cost = token_cost(config)
    # A strategy that exchanges at every step has no local steps to share out.
    shares = plan.placement != "planned" and config.strategy.inner == "adamw"
    planned = _try(with_strategy(config, placement="planned")) if shares else None
    return [
        *_memory(config, plan, planned, sites, pairs),
        *_time(config, plan, planned),
        *_placement_and_routing(config, plan, pairs, cost),
        *_not_known(config, pairs),
    ]


# ----- memory


def _memory(
    config: RunConfig, plan: Plan, planned: Plan | None, sites: list[PlanSite], pairs: Pairs
) -> Iterator[str]:
    """Who cannot hold what, and what would fit.

    Args:
        planned: with strategy.placement=planned, if that is another plan.
    """
    small = [pair for pair in pairs if pair[1].memory_bytes > pair[0].memory_bytes]
    if not small:
        return
    site, too_much = min(small, key=lambda pair: pair[0].memory_bytes)
    holder = "it has" if len(small) == 1 else f"{site.name} has"
    remedies = [*_smaller_step(config, pairs), *_smaller_overlap(config, plan, sites)]
    if planned is not None:
        remedies.append(
            f"strategy.placement=planned gives {site.name} {_site(planned, site.name).experts_per_layer}"
        )
    yield (
        f"{some([site.name for site, _ in small])} cannot hold {experts(too_much.experts_per_layer)} a layer: "
        f"{in_bytes(too_much.memory_bytes)}, of which {in_bytes(too_much.state_bytes)} of state, {holder} "
        f"{in_bytes(site.memory_bytes)}; " + (", ".join(remedies) or "no overlap fits")
    )


def _smaller_step(config: RunConfig, pairs: Pairs) -> Iterator[str]:
    """The least that a step must do otherwise for all to hold what they are given: more pieces, then more work."""
    most = min(site.batch_size for site, _ in pairs)
    counts = [
        2**exponent for exponent in range(most.bit_length()) if 2**exponent > config.train.micro_batches
    ]
    levels = RECOMPUTE[RECOMPUTE.index(config.train.recompute) :]
    # Sites that are alike are looked at once.
    kinds = {
        (site.batch_size, site.device, planned.experts_per_layer, site.memory_bytes): site
        for site, planned in pairs
    }
    for level in levels:
        for pieces in (config.train.micro_batches, *counts):
            other = with_train(config, micro_batches=pieces, recompute=level)
            if all(
                memory_bytes(other, site, float(held)) <= room for (_, _, held, room), site in kinds.items()
            ):
                changed = [f"train.micro_batches={pieces}"] if pieces != config.train.micro_batches else []
                changed += [f"train.recompute={level}"] if level != config.train.recompute else []
                yield f"{' '.join(changed)} fits"
                return


def _smaller_overlap(config: RunConfig, plan: Plan, sites: list[PlanSite]) -> Iterator[str]:
    overlaps = [overlap for overlap in _fitting(config, sites) if overlap < config.overlap]
    if overlaps and plan.placement == "equal":
        yield f"strategy.overlap={overlaps[-1]} fits"


def _fitting(config: RunConfig, sites: Sequence[PlanSite]) -> list[int]:
    """The overlaps whose equal shares every site has memory for, ascending."""
    num_experts = config.model.num_experts
    counts_R = np.arange(1.0, num_experts + 1)
    rooms: dict[tuple[int, str], PlanSite] = {}
    for site in sorted(sites, key=lambda site: -site.memory_bytes):
        rooms[site.batch_size, site.device] = site
    fits_R = np.logical_and.reduce(
        [memory_bytes(config, site, counts_R) <= site.memory_bytes for site in rooms.values()]
    )
    return [
        overlap
        for overlap in possible_overlaps(len(sites), num_experts)
        if fits_R[max(equal_shares(len(sites), num_experts, overlap)) - 1]
    ]


# ----- time


def _time(config: RunConfig, plan: Plan, planned: Plan | None) -> Iterator[str]:
    """Who waits for whom, and for which link."""
    if planned is not None:
        yield from _sharing_out(config, plan, planned)
    elif plan.placement == "planned":
        yield from _more_freedom(config, plan)
    yield from _communication(config, plan)
    yield from _leaving_out(config, plan)


def _sharing_out(config: RunConfig, plan: Plan, planned: Plan) -> Iterator[str]:
    if _gain(plan, planned) >= LEAST_GAIN:
        yield (
            f"{_who_waits(plan)}: strategy.placement=planned shares the work out so that a round takes "
            f"{time_span(planned.round_s)}, {_faster(plan, planned)}, with {percent(_held(config, planned))} of "
            f"the experts at a site in the mean instead of {percent(_held(config, plan))}"
        )


def _more_freedom(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Some sites take all the steps they may, and wait."""
    ratio = 2 * config.plan.max_steps_ratio
    freer = _try(dataclasses.replace(config, plan=dataclasses.replace(config.plan, max_steps_ratio=ratio)))
    if freer is not None and _gain(plan, freer) >= LEAST_GAIN:
        most = max(site.local_steps for site in freer.sites)
        yield (
            f"{_who_waits(plan)}: plan.max_steps_ratio={ratio:g} lets sites take up to {most} local steps, "
            f"{_faster(plan, freer)}"
        )


def _who_waits(plan: Plan) -> str:
    first = min(plan.sites, key=lambda site: site.round_s)
    last = max(plan.sites, key=lambda site: site.round_s)
    if (waits_s := last.round_s - first.round_s) < LEAST_WAIT * plan.round_s:
        return f"a round takes {time_span(plan.round_s)} at every site"
    return f"{first.site} waits {time_span(waits_s)} of {time_span(plan.round_s)} for {last.site}"


def _held(config: RunConfig, plan: Plan) -> float:
    """Share of a layer's experts at a site, mean over the sites."""
    return plan.mean_residents / config.model.num_experts


def _communication(config: RunConfig, plan: Plan) -> Iterator[str]:
    """What to do where the slowest site's round is mostly its link."""
    share = communication_share(plan)
    if share < MUCH_COMMUNICATION:
        return
    slowest = max(plan.sites, key=lambda site: site.round_s)
    if remedies := [*_fewer_exchanges(config, plan), *_fewer_bytes(config, plan)]:
        yield f"communication is {percent(share)} of {slowest.site}'s round: {'; '.join(remedies)}"


def _fewer_exchanges(config: RunConfig, plan: Plan) -> Iterator[str]:
    if config.strategy.inner == "adamw":
        yield from _more_steps(config, plan)
        return
    steps = max(DILOCO_STEPS, config.train.local_steps)
    diloco = with_train(with_strategy(config, inner="adamw", outer="nesterov"), local_steps=steps)
    yield from _if_faster(f"strategy=diloco train.local_steps={steps}", plan, _try(diloco))


def _fewer_bytes(config: RunConfig, plan: Plan) -> Iterator[str]:
    whole = [key for key in ("up", "down") if getattr(config.strategy, key) == "fp32"]
    if whole:
        half = _try(with_strategy(config, **dict.fromkeys(whole, "bf16")))
        keys = " ".join(f"strategy.{key}=bf16" for key in whole)
        yield from _if_faster(f"{keys} sends half of the bytes and", plan, half)
    if config.strategy.outer == "local_adamw":
        third = _try(with_strategy(config, outer="nesterov"))
        yield from _if_faster("strategy.outer=nesterov sends a third of the bytes and", plan, third)


def _more_steps(config: RunConfig, plan: Plan) -> Iterator[str]:
    best: tuple[int, Plan] | None = None
    # Each may take the solver seconds.
    factors = STEP_FACTORS[1::2] if plan.placement == "planned" else STEP_FACTORS
    for factor in factors:
        more = math.ceil(factor * config.train.local_steps)
        planned = _try(with_train(config, local_steps=more))
        if planned is None or _gain(plan, planned) < LEAST_GAIN:
            continue
        best = (more, planned)
        if communication_share(planned) <= LITTLE_COMMUNICATION:
            break
    if best is not None:
        more, planned = best
        after = communication_share(planned)
        brings = (
            f"brings it to {percent(after)}, " if communication_share(plan) - after >= LEAST_WAIT else "does "
        )
        yield f"train.local_steps={more} {brings}{_faster(plan, planned)}"


def _leaving_out(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Whether the others would be faster without the slowest site."""
    slowest = max(plan.sites, key=lambda site: site.round_s).site
    rest = [site for site in config.federation.sites if site.name != slowest]
    if not rest or (config.strategy.overlap or 1) > len(rest) or config.plan.holders > len(rest):
        return
    federation = dataclasses.replace(config.federation, sites=rest, num_sites=len(rest))
    without = dataclasses.replace(config, federation=federation)
    other = _try(without)
    if other is not None and _gain(plan, other) >= LEAST_GAIN:
        yield f"without {slowest} (and its data) the other {len(rest)} do {_faster(plan, other)}"


def communication_share(plan: Plan) -> float:
    """Of the slowest site's round, without what its steps hide."""
    slowest = max(plan.sites, key=lambda site: site.round_s)
    return (slowest.communication_s - slowest.hidden_s) / slowest.round_s


# ----- placement and routing


def _placement_and_routing(config: RunConfig, plan: Plan, pairs: Pairs, cost: TokenCost) -> Iterator[str]:
    """Whether sites should hold more or fewer experts, and whether tokens should travel."""
    if note := groups_note(config):
        yield note
    yield from _overlap(config, plan, [site for site, _ in pairs])
    yield from _partitioned(config, plan)
    # Their formulas count every second of communication.
    counted = config.strategy.inner != "gradient" and not hides_communication(config)
    if config.strategy.routing != "partitioned" and counted:
        yield from _replica(config, pairs, cost)
        yield from _exchange(config, pairs, cost)


def groups_note(config: RunConfig) -> str | None:
    """What partitioned routing makes of a router that chooses within groups of experts."""
    hf = config.model.hf
    if not hf or config.strategy.routing != "partitioned":
        return None
    # Slow to import, as what has read model.hf was.
    from fomoe_flwr.model.stock import drops_groups

    if not drops_groups(hf):
        return None
    return (
        f"strategy.routing=partitioned: a site chooses without the groups of {hf['model_type']} (model.hf.n_group), so "
        "it trains a slightly other function than the whole model is; strategy.routing=skip keeps them"
    )


def _overlap(config: RunConfig, plan: Plan, sites: list[PlanSite]) -> Iterator[str]:
    """Another overlap that fits and does more useful work in the same time."""
    if plan.placement != "equal" or config.strategy.inner == "gradient" or too_small(plan, sites):
        return
    others = [overlap for overlap in _fitting(config, sites) if overlap != config.overlap]
    every = math.ceil(len(others) / MOST_OVERLAPS) or 1
    plans = {overlap: _try(with_strategy(config, overlap=overlap)) for overlap in others[::-every]}
    known = {overlap: planned for overlap, planned in plans.items() if planned is not None}
    if not known:
        return
    best = max(known, key=lambda overlap: known[overlap].useful_tokens_per_second)
    if _gain(plan, known[best]) >= LEAST_GAIN:
        yield (
            f"strategy.overlap={best} fits every site and does {_faster(plan, known[best])}, "
            f"if a skipped assignment costs plan.skip_price={config.skip_price:g} of its worth"
        )


def _partitioned(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Choosing among the experts that are held, where that teaches more than skipping the others."""
    model = config.model
    # These need the whole router at every site.
    bound = model.router != "linear" or model.locality != "off" or model.balance != "local"
    strategy = config.strategy
    if strategy.routing == "partitioned" or strategy.inner == "gradient" or config.model.standins or bound:
        return
    other = _try(with_strategy(config, routing="partitioned"))
    if other is not None and _gain(plan, other) >= LEAST_GAIN:
        yield (
            f"strategy.routing=partitioned does {_faster(plan, other)}: a token counts up to "
            f"{percent(SKIP_PRICES['partitioned'])} less where its experts are not held, and not "
            f"{percent(config.skip_price)}"
        )


def _replica(config: RunConfig, pairs: Pairs, cost: TokenCost) -> Iterator[str]:
    """Sites that had better hold every expert if skipping teaches nothing (`break_even_hit_rate`)."""
    every = config.model.num_experts
    below = {}
    for site, planned in pairs:
        # Where memory is not given nobody knows what fits.
        if planned.resident_share == 1 or math.isinf(site.memory_bytes):
            continue
        if memory_bytes(config, site, float(every)) <= site.memory_bytes:
            needed = break_even_hit_rate(
                shard_sync_s=planned.communication_s,
                replica_sync_s=exchange_s(site, down_bytes(config, every), up_bytes(config, every)),
                dense_round_s=_dense_round_s(site, planned, cost),
            )
            if planned.resident_share < needed:
                below[site.name] = (needed, planned)
    if not below:
        return
    name, (needed, planned) = max(below.items(), key=lambda item: item[1][0] - item[1][1].resident_share)
    priced = dataclasses.replace(config.plan, skip_price=1.0)
    other = _try(dataclasses.replace(with_strategy(config, placement="planned"), plan=priced))
    if other is not None and (more := _site(other, name).experts_per_layer) > planned.experts_per_layer:
        yield (
            f"{some(list(below))} would learn faster with every expert if skipped assignments taught nothing: at "
            f"{name} {percent(planned.resident_share)} of the router's choices are held, the break-even is "
            f"{percent(needed)}; "
            f"strategy.placement=planned plan.skip_price=1 gives it {experts(more)} a layer instead of "
            f"{planned.experts_per_layer}"
        )


def _dense_round_s(site: PlanSite, planned: SitePlan, cost: TokenCost) -> float:
    """Compute of a round outside the experts, in skip mode."""
    return planned.tokens * (cost.dense_s + cost.router_s) / site.speed


def _exchange(config: RunConfig, pairs: Pairs, cost: TokenCost) -> Iterator[str]:
    """What a link must carry before tokens should travel instead of being skipped (HybridEP)."""
    reach = _reach_bytes_per_s([site for site, _ in pairs])
    needs = {
        site.name: _exchange_bytes_per_s(config, site, planned, cost)
        for site, planned in pairs
        if planned.resident_share < 1
    }
    if not needs:
        return
    name, needed = min(needs.items(), key=lambda item: item[1] / reach[item[0]])
    if needed > reach[name]:
        yield (
            f"tokens stay home: exchanging them with other sites instead of skipping them would pay from "
            f"{in_bits(needed)} on, and {name} has {in_bits(reach[name])} to the best of them"
        )


def _reach_bytes_per_s(sites: Sequence[PlanSite]) -> dict[str, float]:
    """What each site has to the one with the best link of the others, both ways; kind to the exchange."""
    links = {site.name: min(site.down_bytes_per_s, site.up_bytes_per_s) for site in sites}
    *_, second, best = sorted([0.0, *links.values()])
    return {name: min(link, second if link == best else best) for name, link in links.items()}


def _exchange_bytes_per_s(config: RunConfig, site: PlanSite, planned: SitePlan, cost: TokenCost) -> float:
    model = config.model
    step_bytes = exchanged_step_bytes(
        num_layers=model.num_layers,
        step_tokens=site.step_tokens,
        top_k=model.top_k,
        d_model=model.d_model,
        activation_bytes=ACTIVATION_BYTES,
    )
    return exchange_bandwidth_threshold(
        hit_rate=planned.resident_share,
        exchanged_step_bytes=step_bytes,
        local_steps=planned.local_steps,
        sync_s=planned.communication_s,
        dense_step_s=_dense_round_s(site, planned, cost) / planned.local_steps,
    )


# ----- what is not known


def _not_known(config: RunConfig, pairs: Pairs) -> Iterator[str]:
    """What the plan assumes because nobody said."""
    federation, plan = config.federation.sites, config.plan
    fields = {
        "up_mbps": [site.name for site in federation if site.up_mbps is None],
        "down_mbps": [site.name for site in federation if site.down_mbps is None],
        "latency_ms": [site.name for site in federation if site.latency_ms is None],
    }
    if all(len(names) == len(federation) for names in fields.values()):
        yield (
            f"links are not given: {plan.assumed_mbps:g} Mbit/s and {plan.assumed_latency_ms:g} ms are assumed "
            "(plan.assumed_mbps, plan.assumed_latency_ms; or up_mbps, down_mbps and latency_ms of each site)"
        )
    else:
        for field, names in fields.items():
            key = "assumed_latency_ms" if field == "latency_ms" else "assumed_mbps"
            if names:
                yield f"{field} of {some(names)} is not given: {getattr(plan, key):g} is assumed (plan.{key})"
    if unknown := [(site, planned) for site, planned in pairs if math.isinf(site.memory_bytes)]:
        most = max(planned.memory_bytes for _, planned in unknown)
        whose = "each site" if len(unknown) == len(pairs) else some([site.name for site, _ in unknown])
        yield f"memory_gib of {whose} is not given: up to {in_bytes(most)} are taken to fit"
    if plan.measured is None:
        yield (
            f"compute is modelled (plan.tflops={plan.tflops:g}, plan.mfu={plan.mfu:g}): plan.measured=RUN_DIR uses a "
            "run's own speeds"
        )


# ----- words


def experts(number: int) -> str:
    """`1 expert`, `8 experts`."""
    return "1 expert" if number == 1 else f"{number} experts"


def _faster(plan: Plan, other: Plan) -> str:
    before, after = plan.useful_tokens_per_second, other.useful_tokens_per_second
    return f"{count(after)} useful tokens/s instead of {count(before)}"


def _if_faster(says: str, plan: Plan, other: Plan | None) -> Iterator[str]:
    if other is not None and _gain(plan, other) >= LEAST_GAIN:
        yield f"{says} does {_faster(plan, other)}"


def _site(plan: Plan, name: str) -> SitePlan:
    return next(site for site in plan.sites if site.site == name)


def _gain(plan: Plan, other: Plan) -> float:
    return other.useful_tokens_per_second / plan.useful_tokens_per_second


def _try(config: RunConfig) -> Plan | None:
    try:
        return make_plan(config)
    except ConfigError:
        # What cannot be planned is not recommended.
        return None
