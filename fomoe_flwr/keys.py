"""`fomoe train --help`: every key with its default, what is allowed, and what it means.

The meanings are the comments of `config.py`: at the end of a field's line, or on the lines above it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from fomoe_flwr.config import RunConfig, SiteConfig


class Key(NamedTuple):
    """A leaf of the configuration."""

    name: str  # dotted
    default: str
    allowed: str  # "" if its type says it all
    meaning: str


def all_keys(config_type: type = RunConfig, prefix: str = "") -> Iterator[Key]:
    """Every key of the schema, in its order; those of a site as federation.sites[].NAME."""
    told = comments(config_type)
    for spec in dataclasses.fields(config_type):
        name, section = f"{prefix}{spec.name}", spec.default_factory
        if dataclasses.is_dataclass(section):
            yield from all_keys(section, f"{name}.")  # type: ignore[arg-type]
        elif section is list:
            yield from all_keys(SiteConfig, f"{name}[].")
        elif told.get(spec.name):
            yield Key(name, _text(spec.default), _allowed(spec.metadata), told[spec.name])
        else:
            yield Key(name, _text(spec.default), _allowed(spec.metadata), "")


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(metadata: Any) -> str:
    if "allowed" in metadata:
        return ", ".join(metadata["allowed"])
    if "minimum" in metadata:
        return f">= {metadata['minimum']:g}"
    if "above" in metadata:
        return f"> {metadata['above']:g}"
    return {"path": "a path", "name": "a name"}.get(metadata.get("kind", ""), "")


@functools.cache
def comments(config_type: type) -> dict[str, str]:
    """What the source of a dataclass says of each field."""
    found: dict[str, str] = {}
    above: list[str] = []
    field = ""
    for line in inspect.getsource(config_type).splitlines():
        text = line.strip()
        if text.startswith("#"):
            above.append(text.removeprefix("#").strip())
            continue
        name, colon, _ = text.partition(":")
        if colon and name.isidentifier():
            beside = [
                token.string.removeprefix("#").strip()
                for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT
            ]
            field = name
            found[field] = " ".join([*above, *beside])
        above = []
    return found


def keys_table() -> Table:
    """One row a key."""
    table = Table(box=SIMPLE, pad_edge=False)
    for header in ("key", "default", "allowed", "meaning"):
        table.add_column(header, overflow="fold", no_wrap=header == "key")
    for key in all_keys():
        table.add_row(*key)
    return table
