"""`fomoe report`: tables and pictures of a run directory, or the table of a sweep directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fomoe_flwr.console import print_whole
from fomoe_flwr.errors import RunError
from fomoe_flwr.reading import reason

if TYPE_CHECKING:
    from rich.console import Console


def report(directory: Path, console: Console) -> None:
    """Print the tables of a run and draw its pictures, or print the table of a sweep.

    Raises:
        RunError: the directory is neither, or its metrics cannot be read.
        ConfigError: its configuration cannot be read.
    """
    # Imported here, so that `fomoe --help` does not wait for matplotlib.
    from fomoe_flwr.report import picture, reality, routing, tables
    from fomoe_flwr.report.load import load_run

    try:
        if not directory.is_dir():
            raise RunError(f"{directory}: no such directory")
        is_run = (directory / "config.yaml").exists() or (directory / "metrics.jsonl").exists()
        is_sweep = not is_run and bool(tables.job_dirs(directory))
    except OSError as error:
        raise RunError(f"{directory!s:.200}: {reason(error)}") from error
    if is_run:
        run = load_run(directory)
        console.print(tables.run_table(run))
        print_whole(tables.comparison_table(run), console)
        if compared := reality.compare(run):
            print_whole(reality.reality_table(compared), console)
            for note in reality.notes(run, compared):
                console.print(f"  {note}", soft_wrap=True, markup=False, highlight=False)
        tables.show_saved(directory / "evaluation.json", console)
        console.print(f"picture: {picture.draw(run)}", soft_wrap=True, markup=False)
        if drawn := routing.draw_routing(run):
            console.print(f"routing: {drawn}", soft_wrap=True, markup=False)
    elif is_sweep:
        print_whole(tables.sweep_table(directory), console)
    else:
        raise RunError(f"{directory}: neither a run (config.yaml, metrics.jsonl) nor a sweep (0/, 1/, …)")
