"""A terminal: arguments, the log, tables."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from fomoe_flwr.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDEST = 200  # columns of a table


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises a `ConfigError` of one line, and takes options by their full names only.

    argparse itself prints the whole usage and exits; abbreviations would break when an option is added.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def at_least_1(text: str) -> int:
    """Type of an argument that counts something."""
    # Python refuses to read very many digits.
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text:.40}: needs a whole number from 1 to 999999999")
    return int(text)


def setup_logging(verbose: bool = False) -> None:
    """Send the program's own log to stderr; the sites' log of each step only if `verbose`.

    From here on, what the terminal's encoding does not have is printed as question marks instead of ending the work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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
