"""`routing.png`: where the experts are, how much each is used, and how the routers develop.

Load is relative to an even share. White is the load that each expert has if all have the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from fomoe_flwr.health import COLLAPSED_BELOW, DYING_BELOW
from fomoe_flwr.report.load import Run
from fomoe_flwr.report.picture import (
    DPI,
    EMPTY,
    INK,
    MANY_ROUNDS,
    TRAIN,
    VALIDATION,
    draw_line,
    dress,
    expert_map,
    round_axis,
    save_figure,
    say,
    short_names,
)
from fomoe_flwr.report.tables import setting
from fomoe_flwr.units import percent

SIZE_INCHES = (14.0, 11.5)
MAX_LAYERS = 6  # whose load is shown round by round
MAX_MARKS = 1024  # cells of a heat map up to which dying experts are marked one by one

WARN = "#D55E00"
EVEN = LogNorm(1 / 8, 8)  # times an even share; fixed, so that pictures can be compared
NOBODY = 1e-9  # shown instead of 0, which has no logarithm

Loads = NDArray[np.float64]


def draw_routing(run: Run) -> Path | None:
    """Write `routing.png` into the run directory and return its path; None where no round has routing figures.

    Raises:
        RunError: it cannot be written.
    """
    if not measured(run):
        return None
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(4, 1, height_ratios=(0.07, 0.36, 0.28, 0.29))
    head = figure.add_subfigure(grid[0])
    head.text(0.5, 0.75, setting(run.config), ha="center", va="center", fontsize=12.5, fontweight="bold")
    head.text(0.5, 0.15, headline(run), ha="center", va="center", fontsize=11.5, color=INK)
    where, used = figure.add_subfigure(grid[1]).subplots(1, 2)
    expert_map(where, run)
    load_map(used, run)
    load_by_round(figure.add_subfigure(grid[2]), run)
    spread, routers, local, jumps = figure.add_subfigure(grid[3]).subplots(1, 4)
    load_spread(spread, run)
    router_figures(routers, run)
    resident_map(local, run)
    spikes(jumps, run)
    return save_figure(figure, run.directory / "routing.png")


def measured(run: Run) -> dict[int, dict[str, Any]]:
    """The routing figures by round, from round 1 on."""
    return {record.round: {**record.routing} for record in run.rounds if record.routing and record.round}


def headline(run: Run) -> str:
    """The state of routing in the last round that was measured, in one sentence."""
    entropies = _points(run, "load_entropy")
    if not entropies:
        return "no load was reported"
    last, entropy = entropies[-1]
    routing, total = measured(run)[last], run.config.model.num_layers * run.config.model.num_experts
    parts = [f"round {last}: load entropy {percent(entropy)} of its maximum"]
    if (dead := routing.get("dead_experts")) is not None:
        parts.append(f"{dead:g} of {total:,} experts without any token")
    if (load_LE := relative_loads(run).get(last)) is not None:
        parts.append(f"{int(_dying(load_LE).sum())} dying")
    if (agreement := routing.get("agreement")) is not None:
        parts.append(f"two sites' routers agree on {percent(agreement)} of the choices")
    return "    ".join(parts)


# ----- load, by layer and expert


def relative_loads(run: Run) -> dict[int, Loads]:
    """Load of each layer's experts by round, relative to an even share; nan for a layer without any token."""
    tables = {
        round_: np.array(routing["load"], dtype=np.float64)
        for round_, routing in measured(run).items()
        if routing.get("load")
    }
    with np.errstate(invalid="ignore"):
        return {round_: load_LE / load_LE.mean(axis=1, keepdims=True) for round_, load_LE in tables.items()}


def load_map(axes: Axes, run: Run) -> None:
    """Layers x experts: what each expert got in the last round that was measured."""
    loads = relative_loads(run)
    if not loads:
        layer_map(axes, run, "load_entropy", "Load entropy of each layer, share of its maximum")
        return
    last = max(loads)
    dress(axes, f"Load of each expert in round {last}", "layer")
    load_LE = loads[last]
    image = _heat_map(axes, load_LE)
    axes.yaxis.set_major_locator(_whole_numbers())
    meaning = "black: no token chose it"
    if load_LE.size <= MAX_MARKS:
        layers, experts = np.nonzero(_dying(load_LE))
        axes.scatter(experts, layers, marker="v", s=45, color="white", edgecolors=INK)
        meaning += "; ▾: dying, below a tenth of an even share"
    axes.set_xlabel(f"expert   ({meaning})", color=INK)
    bar = axes.figure.colorbar(image, ax=axes, extend="both", pad=0.02)
    bar.set_label("times an even share", color=INK)
    bar.ax.yaxis.set_major_locator(FixedLocator([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]))
    bar.ax.yaxis.set_major_formatter(FixedFormatter(["1/8", "1/4", "1/2", "even", "2x", "4x", "8x"]))
    bar.ax.yaxis.set_minor_locator(NullLocator())


def layer_map(axes: Axes, run: Run, name: str, title: str) -> None:
    """Layers x rounds of a figure, for models with so many experts that the load is not recorded by expert."""
    dress(axes, title, "layer")
    columns = {round_: routing["by_layer"][name] for round_, routing in measured(run).items()}
    values_LR = np.array(list(columns.values()), dtype=np.float64).T
    if np.isnan(values_LR).all():
        say(axes, "not measured")
        return
    axes.spines[:].set_visible(False)
    extent = (min(columns) - 0.5, max(columns) + 0.5, len(values_LR) - 0.5, -0.5)
    highest = max(1.0, float(np.nanmax(values_LR)))
    image = axes.imshow(
        values_LR, "viridis", vmin=0, vmax=highest, aspect="auto", interpolation="nearest", extent=extent
    )
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.set_xlabel("round", color=INK)
    axes.figure.colorbar(image, ax=axes, pad=0.02)


def _dying(load_LE: Loads) -> NDArray[np.bool_]:
    dying_LE: NDArray[np.bool_] = (load_LE > 0) & (load_LE < DYING_BELOW)
    return dying_LE


def load_by_round(figure: SubFigure, run: Run) -> None:
    """Experts x rounds for each layer, or for those whose load is least even."""
    loads = relative_loads(run)
    if not loads:
        layer_map(figure.subplots(), run, "dead_experts", "Experts of each layer that no token chose")
        return
    layers = least_even_layers(loads[max(loads)])
    first, last = min(loads), max(loads)
    nothing = np.full_like(loads[last], np.nan)
    load_RLE = np.stack([loads.get(round_, nothing) for round_ in range(first, last + 1)])
    panels = np.atleast_1d(figure.subplots(1, len(layers)))
    for axes, layer in zip(panels, layers, strict=True):
        dress(axes, f"layer {layer}", "")
        _heat_map(axes, load_RLE[:, layer].T, first)
        axes.set_xlabel("round", color=INK)
        axes.yaxis.set_major_locator(_whole_numbers())
    chosen = (
        ""
        if len(layers) == len(loads[last])
        else f"   (least even {len(layers)} of {len(loads[last])} layers)"
    )
    dress(panels[0], f"Load by round: layer {layers[0]}", f"expert{chosen}")


def least_even_layers(load_LE: Loads) -> list[int]:
    """All layers, or the `MAX_LAYERS` with the greatest variation of load, in their order."""
    order = np.argsort(-np.nan_to_num(load_LE).std(axis=1), kind="stable")
    return sorted(order[:MAX_LAYERS].tolist())


def _heat_map(axes: Axes, load_YX: Loads, first: int = 0) -> AxesImage:
    """Rows from the top; the first column is number `first`."""
    rows, columns = load_YX.shape
    shown_YX = np.where(load_YX == 0, NOBODY, np.maximum(load_YX, EVEN.vmin or 0))
    extent = (first - 0.5, first + columns - 0.5, rows - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(_whole_numbers(5))
    return axes.imshow(shown_YX, _colors(), EVEN, aspect="auto", interpolation="nearest", extent=extent)


def _colors() -> Colormap:
    # Without the darkest colours: an expert with few tokens must not look like one without any (black).
    shades = matplotlib.colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256))
    return ListedColormap(shades).with_extremes(under="black", bad=EMPTY)


def _whole_numbers(most: int = 9) -> MaxNLocator:
    return MaxNLocator(most, integer=True, min_n_ticks=1)


# ----- figures by round


def load_spread(axes: Axes, run: Run) -> None:
    """Entropy of the load, mean and range over the layers."""
    dress(axes, "How even the load is", "entropy, share of its maximum")
    round_axis(axes, run)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    entropies = _points(run, "load_entropy")
    if not entropies:
        say(axes, "not measured")
        return
    rounds = [round_ for round_, _ in entropies]
    by_layer = [measured(run)[round_]["by_layer"]["load_entropy"] for round_ in rounds]
    known = [[value for value in values if value is not None] or [math.nan] for values in by_layer]
    low, high = [min(values) for values in known], [max(values) for values in known]
    axes.fill_between(rounds, low, high, color=TRAIN, alpha=0.4, label="least to most even layer")
    draw_line(axes, run, entropies, VALIDATION, "mean of the layers")
    if (experts := run.config.model.num_experts) > 2:
        # exp(entropy) is the number of experts that seem to be used.
        bound = 1 + math.log(COLLAPSED_BELOW) / math.log(experts)
        axes.axhline(
            bound, color=WARN, linestyle=":", linewidth=1.5, label="as if half of the experts were used"
        )
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def router_figures(axes: Axes, run: Run) -> None:
    """How alike the sites' routers are, how far the global one moves, and how alike the experts become."""
    dress(axes, "Routers and experts", "0: none, 1: all")
    round_axis(axes, run)
    axes.set_ylim(-0.1, 1.05)
    for name, label, color in (
        ("agreement", "choices on which two sites agree", "#0072B2"),
        ("js_distance", "distance of two sites' gates (JS)", "#56B4E9"),
        ("drift", "choices that the sync changed", "#E69F00"),
        ("expert_similarity", "cosine of two experts", "#009E73"),
    ):
        if points := _points(run, name):
            draw_line(axes, run, points, color, label)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    else:
        say(axes, "not measured")


def resident_map(axes: Axes, run: Run) -> None:
    """Sites x layers: share of the router's choices that the site held, in the last round that was measured."""
    known = [
        (round_, found) for round_, routing in measured(run).items() if (found := routing.get("residents"))
    ]
    if not known:
        dress(axes, "Choices held by the site", "")
        say(axes, "not measured")
        return
    round_, residents = known[-1]
    dress(axes, f"Choices held, round {round_}", "")
    share_ML = np.array(list(residents.values()), dtype=np.float64)
    axes.spines[:].set_visible(False)
    image = axes.imshow(share_ML, "viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xlabel(f"layer   (sites hold {percent(run.held_share)} of the experts)", color=INK)
    axes.xaxis.set_major_locator(_whole_numbers(5))
    if len(residents) <= 10:
        axes.set_yticks(range(len(residents)), short_names(list(residents)))
    else:
        axes.set_ylabel("site", color=INK)
    axes.figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), pad=0.03)


def spikes(axes: Axes, run: Run) -> None:
    """By how much the loss jumps when the sites take over the averaged model."""
    dress(axes, "Loss jump at a sync", "nats per token")
    round_axis(axes, run)
    points = _points(run, "spike")
    if not points:
        say(axes, "needs two rounds" if run.rounds[-1].round < 2 else "not measured")
        return
    rounds, values = zip(*points, strict=True)
    width = 0.8 if len(rounds) < MANY_ROUNDS else 1.0
    axes.bar(rounds, values, width, color=[WARN if value > 0 else VALIDATION for value in values])
    axes.axhline(0, color=INK, linewidth=1)


def _points(run: Run, name: str) -> list[tuple[int, float]]:
    """A figure by round, where it is defined."""
    values = [(round_, routing.get(name)) for round_, routing in measured(run).items()]
    return [(round_, value) for round_, value in values if value is not None]
