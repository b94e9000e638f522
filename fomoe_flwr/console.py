"""What a person sees on a terminal: log lines without a stack of prefixes, and tables that are not cut off."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDEST = 200  # columns of a table


def setup_logging(verbose: bool = False) -> None:
    """Send the program's own log to stderr; the sites' step lines only when asked for."""
    logger = logging.getLogger("fomoe")
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("fomoe.site").setLevel(logging.DEBUG if verbose else logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of Flower's data base; it lists its plugins


def print_whole(table: Table, console: Console) -> None:
    """Print a table as wide as it must be.

    In 80 columns, which is also what rich takes a file to have, numbers would be cut off; better a long line.
    """
    table.width = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    console.print(table, crop=False)
