"""How long the server waits: in closed form, and bounds that no site can move."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.config import StrategyConfig
from fomoe_flwr.server.deadline import Deadline

SETTINGS = StrategyConfig(timeout_s=1000.0, timeout_floor_s=10.0, timeout_factor=3.0)


def deadline_after(*rounds: float, ceiling: float = 1000.0) -> float:
    deadline = Deadline(SETTINGS, ceiling)
    for seconds in rounds:
        deadline.took([seconds])
    return deadline.seconds()


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ((), 1000.0),  # before anything is known it is the ceiling
        ((20.0,), 1000.0),
        ((20.0, 20.0, 20.0), 60.0),  # no spread: three medians
        ((20.0, 22.0, 24.0), 3 * 22 + 4 * 1.4826 * 2),  # median 22, median deviation 2
        ((1.0, 1.0, 1.0), 10.0),  # the floor
        ((500.0, 500.0), 1000.0),  # the ceiling
        ((20.0, 20.0, 900.0, 20.0), 60.0),  # one slow round is no reason to wait for ever
        ((300.0,) * 10 + (20.0,) * 10, 60.0),  # what was long ago is forgotten
    ],
)
def test_deadlines_in_closed_form(rounds: tuple[float, ...], expected: float) -> None:
    assert deadline_after(*rounds) == pytest.approx(expected)


@pytest.mark.parametrize("honest", [(10.0, 11.0, 12.0), (10.0,), (4.0, 10.0, 28.0)])
def test_a_site_that_always_answers_just_in_time_does_not_drive_the_deadline(
    honest: tuple[float, ...],
) -> None:
    """30 rounds; the honest sites are never cut off, also a slow one among them."""
    deadline = Deadline(dataclasses.replace(SETTINGS, timeout_s=3600.0), 3600.0)
    for round_ in range(30):
        given = deadline.seconds()
        assert given >= max(honest)
        if round_ >= 2:
            assert given <= 10 * max(honest)
        deadline.took([*honest, 0.95 * given])


def test_one_round_cannot_lengthen_the_deadline_by_more_than_its_growth() -> None:
    """Also if all sites are late: three rounds of 20 s, then they use what they get."""
    deadline = Deadline(SETTINGS, 1000.0)
    for _ in range(3):
        deadline.took([20.0] * 4)
    for _ in range(10):
        before = deadline.seconds()
        deadline.took([0.95 * before] * 4)
        assert deadline.seconds() <= 3 * before


def test_a_round_without_a_reply_says_nothing_about_how_long_rounds_take() -> None:
    """As one whose replies all were there from before the server's death."""
    deadline = Deadline(SETTINGS, 1000.0)
    for seconds in ([20.0], [], [20.0], []):
        deadline.took(seconds)
    assert deadline.seconds() == pytest.approx(60.0)


def test_a_ceiling_below_the_floor_wins() -> None:
    assert deadline_after(1.0, 1.0, ceiling=2.0) == 2.0


@given(st.lists(st.floats(0.0, 1e6), max_size=30))
def test_it_is_always_within_its_bounds_and_never_below_the_median_round(rounds: list[float]) -> None:
    deadline = Deadline(SETTINGS, 1000.0)
    # Nothing is good that comes after the deadline.
    for index, seconds in enumerate(rounds):
        rounds[index] = min(seconds, deadline.seconds())
        deadline.took([rounds[index]])
    seconds = deadline.seconds()
    assert 10.0 <= seconds <= 1000.0
    recent = sorted(rounds[-10:])
    if len(recent) >= 2:
        assert seconds >= min(recent[(len(recent) - 1) // 2], 1000.0)
