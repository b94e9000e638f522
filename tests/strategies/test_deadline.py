"""The deadline: a ceiling at first, then what rounds take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.config import StrategyConfig
from strategies.deadline import Deadline

SETTINGS = StrategyConfig(timeout_s=1000.0, timeout_floor_s=10.0, timeout_factor=3.0)


def deadline_after(*rounds: float, ceiling: float = 1000.0) -> float:
    deadline = Deadline(SETTINGS, ceiling)
    for seconds in rounds:
        deadline.took(seconds)
    return deadline.seconds()


def test_before_anything_is_known_it_is_the_ceiling() -> None:
    assert deadline_after() == deadline_after(20.0) == 1000.0


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ((20.0, 20.0, 20.0), 60.0),  # no spread: three medians
        ((20.0, 22.0, 24.0), 3 * 22 + 4 * 1.4826 * 2),  # median 22, median deviation 2
        ((1.0, 1.0, 1.0), 10.0),  # the floor
        ((500.0, 500.0), 1000.0),  # the ceiling
        ((20.0, 20.0, 900.0, 20.0), 60.0),  # one slow round is no reason to wait for ever
    ],
)
def test_closed_forms(rounds: tuple[float, ...], expected: float) -> None:
    assert deadline_after(*rounds) == pytest.approx(expected)


def test_it_forgets_what_was_long_ago() -> None:
    assert deadline_after(*[300.0] * 10, *[20.0] * 10) == pytest.approx(60.0)


def test_a_ceiling_below_the_floor_wins() -> None:
    assert deadline_after(1.0, 1.0, ceiling=2.0) == 2.0


@given(st.lists(st.floats(0.0, 1e6), max_size=30))
def test_it_is_always_within_its_bounds_and_never_below_the_median_round(rounds: list[float]) -> None:
    seconds = deadline_after(*rounds)
    assert 10.0 <= seconds <= 1000.0
    recent = sorted(rounds[-10:])
    if len(recent) >= 2:
        assert seconds >= min(recent[(len(recent) - 1) // 2], 1000.0)
