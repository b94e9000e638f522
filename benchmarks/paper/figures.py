"""FoMoE's modelled figures 8, 9 and 10, and the scale sweep, as pictures.

Every function writes a PNG and returns the numbers it drew. What the numbers assume stands under each picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.typing import LineStyleType

from benchmarks.paper.formulas import (
    bytes_a_token,
    compute_s,
    ring_bytes,
    round_s,
    rounds_for,
    site_flops,
    star_bytes,
)
from benchmarks.paper.scale import (
    GBPS,
    H100_FLOPS_PER_S,
    MFU,
    SITES,
    Scale,
    Strategy,
    Throughput,
    best_domain,
    sweep,
)
from fomoe_flwr.compose import compose
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model.spec import parameter_counts
from fomoe_flwr.plan.system import split_parameters, transfer_s
from fomoe_flwr.report.picture import INK, dress, save_figure
from fomoe_flwr.units import count, in_bytes, percent, times

DPI = 80
SMALL = 10  # points: labels at lines, assumptions

# Okabe and Ito, as in the report: made for the colour-blind.
SKIP, PARTITIONED = "#0072B2", "#E69F00"
GREY = "#888888"
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 2}  # under text, so that no grid runs through it

PAPER_MODELS = ("proxy", "medium", "large", "xl", "xxl")
PAPER_SEQ_LEN = 2048
PAPER_BATCH_TOKENS = 1024 * 2048  # of all sites, a step
PAPER_LOCAL_STEPS = 32
BYTES_PER_NUMBER = 2  # bf16
MODES = ("skip", "partitioned")

FIGURE_8_SITES = 8

FIGURE_9_SITES = 4
FIGURE_9_OVERLAPS = (1, 2)  # the third, 4 of 4 sites, is DiLoCo
FIGURE_9_ROUNDS = 20  # 640 steps, 1.34 B tokens: what the paper trains
RESHUFFLE_RATE = 1.0  # gamma: placement redrawn every round, as in the paper's headline

FIGURE_10_SITES = 8
FIGURE_10_OVERLAPS = (1, 2, 4, 8)
FIGURE_10_GBPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
FIGURE_10_TOKENS = 60e9
FIGURE_10_ACCELERATORS = 32  # H100, of all sites together
LATENCY_S = 0.05

SWEEP_GBPS = (0.1, 1.0, 10.0, 100.0)


_FORMULA_NOTES = {"ours": "", "paper": "\nFlops by the paper's eq. 3 as printed, with unmasked attention."}


class FlopsRow(NamedTuple):
    """A point of figure 8: training flops of a token at one site."""

    model: str
    routing: str
    overlap: int
    flops: float


class BytesRow(NamedTuple):
    """A point of figure 9: what one site has exchanged after so many tokens of all sites."""

    strategy: str
    overlap: int  # sites holding each expert; all of them but for FoMoE
    network: str  # ring or star
    tokens: float
    site_bytes: float
    bytes_a_token: float  # BPT: of all sites together


class HoursRow(NamedTuple):
    """A point of figure 10: wall-clock hours of the whole training."""

    routing: str
    overlap: int
    gbps: float
    hours: float


class SitesRow(NamedTuple):
    """A point of the scale sweep."""

    limited: bool  # the server's link is as fast as stated, and not as fast as anybody wants
    point: Throughput


def paper_models() -> list[ModelConfig]:
    """The five models of the paper, smallest first."""
    return [compose([f"model={name}"]).config.model for name in PAPER_MODELS]


# -- figure 8 --------------------------------------------------------------------------------------------


def figure_8(
    path: Path, models: Sequence[ModelConfig] | None = None, formula: str = "ours"
) -> list[FlopsRow]:
    """Flops a token against O_e, both routing modes, a panel a model.

    Args:
        formula: see `site_flops`.

    Raises:
        RunError: the picture cannot be written.
    """
    models = paper_models() if models is None else models
    rows = flops_rows(models, formula)
    figure = _figure(13, 3.9)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        mine = [row for row in rows if row.model == model.name]
        _flops_panel(axes, model, mine, "GFLOP a token" if model is models[0] else "")
    handles = [_handle(PARTITIONED, "partitioned router"), _handle(SKIP, "skip-token")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    _frame(
        figure,
        "Figure 8: compute of a token against overlap",
        f"Forward and backward, {FIGURE_8_SITES} sites, sequences of {PAPER_SEQ_LEN} tokens, balanced routing. "
        "Percentages: of a full replica ($O_e$ = 8). Each panel has a scale of its own."
        + _FORMULA_NOTES[formula],
    )
    save_figure(figure, path)
    return rows


def flops_rows(models: Sequence[ModelConfig], formula: str = "ours") -> list[FlopsRow]:
    """`F(O_e)` of every model in both modes."""
    return [
        FlopsRow(
            model.name,
            routing,
            overlap,
            site_flops(model, PAPER_SEQ_LEN, routing, residents, formula=formula),
        )
        for model in models
        for routing in MODES
        for overlap in range(1, FIGURE_8_SITES + 1)
        for residents in [model.num_experts * overlap / FIGURE_8_SITES]
    ]


def _flops_panel(axes: Axes, model: ModelConfig, rows: Sequence[FlopsRow], y_label: str) -> None:
    dress(axes, f"{model.name}, {count(parameter_counts(model).total)}", y_label)
    _grid(axes)
    replica = rows[-1].flops
    share = {}
    for routing, color in (("partitioned", PARTITIONED), ("skip", SKIP)):
        points = [(row.overlap, row.flops / 1e9) for row in rows if row.routing == routing]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.8)
        share[routing] = percent(points[0][1] * 1e9 / replica)
    # Down here, because the curves of the paper's models stay in the upper half.
    says = f"at $O_e$ = 1:\npartitioned {share['partitioned']}\nskip {share['skip']}"
    axes.text(
        0.08, 0.08, says, transform=axes.transAxes, fontsize=SMALL, color=INK, linespacing=1.4, bbox=_WHITE
    )
    axes.set_ylim(0, 1.15 * replica / 1e9)
    axes.set_xlim(0.6, FIGURE_8_SITES + 0.4)
    axes.set_xticks(range(1, FIGURE_8_SITES + 1))
    axes.set_xlabel("$O_e$, sites with an expert", color=INK)


# -- figure 9 --------------------------------------------------------------------------------------------


def figure_9(path: Path, model: ModelConfig | None = None) -> list[BytesRow]:
    """Cumulative bytes of a site against tokens: all strategies on a log scale, the thrifty ones on a linear one.

    Raises:
        RunError: the picture cannot be written.
    """
    model = compose(["model=large"]).config.model if model is None else model
    rows = bytes_rows(model)
    figure = _figure(13, 5.4)
    left, right = figure.subplots(1, 2)
    dress(left, "All, logarithmic", "a site has exchanged, GB")
    dress(right, "DiLoCo and FoMoE, linear", "a site has exchanged, GB")
    left.set_xscale("log")
    left.set_yscale("log")
    thrifty = {"DiLoCo", "FoMoE"}
    _bytes_lines(left, rows, label_stars=False)
    _bytes_lines(right, [row for row in rows if row.strategy in thrifty], label_stars=True)
    right.set_xlim(left=0)
    right.set_ylim(bottom=0)
    right.xaxis.set_major_locator(MaxNLocator(4))
    for axes in (left, right):
        axes.set_xlabel("tokens trained on, all sites together", color=INK)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
    left.xaxis.set_major_locator(FixedLocator([1e8, 2e8, 5e8, 1e9]))
    left.xaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    handles = [_handle(INK, "ring, as in the paper"), _handle(INK, "star, as in this program", ":")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    _frame(
        figure,
        "Figure 9: bytes against tokens",
        f"Model {model.name}, {FIGURE_9_SITES} sites, K = {PAPER_LOCAL_STEPS}, {count(PAPER_BATCH_TOKENS)} tokens a "
        f"step, bf16, partitioned router, placement redrawn every round (gamma = {RESHUFFLE_RATE:g}).\n"
        "Ring: bytes that a site sends while it receives as many. Star: received and sent, half each. Factors: of "
        "FoMoE with $O_e$ = 2 on the ring. B a token: of all sites together (BPT).",
    )
    save_figure(figure, path)
    return rows


def bytes_rows(model: ModelConfig) -> list[BytesRow]:
    """Cumulative bytes of a site at the end of every round."""
    kinds = [("DDP", FIGURE_9_SITES, PAPER_LOCAL_STEPS), ("LocalAdamW", FIGURE_9_SITES, 3)]
    kinds += [("DiLoCo", FIGURE_9_SITES, 1), *(("FoMoE", overlap, 1) for overlap in FIGURE_9_OVERLAPS)]
    round_tokens = PAPER_LOCAL_STEPS * PAPER_BATCH_TOKENS
    return [
        BytesRow(
            strategy,
            overlap,
            network,
            rounds * round_tokens,
            rounds * copies * exchange_bytes,
            bytes_a_token(FIGURE_9_SITES, copies * exchange_bytes, round_tokens),
        )
        for strategy, overlap, copies in kinds
        for network, exchange_bytes in _exchange_bytes(model, overlap)
        for rounds in range(1, FIGURE_9_ROUNDS + 1)
    ]


def _exchange_bytes(model: ModelConfig, overlap: int) -> list[tuple[str, float]]:
    """One exchange of what a site holds, on a ring and through a server (down and up)."""
    split = split_parameters(model, "partitioned")
    experts = model.num_layers * model.num_experts
    ring = ring_bytes(split, experts, FIGURE_9_SITES, overlap, RESHUFFLE_RATE, BYTES_PER_NUMBER)
    star = 2 * star_bytes(split.held(experts * overlap / FIGURE_9_SITES), BYTES_PER_NUMBER)
    return [("ring", ring), ("star", star)]


_BYTES_COLORS = {
    ("DDP", 4): "#000000",
    ("LocalAdamW", 4): "#CC79A7",
    ("DiLoCo", 4): "#D55E00",
    ("FoMoE", 2): "#0072B2",
    ("FoMoE", 1): "#009E73",
}


def _bytes_lines(axes: Axes, rows: Sequence[BytesRow], label_stars: bool) -> None:
    _grid(axes)
    reference = next(r for r in reversed(rows) if (r.strategy, r.overlap, r.network) == ("FoMoE", 2, "ring"))
    labels = []
    for strategy, overlap, network in dict.fromkeys(row[:3] for row in rows):
        mine = [row for row in rows if row[:3] == (strategy, overlap, network)]
        points = [(row.tokens, row.site_bytes / 1e9) for row in mine]
        color = _BYTES_COLORS[strategy, overlap]
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            linestyle=":" if network == "star" else "-",
            linewidth=1.8,
        )
        last = points[-1][1]
        amount = f"{in_bytes(last * 1e9)}, {mine[-1].bytes_a_token:.0f} B a token"
        name = f"FoMoE, $O_e$ = {overlap}" if strategy == "FoMoE" else strategy
        if network == "ring":
            ratio = f" ({times(last * 1e9 / reference.site_bytes)})" if strategy != "FoMoE" else ""
            labels.append((last, f"{name}: {amount}{ratio}", color))
        elif label_stars:
            labels.append((last, f"{name}, star: {amount}", color))
    _end_labels(axes, rows[-1].tokens, labels)


# -- figure 10 -------------------------------------------------------------------------------------------


def figure_10(path: Path, model: ModelConfig | None = None, formula: str = "ours") -> list[HoursRow]:
    """Hours to train against bandwidth and O_e, a panel a routing mode.

    Args:
        formula: see `site_flops`.

    Raises:
        RunError: the picture cannot be written.
    """
    model = compose(["model=xl", "model.num_layers=64"]).config.model if model is None else model
    rows = hours_rows(model, formula)
    figure = _figure(13, 5.0)
    for axes, routing in zip(figure.subplots(1, 2), ("partitioned", "skip"), strict=True):
        _hours_panel(axes, [row for row in rows if row.routing == routing], routing)
    _frame(
        figure,
        f"Figure 10: hours for {count(FIGURE_10_TOKENS)} tokens against bandwidth and overlap",
        f"{count(parameter_counts(model).total)} parameters (d = {model.d_model}, {model.num_layers} layers), "
        f"{FIGURE_10_SITES} sites, {FIGURE_10_ACCELERATORS} H100 together at {MFU:.0%} (assumed) of "
        f"{H100_FLOPS_PER_S / 1e12:.0f} Tflop/s, {count(PAPER_BATCH_TOKENS)} tokens a step, K = {PAPER_LOCAL_STEPS}.\n"
        f"Ring, bf16, fixed placement, {1000 * LATENCY_S:.0f} ms once a round, nothing hidden behind compute. "
        "A skipped assignment counts as free." + _FORMULA_NOTES[formula],
    )
    save_figure(figure, path)
    return rows


def hours_rows(model: ModelConfig, formula: str = "ours") -> list[HoursRow]:
    """`T = N_tok/(M·B_l·K) · (K·t_comp + t_comm)` in hours."""
    return [
        HoursRow(routing, overlap, gbps, _hours(model, routing, overlap, gbps, formula))
        for routing in MODES
        for overlap in FIGURE_10_OVERLAPS
        for gbps in FIGURE_10_GBPS
    ]


def _hours(model: ModelConfig, routing: str, overlap: int, gbps: float, formula: str) -> float:
    residents = model.num_experts * overlap / FIGURE_10_SITES
    flops = site_flops(model, PAPER_SEQ_LEN, routing, residents, formula=formula)
    # All sites work at the same time: the whole batch over all accelerators takes as long as a part over its own.
    step_s = compute_s(flops, PAPER_BATCH_TOKENS, FIGURE_10_ACCELERATORS * MFU * H100_FLOPS_PER_S)
    experts = model.num_layers * model.num_experts
    split = split_parameters(model, routing)
    site_bytes = ring_bytes(split, experts, FIGURE_10_SITES, overlap, 0.0, BYTES_PER_NUMBER)
    seconds = round_s(PAPER_LOCAL_STEPS, step_s, transfer_s(site_bytes, gbps * GBPS, LATENCY_S))
    return rounds_for(FIGURE_10_TOKENS, PAPER_LOCAL_STEPS * PAPER_BATCH_TOKENS) * seconds / 3600


_OVERLAP_COLORS = dict(zip(FIGURE_10_OVERLAPS, ("#009E73", "#0072B2", "#AA4499", "#D55E00"), strict=True))


def _hours_panel(axes: Axes, rows: Sequence[HoursRow], routing: str) -> None:
    dress(axes, {"skip": "Skip-token", "partitioned": "Partitioned router"}[routing], "hours to train")
    _grid(axes)
    axes.set_xscale("log")
    axes.set_xlim(FIGURE_10_GBPS[0] / 4, FIGURE_10_GBPS[-1] * 1.2)  # room for the hours at the left ends
    axes.set_ylim(0, 1.1 * max(row.hours for row in rows))
    starts, ends = [], []
    for overlap, color in _OVERLAP_COLORS.items():
        points = [(row.gbps, row.hours) for row in rows if row.overlap == overlap]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.8)
        kind = " (full replica)" if overlap == FIGURE_10_SITES else ""
        (_, slow), (_, fast) = points[0], points[-1]
        starts.append((slow, f"{slow:.1f} h", color))
        ends.append((fast, f"$O_e$ = {overlap}{kind}: {fast:.1f} h", color))
    _end_labels(axes, FIGURE_10_GBPS[0], starts, left=True)
    _end_labels(axes, FIGURE_10_GBPS[-1], ends)
    axes.set_xlabel("bandwidth of a site's link, Gbit/s", color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda gbps, _: f"{gbps:g}"))


# -- the scale sweep -------------------------------------------------------------------------------------


class _Look(NamedTuple):
    color: str
    style: LineStyleType
    width: float


_LOOKS = {
    Strategy.DDP: _Look("#BBBBBB", "-", 5.0),  # wide and pale: another line lies on it
    Strategy.HYBRID_BEST: _Look("#000000", "--", 1.5),
    Strategy.EXPERT_PARALLEL: _Look("#F5C9A8", "-", 5.0),
    Strategy.HYBRID_DOMAIN: _Look("#D55E00", "--", 1.5),
    Strategy.HYBRID_SHARE: _Look("#CC79A7", "-", 1.5),
    Strategy.DILOCO: _Look("#E69F00", "-", 2.0),
    Strategy.PARTITIONED: _Look("#009E73", "-", 2.0),
    Strategy.SKIP: _Look("#0072B2", "--", 2.0),
}
_ONCE_A_ROUND = (Strategy.DILOCO, Strategy.PARTITIONED, Strategy.SKIP)


def figure_sites(path: Path, scale: Scale | None = None) -> list[SitesRow]:
    """The scale sweep: tokens a second against sites at four bandwidths, and FoMoE beside DiLoCo.

    Raises:
        RunError: the picture cannot be written.
    """
    scale = Scale(compose(["model=xxl"]).config.model) if scale is None else scale
    rows = sites_rows(scale)
    figure = _figure(13, 8.6)
    upper, lower = figure.subplots(2, len(SWEEP_GBPS), sharex=True, sharey="row", height_ratios=(2.1, 1))
    for axes, below, gbps in zip(upper, lower, SWEEP_GBPS, strict=True):
        here = [row for row in rows if row.point.bytes_per_s == gbps * GBPS]
        dress(axes, f"{gbps:g} Gbit/s", "tokens/s, all sites" if gbps == SWEEP_GBPS[0] else "")
        dress(below, "", "times DiLoCo's tokens/s" if gbps == SWEEP_GBPS[0] else "")
        _speeds(axes, here, scale.tokens_a_step)
        _gains(below, [row.point for row in here if row.limited])
    lower[0].set_ylim(bottom=0)
    figure.legend(handles=_sites_handles(scale), loc="outside right upper", frameon=False, labelspacing=0.9)
    _frame(figure, "Scale sweep: sites and bandwidth", _sites_assumptions(scale))
    save_figure(figure, path)
    return rows


def sites_rows(scale: Scale) -> list[SitesRow]:
    """The sweep with the server's limit, and what goes through the server without it."""
    limited = [SitesRow(True, point) for point in sweep(scale, SITES, SWEEP_GBPS)]
    free = dataclasses.replace(scale, server_bytes_per_s=None)
    return limited + [SitesRow(False, point) for point in sweep(free, SITES, SWEEP_GBPS, _ONCE_A_ROUND)]


def _speeds(axes: Axes, rows: Sequence[SitesRow], tokens_a_step: float) -> None:
    _grid(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    free_network = [num_sites * tokens_a_step / _compute_s(rows) for num_sites in SITES]
    axes.plot(SITES, free_network, color=GREY, linewidth=1, linestyle=(0, (1, 1)))
    for strategy, look in _LOOKS.items():
        mine = [row.point for row in rows if row.limited and row.point.strategy is strategy]
        _speed_line(axes, mine, look.color, look.style, look.width)
    for strategy in (Strategy.DILOCO, Strategy.PARTITIONED):  # skip would lie on partitioned
        mine = [row.point for row in rows if not row.limited and row.point.strategy is strategy]
        _speed_line(axes, mine, _LOOKS[strategy].color, ":", 1.5)


def _speed_line(
    axes: Axes, points: Sequence[Throughput], color: str, style: LineStyleType, width: float
) -> None:
    axes.plot(
        [point.num_sites for point in points],
        [point.tokens_per_s for point in points],
        color=color,
        linestyle=style,
        linewidth=width,
    )


def _compute_s(rows: Sequence[SitesRow]) -> float:
    return next(row.point.compute_s for row in rows if row.point.strategy is Strategy.DDP)


def _gains(axes: Axes, points: Sequence[Throughput]) -> None:
    _grid(axes)
    axes.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sites", color=INK)
    diloco = {p.num_sites: p.tokens_per_s for p in points if p.strategy is Strategy.DILOCO}
    axes.axhline(1, color=_LOOKS[Strategy.DILOCO].color, linewidth=2)

    def line(strategy: Strategy, value: Callable[[Throughput], float], style: LineStyleType) -> None:
        mine = [(p.num_sites, value(p) / diloco[p.num_sites]) for p in points if p.strategy is strategy]
        axes.plot(*zip(*mine, strict=True), color=_LOOKS[strategy].color, linestyle=style, linewidth=2)

    line(Strategy.PARTITIONED, lambda p: p.tokens_per_s, "-")
    line(Strategy.SKIP, lambda p: p.tokens_per_s, "--")
    line(Strategy.SKIP, lambda p: p.worth_per_s, "-.")


def _sites_handles(scale: Scale) -> list[Line2D]:
    """The lines from top to bottom, as most panels have them."""
    everywhere = all(
        best_domain(scale, sites, gbps * GBPS) == sites for sites in SITES for gbps in SWEEP_GBPS
    )
    notes = {Strategy.HYBRID_BEST: "\n(here always all sites)"} if everywhere else {}
    lines = [
        _handle(look.color, name + notes.get(name, ""), look.style, look.width)
        for name, look in reversed(_LOOKS.items())
    ]
    skip = _LOOKS[Strategy.SKIP].color
    return [
        _handle(GREY, "a network that costs nothing", (0, (1, 1))),
        _handle(INK, "same colour: a server\nwithout limit", ":"),
        *lines,
        _handle(
            skip, f"FoMoE, skip, with skipped\nassignments at price {scale.skip_price:g}\n(lower row)", "-."
        ),
    ]


def _sites_assumptions(scale: Scale) -> str:
    server = (
        "without limit" if scale.server_bytes_per_s is None else f"{scale.server_bytes_per_s / GBPS:g} Gbit/s"
    )
    return (
        f"Model {scale.model.name} ({count(parameter_counts(scale.model).total)} parameters), "
        f"{count(scale.tokens_a_step)} tokens a step and site, {scale.flops_per_s / 1e15:.1f} Pflop/s a site, "
        f"K = {scale.local_steps}, FoMoE holds {scale.overlap_share:.0%} of the experts, server {server},\n"
        f"{1000 * scale.latency_s:.0f} ms, {scale.bytes_per_number:g} bytes a number, nothing hidden behind compute "
        f"but HybridEP's gathers; fixed domain: {scale.domain_size} sites, fixed share: {scale.token_share:.0%} "
        "of the tokens sent."
    )


# -- what all pictures share -----------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def _frame(figure: Figure, title: str, assumptions: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.supxlabel(assumptions, x=0.01, ha="left", fontsize=SMALL, color=INK)


def _grid(axes: Axes) -> None:
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)


def _handle(color: str, label: str, style: LineStyleType = "-", width: float = 1.8) -> Line2D:
    return Line2D([], [], color=color, label=label, linestyle=style, linewidth=width)


def _end_labels(axes: Axes, x: float, labels: Iterable[tuple[float, str, str]], left: bool = False) -> None:
    """Names at the ends of lines, pushed apart where they would touch."""
    axes.figure.canvas.draw()  # positions in points are known only once the layout is
    gap = 1.25 * SMALL * DPI / 72
    free = -float("inf")
    for y, text, color in sorted(labels):
        at = float(axes.transData.transform((x, y))[1])
        shift = max(0.0, free - at)
        free = at + shift + gap
        axes.annotate(
            text,
            (x, y),
            xytext=(-6 if left else 6, shift * 72 / DPI),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=SMALL,
            color=color,
            annotation_clip=False,
        )
