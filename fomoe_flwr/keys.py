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
        name = f"{prefix}{spec.name}"
        section: Any = spec.default_factory
        if dataclasses.is_dataclass(section):
            yield from all_keys(section, f"{name}.")  # type: ignore[arg-type]
        elif section is dict:
            yield Key(name, "{}", "", told[spec.name])
        elif section is list:
            yield from all_keys(SiteConfig, f"{name}[].")
        else:
            yield Key(name, _text(spec.default), _allowed(spec.metadata), told[spec.name])


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(metadata: Any) -> str:
    if "allowed" in metadata:
        return ", ".join(metadata["allowed"])
    if metadata.get("maximum") is not None:
        return f"{metadata['minimum']} to {metadata['maximum']}"
    if "minimum" in metadata:
        return f">= {metadata['minimum']:g}"
    if "above" in metadata:
        return f"> {metadata['above']:g}"
    return {"path": "a path", "name": "a name"}.get(metadata.get("kind", ""), "")


@functools.cache
def comments(config_type: type) -> dict[str, str]:
    """What the source of a dataclass says of each field: the comment lines above it, and the one beside it."""
    found: dict[str, str] = {}
    said: list[str] = []
    line: list[str] = []  # the code of this statement
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(config_type)).readline):
        if token.type == tokenize.COMMENT:
            said.append(token.string.removeprefix("#").strip())
        elif token.type == tokenize.NEWLINE:
            if line[1:2] == [":"]:
                found[line[0]] = " ".join(said)
            said, line = [], []
        elif token.string.strip():
            line.append(token.string)
    return found


def keys_table() -> Table:
    """One row a key."""
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for header in ("key", "default", "allowed", "meaning"):
        table.add_column(header, overflow="fold", no_wrap=header == "key")
    for key in all_keys():
        table.add_row(*key)
    return table
