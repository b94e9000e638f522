"""Outliers: every site is held against the others. The other checks: tests/faults/test_replies.py."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.check import outliers


def norms(*values: float) -> dict[int, dict[str, float]]:
    return {site: {"update": value} for site, value in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "history", "bound", "expected"),
    [
        ((1.0, 1.2, 0.9), (), 10, set()),
        ((1.0, 1.2, 30.0), (), 10, {2}),
        ((1.0, 30.0), (), 10, {1}),  # two sites: it cannot hide in a median of its own
        ((30.0,), (), 10, set()),  # nobody to compare with
        ((30.0,), (1.0, 1.0), 10, {0}),  # but rounds before
        ((30.0, 31.0), (1.0, 1.0, 1.0), 10, {0, 1}),  # one other may be as bad
        ((30.0, 31.0, 29.0), (1.0,) * 32, 10, set()),  # what all have in common is no site's fault
        ((1.0, 30.0), (), 0, set()),  # switched off
        ((0.0, 0.0, 0.0), (), 10, set()),  # nothing learnt at all is no crime
        ((1.0, math.inf, 1.0), (), 10, {1}),
        ((0.001, 1.0, 1.0), (), 10, set()),  # small is allowed: a site with little to say
    ],
)
def test_by_hand(values, history, bound: float, expected: set[int]) -> None:
    found = outliers(norms(*values), [{"update": value} for value in history], bound)
    assert found.keys() == expected


def test_each_kind_of_tensor_is_compared_with_its_like() -> None:
    replies = {site: {"update": 1.0, "exp_avg_sq": 1e-8} for site in range(3)}
    replies[1] = {"update": 1.0, "exp_avg_sq": 1e-3}
    found = outliers(replies, [], 10)
    assert found.keys() == {1}
    assert "exp_avg_sq of RMS 0.001, the others' median is 1e-08 (strategy.norm_bound=10)" in found[1]


@given(st.lists(st.floats(0.1, 0.9), min_size=2, max_size=9), st.floats(1.0, 1e6))
def test_one_bad_site_never_gets_a_good_one_refused(values: list[float], huge: float) -> None:
    assert set(outliers(norms(*values, huge * 100), [], 10)) == {len(values)}
