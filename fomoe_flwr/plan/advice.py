"""What to change, in sentences with numbers. A change is planned before it is recommended: none that changes nothing.

Advice is about time, bytes and memory. Quality is in it through plan.skip_price alone, and what more local steps cost
in loss is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.model.spec import expert_parameters
from fomoe_flwr.plan.cost import TokenCost, token_cost
from fomoe_flwr.plan.hybridep import break_even_hit_rate, exchange_bandwidth_threshold, exchanged_step_bytes
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.record import Plan, SitePlan
from fomoe_flwr.plan.sites import PlanSite
from fomoe_flwr.plan.strategies import dividing_overlaps, some, too_small, with_strategy, with_train
from fomoe_flwr.plan.system import expert_work, split_parameters, star_bytes, state_bytes, transfer_s
from fomoe_flwr.plan.traffic import BYTES_PER_NUMBER, copies_sent
from fomoe_flwr.units import count, in_bits, in_bytes, percent, time_span

WORTH_SAYING = 1.05  # a gain below this is not
A_WAIT = 0.05  # share of the round; sites that wait less do not wait
MUCH = 0.5  # share of a round from which on communication is
ENOUGH = 0.4  # to which more local steps should bring it
STEP_FACTORS = (1.5, 2.0, 3.0, 5.0, 7.5, 10.0)  # of train.local_steps; more would be another experiment
DILOCO_STEPS = 20  # recommended to those who exchange at every step
MOST_OVERLAPS = 8  # tried
ACTIVATION_BYTES = 2  # bf16

Pairs = Sequence[tuple[PlanSite, SitePlan]]


def advise(config: RunConfig, plan: Plan, sites: list[PlanSite]) -> list[str]:
    """All advice for a plan, the most urgent first."""
    pairs = list(zip(sites, plan.sites, strict=True))
    cost = token_cost(config)
    # Where every step is a round there is nothing to share out.
    shares = plan.policy != "solver" and config.strategy.inner == "adamw"
    planned = _try(_with_solver(config)) if shares else None
    return [
        *_memory(config, plan, planned, sites, pairs),
        *(_waiting(config, plan) if planned is None else _sharing_out(config, plan, planned)),
        *_communication(config, plan),
        *_leaving_out(config, plan),
        *_overlap(config, plan, sites),
        *_replica(config, pairs, cost),
        *_not_given(config, pairs),
        *_modelled(config),
        *_exchange(config, pairs, cost),
        *_inside(config, pairs),
    ]


# ----- memory


def _memory(
    config: RunConfig, plan: Plan, planned: Plan | None, sites: list[PlanSite], pairs: Pairs
) -> Iterator[str]:
    """Who cannot hold what, and what would fit.

    Args:
        planned: by the solver, if that is another plan.
    """
    small = [pair for pair in pairs if pair[1].memory_bytes > pair[0].memory_bytes]
    if not small:
        return
    site, too_much = min(small, key=lambda pair: pair[0].memory_bytes)
    holder = "it has" if len(small) == 1 else f"{site.name} has"
    remedies = list(_smaller_overlap(config, plan, sites))
    if planned is not None:
        remedies.append(
            f"{_solver_keys(config)} gives {site.name} {_site(planned, site.name).experts_per_layer}"
        )
    yield (
        f"{some([site.name for site, _ in small])} cannot hold {experts(too_much.experts_per_layer)} a layer: "
        f"{in_bytes(too_much.memory_bytes)} of state, {holder} {in_bytes(site.memory_bytes)}; "
        + (", ".join(remedies) or "no overlap fits")
    )


def _smaller_overlap(config: RunConfig, plan: Plan, sites: list[PlanSite]) -> Iterator[str]:
    overlaps = [overlap for overlap in _fitting(config, sites) if overlap < config.overlap]
    if overlaps and plan.policy == "equal":
        yield f"strategy.overlap={overlaps[-1]} fits"


def _fitting(config: RunConfig, sites: list[PlanSite]) -> list[int]:
    """The overlaps whose equal shares every site has memory for, ascending."""
    model, smallest = config.model, min(site.memory_bytes for site in sites)
    split = split_parameters(model, config.strategy.routing)

    def need(overlap: int) -> float:
        held = split.held(model.num_layers * model.num_experts * overlap // len(sites))
        return state_bytes(held, config.plan.bytes_per_parameter)

    return [o for o in dividing_overlaps(len(sites), model.num_experts) if need(o) <= smallest]


# ----- time


def _sharing_out(config: RunConfig, plan: Plan, planned: Plan) -> Iterator[str]:
    """What the solver makes of the same federation."""
    if _gain(plan, planned) >= WORTH_SAYING:
        yield (
            f"{_who_waits(plan)}: {_solver_keys(config)} shares the work out so that a round takes "
            f"{time_span(planned.round_s)}, {_faster(plan, planned)}, with {percent(_held(config, planned))} of "
            f"the experts at a site in the mean instead of {percent(_held(config, plan))}"
        )


def _waiting(config: RunConfig, plan: Plan) -> Iterator[str]:
    """Sites that have taken all the steps they may, and wait."""
    if plan.policy != "solver":
        return
    ratio = 2 * config.plan.max_steps_ratio
    freer = _try(dataclasses.replace(config, plan=dataclasses.replace(config.plan, max_steps_ratio=ratio)))
    if freer is not None and _gain(plan, freer) >= WORTH_SAYING:
        yield (
            f"{_who_waits(plan)}: plan.max_steps_ratio={ratio:g} lets sites take up to {_most_steps(freer)} local "
            f"steps, {_faster(plan, freer)}"
        )


def _most_steps(plan: Plan) -> int:
    return max(site.local_steps for site in plan.sites)


def _who_waits(plan: Plan) -> str:
    first = min(plan.sites, key=lambda site: site.round_s)
    last = max(plan.sites, key=lambda site: site.round_s)
    if (waits_s := last.round_s - first.round_s) < A_WAIT * plan.round_s:
        return f"a round takes {time_span(plan.round_s)} at every site"
    return f"{first.site} waits {time_span(waits_s)} of {time_span(plan.round_s)} for {last.site}"


def _held(config: RunConfig, plan: Plan) -> float:
    """Share of a layer's experts at a site, mean over the sites."""
    return sum(site.experts_per_layer for site in plan.sites) / len(plan.sites) / config.model.num_experts


def _communication(config: RunConfig, plan: Plan) -> Iterator[str]:
    """What to do where the slowest site's round is mostly its link."""
    share = communication_share(plan)
    if share < MUCH:
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
    if config.strategy.wire_dtype == "fp32":
        half = _try(with_strategy(config, wire_dtype="bf16"))
        yield from _if_faster("strategy.wire_dtype=bf16 halves the bytes and", plan, half)
    if config.strategy.outer == "local_adamw":
        third = _try(with_strategy(config, outer="nesterov"))
        yield from _if_faster("strategy.outer=nesterov sends a third of the bytes and", plan, third)


def _more_steps(config: RunConfig, plan: Plan) -> Iterator[str]:
    best: tuple[int, Plan] | None = None
    factors = (
        STEP_FACTORS[1::2] if plan.policy == "solver" else STEP_FACTORS
    )  # each may take the solver seconds
    for factor in factors:
        more = math.ceil(factor * config.train.local_steps)
        planned = _try(with_train(config, local_steps=more))
        if planned is None or _gain(plan, planned) < WORTH_SAYING:
            continue
        best = (more, planned)
        if communication_share(planned) <= ENOUGH:
            break
    if best is not None:
        more, planned = best
        after = communication_share(planned)
        brings = (
            f"brings it to {percent(after)}, " if communication_share(plan) - after >= A_WAIT else "does "
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
    if plan.policy == "equal" and without.overlap not in dividing_overlaps(
        len(rest), config.model.num_experts
    ):
        return
    other = _try(without)
    if other is not None and _gain(plan, other) >= WORTH_SAYING:
        yield f"without {slowest} (and its data) the other {len(rest)} do {_faster(plan, other)}"


def communication_share(plan: Plan) -> float:
    """Of the slowest site's round."""
    slowest = max(plan.sites, key=lambda site: site.round_s)
    return slowest.communication_s / slowest.round_s


def _overlap(config: RunConfig, plan: Plan, sites: list[PlanSite]) -> Iterator[str]:
    """Another overlap that fits and does more useful work in the same time."""
    if plan.policy != "equal" or config.strategy.inner == "gradient" or too_small(plan, sites):
        return
    others = [overlap for overlap in _fitting(config, sites) if overlap != config.overlap]
    every = math.ceil(len(others) / MOST_OVERLAPS) or 1
    plans = {overlap: _try(with_strategy(config, overlap=overlap)) for overlap in others[::-every]}
    known = {overlap: planned for overlap, planned in plans.items() if planned is not None}
    if not known:
        return
    best = max(known, key=lambda overlap: known[overlap].useful_tokens_per_second)
    if _gain(plan, known[best]) >= WORTH_SAYING:
        yield (
            f"strategy.overlap={best} fits every site and does {_faster(plan, known[best])}, "
            f"if a skipped assignment costs plan.skip_price={config.skip_price:g} of its worth"
        )


def _replica(config: RunConfig, pairs: Pairs, cost: TokenCost) -> Iterator[str]:
    """Sites that had better hold every expert if skipping teaches nothing (`break_even_hit_rate`)."""
    if config.strategy.routing != "skip" or config.strategy.inner == "gradient":
        return
    below = {}
    for site, planned in pairs:
        # Memory that is not given says nothing about what fits.
        if planned.resident_share < 1 and _replica_state(config) <= site.memory_bytes < math.inf:
            needed = break_even_hit_rate(
                shard_sync_s=planned.communication_s,
                replica_sync_s=_replica_sync_s(config, site),
                dense_round_s=_dense_round_s(site, planned, cost),
            )
            if planned.resident_share < needed:
                below[site.name] = (needed, planned)
    if not below:
        return
    name, (needed, planned) = max(below.items(), key=lambda item: item[1][0] - item[1][1].resident_share)
    priced = dataclasses.replace(config.plan, policy="solver", skip_price=1.0)
    other = _try(dataclasses.replace(with_strategy(config, placement="planned"), plan=priced))
    if other is not None and (more := _site(other, name).experts_per_layer) > planned.experts_per_layer:
        yield (
            f"{some(list(below))} would learn faster with every expert if skipped assignments taught nothing: at "
            f"{name} {percent(planned.resident_share)} of the router's choices are held, the break-even is "
            f"{percent(needed)}; "
            f"strategy.placement=planned plan.skip_price=1 gives it {experts(more)} a layer instead of "
            f"{planned.experts_per_layer}"
        )


def _replica_state(config: RunConfig) -> float:
    return state_bytes(_all_parameters(config), config.plan.bytes_per_parameter)


def _replica_sync_s(config: RunConfig, site: PlanSite) -> float:
    width, copies = BYTES_PER_NUMBER[config.strategy.wire_dtype], copies_sent(config.strategy)
    one_way = star_bytes(_all_parameters(config), width, copies)
    return transfer_s(one_way, site.down_bytes_per_s, site.latency_s) + transfer_s(
        one_way, site.up_bytes_per_s, site.latency_s
    )


def _all_parameters(config: RunConfig) -> float:
    model = config.model
    return split_parameters(model, config.strategy.routing).held(model.num_layers * model.num_experts)


def _dense_round_s(site: PlanSite, planned: SitePlan, cost: TokenCost) -> float:
    """Compute of a round outside the experts, in skip mode."""
    return planned.tokens * (cost.dense_s + cost.router_s) / site.speed


# ----- what is not known


def _not_given(config: RunConfig, pairs: Pairs) -> Iterator[str]:
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
        yield f"memory_gib of {whose} is not given: up to {in_bytes(most)} of state is taken to fit"


def _modelled(config: RunConfig) -> Iterator[str]:
    plan = config.plan
    if plan.measured is None:
        yield (
            f"compute is modelled (plan.tflops={plan.tflops:g}, plan.mfu={plan.mfu:g}): plan.measured=RUN_DIR uses a "
            "run's own speeds"
        )


# ----- tokens or experts (HybridEP)


def _exchange(config: RunConfig, pairs: Pairs, cost: TokenCost) -> Iterator[str]:
    """Whether tokens should travel instead of being skipped (`exchange_bandwidth_threshold`)."""
    if config.strategy.routing != "skip" or config.strategy.inner == "gradient":
        return
    reach = _reach_bytes_per_s([site for site, _ in pairs])
    needs = {
        site.name: (_exchange_bytes_per_s(config, site, planned, cost), planned.resident_share)
        for site, planned in pairs
        if planned.resident_share < 1
    }
    if not needs:
        return
    name, (needed, share) = min(needs.items(), key=lambda item: item[1][0] / reach[item[0]])
    if needed > reach[name]:
        yield (
            f"tokens stay home: exchanging them with other sites instead of skipping them would pay from "
            f"{in_bits(needed)} on, and {name} has {in_bits(reach[name])} to the best of them"
        )
        return
    pays = [site for site, (least, _) in needs.items() if least <= reach[site]]
    yield (
        f"exchanging tokens instead of skipping them would pay at {some(pays)}: {name} skips {percent(1 - share)} of "
        f"its choices, needs {in_bits(needed)} and has {in_bits(reach[name])} to another site. Nothing here exchanges "
        "tokens between sites: more experts there help, or near sites that join as one"
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


def _inside(config: RunConfig, pairs: Pairs) -> Iterator[str]:
    """Whether a site with several accelerators should gather its experts at each of them."""
    site, planned = max(pairs, key=lambda pair: pair[0].speed)  # the likeliest to have several
    workers = gathering_workers(config, site, planned)
    if workers >= 2 and planned.experts_per_layer >= 2:
        yield (
            f"inside {site.name}, if it has several accelerators: with up to {workers} of them HybridEP would gather "
            f"all {planned.experts_per_layer} resident experts of a layer at each rather than exchange tokens "
            "(this program leaves that to the site)"
        )


def gathering_workers(config: RunConfig, site: PlanSite, planned: SitePlan) -> int:
    """The most accelerators G inside a site for which 2·D ≥ G·P_E (`gathers_every_expert`), whatever their links.

    D = n·k'·d·b/G bytes of tokens, of the k' choices of a token that are computed here, and P_E = R·P_e·b/G, an
    equal part of the R residents' weights: G ≤ 2·n·k'·d / (R·P_e).
    """
    model, residents = config.model, planned.experts_per_layer
    work = expert_work(config.strategy.routing, model.num_experts, model.top_k, residents, None)
    computed = site.step_tokens * model.top_k * work * model.d_model
    return int(2 * computed / (residents * expert_parameters(model)))


# ----- words


def experts(number: int) -> str:
    """`1 expert`, `8 experts`."""
    return "1 expert" if number == 1 else f"{number} experts"


def _faster(plan: Plan, other: Plan) -> str:
    before, after = plan.useful_tokens_per_second, other.useful_tokens_per_second
    return f"{count(after)} useful tokens/s instead of {count(before)}"


def _if_faster(says: str, plan: Plan, other: Plan | None) -> Iterator[str]:
    if other is not None and _gain(plan, other) >= WORTH_SAYING:
        yield f"{says} does {_faster(plan, other)}"


def _site(plan: Plan, name: str) -> SitePlan:
    return next(site for site in plan.sites if site.site == name)


def _gain(plan: Plan, other: Plan) -> float:
    return other.useful_tokens_per_second / plan.useful_tokens_per_second


def _with_solver(config: RunConfig) -> RunConfig:
    changed = with_strategy(config, placement="planned")
    return dataclasses.replace(changed, plan=dataclasses.replace(config.plan, policy="solver"))


def _solver_keys(config: RunConfig) -> str:
    """What `_with_solver` changes, as overrides."""
    keys = {"strategy.placement=planned": config.strategy.placement, "plan.policy=solver": config.plan.policy}
    return " ".join(key for key, now in keys.items() if not key.endswith(f"={now}"))


def _try(config: RunConfig) -> Plan | None:
    try:
        return make_plan(config)
    except ConfigError:  # then it is nothing to recommend
        return None
