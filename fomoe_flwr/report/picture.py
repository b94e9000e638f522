"""`report.png`: what a run was, learned, sent and held, on one page; and what other pictures share with it.

Figures are drawn without pyplot, so they need no display and change no global state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from fomoe_flwr.errors import RunError
from fomoe_flwr.model.spec import expert_layers
from fomoe_flwr.placement import Placement
from fomoe_flwr.plan.rivals import compare_strategies
from fomoe_flwr.report.load import CLASSES, Run, SiteRound
from fomoe_flwr.report.tables import setting, summarize
from fomoe_flwr.units import byte_unit, count, decimal, in_bytes, percent, times

SIZE_INCHES = (14.0, 9.5)
DPI = 120

INK, EMPTY = "#333333", "#EEEEEE"
# Colours that colour-blind people can tell apart: Okabe and Ito's for quantities, Tol's muted set for sites.
TRAIN, VALIDATION = "#56B4E9", "#0072B2"
CLASS_COLORS = {"dense": "#0072B2", "expert": "#E69F00", "other": "#999999"}
CLASS_LABELS = {"dense": "dense part", "expert": "experts", "other": "other"}
SITE_COLORS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#DDCC77", "#882255", "#44AA99", "#AA4499")

MANY_ROUNDS = 60  # with so many rounds there are no markers and no gaps between bars
OFF_CHART = 4.0  # a strategy that sends more than this many times our bytes is only named
MAX_ROWS = 64  # sites x layers of the expert map
MAX_EXPERTS = 64


def draw(run: Run) -> Path:
    """Write `report.png` into the run directory and return its path.

    Raises:
        RunError: it cannot be written.
    """
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    # The head has a strip of its own, so that no length of it pushes into the
    grid = figure.add_gridspec(2, 2, height_ratios=(0.09, 0.91))
    head = figure.add_subfigure(grid[0, :])
    head.text(0.5, 0.72, setting(run.config), ha="center", va="center", fontsize=12.5, fontweight="bold")
    head.text(0.5, 0.22, headline(run), ha="center", va="center", fontsize=11.5, color=INK)
    upper, lower = figure.add_subfigure(grid[1, 0]).subplots(2, 1)
    losses(upper, run)
    expert_map(lower, run)
    upper, middle, lower = figure.add_subfigure(grid[1, 1]).subplots(3, 1, height_ratios=(2, 1, 1))
    traffic(upper, run)
    resident_share(middle, run)
    speed(lower, run)
    return save_figure(figure, run.directory / "report.png")


def headline(run: Run) -> str:
    """The result in one sentence."""
    summary = summarize(run)
    rounds = "1 round" if summary.rounds == 1 else f"{summary.rounds} rounds"
    parts = [f"{rounds}, {count(summary.tokens)} tokens"]
    if summary.val_loss is not None:
        before = "" if summary.first_val_loss is None else f"{decimal(summary.first_val_loss)} → "
        parts.append(f"validation loss {before}{decimal(summary.val_loss)}")
    if summary.site_bytes:
        _, diloco, ddp = compare_strategies(run.config, run.plan, run.mean_residents)
        parts.append(
            f"{in_bytes(summary.site_bytes)} per site and round "
            f"({diloco.name} would need {times(diloco.site_bytes / summary.site_bytes)}, "
            f"{ddp.name} {times(ddp.site_bytes / summary.site_bytes)}, by formula)"
        )
    return "    ".join(parts)


# ----- panels


def losses(axes: Axes, run: Run) -> None:
    """Training and validation loss; bits per byte as the right-hand scale."""
    dress(axes, "Loss", "nats per token")
    round_axis(axes, run)
    for label, color, points in (
        ("training, mean over the round", TRAIN, [(r.round, r.train_loss) for r in run.rounds]),
        ("validation, after the round", VALIDATION, [(r.round, r.val_loss) for r in run.rounds]),
    ):
        measured = [(round_, loss) for round_, loss in points if loss is not None]
        if measured:
            draw_line(axes, run, measured, color, label)
    if not axes.lines:
        say(axes, "no loss measured")
        return
    axes.legend(frameon=False, loc="best")
    # Bits per byte is the validation loss times a constant of the text, so a second scale is enough.
    factors = [r.val_bpb / r.val_loss for r in run.rounds if r.val_bpb and r.val_loss]
    # A run that diverged has nan.
    if known := [factor for factor in factors if math.isfinite(factor)]:
        factor = known[-1]
        scales = (lambda loss: np.multiply(loss, factor), lambda bpb: np.divide(bpb, factor))
        right = axes.secondary_yaxis("right", functions=scales)
        right.set_ylabel("validation, bits per byte", color=INK)
        right.tick_params(colors=INK)


def traffic(axes: Axes, run: Run) -> None:
    """Measured bytes, stacked by class, and those of other strategies by formula.

    The scale is linear because the height of stacked bars means nothing on a log scale.
    """
    dress(axes, "Traffic per site, down + up (bars: measured)", "bytes per round")
    round_axis(axes, run)
    rounds = [record for record in run.rounds if record.sites]
    if not rounds:
        say(axes, "no training round yet")
        return
    ours = max(record.site_bytes or 0 for record in rounds)
    rivals = compare_strategies(run.config, run.plan, run.mean_residents)[1:]
    on_chart = [row for row in rivals if row.site_bytes <= OFF_CHART * ours]
    highest = max([ours, *(row.site_bytes for row in on_chart)])
    factor, unit = byte_unit(highest)
    axes.set_ylabel(f"{unit} per round")
    axes.set_ylim(0, 1.5 * highest / factor)  # room for the legend and what is off the chart

    positions, width = [record.round for record in rounds], 0.8 if len(rounds) < MANY_ROUNDS else 1.0
    bottom = np.zeros(len(rounds))
    for name in CLASSES:
        heights = np.array([r.bytes_by_class[name] / len(r.sites) for r in rounds]) / factor
        axes.bar(positions, heights, width, bottom, color=CLASS_COLORS[name], label=CLASS_LABELS[name])
        bottom += heights
    axes.legend(frameon=False, loc="upper left", ncols=3, columnspacing=1.2, handlelength=1.2)

    # With K = 1 DDP and DiLoCo send the same and share a line.
    for site_bytes, rows in groupby(on_chart, key=lambda row: row.site_bytes):
        height = site_bytes / factor
        axes.axhline(height, color=INK, linestyle="--", linewidth=1.5)
        names = " = ".join(row.name for row in rows)
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
        note_on_line(axes, f"{names}, by formula: {in_bytes(site_bytes)}", height, bbox=box)
    beyond = [
        f"↑ off the chart: {row.name}, by formula {in_bytes(row.site_bytes)} ({times(row.site_bytes / ours)})"
        for row in rivals
        if row not in on_chart
    ]
    axes.text(0.015, 0.86, "\n".join(beyond), transform=axes.transAxes, va="top", color=INK)


def resident_share(axes: Axes, run: Run) -> None:
    """How many of the router's choices were experts that the site holds."""
    dress(axes, "Router choices held by the site", "share of choices")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    by_site(axes, run, lambda site: site.resident_share)
    if axes.lines:
        held = run.held_share
        axes.set_title(f"dotted: share of experts held, {percent(held)}", loc="right", fontsize=10, color=INK)
        axes.axhline(held, color=INK, linestyle=":", linewidth=1.5)


def speed(axes: Axes, run: Run) -> None:
    """Tokens a second of each site while it trains."""
    dress(axes, "Speed of a site while training", "tokens/s")
    by_site(axes, run, lambda site: site.tokens_per_second)
    if axes.lines:
        # The highest value is 0 if no time was measured.
        axes.set_ylim(0, 1.15 * axes.dataLim.y1 or 1)
        # The legend is also that of the panel above.
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=4)


def by_site(axes: Axes, run: Run, value: Callable[[SiteRound], float | None]) -> None:
    """A line for each site; with more sites than colours, their mean and range."""
    round_axis(axes, run)
    points = [
        (site.site, record.round, measured)
        for record in run.rounds
        for site in record.sites
        if (measured := value(site)) is not None
    ]
    if not points:
        say(axes, "not measured")
        return
    names = [site.name for site in run.config.federation.sites]
    if len(names) <= len(SITE_COLORS):
        for name, color in zip(names, SITE_COLORS, strict=False):
            mine = [(round_, measured) for site, round_, measured in points if site == name]
            if mine:
                draw_line(axes, run, mine, color, name)
        return
    rounds = sorted({round_ for _, round_, _ in points})
    values = [[measured for _, here, measured in points if here == round_] for round_ in rounds]
    low, high = [min(here) for here in values], [max(here) for here in values]
    axes.fill_between(rounds, low, high, color=TRAIN, alpha=0.4, label="lowest to highest site")
    means = [(round_, sum(here) / len(here)) for round_, here in zip(rounds, values, strict=True)]
    draw_line(axes, run, means, VALIDATION, "mean of the sites")


def expert_map(axes: Axes, run: Run) -> None:
    """Layers x experts of each site, in the last round; if there are too many, the number that each site holds."""
    config = run.config
    model, strategy, sites = config.model, config.strategy, config.federation.sites
    round_ = max(1, run.rounds[-1].round)
    placement = run.placement(round_)
    if placement is None:
        dress(axes, "Experts held by each site", "")
        say(axes, "not recorded")
        return
    names = short_names([site.name for site in sites])
    changed = strategy.placement == "random" or len(run.placements) > 1
    when = f" in round {round_}" if changed else ""
    if len(sites) * model.num_layers <= MAX_ROWS and model.num_experts <= MAX_EXPERTS:
        dress(axes, f"Experts held by each site{when}", "")
        _grids(axes, placement, names, expert_layers(model))
    else:
        dress(axes, f"Experts held by each site{when}, all {model.num_layers} layers", "experts")
        _counts(axes, placement, names)


def short_names(names: Sequence[str]) -> list[str]:
    """Names of sites that fit beside a panel."""
    return [name if len(name) <= 14 else f"{name[:13]}…" for name in names]


def _grids(axes: Axes, placement: Placement, names: list[str], layers: Sequence[int]) -> None:
    num_layers, num_experts, num_sites = placement.holds_LEM.shape
    colors = site_colors(num_sites)
    cells = np.empty((num_sites, num_layers, num_experts, 3))
    cells[:] = to_rgb(EMPTY)
    for site in range(num_sites):
        cells[site, placement.holds_LEM[:, :, site]] = to_rgb(colors[site])
    # A grid for each site, one below the other: its rows are layers, its columns the experts of a layer.
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
        f"one row: the only layer{'' if layers[0] == 0 else ' with experts'}"
        if num_layers == 1
        else f"rows: layers {layers[0]} to {layers[-1]} from the top"
    )
    axes.set_xlabel(f"expert   ({rows_are}; coloured: held, grey: not)", color=INK)
    axes.spines[:].set_visible(False)


def _counts(axes: Axes, placement: Placement, names: list[str]) -> None:
    held_M = placement.holds_LEM.sum(axis=(0, 1))
    total = placement.holds_LEM[:, :, 0].size
    axes.bar(range(len(names)), held_M, color=site_colors(len(names)))
    axes.axhline(total, color=INK, linestyle="--", linewidth=1.5)
    note_on_line(axes, f"the whole model: {total:,}   each site: {held_M.max():,}", total)
    axes.set_ylim(0, 1.2 * total)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if len(names) <= 12:
        axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 4 else 0)
    else:
        axes.set_xlabel("site", color=INK)


# ----- what panels and other pictures share


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a picture, and return where it is.

    Raises:
        RunError: it cannot be written.
    """
    try:
        figure.savefig(path, pil_kwargs={"optimize": True})
    except OSError as error:
        raise RunError(f"{path}: cannot write the picture: {error}") from error
    return path


def dress(axes: Axes, title: str, y_label: str) -> None:
    """Title, label and style of a panel."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def site_colors(num_sites: int) -> Sequence[str]:
    """A colour for each site; with more sites than colours, one for all."""
    return SITE_COLORS[:num_sites] if num_sites <= len(SITE_COLORS) else [VALIDATION] * num_sites


def round_axis(axes: Axes, run: Run) -> None:
    """Rounds from left to right."""
    axes.set_xlabel("round", color=INK)
    axes.set_xlim(run.rounds[0].round - 0.5, run.rounds[-1].round + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def draw_line(axes: Axes, run: Run, points: Sequence[tuple[int, float]], color: str, label: str) -> None:
    """A quantity by round."""
    rounds, values = zip(*points, strict=True)
    marker = "o" if len(run.rounds) < MANY_ROUNDS else ""
    axes.plot(rounds, values, color=color, label=label, linewidth=1.8, marker=marker, markersize=5)


def say(axes: Axes, text: str) -> None:
    """Text instead of data."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK, fontsize=12)


def note_on_line(axes: Axes, text: str, height: float, **options: Any) -> None:
    """Words just above a horizontal line."""
    axes.annotate(
        text, (0.015, height), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points",
        color=INK, **options,
    )  # fmt: skip
