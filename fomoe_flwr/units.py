"""Numbers as text, the same on the console, in tables and in the picture. Prefixes are decimal: 1 MB = 10^6 bytes."""

from __future__ import annotations

import math
from typing import Any

NONE = "-"  # a value that was not measured

_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_BITS = ((1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"), (1.0, "bit/s"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
# B for billion, as is usual for tokens and parameters.
_COUNT = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"), (1.0, ""))


def byte_unit(value: float) -> tuple[float, str]:
    """The unit in which `value` bytes read best: how many bytes it is, and its name."""
    return next((unit for unit in _BYTES if value >= unit[0]), _BYTES[-1])


def in_bytes(value: float | None) -> str:
    """4_915_200 -> `4.92 MB`."""
    if value is None:
        return NONE
    size, name = byte_unit(value)
    return f"{_digits(value / size)} {name}"


def count(value: float | None) -> str:
    """Tokens, parameters: 4_915_200 -> `4.92 M`."""
    if value is None:
        return NONE
    size, letter = next((unit for unit in _COUNT if value >= unit[0]), _COUNT[-1])
    return f"{_digits(value / size)}{letter}"


def percent(share: float | None) -> str:
    """0.541 -> `54.1 %`."""
    return NONE if share is None else f"{100 * share:.1f} %"


def times(ratio: float) -> str:
    """1.83 -> `1.83x`, 91.74 -> `91.7x`."""
    return f"{_digits(ratio)}x"


def decimal(value: float | None) -> str:
    """A loss: three decimals."""
    return NONE if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """5025 -> `1 h 23 min`; below a minute, seconds with one decimal."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def time_span(seconds: float) -> str:
    """0.0129 -> `12.9 ms`, 3.7 -> `3.70 s`; from a minute on as `duration`."""
    if seconds >= 59.95:
        return duration(seconds)
    size, name = next((unit for unit in _SECONDS if seconds >= unit[0]), _SECONDS[-1])
    return f"{_digits(seconds / size)} {name}"


def in_bits(bytes_per_s: float) -> str:
    """6_250_000 bytes a second -> `50.0 Mbit/s`."""
    size, name = next((unit for unit in _BITS if 8 * bytes_per_s >= unit[0]), _BITS[-1])
    return f"{_digits(8 * bytes_per_s / size)} {name}"


def _digits(value: float) -> str:
    """Three digits for a number below 1000."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for (memory that is not given is infinite)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
