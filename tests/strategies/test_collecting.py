"""Replies are checked beside the loop that pulls them: none waits for another's check, few wait in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from fomoe_flwr.model.build import initial_state
from fomoe_flwr.placement import full_residents
from strategies.fomoe import WAITING, FoMoE
from strategies.local_grid import LocalGrid
from strategies.nodes import exchange
from tests.server.federation import config_of, nothing
from tests.strategies.helpers import answering

SITES = 3 * (WAITING + 1)
LONG = 30.0  # seconds; a test that waits so long has failed


class Pulled:
    """The replies of a round, pulled one after the other; `most` is how many were in memory at the most."""

    def __init__(self, replies: list[Message]) -> None:
        self.number = self.checked = self.most = 0
        self.all = threading.Event()
        self._replies = replies

    def __iter__(self) -> Iterator[Message]:
        while self._replies:
            self.number += 1
            self.most = max(self.most, self.number - self.checked)
            yield self._replies.pop(0)
        self.all.set()


@pytest.fixture
def strategy() -> FoMoE:
    settings = (
        f"federation.num_sites={SITES}",
        f"strategy.overlap={SITES}",
        "strategy.up=fp32",
        "strategy.down=fp32",
    )
    config = config_of(*settings, "strategy.outer=average")
    everything = full_residents(config.model.num_layers, config.model.num_experts)
    strategy = FoMoE(config)
    strategy.load(initial_state(config.model, everything, config.strategy.routing, config.seed))
    return strategy


@pytest.fixture
def pulled(strategy: FoMoE) -> Pulled:
    """Round 1, to which every site has answered with an update of zeros."""
    grid = LocalGrid(answering(nothing), SITES)
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    replies = [reply for _, reply in exchange(grid, messages, LONG)]
    grid.close()
    assert len(replies) == SITES
    return Pulled(replies)


def before_each_put(strategy: FoMoE, monkeypatch: pytest.MonkeyPatch, do: Callable[[int], None]) -> None:
    """Have `do(site)` called at the end of each check, before the reply is written to the disk."""
    put = strategy.server.inbox.put

    def do_and_put(site: int, header: str, blobs: Mapping[str, bytes]) -> None:
        do(site)
        put(site, header, blobs)

    monkeypatch.setattr(strategy.server.inbox, "put", do_and_put)


def test_a_slow_check_keeps_no_other_reply_from_being_pulled(
    strategy: FoMoE, pulled: Pulled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reply's check ends only when all others have been pulled."""
    waited = []

    def first_is_slow(site: int) -> None:
        if site == 0:
            waited.append(pulled.all.wait(LONG))

    before_each_put(strategy, monkeypatch, first_is_slow)
    strategy.aggregate_train(1, pulled)
    assert waited == [True]
    assert strategy.round.committed
    assert len(strategy.round.replies) == SITES


def test_no_more_replies_are_pulled_than_may_wait_in_memory(
    strategy: FoMoE, pulled: Pulled, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = threading.Lock()

    def slow(site: int) -> None:
        time.sleep(0.02)
        with lock:
            pulled.checked += 1

    before_each_put(strategy, monkeypatch, slow)
    strategy.aggregate_train(1, pulled)
    # One more than may wait has just been pulled. A busy machine may check faster than it pulls, so no less is asked.
    assert pulled.most <= WAITING + 1
    assert len(strategy.round.replies) == SITES


@pytest.mark.parametrize("site", [0, SITES - 1], ids=["of the first reply", "of the last reply"])
def test_what_a_check_raises_ends_the_run(
    strategy: FoMoE, pulled: Pulled, monkeypatch: pytest.MonkeyPatch, site: int
) -> None:
    """A full disk is no bad reply, which would be refused and logged; the model stays as it was."""

    def fails(of: int) -> None:
        if of == site:
            raise OSError("No space left on device")

    before = {name: value.clone() for name, value in strategy.server.state.tensors.items()}
    before_each_put(strategy, monkeypatch, fails)
    with pytest.raises(OSError, match="No space left"):
        strategy.aggregate_train(1, pulled)
    assert strategy.server.state.round == 0
    assert all(torch.equal(value, before[name]) for name, value in strategy.server.state.tensors.items())
