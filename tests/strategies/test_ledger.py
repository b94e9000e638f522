"""The ledger of experts: ages, holders, tokens, and orphans said once."""

from __future__ import annotations

import json

import numpy as np

from fomoe_flwr.placement import Placement
from strategies.ledger import ExpertLedger

# One layer, three experts: 0 at both sites, 1 at site 0, 2 at site 1.
PLACEMENT = Placement(np.array([[[True, True], [True, False], [False, True]]]))


def test_an_orphan_is_said_when_it_becomes_one_and_when_it_is_over(caplog) -> None:
    caplog.set_level("INFO", logger="fomoe")
    ledger = ExpertLedger(1, 3)
    assert ledger.look(PLACEMENT, [0, 1]) == []
    assert ledger.look(PLACEMENT, [1]) == [(0, 1)]
    assert ledger.look(PLACEMENT, [1]) == [(0, 1)]
    assert ledger.look(PLACEMENT, [0, 1]) == []
    assert caplog.messages == [
        "no site with 1 expert is connected: layer 0 expert 1",
        "1 expert held again: layer 0 expert 1",
    ]


def test_ages_tokens_and_holders() -> None:
    ledger = ExpertLedger(1, 3)
    ledger.look(PLACEMENT, [0, 1])
    ledger.record(1, [(0, 0), (0, 1), (0, 2)], np.array([[0, 5, 0]]))
    ledger.look(PLACEMENT, [0])
    ledger.record(3, [(0, 0), (0, 1)], np.array([[1, 2, 0]]))
    assert ledger.table(4) == {
        "round": 4,
        "rounds_since_update": [[1, 1, 3]],
        "holders_alive": [[1, 1, 0]],
        "tokens": [[1, 7, 0]],
    }
    assert ledger.summary(4) == {
        "orphaned": [[0, 2]],
        "num_orphaned": 1,
        "starved": [],
        "num_starved": 0,
        "fewest_holders": 0,
        "rounds_since_update_max": 3,
        "tokens_min": 0,
        "tokens_max": 7,
    }


def test_the_starved_are_named_in_their_round_and_only_then(caplog) -> None:
    ledger = ExpertLedger(1, 12)
    ledger.starve(3, [(0, 2), (0, 1)], least=7)
    assert caplog.messages == [
        "round 3: 2 experts starved, with fewer than 7 tokens over all sites, and held back: "
        "layer 0 expert 1, layer 0 expert 2"
    ]
    assert ledger.summary(3)["starved"] == [[0, 1], [0, 2]]
    ledger.starve(4, [(0, expert) for expert in range(10)], least=7)
    assert len(ledger.summary(4)["starved"]) == 8  # a line names no more
    assert ledger.summary(4)["num_starved"] == 10
    ledger.starve(5, [], least=7)
    assert ledger.summary(5)["starved"] == []
    assert len(caplog.messages) == 2


def test_it_survives_a_checkpoint() -> None:
    ledger, loaded = ExpertLedger(1, 3), ExpertLedger(1, 3)
    ledger.look(PLACEMENT, [0])
    ledger.record(2, [(0, 0)], np.array([[9, 0, 0]]))
    loaded.load(json.loads(json.dumps(ledger.table(2))))
    assert loaded.table(5) == ledger.table(5)
