"""`fomoe plan`: what a run would cost, before anything is trained, downloaded or asked over a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.plan.advice import advise
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.show import Outlook, as_json, show
from fomoe_flwr.plan.sites import plan_sites
from fomoe_flwr.plan.strategies import compare
from fomoe_flwr.units import finite

T = TypeVar("T")

USAGE = """usage: fomoe plan [OVERRIDE ...] [--json] [--picture FILE.png]    what a run would cost, with advice
OVERRIDE: as for fomoe train. Sites and their links: federation=FILE.yaml; what is assumed: plan.*"""


@dataclass(frozen=True)
class _Request:
    overrides: list[str]
    as_json: bool
    picture: Path | None


def plan(arguments: Sequence[str], console: Console | None = None) -> None:
    """The command.

    Raises:
        ConfigError: one line with what cannot be.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    request = _parse(arguments)
    _plan(request, console or Console())


def look_ahead(config: RunConfig) -> Outlook:
    """The plan of a configuration, its rivals and the advice.

    Raises:
        ConfigError: a site on which no expert fits, or which constraint cannot be met.
    """
    sites, made = plan_sites(config), make_plan(config)
    return Outlook(config, sites, made, compare(config, made, sites), advise(config, made, sites))


def _plan(request: _Request, console: Console) -> None:
    config = _compose(request.overrides)
    outlook = look_ahead(config)
    if request.picture is not None:
        from fomoe_flwr.plan.picture import draw  # matplotlib takes a second to import

        _written(request.picture, lambda path: draw(path, outlook))
    if request.as_json:
        _print_json({**as_json(outlook), **_where(request.picture)})
        return
    show(outlook, console)
    if request.picture is not None:
        console.print(f"picture: {request.picture}", soft_wrap=True, markup=False, highlight=False)


def _compose(overrides: Sequence[str]) -> RunConfig:
    if any(item.startswith("resume=") for item in overrides):
        from fomoe_flwr.resume import resumed_overrides  # PyTorch

        overrides = resumed_overrides(overrides)
    return compose(overrides).config


# ----- arguments


def _parse(arguments: Sequence[str]) -> _Request:
    overrides: list[str] = []
    picture: Path | None = None
    as_json, rest = False, list(arguments)
    while rest:
        item = rest.pop(0)
        key, equals, value = item.partition("=")
        if item == "--json":
            as_json = True
        elif key == "--picture":
            picture = _picture_path(value if equals else rest.pop(0) if rest else "")
        elif item.startswith("-"):
            raise ConfigError(
                f"{item}: no option of fomoe plan; it has --json, --picture FILE.png and --help"
            )
        elif key in ("figure", "sweep"):
            raise ConfigError(f"{item}: the paper's figures are drawn by `python -m benchmarks.paper {item}`")
        else:
            overrides.append(item)
    return _Request(overrides, as_json, picture)


def _picture_path(text: str) -> Path:
    if not text or text.startswith("-"):
        raise ConfigError(f"--picture {text}".rstrip() + ": give the file to write, as in --picture plan.png")
    path = Path(text).expanduser()
    _check_writable(path)
    return path


def _check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--picture {path}: the name must end in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: there is no directory {path.parent}")
    if path.is_dir():
        raise ConfigError(f"--picture {path}: is a directory")


def _written(path: Path, draw: Callable[[Path], T]) -> T:
    try:
        return draw(path)
    except RunError as error:
        raise ConfigError(f"--picture {path}: cannot be written ({error})") from error


# ----- output


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(finite(content), allow_nan=False, ensure_ascii=False))


def _where(picture: Path | None) -> dict[str, str]:
    return {} if picture is None else {"picture": str(picture)}
