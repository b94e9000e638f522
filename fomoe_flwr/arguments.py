"""Command lines of `fomoe`: argparse, with an error in one line like every other."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from fomoe_flwr.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises a `ConfigError` of one line, and takes options by their full names only.

    argparse itself prints the whole usage and exits; abbreviations would break when an option is added.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")
