"""What a run directory or a sweep directory has to say: tables, and one picture a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fomoe_flwr.console import print_whole
from fomoe_flwr.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console


def report(directory: Path, console: Console) -> None:
    """Print the tables of a run and draw its `report.png`, or print the table of a sweep.

    Raises:
        RunError: the directory is neither, or its metrics cannot be read.
        ConfigError: its configuration cannot be read.
    """
    # Imported here: `fomoe --help` must not wait for matplotlib.
    from fomoe_flwr.report.evaluation import show_saved
    from fomoe_flwr.report.load import load_run
    from fomoe_flwr.report.reality import compare, notes, reality_table
    from fomoe_flwr.report.sweep import job_dirs, sweep_table
    from fomoe_flwr.report.tables import comparison_table, run_table

    if not directory.is_dir():
        raise RunError(f"{directory}: no such directory")
    if (directory / "config.yaml").is_file() or (directory / "metrics.jsonl").is_file():
        from fomoe_flwr.report.picture import draw
        from fomoe_flwr.report.routing import draw_routing

        run = load_run(directory)
        console.print(run_table(run))
        print_whole(comparison_table(run), console)
        if reality := compare(run):
            print_whole(reality_table(reality), console)
            for note in notes(run, reality):
                console.print(f"  {note}", soft_wrap=True, markup=False, highlight=False)
        show_saved(directory, console)
        console.print(f"picture: {draw(run)}", soft_wrap=True, markup=False)
        if routing := draw_routing(run):
            console.print(f"routing: {routing}", soft_wrap=True, markup=False)
    elif job_dirs(directory):
        print_whole(sweep_table(directory), console)
    else:
        raise RunError(f"{directory}: neither a run (config.yaml, metrics.jsonl) nor a sweep (0/, 1/, …)")
