"""Numbers as text, for the console, tables and pictures. Prefixes are decimal: 1 MB = 10^6 bytes."""

from __future__ import annotations

import math
from typing import Any

NONE = "-"  # a value that was not measured

_Units = tuple[tuple[float, str], ...]  # largest first

_BYTES: _Units = ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1.0, " B"))
_BITS: _Units = ((1e12, " Tbit/s"), (1e9, " Gbit/s"), (1e6, " Mbit/s"), (1e3, " kbit/s"), (1.0, " bit/s"))
_SECONDS: _Units = ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs"))
# B for billion, as is usual for tokens and parameters.
_COUNT: _Units = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"), (1.0, ""))


def _with_unit(value: float | None, units: _Units) -> str:
    """Three digits for a number below 1000, in the largest unit in which it is at least 1."""
    if value is None:
        return NONE
    size, name = next((unit for unit in units if value >= unit[0]), units[-1])
    return _digits(value / size) + name


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def byte_unit(value: float) -> tuple[float, str]:
    """The unit for `value` bytes: how many bytes it is, and its name."""
    size, name = next((unit for unit in _BYTES if value >= unit[0]), _BYTES[-1])
    return size, name.strip()


def in_bytes(value: float | None) -> str:
    """4_915_200 -> `4.92 MB`."""
    return _with_unit(value, _BYTES)


def in_bits(bytes_per_s: float) -> str:
    """6_250_000 bytes a second -> `50.0 Mbit/s`."""
    return _with_unit(8 * bytes_per_s, _BITS)


def count(value: float | None) -> str:
    """Tokens, parameters: 4_915_200 -> `4.92 M`."""
    return _with_unit(value, _COUNT)


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
    if not math.isfinite(seconds):
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def time_span(seconds: float) -> str:
    """0.0129 -> `12.9 ms`, 3.7 -> `3.70 s`; a minute or more as in `duration`."""
    return duration(seconds) if seconds >= 59.95 else _with_unit(seconds, _SECONDS)


def finite(value: Any) -> Any:
    """The value as JSON can hold it: null instead of infinity and nan."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
