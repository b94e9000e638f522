"""Shares of the load, averaged over rounds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fomoe_flwr.load import averaged, difference


def test_half_is_the_newest_round_and_a_round_counts_by_its_shares() -> None:
    shares = averaged(None, [[1, 3], [2, 2]])
    assert shares == [[0.25, 0.75], [0.5, 0.5]]
    shares = averaged(shares, np.array([[300, 100], [0, 400]]))  # a hundred times the tokens, the same weight
    assert shares == [[0.5, 0.5], [0.25, 0.75]]
    assert averaged(shares, [[1, 0], [1, 0]]) == [[0.75, 0.25], [0.625, 0.375]]


def test_a_round_of_which_nobody_says_where_its_tokens_went_does_not_count() -> None:
    assert averaged(None, np.zeros((2, 2), dtype=np.int64)) is None
    assert averaged([[0.25, 0.75], [0.5, 0.5]], [[1, 3], [0, 0]]) == [[0.25, 0.75], [0.5, 0.5]]


def test_json_keeps_every_bit() -> None:
    shares = averaged(None, np.random.default_rng(0).integers(1, 1000, (3, 7)))
    assert json.loads(json.dumps(shares)) == shares
    assert [sum(layer) for layer in shares] == pytest.approx([1.0] * 3)


def test_the_difference_makes_a_sites_load_the_federations() -> None:
    federation, own = [[0.25, 0.75], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]
    assert difference(federation, own) == [[-0.25, 0.25], [0.0, 0.0]]
    assert difference(None, own) is difference(federation, None) is None
