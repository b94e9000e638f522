"""Hydra's and OmegaConf's many-line messages as one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import Any

from fomoe_flwr.config import RunConfig, SiteConfig


def known_keys(config_type: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, dotted."""
    for spec in dataclasses.fields(config_type):
        yield prefix + spec.name
        section: Any = spec.default_factory
        if dataclasses.is_dataclass(section):
            yield from known_keys(section, f"{prefix}{spec.name}.")  # type: ignore[arg-type]


def one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's many-line messages as one line with key, value and what is allowed."""
    causes: list[str] = []
    current: BaseException | None = error
    while current is not None:
        causes.append(str(current))
        current = current.__cause__
    text = "\n".join(causes)
    if match := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"{match[1]}={match[2]}: no such option; allowed are {', '.join(sorted(options))}"
    overridden = re.search(r"Could not override '([^']+)'", text)
    unknown = re.search(r"Key '[^']+' (?:is )?not in[\s\S]*?full_key: (\S+)", text) or overridden
    if unknown:
        key = unknown[1]
        # A key of one of the sites comes without the list it stands in.
        within = f"{overridden[1]}: " if overridden and overridden[1] != key else ""
        close = difflib.get_close_matches(key, [*known_keys(), *known_keys(SiteConfig)], n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{within}{key}: unknown key{hint}"
    full_key = re.search(r"full_key: (\S+)", text)
    mistyped = re.search(r"Value '([^\n]*)' of type '[^\n]*' could not be converted to (\w+)", text)
    if full_key and mistyped:
        wanted = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
        return f"{full_key[1]}={mistyped[1]}: must be {wanted.get(mistyped[2], mistyped[2])}"
    if full_key:  # Hydra names key and value, the last cause says in its first line what is wrong with them
        merging = re.search(r"Error merging override ([^\n]+)", text)
        return f"{merging[1] if merging else full_key[1]}: {causes[-1].splitlines()[0]}"
    return " ".join(causes[0].split())
