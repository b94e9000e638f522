"""A plan as tables for a terminal, or as one JSON object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fomoe_flwr.codecs import down_differences
from fomoe_flwr.config import SKIP_PRICES, RunConfig
from fomoe_flwr.console import print_whole
from fomoe_flwr.model.spec import parameter_counts, routing_in_words
from fomoe_flwr.plan.memory import Memory, memory, piece_of, state_a_parameter
from fomoe_flwr.plan.record import Plan, SitePlan
from fomoe_flwr.plan.rivals import Row, skipping_mode, some
from fomoe_flwr.plan.system import (
    PlanSite,
    edge_bytes,
    hides_communication,
    peak_bytes,
    run_bytes,
)
from fomoe_flwr.turns import takes_turns, turns_in_words
from fomoe_flwr.units import NONE, count, finite, in_bits, in_bytes, percent, time_span

MOST_ROWS = 20  # of the table of sites


@dataclass(frozen=True)
class Outlook:
    """All that is known before a run."""

    config: RunConfig
    sites: list[PlanSite]
    plan: Plan
    rows: list[Row]
    advice: list[str]


def show(outlook: Outlook, console: Console) -> None:
    """Print everything."""
    tables = (facts_table(outlook), site_table(outlook.plan, outlook.sites, outlook.config.model.num_experts))
    for table in (*tables, memory_table(outlook), strategy_table(outlook.rows, len(outlook.sites))):
        print_whole(table, console)
    for title, lines in (("assumed", assumptions_in_words(outlook)), ("advice", outlook.advice)):
        console.print(f" {title}:", markup=False, highlight=False)
        for line in lines or [NONE]:
            console.print(f"  - {line}", markup=False, highlight=False, soft_wrap=True)


def facts_table(outlook: Outlook) -> Table:
    """The model, the setting and a round in a few lines."""
    config, plan = outlook.config, outlook.plan
    counts, strategy, rounds = parameter_counts(config.model), config.strategy, config.train.rounds
    site_bytes = sum(site.bytes_down + site.bytes_up for site in plan.sites)
    table = Table(title="plan", box=SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    kind = "" if not config.model.hf else f" ({config.model.hf['model_type']})"
    table.add_row(
        "model",
        f"{escape(config.model.name + kind)}: {count(counts.total)} parameters, {count(counts.dense)} dense, "
        f"{count(counts.experts)} in experts, {count(counts.router)} in routers"
        + (f"; {count(counts.standins)} in stand-ins, at every site" if counts.standins else ""),
    )
    table.add_row(
        "setting",
        f"{_sites(len(plan.sites))}, {routing_in_words(config.model, strategy.routing)} routing, "
        f"{strategy.placement} placement, "
        f"{strategy.outer} outer, {strategy.up} up and {strategy.down} down{turns_in_words(strategy)}",
    )
    table.add_row(
        "a round",
        f"{time_span(plan.round_s)}, {count(plan.tokens)} tokens, {count(plan.tokens_per_second)} tokens/s, "
        f"of which useful {count(plan.useful_tokens_per_second)}; sites train {percent(plan.utilisation)} of the time",
    )
    held = _held(outlook)
    first, last = edge_bytes(config, held)
    if takes_turns(strategy) or down_differences(strategy) is not None:
        peak = peak_bytes(config, held)
        table.add_row(
            "its bytes",
            f"{in_bytes(site_bytes)} down and up, all sites"
            + (f", in the mean; at most {in_bytes(peak)}" if takes_turns(strategy) else "")
            + f". Round 1, which brings everything whole: {in_bytes(first)}"
            + (f"; the last, which sends everything: {in_bytes(last)}" if takes_turns(strategy) else ""),
        )
    if config.plan.measured is None:
        table.add_row(
            "times",
            f"as if a site of speed 1 had {config.plan.tflops:g} Tflop/s (plan.tflops; an H100 has 989, a laptop well "
            "below 1); after a run of two rounds plan.measured=RUN_DIR goes by what it took",
        )
    table.add_row(
        "the run",
        f"{rounds} rounds: {time_span(rounds * plan.round_s)}, {count(rounds * plan.tokens)} tokens, "
        f"{in_bytes(run_bytes(config, held, site_bytes))} down and up, all sites, without headers",
    )
    return table


def _held(outlook: Outlook) -> list[int]:
    """Experts a layer of each site that holds some."""
    return [site.experts_per_layer for site in outlook.plan.sites if site.experts_per_layer]


# ----- sites


def site_table(plan: Plan, sites: Sequence[PlanSite], num_experts: int) -> Table:
    """A line a site, or, where they are many, a line for all that are alike."""
    table = _table("a round at each site")
    table.add_column("site", no_wrap=True)
    hides = any(planned.hidden_s for planned in plan.sites)
    headers = (
        f"experts a layer\nof {num_experts}", "local\nsteps", "batch", "memory\nof what it has", "down", "up",
        "compute", "commu-\nnication", *(["of which\nhidden"] if hides else []), "round", "waits for\nthe slowest",
        "expected\nresident share",
    )  # fmt: skip
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    groups = group_sites(plan, sites)
    for names, site, planned in groups[:MOST_ROWS]:
        table.add_row(escape(alike(names)), *_site_cells(site, planned, plan.round_s, hides))
    if rest := [name for names, _, _ in groups[MOST_ROWS:] for name in names]:
        table.caption, table.caption_justify = f"… and {len(rest)} more, faster than these", "left"
    return table


def group_sites(plan: Plan, sites: Sequence[PlanSite]) -> list[tuple[list[str], PlanSite, SitePlan]]:
    """Sites that are alike, with one of them; each alone while they are few. The slowest group is among the first."""
    if len(sites) <= MOST_ROWS:
        return [([site.name], site, planned) for site, planned in zip(sites, plan.sites, strict=True)]
    groups: dict[Any, tuple[list[str], PlanSite, SitePlan]] = {}
    for site, planned in zip(sites, plan.sites, strict=True):
        key = (dataclasses.replace(site, name=""), dataclasses.replace(planned, site=""))
        groups.setdefault(key, ([], site, planned))[0].append(site.name)
    ordered = list(groups.values())
    if len(ordered) > MOST_ROWS:  # then the slowest ones are worth the most
        ordered.sort(key=lambda group: -group[2].round_s)
    return ordered


def alike(names: Sequence[str]) -> str:
    """`site-0`, or `site-0 and 999 more like it`."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more like it"


def _site_cells(site: PlanSite, planned: SitePlan, round_s: float, hides: bool) -> tuple[str, ...]:
    too_small = planned.memory_bytes > site.memory_bytes
    memory = in_bytes(planned.memory_bytes)
    if math.isfinite(site.memory_bytes):
        memory += f" of {in_bytes(site.memory_bytes)}"
    return (
        str(planned.experts_per_layer),
        str(planned.local_steps),
        str(planned.batch_size),
        f"[bold red]{memory}, too small[/]" if too_small else memory,
        f"{in_bytes(planned.bytes_down)}",
        f"{in_bytes(planned.bytes_up)}",
        time_span(planned.compute_s),
        time_span(planned.communication_s),
        *([time_span(planned.hidden_s)] if hides else []),
        time_span(planned.round_s),
        time_span(round_s - planned.round_s) if planned.round_s < round_s else "slowest",
        percent(planned.resident_share),
    )


# ----- memory


def parts_of(needed: Memory) -> dict[str, float]:
    """What a site's device holds at the peak of a step, by kind, in bytes."""
    state = {name: getattr(needed, name) for name in ("weights", "gradients", "moments", "shard")}
    parts = {**state, **needed.activations._asdict(), "passing": needed.passing}
    return {name: float(part) for name, part in parts.items()}


def memory_table(outlook: Outlook) -> Table:
    """A line for all sites that need the same."""
    config = outlook.config
    table = _table("memory at the peak of a step")
    table.add_column("site", no_wrap=True)
    for header in (
        "weights", "gra-\ndients", "moments", "shard\nas sent", "stream,\nnorms", "atten-\ntion", "routers",
        "experts", "dense\nlayers", "head", "in\npassing", "all",
    ):  # fmt: skip
        table.add_column(header, justify="right", no_wrap=True)
    groups: dict[tuple[float, int, str], list[int]] = {}
    for index, (site, planned) in enumerate(zip(outlook.sites, outlook.plan.sites, strict=True)):
        if planned.experts_per_layer:
            groups.setdefault((planned.memory_bytes, site.batch_size, site.device), []).append(index)
    for members in list(groups.values())[:MOST_ROWS]:
        site, planned = outlook.sites[members[0]], outlook.plan.sites[members[0]]
        parts = parts_of(memory(config, site, float(planned.experts_per_layer)))
        streams = parts.pop("residual") + parts.pop("norms")
        shown = [*list(parts.values())[:4], streams, *list(parts.values())[4:], planned.memory_bytes]
        names = alike([outlook.sites[index].name for index in members])
        table.add_row(escape(names), *(in_bytes(part) if part else NONE for part in shown))
    if len(groups) > MOST_ROWS:
        table.caption, table.caption_justify = f"… and {len(groups) - MOST_ROWS} more", "left"
    return table


def memory_in_words(outlook: Outlook) -> str:
    """What it was computed from."""
    config = outlook.config
    site = max(outlook.sites, key=lambda site: site.batch_size)
    each, (piece, _) = state_a_parameter(config, site.device), piece_of(config, site)
    if config.plan.bytes_per_parameter is None:
        parts = " + ".join(f"{part:.3g}" for part in each)
        state = f"{parts} bytes a parameter"
        state += " (weights, gradients, moments, shard as sent)"
    else:
        state = f"{each.weights:g} bytes a parameter (plan.bytes_per_parameter)"
    device = "; activations as on a GPU, the shard as on a CPU" if site.device == "auto" else ""
    return (
        f"{state}; activations of {piece.rows} x {piece.seq_len} tokens at a time, {config.train.dtype}, "
        f"recompute {piece.recompute}{device}"
    )


# ----- strategies


def strategy_table(rows: Sequence[Row], num_sites: int) -> Table:
    """Strategies side by side; what cannot be, with its reason below."""
    table = _table("strategies for this federation (▸ this run)")
    table.add_column("strategy", no_wrap=True)
    headers = (
        "overlap", "bytes per site\nand round", "round", "tokens/s", "worth of\na token", "useful\ntokens/s",
        "greatest\nmemory", "sites too small",
    )  # fmt: skip
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        name = escape(row.name)
        table.add_row(f"▸ [bold]{name}[/]" if row.this_run else f"  {name}", *_strategy_cells(row, num_sites))
    reasons = [f"{row.name}: {row.reason}" for row in rows if row.reason]
    table.caption, table.caption_justify = escape("\n".join(reasons)) or None, "left"
    return table


def _strategy_cells(row: Row, num_sites: int) -> tuple[str, ...]:
    if row.plan is None:
        return (str(row.overlap), *(NONE for _ in range(6)), "not possible")
    return (
        str(row.overlap),
        in_bytes(row.bytes_per_round),
        time_span(row.plan.round_s),
        count(row.plan.tokens_per_second),
        percent(row.plan.useful_tokens_per_second / row.plan.tokens_per_second),
        count(row.plan.useful_tokens_per_second),
        in_bytes(row.memory_bytes),
        escape(_which(row.too_small, num_sites)),
    )


def _which(names: Sequence[str], num_sites: int) -> str:
    if not names:
        return "none"
    return "all" if len(names) == num_sites else some(names)


# ----- assumptions


def assumptions(outlook: Outlook) -> dict[str, Any]:
    """What the numbers rest on, for a program to read."""
    config, plan = outlook.config, outlook.config.plan
    return {
        "compute": "modelled" if plan.measured is None else "measured",
        "measured": plan.measured,
        "tflops": plan.tflops,
        "mfu": plan.mfu,
        "bytes_per_parameter": plan.bytes_per_parameter,
        "assumed_mbps": plan.assumed_mbps,
        "assumed_latency_ms": plan.assumed_latency_ms,
        "server_mbps": plan.server_mbps,
        "skip_price": config.skip_price,
        "holders": plan.holders,
        "max_steps_ratio": plan.max_steps_ratio,
        "up": config.strategy.up,
        "down": config.strategy.down,
        "sites_with_assumed_links": len(assumed_links(config)),
        "sites_with_unknown_memory": sum(math.isinf(site.memory_bytes) for site in outlook.sites),
        "balanced_routing": True,
        "activations_counted": True,
        "computing_hides_communication": hides_communication(config),
    }


def assumed_links(config: RunConfig) -> list[str]:
    """The sites of which some number of the link is not given."""
    return [
        site.name
        for site in config.federation.sites
        if None in (site.up_mbps, site.down_mbps, site.latency_ms)
    ]


def assumptions_in_words(outlook: Outlook) -> list[str]:
    """The same for a person."""
    config, plan = outlook.config, outlook.config.plan
    compute = (
        f"{plan.tflops:g} Tflop/s x {plan.mfu:g} (plan.tflops, plan.mfu) at a site of speed 1"
        if plan.measured is None
        else f"as measured in {plan.measured}"
    )
    server = (
        "without limit"
        if plan.server_mbps is None
        else f"{in_bits(plan.server_mbps * 1e6 / 8)} for all sites"
    )
    unlinked, total = len(assumed_links(outlook.config)), len(outlook.sites)
    link = f"{in_bits(plan.assumed_mbps * 1e6 / 8)} and {plan.assumed_latency_ms:g} ms"
    links = f"; {unlinked} of {_sites(total)} with an assumed link ({link})" if unlinked else ""
    measured = " or ".join(
        f"{percent(SKIP_PRICES[routing])} less in {routing} mode"
        for routing in (skipping_mode(outlook.config), "partitioned")
    )
    hidden = (
        "what hides behind it is a round's that goes on like the one before"
        if hides_communication(config)
        else "nothing hides communication"
    )
    less = measured if plan.skip_price is None else f"{percent(plan.skip_price)} less"
    return [
        f"compute: {compute}; routing is balanced; {hidden}",
        f"memory: {memory_in_words(outlook)}",
        f"network: all sites at once through one server, {server}{links}; tensors alone, without headers",
        f"useful: a token counts up to {less} where its experts are not held (plan.skip_price)"
        + ("; what stand-ins save of that is not counted" if outlook.config.model.standins else ""),
    ]


# ----- JSON


def as_json(outlook: Outlook) -> dict[str, Any]:
    """One object, in which everything is finite or null."""
    config, plan = outlook.config, outlook.plan
    counts, held = parameter_counts(config.model), _held(outlook)
    first, last = edge_bytes(config, held)
    content = {
        "model": {
            "name": config.model.name,
            "params_total": counts.total,
            "params_dense": counts.dense,
            "params_expert": counts.experts,
            "params_router": counts.router,
            "params_standin": counts.standins,
        },
        "sites": [
            {
                **dataclasses.asdict(planned),
                "memory_available_bytes": site.memory_bytes,
                "memory_parts_bytes": parts_of(memory(config, site, float(planned.experts_per_layer)))
                if planned.experts_per_layer
                else {},
            }
            for site, planned in zip(outlook.sites, plan.sites, strict=True)
        ],
        "strategies": [_row_as_json(row) for row in outlook.rows],
        "plan": {
            "placement": plan.placement,
            "overlap": config.overlap,
            "routing": config.strategy.routing,
            "round_s": plan.round_s,
            "tokens": plan.tokens,
            "tokens_per_second": plan.tokens_per_second,
            "useful_tokens_per_second": plan.useful_tokens_per_second,
            "utilisation": plan.utilisation,
            "peak_bytes": peak_bytes(config, held),
            "first_round_bytes": first,
            "last_round_bytes": last,
            "run_bytes": run_bytes(config, held, sum(site.bytes_down + site.bytes_up for site in plan.sites)),
        },
        "assumptions": assumptions(outlook),
        "advice": outlook.advice,
    }
    return {key: finite(value) for key, value in content.items()}


def _row_as_json(row: Row) -> dict[str, Any]:
    plan = row.plan
    return {
        "name": row.name,
        "this_run": row.this_run,
        "overlap": row.overlap,
        "bytes_per_round": row.bytes_per_round,
        "round_s": None if plan is None else plan.round_s,
        "tokens_per_second": None if plan is None else plan.tokens_per_second,
        "useful_tokens_per_second": None if plan is None else plan.useful_tokens_per_second,
        "memory_bytes": row.memory_bytes,
        "sites_too_small": row.too_small,
        "impossible": row.reason or None,
    }


def _table(title: str) -> Table:
    return Table(title=title, box=SIMPLE, pad_edge=False, collapse_padding=True)


def _sites(number: int) -> str:
    return "1 site" if number == 1 else f"{number} sites"
