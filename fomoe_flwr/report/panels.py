"""The panels with a quantity by round: loss, bytes, resident share, speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fomoe_flwr.plan.rivals import Traffic, compare_strategies
from fomoe_flwr.report.load import CLASSES, Run, SiteRound
from fomoe_flwr.units import byte_unit, in_bytes, percent, times

INK = "#333333"
# Okabe and Ito for quantities, Tol's muted set for sites: both are made for the colour-blind.
TRAIN, VALIDATION = "#56B4E9", "#0072B2"
CLASS_COLORS = {"dense": "#0072B2", "expert": "#E69F00", "other": "#999999"}
CLASS_LABELS = {"dense": "dense part", "expert": "experts", "other": "other"}
SITE_COLORS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#DDCC77", "#882255", "#44AA99", "#AA4499")

MANY_ROUNDS = 60  # from here on no markers and no gaps between bars
OFF_CHART = 4.0  # a rival that sends more than this many times our bytes would flatten our bars


def dress(axes: Axes, title: str, y_label: str) -> None:
    """The looks all panels share."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def site_colors(num_sites: int) -> Sequence[str]:
    """A colour a site while there are enough of them, else one for all."""
    return SITE_COLORS[:num_sites] if num_sites <= len(SITE_COLORS) else [VALIDATION] * num_sites


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
    # Bits per byte is the validation loss in another unit (the factor is that text's tokens per byte): a second
    # line would lie on the first, a second scale says the same.
    factors = [r.val_bpb / r.val_loss for r in run.rounds if r.val_bpb and r.val_loss]
    if known := [factor for factor in factors if math.isfinite(factor)]:  # a run that diverged has nan
        factor = known[-1]
        scales = (lambda loss: np.multiply(loss, factor), lambda bpb: np.divide(bpb, factor))
        right = axes.secondary_yaxis("right", functions=scales)
        right.set_ylabel("validation, bits per byte", color=INK)
        right.tick_params(colors=INK)


def traffic(axes: Axes, run: Run) -> None:
    """Measured bytes, stacked by class, and the rivals' by formula; linear, as a stack on a log scale misleads."""
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

    for site_bytes, rows in groupby(on_chart, key=lambda row: row.site_bytes):  # DDP is DiLoCo where K = 1
        height = site_bytes / factor
        axes.axhline(height, color=INK, linestyle="--", linewidth=1.5)
        names = " = ".join(row.name for row in rows)
        axes.annotate(
            f"{names}, by formula: {in_bytes(site_bytes)}",
            (0.015, height),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            color=INK,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        )
    if beyond := [row for row in rivals if row not in on_chart]:
        axes.text(0.015, 0.86, _off_chart(beyond, ours), transform=axes.transAxes, va="top", color=INK)


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
        axes.set_ylim(0, 1.15 * axes.dataLim.y1 or 1)  # 0 where no time was measured
        # One legend for this panel and the one above.
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=4)


def by_site(axes: Axes, run: Run, value: Callable[[SiteRound], float | None]) -> None:
    """A line a site while they can be told apart, else mean and range over the sites."""
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


def _off_chart(rows: list[Traffic], ours: float) -> str:
    return "\n".join(
        f"↑ off the chart: {row.name}, by formula {in_bytes(row.site_bytes)} ({times(row.site_bytes / ours)})"
        for row in rows
    )


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
    """Words where there is nothing to draw."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK, fontsize=12)
