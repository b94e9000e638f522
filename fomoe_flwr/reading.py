"""What is read back may be damaged, half written, or another program's: one way to read it and to check its types.

Whole numbers are those that a run writes: not below 0, at most 64 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Sized
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

import yaml  # type: ignore[import-untyped]

from fomoe_flwr.errors import RunError

log = logging.getLogger("fomoe")

T = TypeVar("T")

WORDS = {
    int: "a whole number from 0", float: "a number", str: "a string", bool: "true or false",
    list: "a list", tuple: "a list",
}  # fmt: skip
MOST_TOLD = 160  # characters of what was wrong


def finite(value: float) -> bool:
    return math.isfinite(value)


def not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def positive(value: float) -> bool:
    return 0 < value < math.inf


def not_empty(value: Sized) -> bool:
    return len(value) > 0


Number = Annotated[float, finite]
Amount = Annotated[float, not_negative]  # seconds, bytes, …


class WrongTypeError(ValueError):
    """A value that is not of its type.

    Args:
        where: the way to it from the outermost value.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where.lstrip('.')[:MOST_TOLD]} {what}".strip())
        self.where, self.what = where, what


def as_type(kind: Any, value: Any) -> Any:
    """A JSON value as this type.

    Args:
        kind: bool, int, float, str, Any, `X | None`, list[X], tuple[X, ...], dict[str, X], a dataclass or TypedDict, or
            `Annotated[X, check]`, where check says whether a value of that type is allowed. A record may have more keys
            than its type; a TypedDict keeps them.

    Raises:
        WrongTypeError: which part of it is not.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        value = as_type(parts[0], value)
        if not parts[1](value):
            raise WrongTypeError("", f"is {_said(value)}, must be {parts[1].__name__.replace('_', ' ')}")
        return value
    if NoneType in parts:
        return None if value is None else as_type(next(part for part in parts if part is not NoneType), value)
    # Some whole numbers are too large for a float.
    if kind is float and (type(value) is float or (type(value) is int and abs(value) < 2**1000)):
        return float(value)
    if (kind is int and type(value) is int and 0 <= value < 2**63) or (
        kind in (str, bool) and type(value) is kind
    ):
        return value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_part(parts[0], item, f"[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict):
        if origin is dict:
            return {key: _part(parts[1], item, f".{key}") for key, item in value.items()}
        if dataclasses.is_dataclass(kind) or is_typeddict(kind):
            return _record(kind, value)
    raise WrongTypeError("", f"is {_said(value)}, must be {WORDS.get(origin or kind, 'an object')}")


def _part(kind: Any, value: Any, where: str) -> Any:
    try:
        return as_type(kind, value)
    except WrongTypeError as error:
        raise WrongTypeError(where + error.where, error.what) from None


def _record(kind: Any, value: dict[str, Any]) -> Any:
    hints, required = _fields(kind)
    known = {}
    for key, hint in hints.items():
        if key in value:
            known[key] = _part(hint, value[key], f".{key}")
        elif key in required:
            raise WrongTypeError(f".{key}", "is missing")
    return {**value, **known} if is_typeddict(kind) else kind(**known)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types by key, and the keys that must be there."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        return hints, frozenset(kind.__required_keys__)
    fields, none = dataclasses.fields(kind), dataclasses.MISSING
    return hints, frozenset(
        spec.name for spec in fields if spec.default is none and spec.default_factory is none
    )


def _said(value: Any) -> str:
    """In a few characters. A text may be of any length, a list of any depth, and Python writes no very large number."""
    if value is None:
        return "null"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a very large number"
    if isinstance(value, list | tuple | dict):
        return "an object" if isinstance(value, dict) else "a list"
    return f"{value!r:.40}"


# ----- files


def reason(error: BaseException) -> str:
    """What was wrong, in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)[:MOST_TOLD]
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return " ".join(str(error).split())[:MOST_TOLD]


def load_json(path: Path, kind: Any) -> Any:
    """A JSON file's value as this type (`as_type`).

    Raises:
        ValueError, OSError: what is wrong, without the file's name.
    """
    try:
        return as_type(kind, json.loads(path.read_bytes().decode()))
    except RecursionError as error:
        raise ValueError(reason(error)) from error


def read_json(path: Path, kind: Any) -> Any:
    """The same, with an error for the user.

    Raises:
        RunError: it cannot be read, or is something else.
    """
    try:
        return load_json(path, kind)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({reason(error)})") from error


def read_lines(path: Path, take: Callable[[Any], T], needed: bool = False) -> list[T]:
    """What `take` makes of each line of a JSONL file, without the damaged lines, which one warning names.

    An unfinished last line, which a crash leaves, does not count and is not named. Empty where there is no file.

    Args:
        take: raises ValueError for a line that is not one of this file.
        needed: at least one line.

    Raises:
        RunError: the file cannot be read, or has no line that is needed.
    """
    try:
        lines = path.read_bytes().split(b"\n") if needed or path.exists() else [b""]
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({reason(error)})") from error
    found, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                found.append(take(json.loads(line.decode())))
        except (ValueError, OverflowError, MemoryError, RecursionError) as error:
            if number < len(lines):
                damaged.append(f"line {number}: {reason(error)}")
    if needed and not found:
        raise RunError(f"{path}{', ' if damaged else ': no whole line in it'}{''.join(damaged[:1])}")
    if damaged:
        log.warning(
            "%s: left out %d of %d lines, which cannot be read; %s",
            path, len(damaged), len(found) + len(damaged), damaged[0],
        )  # fmt: skip
    return found


def read_yaml(path: Path, kind: Any) -> Any:
    """A YAML file's value as this type. Not by OmegaConf, which would resolve what is in it.

    Raises:
        RunError: it cannot be read, or is something else.
    """
    try:
        return as_type(kind, yaml.safe_load(path.read_bytes()))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunError(f"{path}: not YAML: {reason(error)}") from error
