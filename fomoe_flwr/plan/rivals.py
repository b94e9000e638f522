"""The strategies that a run is compared with: one list, for the plan before a run and for the report after it.

Each is this run's configuration with other settings, planned by the same formulas: same model, sites, local steps
and batch. DDP exchanges the whole gradient through the server at every one of those steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fomoe_flwr.codecs import LOSSY
from fomoe_flwr.config import PLANNED, RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.placement import check_overlap, least_overlap
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.record import Plan, SitePlan
from fomoe_flwr.plan.system import PlanSite, down_bytes, held_parameters, up_bytes

DDP, DILOCO, LOCAL_ADAMW = "DDP", "full-replica DiLoCo", "LocalAdamW"
FOMOE_EQUAL, FOMOE_PLANNED = "FoMoE, equal", "FoMoE, planned"


@dataclass(frozen=True)
class Row:
    """One strategy. `plan` is None where there is no plan for it, and `reason` says why."""

    name: str
    this_run: bool
    overlap: int
    plan: Plan | None
    too_small: tuple[str, ...] = ()  # sites whose memory does not hold it
    reason: str = ""

    @property
    def bytes_per_round(self) -> float | None:
        """Per site, down and up; mean over the sites."""
        if self.plan is None:
            return None
        return sum(site.bytes_down + site.bytes_up for site in self.plan.sites) / len(self.plan.sites)

    @property
    def memory_bytes(self) -> float | None:
        """Of the site that needs most."""
        return None if self.plan is None else max(site.memory_bytes for site in self.plan.sites)


class Traffic(NamedTuple):
    """A strategy's bytes, down and up."""

    name: str
    site_bytes: float  # of a site in a round, mean over the sites
    token_bytes: float  # for each token that the site trains on
    ratio: float  # to this run's site_bytes
    model_share: float  # of the parameters, held by a site


@dataclass(frozen=True)
class _Candidate:
    name: str
    config: RunConfig
    exchanges: int = 1  # rounds of this configuration in the time of one of this run's


def compare(config: RunConfig, plan: Plan, sites: list[PlanSite]) -> list[Row]:
    """The rows of the plan's table; a run that is none of the strategies comes first, with a row of its own.

    Args:
        plan: of this run.
    """
    candidates = _candidates(config)
    this_run = _traits(config)
    mine = next((candidate for candidate in candidates if _traits(candidate.config) == this_run), None)
    rows = [_row(candidate, plan if candidate is mine else None, sites) for candidate in candidates]
    if mine is None:
        kind = "" if plan.placement == "equal" else f", {plan.placement} placement"
        name = f"this run: {config.strategy.name}{kind}"
        rows.insert(0, Row(name, True, config.overlap, plan, too_small(plan, sites)))
    return rows


def compare_strategies(
    config: RunConfig, plan: Plan | None = None, residents: float | None = None
) -> list[Traffic]:
    """Bytes by formula of this run, and of those of its rivals that hold the whole model everywhere: DiLoCo and DDP.

    Args:
        plan: of a run whose sites differ; figures are then means over its sites.
        residents: experts a layer at a site, mean over the sites, where it is recorded; else the plan's.
    """
    train = config.train
    tokens: float = train.local_steps * train.batch_size * train.seq_len
    if plan is not None:
        tokens = plan.tokens / len(plan.sites)
    if residents is None:
        equal = config.model.num_experts * config.overlap / len(config.federation.sites)
        residents = equal if plan is None else plan.mean_residents
    this_run = _Candidate("this run", config)
    rivals = {candidate.name: candidate for candidate in _candidates(config)}
    rows: list[Traffic] = []
    for candidate in (this_run, rivals[DILOCO], rivals[DDP]):
        held = residents if candidate is this_run else float(config.model.num_experts)
        once = down_bytes(candidate.config, held) + up_bytes(candidate.config, held)
        site_bytes = candidate.exchanges * once
        share = held_parameters(config, held) / held_parameters(config, config.model.num_experts)
        ratio = site_bytes / (rows[0].site_bytes if rows else site_bytes)
        rows.append(Traffic(candidate.name, site_bytes, site_bytes / tokens, ratio, share))
    return rows


def possible_overlaps(num_sites: int, num_experts: int) -> list[int]:
    """Every overlap with which each site has an expert, ascending; the last is a full replica."""
    return list(range(least_overlap(num_sites, num_experts), num_sites + 1))


def fomoe_overlap(config: RunConfig) -> int:
    """The overlap of FoMoE with equal shares: this run's, or half of the sites where it is a full replica.

    If some site would have no expert, the smallest with which each has one. Where that is a full replica it is what was
    wanted, and cannot be.
    """
    num_sites = len(config.federation.sites)
    wanted = config.overlap if config.overlap < num_sites else max(1, num_sites // 2)
    shared = possible_overlaps(num_sites, config.model.num_experts)[:-1]
    return wanted if wanted in shared else min(shared, default=wanted)


def skipping_mode(config: RunConfig) -> str:
    """The routing in which ghosts are skipped: this run's, if it is one."""
    return "skip" if config.strategy.routing == "partitioned" else config.strategy.routing


def too_small(plan: Plan, sites: list[PlanSite]) -> tuple[str, ...]:
    """The sites whose memory does not hold what the plan gives them."""
    return tuple(
        site.name
        for site, planned in zip(sites, plan.sites, strict=True)
        if planned.memory_bytes > site.memory_bytes
    )


def some(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a and 12 more`."""
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {names[1] if len(names) == 2 else f'{len(names) - 1} more'}"


def with_strategy(config: RunConfig, **settings: object) -> RunConfig:
    """The configuration with other settings of `strategy`."""
    return dataclasses.replace(config, strategy=dataclasses.replace(config.strategy, **settings))  # type: ignore[arg-type]


def with_train(config: RunConfig, **settings: object) -> RunConfig:
    """The configuration with other settings of `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))  # type: ignore[arg-type]


def _candidates(config: RunConfig) -> list[_Candidate]:
    # Who holds every expert needs no stand-ins.
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, standins=0))
    replica = with_strategy(whole, overlap=None, placement="fixed", inner="adamw", outer="nesterov")
    # What gradients and moments would not bear.
    down = "bf16" if config.strategy.down in LOSSY else config.strategy.down
    plain = with_strategy(replica, down=down, delay=0, fragments=1, sole_every=1)
    ddp = with_strategy(plain, inner="gradient", outer="adamw")
    # FoMoE comes with this run's own outer step, if this run is FoMoE.
    planned, overlap = config.strategy.placement in PLANNED, fomoe_overlap(config)
    fomoe = config if planned or config.overlap < len(config.federation.sites) else replica
    equal = with_strategy(fomoe, overlap=overlap, placement="fixed")
    shared_out = with_strategy(fomoe, overlap=config.overlap if planned else overlap, placement="planned")
    skipping = skipping_mode(config)
    suffix = ", LocalAdamW" if fomoe.strategy.outer == "local_adamw" else ""
    return [
        _Candidate(DDP, with_train(ddp, local_steps=1), exchanges=config.train.local_steps),
        _Candidate(DILOCO, replica),
        _Candidate(LOCAL_ADAMW, with_strategy(plain, outer="local_adamw")),
        _Candidate(f"{FOMOE_EQUAL}, partitioned{suffix}", with_strategy(equal, routing="partitioned")),
        _Candidate(f"{FOMOE_EQUAL}, {skipping}{suffix}", with_strategy(equal, routing=skipping)),
        _Candidate(f"{FOMOE_PLANNED}, {shared_out.strategy.routing}{suffix}", shared_out),
    ]


def _traits(config: RunConfig) -> tuple[object, ...]:
    """What a strategy is known by. Where every site holds everything, placement and routing make no difference."""
    strategy = config.strategy
    placement = "equal" if strategy.placement in ("fixed", "random") else strategy.placement
    full = placement == "equal" and config.overlap == len(config.federation.sites)
    return (
        placement,
        config.overlap,
        None if full else strategy.routing,
        strategy.inner,
        strategy.outer,
        config.train.local_steps,
    )


def _row(candidate: _Candidate, plan: Plan | None, sites: list[PlanSite]) -> Row:
    """A candidate's plan, or why there is none.

    Args:
        plan: of this run, if this is it.
    """
    config, this_run = candidate.config, plan is not None
    try:
        if config.strategy.placement != "planned":
            check_overlap(len(sites), config.model.num_experts, config.overlap)
        plan = plan or _repeated(make_plan(config), candidate.exchanges)
    except ConfigError as error:
        # The others may still be possible.
        return Row(candidate.name, this_run, config.overlap, None, reason=str(error))
    return Row(candidate.name, this_run, config.overlap, plan, too_small(plan, sites))


def _repeated(plan: Plan, times: int) -> Plan:
    """So many rounds as one. Every exchange waits for the slowest, so a step's round counts in full each time."""

    def site(planned: SitePlan) -> SitePlan:
        return dataclasses.replace(
            planned,
            local_steps=times * planned.local_steps,
            tokens=times * planned.tokens,
            bytes_down=times * planned.bytes_down,
            bytes_up=times * planned.bytes_up,
            compute_s=times * planned.compute_s,
            communication_s=times * planned.communication_s,
            hidden_s=times * planned.hidden_s,
            round_s=times * planned.round_s,
        )

    return dataclasses.replace(
        plan,
        sites=tuple(site(planned) for planned in plan.sites),
        round_s=times * plan.round_s,
        tokens=times * plan.tokens,
    )
