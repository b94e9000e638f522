"""`report.png`: what a run was, learned, sent and held, on one page.

Drawn on matplotlib's Agg canvas through objects alone: no window, no display, no state of pyplot's to disturb.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fomoe_flwr.drawing import save_figure
from fomoe_flwr.plan.rivals import compare_strategies
from fomoe_flwr.report import panels
from fomoe_flwr.report.expert_map import expert_map
from fomoe_flwr.report.load import Run
from fomoe_flwr.report.summary import setting, summarize
from fomoe_flwr.units import count, decimal, in_bytes, times

SIZE_INCHES = (14.0, 9.5)
DPI = 120


def draw(run: Run) -> Path:
    """Write `report.png` into the run directory and return its path.

    Raises:
        RunError: it cannot be written.
    """
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    # The head has a strip of its own, so that no length of it pushes into the panels.
    grid = figure.add_gridspec(2, 2, height_ratios=(0.09, 0.91))
    head = figure.add_subfigure(grid[0, :])
    head.text(0.5, 0.72, setting(run.config), ha="center", va="center", fontsize=12.5, fontweight="bold")
    head.text(0.5, 0.22, headline(run), ha="center", va="center", fontsize=11.5, color=panels.INK)
    upper, lower = figure.add_subfigure(grid[1, 0]).subplots(2, 1)
    panels.losses(upper, run)
    expert_map(lower, run)
    upper, middle, lower = figure.add_subfigure(grid[1, 1]).subplots(3, 1, height_ratios=(2, 1, 1))
    panels.traffic(upper, run)
    panels.resident_share(middle, run)
    panels.speed(lower, run)
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
