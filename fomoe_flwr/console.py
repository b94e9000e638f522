"""The log and tables on a terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDEST = 200  # columns of a table


def setup_logging(verbose: bool = False) -> None:
    """Send the program's own log to stderr; the sites' log of each step only if `verbose`."""
    logger = logging.getLogger("fomoe")
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("fomoe.site").setLevel(logging.DEBUG if verbose else logging.WARNING)
    # A part of Flower's database, which logs the list of its plugins.
    logging.getLogger("alembic").setLevel(logging.WARNING)


def print_whole(table: Table, console: Console) -> None:
    """Print a table with lines as long as it needs.

    rich would cut numbers off to fit into the terminal, or into 80 columns if the output is a file.
    """
    table.width = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    console.print(table, crop=False)
