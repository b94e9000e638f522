"""`fomoe plan`: what a run would cost, before anything is trained, downloaded or asked over a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from rich.console import Console

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.console import Parser
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.files import expanded
from fomoe_flwr.overrides import last_value, read_overrides
from fomoe_flwr.plan.advice import advise
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.rivals import compare
from fomoe_flwr.plan.show import Outlook, as_json, show
from fomoe_flwr.plan.system import plan_sites


def plan(arguments: Sequence[str], console: Console | None = None) -> None:
    """The command.

    Raises:
        ConfigError: one line with what is wrong.
    """
    parser = Parser(
        prog="fomoe plan",
        description="What a run would cost, with advice. Sites and links: federation=FILE.yaml.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as for fomoe train; assumptions: plan.*"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="bytes, memory and time as a picture"
    )
    options = parser.parse_intermixed_args(arguments)
    overrides = read_overrides(options.overrides)
    for override in overrides:
        if override.key_or_group in ("figure", "sweep"):
            item = override.input_line
            raise ConfigError(f"{item}: the paper's figures are drawn by `python -m benchmarks.paper {item}`")
    picture = None if options.picture is None else expanded(options.picture)
    if picture is not None:
        _check_writable(picture)
    outlook = look_ahead(_compose(overrides))
    if picture is not None:
        _draw(picture, outlook)
    if options.json:
        where = {} if picture is None else {"picture": str(picture)}
        print(json.dumps(as_json(outlook) | where, allow_nan=False, ensure_ascii=False))
        return
    console = console or Console()
    show(outlook, console)
    if picture is not None:
        console.print(f"picture: {picture}", soft_wrap=True, markup=False, highlight=False)


def look_ahead(config: RunConfig) -> Outlook:
    """The plan of a configuration, its rivals and the advice.

    Raises:
        ConfigError: a site on which no expert fits, or which constraint cannot be met.
    """
    sites, made = plan_sites(config), make_plan(config)
    return Outlook(config, sites, made, compare(config, made, sites), advise(config, made, sites))


def _compose(overrides: Sequence[Override]) -> RunConfig:
    if last_value(overrides, "resume") is None:
        return compose(overrides).config
    # They import PyTorch, which a plan does not need.
    from fomoe_flwr.checkpoint import compose_run, resume_from
    from fomoe_flwr.server.resume import check_resumable

    config = compose_run(overrides).config
    if config.resume is not None:
        check_resumable(resume_from(config.resume, tensors=False)[1], config)
    return config


def _check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--picture {path}: the name must end in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: there is no directory {path.parent}")
    if path.is_dir():
        raise ConfigError(f"--picture {path}: is a directory")


def _draw(path: Path, outlook: Outlook) -> None:
    # Matplotlib takes a second to import.
    from fomoe_flwr.plan.picture import draw

    try:
        draw(path, outlook)
    except RunError as error:
        raise ConfigError(f"--picture {path}: cannot be written ({error})") from error
