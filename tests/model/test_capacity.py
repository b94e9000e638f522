"""The least number of tokens of an expert, against Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fomoe_flwr.model.capacity import least_tokens, separation_probability

DRAWS = 200_000


def cosines(d_model: int, draws: int) -> np.ndarray:
    """Of random directions with a fixed one, the first axis."""
    x_TD = np.random.default_rng(d_model).standard_normal((draws, d_model), dtype=np.float32)
    return x_TD[:, 0] / np.linalg.norm(x_TD, axis=1)


@pytest.mark.parametrize(("delta", "d_model"), [(0.03, 32), (0.1, 32), (0.3, 32), (0.5, 3), (0.9, 2)])
def test_the_probability_is_that_of_random_directions(delta: float, d_model: int) -> None:
    p = separation_probability(delta, d_model)
    measured = (cosines(d_model, DRAWS) > delta).mean()
    assert abs(measured - p) < 5 * math.sqrt(p * (1 - p) / DRAWS)


def test_in_closed_form() -> None:
    # On a circle the angle is uniform: P(cos > δ) = arccos(δ)/π. On a sphere the coordinate is: (1-δ)/2.
    for delta in (0.1, 0.5, 0.9):
        assert separation_probability(delta, 2) == pytest.approx(math.acos(delta) / math.pi)
        assert separation_probability(delta, 3) == pytest.approx((1 - delta) / 2)
    # In many dimensions √d·cos is standard normal.
    normal = 0.5 * math.erfc(0.03 * math.sqrt(4096) / math.sqrt(2))
    assert separation_probability(0.03, 4096) == pytest.approx(normal, rel=1e-2)


@pytest.mark.parametrize(
    ("confidence", "delta", "d_model"), [(0.95, 0.03, 64), (0.99, 0.2, 64), (0.5, 0.3, 16)]
)
def test_so_many_tokens_are_enough_with_this_confidence_and_one_less_is_not(
    confidence: float, delta: float, d_model: int
) -> None:
    least = least_tokens(confidence, delta, d_model, tokens=10**9)
    above = cosines(d_model, DRAWS) > delta
    spread = 5 * math.sqrt(confidence * (1 - confidence) / (DRAWS // (least + 1)))
    for count, enough in ((least, True), (least - 1, False)):
        groups = above[: DRAWS // count * count].reshape(-1, count)
        measured = groups.any(axis=1).mean()
        assert measured > confidence - spread if enough else measured < confidence + spread
    p = separation_probability(delta, d_model)
    assert 1 - (1 - p) ** least >= confidence > 1 - (1 - p) ** (least - 1)


def test_it_is_a_floor_and_not_a_budget() -> None:
    """A handful at the measured δ of 0.03; and never more than there are, nor less than one."""
    assert least_tokens(0.95, 0.03, 256, 10**6) == 8
    assert least_tokens(0.95, 0.03, 256, 5) == 5
    assert least_tokens(0.01, 0.03, 256, 10**6) == 1
    assert least_tokens(0.95, 0.99, 4096, 1000) == 1000  # such a cosine never happens
    assert least_tokens(0.0, 0.03, 256, 10**6) == 0  # off
