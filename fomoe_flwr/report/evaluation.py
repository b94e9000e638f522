"""The table of `fomoe eval` and of the end of a run, from the same JSON object that a program reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fomoe_flwr.console import print_whole
from fomoe_flwr.errors import RunError
from fomoe_flwr.units import NONE, decimal, percent

FILE = "evaluation.json"  # in the run directory
DOMAINS_SHOWN = 12  # the largest; all are in the JSON


def show_evaluation(content: Mapping[str, Any], console: Console) -> None:
    """Print it."""
    _print_line(_heading(content), console)
    print_whole(loss_table(content), console)
    _print_line(_about_necessity(content["routing"]), console)
    print_whole(necessity_table(content["routing"]), console)


def _print_line(text: str, console: Console) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def show_saved(directory: Path, console: Console) -> None:
    """Print what a run left, if it left any.

    Raises:
        RunError: it cannot be read.
    """
    file = directory / FILE
    if not file.is_file():
        return
    try:
        show_evaluation(json.loads(file.read_text()), console)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: cannot be read ({error!r}); fomoe eval makes the figures anew") from error


def loss_table(content: Mapping[str, Any]) -> Table:
    """Loss with all experts, at each site with its residents only, and by domain."""
    everything = content["all_experts"]
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("experts", no_wrap=True)
    for header in ("loss, nats", "perplexity", "bits per byte", "tokens"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row("[bold]all[/]", *_cells(everything))
    sites = content["residents"]
    if sites and all(figures == everything for figures in sites.values()):
        table.add_row(f"residents of each of the {len(sites)} sites: all", *_cells(everything))
    else:
        for site, figures in sites.items():
            table.add_row(f"residents of {escape(site)}", *_cells(figures))
    domains = everything.get("by_domain", {})
    if len(domains) > 1:
        table.add_section()
        largest = sorted(domains, key=lambda name: -domains[name]["tokens"])
        for name in largest[:DOMAINS_SHOWN]:
            table.add_row(f"all, on {escape(name)}", *_cells(domains[name]))
        if (more := len(largest) - DOMAINS_SHOWN) > 0:
            table.add_row(f"{more} smaller ones are in the JSON")
    return table


def necessity_table(routing: Mapping[str, Any]) -> Table:
    """Routing necessity, over all layers and in each alone."""
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("random in", no_wrap=True)
    table.add_column("necessity", justify="right", no_wrap=True)
    reference = "reference_necessity" in routing
    if reference:
        table.add_column("of the reference", justify="right", no_wrap=True)
        table.add_column("share", justify="right", no_wrap=True)
    rows = [("[bold]all layers[/]", routing["necessity"], routing.get("reference_necessity"))]
    theirs = routing.get("reference_necessity_by_layer") or []
    for layer, value in enumerate(routing["necessity_by_layer"]):
        rows.append((f"layer {layer} alone", value, theirs[layer] if layer < len(theirs) else None))
    for name, value, other in rows:
        cells = [decimal(other), _share(value, other)] if reference else []
        table.add_row(name, decimal(value), *cells)
    return table


def _heading(content: Mapping[str, Any]) -> str:
    text, tokens = content["text"], content["all_experts"]["tokens"]
    part = {"validation": "validation part, ", "whole": ""}[text["part"]]
    of = f"{tokens:,} of {text['tokens']:,}" if tokens < text["tokens"] else f"{tokens:,}"
    documents = "1 document" if text["documents"] == 1 else f"{text['documents']:,} documents"
    return f"{content['checkpoint']} on {text['name']}: {part}{documents}, {of} tokens"


def _about_necessity(routing: Mapping[str, Any]) -> str:
    draws = len(routing["necessity_by_draw"])
    averaged = "1 draw" if draws == 1 else f"mean of {draws} draws"
    return (
        f"routing necessity: loss with random routing minus loss with the learned router, nats; "
        f"{routing['tokens']:,} tokens, {averaged}"
    )


def _cells(figures: Mapping[str, Any] | None) -> tuple[str, ...]:
    if figures is None:
        return (NONE, NONE, NONE, "no experts")
    return (
        decimal(figures["loss"]),
        _perplexity(figures["perplexity"]),
        decimal(figures["bits_per_byte"]),
        f"{figures['tokens']:,}",
    )


def _perplexity(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.1e}"


def _share(value: float | None, other: float | None) -> str:
    return percent(value / other) if value is not None and other is not None and other > 0 else NONE
