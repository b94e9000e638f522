"""What a run directory or a sweep directory has to say: tables, and one picture a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fomoe_flwr.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def report(directory: Path, console: Console) -> None:
    """Print the tables of a run and draw its `report.png`, or print the table of a sweep.

    Raises:
        RunError: the directory is neither, or its metrics cannot be read.
        ConfigError: its configuration cannot be read.
    """
    # Imported here: `fomoe --help` must not wait for matplotlib.
    from fomoe_flwr.report.load import load_run
    from fomoe_flwr.report.reality import compare, notes, reality_table
    from fomoe_flwr.report.sweep import job_dirs, sweep_table
    from fomoe_flwr.report.tables import comparison_table, run_table

    if not directory.is_dir():
        raise RunError(f"{directory}: no such directory")
    if (directory / "config.yaml").is_file() or (directory / "metrics.jsonl").is_file():
        from fomoe_flwr.report.picture import draw

        run = load_run(directory)
        console.print(run_table(run))
        _print_whole(comparison_table(run), console)
        if reality := compare(run):
            _print_whole(reality_table(reality), console)
            for note in notes(run, reality):
                console.print(f"  {note}", soft_wrap=True, markup=False, highlight=False)
        console.print(f"picture: {draw(run)}", soft_wrap=True, markup=False)
    elif job_dirs(directory):
        _print_whole(sweep_table(directory), console)
    else:
        raise RunError(f"{directory}: neither a run (config.yaml, metrics.jsonl) nor a sweep (0/, 1/, …)")


def _print_whole(table: Table, console: Console) -> None:
    # In 80 columns, which is also what rich takes a file to have, it would cut numbers off; better a long line.
    table.width = console.measure(table, options=console.options.update(max_width=200)).maximum
    console.print(table, crop=False)
