"""Numbers as text, the same on the console, in tables and in the picture. Prefixes are decimal: 1 MB = 10^6 bytes."""

from __future__ import annotations

NONE = "-"  # a value that was not measured

_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
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


def _digits(value: float) -> str:
    """Three digits for a number below 1000."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
