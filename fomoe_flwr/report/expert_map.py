"""The panel that shows which site holds which expert."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fomoe_flwr.placement import Placement
from fomoe_flwr.report.load import Run
from fomoe_flwr.report.panels import INK, dress, site_colors

MAX_ROWS = 64  # sites x layers that the eye can tell apart
MAX_EXPERTS = 64
EMPTY = "#EEEEEE"


def expert_map(axes: Axes, run: Run) -> None:
    """Layers x experts for each site; for a large federation or model, how many experts each site holds."""
    config = run.config
    model, strategy, sites = config.model, config.strategy, config.federation.sites
    round_ = max(1, run.rounds[-1].round)  # before training, what the first round will use
    placement = run.placement(round_)
    names = short_names([site.name for site in sites])
    changed = strategy.placement == "random" or len(run.placements) > 1
    when = f" in round {round_}" if changed else ""
    if len(sites) * model.num_layers <= MAX_ROWS and model.num_experts <= MAX_EXPERTS:
        dress(axes, f"Experts held by each site{when}", "")
        _grids(axes, placement, names)
    else:
        dress(axes, f"Experts held by each site{when}, all {model.num_layers} layers", "experts")
        _counts(axes, placement, names)


def short_names(names: Sequence[str]) -> list[str]:
    """Names of sites that fit beside a panel."""
    return [name if len(name) <= 14 else f"{name[:13]}…" for name in names]


def _grids(axes: Axes, placement: Placement, names: list[str]) -> None:
    num_layers, num_experts, num_sites = placement.holds_LEM.shape
    colors = site_colors(num_sites)
    cells = np.empty((num_sites, num_layers, num_experts, 3))
    cells[:] = to_rgb(EMPTY)
    for site in range(num_sites):
        cells[site, placement.holds_LEM[:, :, site]] = to_rgb(colors[site])
    # One grid below the other: rows are a site's layers, columns the experts of a layer.
    x_edges, y_edges = np.arange(num_experts + 1) - 0.5, np.arange(num_sites * num_layers + 1)
    rows = cells.reshape(num_sites * num_layers, num_experts, 3)
    axes.pcolormesh(x_edges, y_edges, rows, edgecolors="white", linewidth=0.8)
    for boundary in range(1, num_sites):
        axes.axhline(boundary * num_layers, color="white", linewidth=5)
    axes.invert_yaxis()
    axes.set_yticks((np.arange(num_sites) + 0.5) * num_layers, names)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    rows_are = (
        "one row: the only layer" if num_layers == 1 else f"rows: layers 0 to {num_layers - 1} from the top"
    )
    axes.set_xlabel(f"expert   ({rows_are}; coloured: held, grey: not)", color=INK)
    axes.spines[:].set_visible(False)


def _counts(axes: Axes, placement: Placement, names: list[str]) -> None:
    held_M = placement.holds_LEM.sum(axis=(0, 1))
    total = placement.holds_LEM[:, :, 0].size
    axes.bar(range(len(names)), held_M, color=site_colors(len(names)))
    axes.axhline(total, color=INK, linestyle="--", linewidth=1.5)
    axes.annotate(
        f"the whole model: {total:,}   each site: {held_M.max():,}",
        (0.015, total),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        color=INK,
    )
    axes.set_ylim(0, 1.2 * total)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if len(names) <= 12:
        axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 4 else 0)
    else:
        axes.set_xlabel("site", color=INK)
