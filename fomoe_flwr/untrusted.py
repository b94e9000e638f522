"""Text and JSON that somebody else wrote, as far as they may go into a parser, a log or a terminal."""

from __future__ import annotations

import json
import math
from typing import Any

LONGEST_LINE = 500  # characters of a site's text in a log line or a metric
_GAP = " ... "
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


def _whole_number(digits: str) -> int | float:
    # Python's own conversion takes time that grows with the square of the digits.
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return values
