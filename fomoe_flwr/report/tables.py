"""Tables of one run, for a terminal or a file."""

from __future__ import annotations

from collections import Counter

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from fomoe_flwr.plan.rivals import compare_strategies
from fomoe_flwr.report.load import Run
from fomoe_flwr.report.summary import setting, summarize
from fomoe_flwr.units import count, decimal, duration, in_bytes, percent, times


def run_table(run: Run) -> Table:
    """What the run was and what came out of it."""
    summary, config = summarize(run), run.config
    table = Table(title=escape(str(run.directory)), box=SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("setting", escape(setting(config)))
    table.add_row("rounds", f"{summary.rounds} of {config.train.rounds}")
    table.add_row("tokens", count(summary.tokens))
    table.add_row("validation loss", _from_to(summary.first_val_loss, summary.val_loss))
    table.add_row("validation bits per byte", _from_to(summary.first_val_bpb, summary.val_bpb))
    table.add_row("bytes down, all sites", in_bytes(summary.bytes_down))
    table.add_row("bytes up, all sites", in_bytes(summary.bytes_up))
    table.add_row("router choices held by the site", percent(summary.resident_share))
    table.add_row("tokens/s, all sites, wire included", count(summary.tokens_per_second))
    table.add_row("wall time", duration(summary.seconds))
    if discarded := sum(not record.committed for record in run.rounds):
        table.add_row("rounds discarded", str(discarded))
    for site, reasons in _missing(run).items():
        told = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        table.add_row(f"replies missing of {escape(site)}", escape(f"{reasons.total()} ({told})"))
    return table


def _missing(run: Run) -> dict[str, Counter[str]]:
    """How often each site's reply was not part of the model, and why."""
    missing: dict[str, Counter[str]] = {}
    for record in run.rounds:
        for site in sorted(record.failures | record.refused):
            reason = f"refused: {record.refused[site]}" if site in record.refused else "failed or late"
            missing.setdefault(site, Counter())[reason] += 1
    return missing


def comparison_table(run: Run) -> Table:
    """Measured bytes next to what this run and its rivals should send by formula (`plan.rivals`)."""
    table = Table(
        title="bytes per site and round, down + up", box=SIMPLE, pad_edge=False, collapse_padding=True
    )
    table.add_column("strategy", no_wrap=True)
    table.add_column("source", no_wrap=True)
    for header in ("bytes", "bytes/token", "vs this run", "model held"):
        table.add_column(header, justify="right", no_wrap=True)
    this_run, *rivals = compare_strategies(run.config, run.plan, run.mean_residents)
    measured = summarize(run).site_bytes
    lines = [(row, "by formula") for row in (this_run, *rivals)]
    if measured is not None:
        ratio = measured / this_run.site_bytes
        token_bytes = this_run.token_bytes * ratio
        lines.insert(
            0, (this_run._replace(site_bytes=measured, token_bytes=token_bytes, ratio=ratio), "measured")
        )
    for row, source in lines:
        cells = (
            in_bytes(row.site_bytes),
            in_bytes(row.token_bytes),
            times(row.ratio),
            percent(row.model_share),
        )
        table.add_row(row.name, source, *cells)
    return table


def _from_to(first: float | None, last: float | None) -> str:
    if first is None or last is None or first == 0:
        return decimal(last)
    return f"{decimal(first)} -> {decimal(last)} ({100 * (last / first - 1):+.1f} %)"
