"""Text and JSON that somebody else wrote, as far as they may go into a parser, a log or a terminal."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST_LINE = 500  # characters of a site's text in a log line or a metric
_GAP = " ... "
LONGEST_FILE = 10**8  # bytes of a JSON file; the index of the largest open models has 10 MB
MOST_NESTED = 50  # levels of a JSON file; what works through its value calls itself for each of them
MAX_DIGITS = 310  # of a whole number; one with more is beyond any double


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Text as one line that can be shown: line breaks become blanks, what else cannot be printed is escaped, and of a
    long one the middle is left out.
    """
    # Cut first: what it costs must not depend on whoever wrote it.
    line = " ".join(_shortened(text, longest).splitlines())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return _shortened(line, longest)


def _shortened(text: str, longest: int) -> str:
    half = (longest - len(_GAP)) // 2
    return text if len(text) <= longest else f"{text[:half]}{_GAP}{text[-half:]}"


def parse_json(text: str | bytes, longest: int) -> Any:
    """JSON in time and memory that are bounded by its length. A whole number of too many digits becomes infinite.

    Raises:
        ValueError: longer than `longest`, not JSON, nested too deep, or a key stands twice in one object.
    """
    if len(text) > longest:
        raise ValueError(f"JSON of {len(text)} characters, at most {longest} are expected")
    try:
        return json.loads(text, parse_int=_whole_number, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error


def parse_json_file(path: Path) -> Any:
    """The same, of a file.

    Raises:
        OSError: it cannot be read, or is no regular file: from a FIFO or a device something might never come.
        ValueError: see `parse_json`.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(path))
    if (size := path.stat().st_size) > LONGEST_FILE:
        raise ValueError(f"{size} bytes, at most {LONGEST_FILE} are expected")
    value = parse_json(path.read_bytes(), LONGEST_FILE)
    level = [value]
    for _ in range(MOST_NESTED):
        level = [part for item in level if isinstance(item, dict | list) for part in _parts(item)]
    if level:
        raise ValueError("JSON nested too deep")
    return value


def _parts(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _whole_number(digits: str) -> int | float:
    # Python's own conversion takes time that grows with the square of the digits.
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return values
