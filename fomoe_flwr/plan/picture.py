"""`fomoe plan --picture FILE`: a site's bytes, memory and time against overlap, and a round against bandwidth."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fomoe_flwr.config import RunConfig, SiteConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.record import Plan, SitePlan
from fomoe_flwr.plan.rivals import fomoe_overlap, possible_overlaps, some, with_strategy
from fomoe_flwr.plan.show import Outlook, assumptions_in_words
from fomoe_flwr.plan.system import PlanSite
from fomoe_flwr.report.picture import INK, dress, save_figure
from fomoe_flwr.report.tables import setting
from fomoe_flwr.units import byte_unit, in_bytes

SIZE_INCHES = (13.0, 9.0)
DPI = 100
SMALL = 10  # points

# Okabe and Ito: made for the colour-blind. Partitioned is wide and pale, as skip often lies on it.
SKIP, PARTITIONED, REPLICA, THIS_RUN, MEMORY = "#0072B2", "#F0C36D", "#888888", "#007A5A", "#D55E00"
MOST_OVERLAPS = 24
MOST_MEMORIES = 6
SCALES = tuple(10 ** (exponent / 4) for exponent in range(-8, 9))  # 0.01 to 100 times the federation's links
TIME_UNITS = (
    (86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"), (1e-3, "ms"), (1e-6, "µs"),
)  # fmt: skip
DIGITS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
NICE_TIMES = {
    number * unit: f"{number} {name}"
    for unit, name, numbers in (
        (1e-6, "µs", DIGITS),
        (1e-3, "ms", DIGITS),
        (1.0, "s", DIGITS[:5]),
        (60.0, "min", DIGITS[:5]),
        (3600.0, "h", DIGITS[:4]),
        (86400.0, "d", (*DIGITS, 1000, 10_000)),
    )
    for number in numbers
}
PAPER = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}  # under words on lines
MOST_TICKS = 12
MOST_NAMES = 8  # of this run's sites


class Point(NamedTuple):
    """Equal shares at one overlap or with one scale of the links: the site that needs most of each."""

    at: float
    site_bytes: float  # down and up in a round
    memory_bytes: float
    round_s: float


class _Line(NamedTuple):
    points: list[Point]
    color: str
    style: str
    width: float


def draw(path: Path, outlook: Outlook) -> None:
    """Write the picture.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12))
    FigureCanvasAgg(figure)
    # Head and foot have strips of their own, so that no length of theirs pushes into the panels.
    grid = figure.add_gridspec(3, 1, height_ratios=(0.1, 0.82, 0.08))
    head, middle, foot = (figure.add_subfigure(grid[row]) for row in range(3))
    head.text(0.012, 0.78, setting(outlook.config), va="center", fontsize=12.5, fontweight="bold", color=INK)
    head.legend(handles=_handles(outlook), loc=(0.004, 0.02), ncols=3, frameon=False, fontsize=SMALL)
    *assumed, _ = assumptions_in_words(outlook)  # the last is about useful tokens, which are not drawn
    foot.text(0.012, 0.5, "\n".join(assumed), va="center", fontsize=SMALL, color=INK)
    (upper_left, upper_right), (lower_left, lower_right) = middle.subplots(2, 2)
    lines = [
        _Line(overlap_points(outlook.config, "partitioned"), PARTITIONED, "-", 6.0),
        _Line(overlap_points(outlook.config, "skip"), SKIP, "-", 1.8),
    ]
    _bytes_panel(upper_left, lines, outlook)
    _memory_panel(upper_right, lines, outlook)
    _time_panel(lower_left, lines, outlook)
    _bandwidth_panel(lower_right, outlook)
    save_figure(figure, path)


# ----- numbers


def overlap_points(config: RunConfig, routing: str) -> list[Point]:
    """Equal shares at every overlap, or at some of them where they are many."""
    overlaps = possible_overlaps(len(config.federation.sites), config.model.num_experts)
    every = math.ceil(len(overlaps) / MOST_OVERLAPS)
    chosen = overlaps[::-every][::-1]  # the full replica is always among them
    return _points((o, with_strategy(config, overlap=o, routing=routing, placement="fixed")) for o in chosen)


def bandwidth_points(config: RunConfig) -> list[Point]:
    """The configuration with all its links so many times as fast."""
    # The solver may take seconds.
    scales = SCALES[::2] if config.strategy.placement == "planned" else SCALES
    return _points((scale, scaled_links(config, scale)) for scale in scales)


def scaled_links(config: RunConfig, scale: float) -> RunConfig:
    """The same federation with other bandwidths, the assumed ones and the server's too; latency stays."""

    def times(mbps: float | None) -> float | None:
        return None if mbps is None else scale * mbps

    def site(given: SiteConfig) -> SiteConfig:
        return dataclasses.replace(given, up_mbps=times(given.up_mbps), down_mbps=times(given.down_mbps))

    plan = dataclasses.replace(
        config.plan,
        assumed_mbps=scale * config.plan.assumed_mbps,
        server_mbps=times(config.plan.server_mbps),
    )
    sites = [site(given) for given in config.federation.sites]
    federation = dataclasses.replace(config.federation, sites=sites)
    return dataclasses.replace(config, plan=plan, federation=federation)


def _points(configs: Iterable[tuple[float, RunConfig]]) -> list[Point]:
    try:
        return [_point(at, make_plan(config)) for at, config in configs]
    except ConfigError:
        # A strategy that is not possible here is not drawn.
        return []


def _point(at: float, plan: Plan) -> Point:
    return Point(
        at,
        max(site.bytes_down + site.bytes_up for site in plan.sites),
        max(site.memory_bytes for site in plan.sites),
        plan.round_s,
    )


# ----- panels against overlap


def _bytes_panel(axes: Axes, lines: Sequence[_Line], outlook: Outlook) -> None:
    factor, unit = byte_unit(max(point.site_bytes for line in lines for point in line.points))
    dress(axes, "Bytes of a site in a round, down + up", unit)
    _against_overlap(axes, lines, lambda point: point.site_bytes / factor)
    _mark_sites(axes, outlook, lambda site: (site.bytes_down + site.bytes_up) / factor)


def _memory_panel(axes: Axes, lines: Sequence[_Line], outlook: Outlook) -> None:
    highest = max(point.memory_bytes for line in lines for point in line.points)
    factor, unit = byte_unit(highest)
    dress(axes, "Memory of a site: weights, gradients, moments", unit)
    _against_overlap(axes, lines, lambda point: point.memory_bytes / factor)
    _mark_sites(axes, outlook, lambda site: site.memory_bytes / factor)
    groups = memory_lines(outlook.sites)
    near = [memory for memory, _ in groups if memory <= 1.6 * highest]
    top = 1.12 * max([highest, *near])
    axes.set_ylim(0, top / factor)
    for memory in near:
        axes.axhline(memory / factor, color=MEMORY, linestyle=":", linewidth=1.5)
    for memory, says in _apart(groups[: len(near)], 0.05 * top):
        axes.annotate(
            says, (0.01, memory / factor), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", fontsize=SMALL, color=MEMORY, bbox=PAPER,
        )  # fmt: skip
    notes = [f"more than drawn: {says}" for memory, says in groups if memory > top][:1]
    if unknown := [site.name for site in outlook.sites if math.isinf(site.memory_bytes)]:
        notes.append(
            f"not given: memory of {'any site' if len(unknown) == len(outlook.sites) else some(unknown)}"
        )
    axes.text(
        0.98, 0.03, "\n".join(notes), transform=axes.transAxes, ha="right", fontsize=SMALL, color=MEMORY
    )


def memory_lines(sites: Sequence[PlanSite]) -> list[tuple[float, str]]:
    """Memories that are given, ascending, and who has them; of many only the least and the median."""
    groups: dict[float, list[str]] = {}
    for site in sites:
        if math.isfinite(site.memory_bytes):
            groups.setdefault(site.memory_bytes, []).append(site.name)
    ordered = sorted(groups.items())
    if len(ordered) <= MOST_MEMORIES:
        return [(memory, f"{some(names)}: {in_bytes(memory)}") for memory, names in ordered]
    least, names = ordered[0]
    middle = statistics.median(site.memory_bytes for site in sites)
    lines = [(least, f"least memory: {in_bytes(least)}, {some(names)}")]
    return [*lines, (middle, f"median: {in_bytes(middle)}")] if math.isfinite(middle) else lines


def _apart(labels: Sequence[tuple[float, str]], apart: float) -> list[tuple[float, str]]:
    """Labels that are too close for two lines of text on one line."""
    placed: list[tuple[float, str]] = []
    last = -math.inf
    for height, says in labels:
        if height - last < apart:
            placed[-1] = (height, f"{placed[-1][1]};  {says}")
        else:
            placed.append((height, says))
            last = height
    return placed


def _time_panel(axes: Axes, lines: Sequence[_Line], outlook: Outlook) -> None:
    longest = max(point.round_s for line in lines for point in line.points)
    size, unit = next((unit for unit in TIME_UNITS if longest >= 2 * unit[0]), TIME_UNITS[-1])
    dress(axes, "A round, until the slowest site is done", unit)
    _against_overlap(axes, lines, lambda point: point.round_s / size)
    plan, config = outlook.plan, outlook.config
    if plan.placement == "equal":
        _mark(axes, [config.overlap], [plan.round_s / size])
    else:  # its sites differ, so it has no place on this axis
        axes.axhline(plan.round_s / size, color=THIS_RUN, linestyle="--", linewidth=1.8)


def _against_overlap(axes: Axes, lines: Sequence[_Line], value: Callable[[Point], float]) -> None:
    _grid(axes)
    for line in lines:
        _plot(axes, line, value, marker="o")
    overlaps = sorted({point.at for line in lines for point in line.points})
    axes.set_xlabel(f"overlap: sites that hold each expert ({overlaps[-1]:g} = full replica)", color=INK)
    few = len(overlaps) <= MOST_TICKS
    axes.xaxis.set_major_locator(FixedLocator(overlaps) if few else MaxNLocator(integer=True))
    axes.set_ylim(0, 1.12 * axes.dataLim.y1)


def _mark_sites(axes: Axes, outlook: Outlook, value: Callable[[SitePlan], float]) -> None:
    """This run's sites, each where equal shares would give it as many experts; they lie on the lines."""
    num_sites, num_experts = len(outlook.sites), outlook.config.model.num_experts
    points: dict[tuple[float, float], list[str]] = {}
    for site in outlook.plan.sites:
        at = site.experts_per_layer * num_sites / num_experts
        points.setdefault((at, value(site)), []).append(site.site)
    _mark(axes, [at for at, _ in points], [height for _, height in points])
    if outlook.plan.placement != "equal":
        axes.set_xlabel(f"{axes.get_xlabel()}; ◆ by what each holds", color=INK)
    if outlook.plan.placement != "equal" and len(points) <= MOST_NAMES:
        for place, names in points.items():
            # Below the line, or above it where there is more room to the left.
            left = place[0] > 0.7 * num_sites
            axes.annotate(
                some(names), place, xytext=(-8, 6) if left else (8, -14), textcoords="offset points",
                ha="right" if left else "left", fontsize=SMALL, color=THIS_RUN,
            )  # fmt: skip


# ----- a round against bandwidth


def _bandwidth_panel(axes: Axes, outlook: Outlook) -> None:
    dress(axes, "A round, with faster or slower links", "")
    _grid(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    lines = _bandwidth_lines(outlook)
    for line in lines:
        _plot(axes, line, lambda point: point.round_s)
    _mark(axes, [1], [outlook.plan.round_s])
    axes.set_xlabel("bandwidth of all links, relative to this federation's (1x)", color=INK)
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.1, 1, 10, 100]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda scale, _: f"{scale:g}x"))
    seconds = [outlook.plan.round_s, *(point.round_s for line in lines for point in line.points)]
    low, high = min(seconds) / 1.5, max(seconds) * 1.5
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(_time_ticks(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: NICE_TIMES.get(float(seconds), "")))


def _bandwidth_lines(outlook: Outlook) -> list[_Line]:
    config = outlook.config
    replica = _Line(
        bandwidth_points(with_strategy(config, overlap=None, placement="fixed")), REPLICA, "-", 1.8
    )
    overlap = fomoe_overlap(config)
    lines = [replica]
    if overlap in possible_overlaps(len(outlook.sites), config.model.num_experts):
        partitioned, skip = (
            bandwidth_points(with_strategy(config, overlap=overlap, routing=routing, placement="fixed"))
            for routing in ("partitioned", "skip")
        )
        lines = [_Line(partitioned, PARTITIONED, "-", 6.0), replica, _Line(skip, SKIP, "-", 1.8)]
    if outlook.plan.placement != "equal":
        lines.append(_Line(bandwidth_points(config), THIS_RUN, "--", 1.8))
    return lines


def _time_ticks(low: float, high: float) -> list[float]:
    """Round times between two, fewer where they are many."""
    ticks = [tick for tick in NICE_TIMES if low <= tick <= high]
    return ticks[:: math.ceil(len(ticks) / MOST_TICKS) or 1]


# ----- what the panels share


def _handles(outlook: Outlook) -> list[Line2D]:
    at = f"lower right: overlap {fomoe_overlap(outlook.config)}"
    planned = outlook.plan.placement != "equal"
    name = f"this run, {outlook.plan.placement} placement" if planned else "this run"
    if outlook.plan.placement == "planned":
        name += f": the useful work of overlap {outlook.config.overlap} in a round"
    return [
        Line2D([], [], color=SKIP, marker="o", linewidth=1.8, label=f"equal shares, skip ({at})"),
        Line2D([], [], color=PARTITIONED, marker="o", linewidth=6, label=f"equal shares, partitioned ({at})"),
        Line2D([], [], color=REPLICA, linewidth=1.8, label="full replica"),
        Line2D([], [], color=THIS_RUN, marker="D", linestyle="--" if planned else "", label=name),
        Line2D([], [], color=MEMORY, linestyle=":", label="memory that a site has"),
    ]


def _plot(axes: Axes, line: _Line, value: Callable[[Point], float], marker: str = "") -> None:
    axes.plot(
        [point.at for point in line.points],
        [value(point) for point in line.points],
        color=line.color,
        linestyle=line.style,
        linewidth=line.width,
        marker=marker,
        markersize=line.width + 3,
    )


def _mark(axes: Axes, at: Sequence[float], heights: Sequence[float]) -> None:
    size = 9 if len(at) <= MOST_NAMES else 3
    axes.plot(at, heights, color=THIS_RUN, marker="D", linestyle="", markersize=size, zorder=4)


def _grid(axes: Axes) -> None:
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
