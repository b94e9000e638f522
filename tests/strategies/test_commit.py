"""Collect, decide, fold: the same bits whatever the order of arrival and whatever the size of a piece."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

import strategies.commit
from fomoe_flwr.config import ModelConfig, RunConfig, StrategyConfig
from fomoe_flwr.model.moe import orthonormal_rows
from fomoe_flwr.model.spec import expert_name
from fomoe_flwr.outer import OuterOptimizer
from fomoe_flwr.placement import Placement
from fomoe_flwr.wire import to_arrays
from strategies.commit import commit, starved_experts, updated_experts
from strategies.inbox import Inbox
from strategies.round import Round, SiteResult

SHARED, FIRST, SECOND = (expert_name(0, expert, "up_proj") for expert in range(3))
DENSE, GATE = "model.norm.weight", "model.layers.0.mlp.gate.weight"
# One layer, three experts: 0 at both sites, 1 at site 0, 2 at site 1.
PLACEMENT = Placement(np.array([[[True, True, True], [True, False, False], [False, True, False]]]))
SENT = {0: (DENSE, SHARED, FIRST), 1: (DENSE, SHARED, SECOND), 2: (DENSE, SHARED)}


def reply(site: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(site)
    return {name: torch.randn(40, generator=generator) * 1e4**site for name in SENT[site]}


def committed(
    folder: Path, arrivals: list[int], config: RunConfig, updated: set[tuple[int, int]] | None = None
) -> dict[str, Tensor]:
    inbox = Inbox(folder)
    assert inbox.begin(1) == []
    current = Round(1, PLACEMENT)
    for site in arrivals:
        inbox.put(
            site, ArrayRecord(to_arrays("all", reply(site), torch.float32)), MetricRecord(), ConfigRecord()
        )
        current.results[site] = SiteResult(
            str(site), 100 + site, 0.0, 0.0, 1.0, 1.0, 0.0, np.array([[site, 0, 0]])
        )
    state = {name: torch.zeros(40) for name in (DENSE, SHARED, FIRST, SECOND)}
    outer = OuterOptimizer(state, config.strategy, config.model, config.train)
    updated = updated_experts(current, 0.5) if updated is None else updated
    commit(current, outer, inbox, config, updated, [20, 20, 20])
    inbox.clear()
    assert not folder.exists()
    return state


@pytest.mark.parametrize("outer", ["average", "nesterov", "adamw"])
def test_any_order_of_arrival_and_any_size_of_piece_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str
) -> None:
    config = RunConfig(strategy=StrategyConfig(outer=outer))
    expected = committed(tmp_path / "inbox", [0, 1, 2], config)
    assert all(value.any() for value in expected.values())
    for order, size in itertools.product(itertools.permutations(range(3)), (1, 200, 2**20)):
        monkeypatch.setattr(strategies.commit, "CHUNK_BYTES", size)
        got = committed(tmp_path / "inbox", list(order), config)
        assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_each_name_is_the_weighted_mean_of_its_senders(tmp_path: Path) -> None:
    state = committed(tmp_path / "inbox", [2, 0, 1], RunConfig(strategy=StrategyConfig(outer="average")))
    replies = [reply(site) for site in range(3)]
    mean = sum((100 + site) * replies[site][DENSE] for site in range(3)) / 303
    torch.testing.assert_close(state[DENSE], -mean)
    torch.testing.assert_close(state[FIRST], -replies[0][FIRST])
    torch.testing.assert_close(state[SECOND], -replies[1][SECOND])


def test_experts_may_weigh_the_tokens_they_got(tmp_path: Path) -> None:
    settings = StrategyConfig(outer="average", expert_weighting="routed")
    state = committed(tmp_path / "inbox", [0, 1, 2], RunConfig(strategy=settings))
    torch.testing.assert_close(state[SHARED], -(reply(1)[SHARED] + 2 * reply(2)[SHARED]) / 3)


def test_an_expert_that_is_held_back_keeps_its_value(tmp_path: Path) -> None:
    state = committed(tmp_path / "inbox", [0, 1, 2], RunConfig(), updated={(0, 1), (0, 2)})
    assert not state[SHARED].any()
    assert state[FIRST].any()
    assert state[DENSE].any()


@pytest.mark.parametrize(
    ("good", "share", "expected"),
    [
        ([0, 1, 2], 1.0, {(0, 0), (0, 1), (0, 2)}),
        ([0], 0.5, {(0, 1)}),  # expert 0 has three holders, of which two are needed
        ([0, 2], 0.5, {(0, 0), (0, 1)}),
        ([2], 0.0, {(0, 0)}),  # one at the least
        ([], 0.0, set()),
    ],
)
def test_which_experts_have_enough_holders(good: list[int], share: float, expected: set) -> None:
    current = Round(1, PLACEMENT)
    current.results = dict.fromkeys(good)  # type: ignore[assignment]
    assert updated_experts(current, share) == expected


# With a confidence of 0.95 eight tokens are the least in 256 dimensions (tests/model/test_capacity.py).
FLOOR = RunConfig(model=ModelConfig(d_model=256), strategy=StrategyConfig(capacity_floor=0.95))


def with_loads(*loads: list[int]) -> Round:
    current = Round(1, PLACEMENT)
    for site, load in enumerate(loads):
        current.results[site] = SiteResult(str(site), 100, 0.0, 0.0, 1.0, 1.0, 0.0, np.array([load]))
    return current


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        (([3, 8, 0], [3, 0, 8], [2, 0, 0]), set()),  # expert 0 gets 8 tokens from its three holders together
        (([3, 8, 0], [3, 0, 8], [1, 0, 0]), {(0, 0)}),
        (([9, 7, 0], [9, 90, 8], [9, 90, 0]), {(0, 1)}),  # a ghost's tokens reach nobody
        (([0, 0, 0], [9, 0, 8], [9, 0, 0]), set()),  # site 0 does not say; expert 1 is only there
    ],
)
def test_starved_is_who_got_too_few_tokens_at_its_holders_together(loads: tuple, expected: set) -> None:
    assert starved_experts(with_loads(*loads), FLOOR) == (expected, 8)


def test_without_a_floor_nobody_starves() -> None:
    assert starved_experts(with_loads([1, 0, 0]), RunConfig()) == (set(), 0)


def test_orthogonal_routers_are_projected_after_the_step(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(router="orthogonal", d_model=8), strategy=StrategyConfig(outer="nesterov")
    )
    inbox = Inbox(tmp_path)
    inbox.begin(1)
    rows = {name: torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) for name in (GATE, DENSE)}
    inbox.put(0, ArrayRecord(to_arrays("all", rows, torch.float32)), MetricRecord(), ConfigRecord())
    state = {name: torch.eye(3, 8) for name in rows}
    commit(with_loads([1, 0, 0]), OuterOptimizer(state, config.strategy, config.model, config.train), inbox, config,
           set(), [20])  # fmt: skip
    stepped = state[DENSE]  # the same start and the same update
    torch.testing.assert_close(state[GATE], orthonormal_rows(stepped))
    assert not torch.allclose(state[GATE], stepped)
