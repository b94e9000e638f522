"""The server's state goes through a checkpoint whole; and its ledger of experts: ages, holders, tokens, orphans."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fomoe_flwr.config import RunConfig
from fomoe_flwr.placement import Placement
from fomoe_flwr.server.outer import OuterOptimizer, with_moments
from fomoe_flwr.server.state import NORMS_KEPT, ExpertLedger, ServerState

# One layer, three experts: 0 at both sites, 1 at site 0, 2 at site 1.
PLACEMENT = Placement(np.array([[[True, True], [True, False], [False, True]]]))


def test_an_orphan_is_said_when_it_becomes_one_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fomoe")
    ledger = ExpertLedger(range(1), 3)
    assert ledger.look(PLACEMENT, [0, 1]) == []
    assert ledger.look(PLACEMENT, [1]) == [(0, 1)]
    assert ledger.look(PLACEMENT, [1]) == [(0, 1)]
    assert ledger.look(PLACEMENT, [0, 1]) == []
    lost, back = caplog.messages
    assert "no site" in lost
    assert "again" in back
    assert all("1 expert" in line and "layer 0 expert 1" in line for line in (lost, back))


def test_ages_tokens_and_holders() -> None:
    ledger = ExpertLedger(range(1), 3)
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


def test_the_starved_are_named_in_their_round_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    ledger = ExpertLedger(range(1), 12)
    ledger.starve(3, [(0, 2), (0, 1)], least=7)
    (line,) = caplog.messages
    said = ("round 3", "2 experts", "fewer than 7 tokens", "layer 0 expert 1, layer 0 expert 2")
    assert all(part in line for part in said)
    assert ledger.summary(3)["starved"] == [[0, 1], [0, 2]]
    ledger.starve(4, [(0, expert) for expert in range(10)], least=7)
    assert len(ledger.summary(4)["starved"]) == 8  # a line names no more
    assert ledger.summary(4)["num_starved"] == 10
    ledger.starve(5, [], least=7)
    assert ledger.summary(5)["starved"] == []
    assert len(caplog.messages) == 2


def test_the_ledger_survives_a_checkpoint() -> None:
    ledger, loaded = ExpertLedger(range(1), 3), ExpertLedger(range(1), 3)
    ledger.look(PLACEMENT, [0])
    ledger.record(2, [(0, 0)], np.array([[9, 0, 0]]))
    loaded.load(json.loads(json.dumps(ledger.table(2))))
    assert loaded.table(5) == ledger.table(5)


def state_of(round_: int) -> ServerState:
    config = RunConfig()
    tensors = with_moments({"model.norm.weight": torch.ones(4)})
    outer = OuterOptimizer(tensors, config.strategy, config.model, config.train)
    return ServerState(tensors, outer, ExpertLedger(range(1), 3), round_)


def test_what_is_remembered_survives_a_checkpoint() -> None:
    one, other = state_of(7), state_of(7)
    one.counted, one.last_losses, one.discarded = {"a": 7, "b": 3}, {"a": 2.5}, 2
    one.global_load = [[0.1, 0.2, 0.7]]
    one.sizes[""].norms.extend({"update": 1.0 / (index + 1)} for index in range(NORMS_KEPT + 5))
    one.experts.record(5, [(0, 2)], np.array([[0, 0, 9]]))
    other.remember(json.loads(json.dumps(one.memory())))
    assert other.memory() == one.memory()
    assert len(other.sizes[""].norms) == NORMS_KEPT
    assert (other.counted, other.last_losses, other.discarded) == (one.counted, one.last_losses, 2)
    assert other.global_load == one.global_load
    assert (other.experts.updated_LE == one.experts.updated_LE).all()


def test_a_checkpoint_older_than_a_figure_has_none_of_it() -> None:
    one, other = state_of(1), state_of(1)
    memory = one.memory()
    del memory["last_losses"], memory["load"]
    other.remember(memory)
    assert (other.last_losses, other.global_load) == ({}, None)


def test_parameters_are_what_is_no_moment() -> None:
    state = state_of(0)
    assert len(state.tensors) == 3
    assert state.parameters().keys() == {"model.norm.weight"}


def test_a_log_line_has_the_layers_own_number(caplog: pytest.LogCaptureFixture) -> None:
    """Of an open model some layers are dense."""
    ledger = ExpertLedger([1, 4], 2)
    holds_LEM = np.ones((2, 2, 1), dtype=bool)
    holds_LEM[1, 0] = False
    assert ledger.look(Placement(holds_LEM), [0]) == [(1, 0)]
    assert "layer 4 expert 0" in caplog.text
