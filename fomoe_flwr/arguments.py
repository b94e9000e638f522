"""Command lines, parsed by argparse; an error is one line, by way of `ConfigError`."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from fomoe_flwr.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises instead of printing its usage, and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")
