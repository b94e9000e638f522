"""The domain that is chosen is the model's best among those that the devices can be divided into."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.engine.domain import best_size, layer_s
from fomoe_flwr.engine.several import Member
from fomoe_flwr.engine.team import end_team, team_of
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.hybridep import ExchangeCase
from tests.engine.test_several import ROUNDED, assert_equal_rounds, shared_task, tokens


@pytest.fixture(autouse=True, scope="module")
def no_process_is_left() -> Iterator[None]:
    yield
    end_team()


sizes = st.floats(1.0, 1e9)


@given(sizes, sizes, sizes, st.integers(1, 12), st.floats(0, 10))
def test_no_other_divisor_is_faster(
    sent: float, experts: float, bandwidth: float, devices: int, before_s: float
) -> None:
    case = ExchangeCase(sent, experts, bandwidth, devices, before_s)
    chosen = best_size(case)
    assert devices % chosen == 0
    for size in range(1, devices + 1):
        if devices % size == 0:
            assert layer_s(case, chosen) <= layer_s(case, size)


def test_tokens_travel_on_a_slow_link_and_experts_where_they_are_small() -> None:
    slow = ExchangeCase(1e5, 1e6, 1e6, 4, 0.01)
    assert best_size(slow) == 1
    assert best_size(ExchangeCase(1e5, 1e6, 1e9, 4, 0.01)) == 4
    assert best_size(ExchangeCase(1e6, 1e3, 1e6, 4, 0.0)) == 4


def test_a_site_chooses_by_what_it_measures() -> None:
    task = shared_task()
    engine = Member(task.model, task.residents, "skip", "ep", "auto", team=team_of(4, "cpu"))
    assert engine.domains is not None
    assert engine.domains.size == 1
    assert_equal_rounds(task, engine, tokens(), ROUNDED)
    assert engine.domains.size in (1, 2, 4)


def test_domains_that_cannot_be() -> None:
    task = shared_task()
    with pytest.raises(ConfigError, match=r"^train\.ep_domain=3: must divide train\.devices=4$"):
        Member(task.model, task.residents, "skip", "ep", "3", team=team_of(4, "cpu"))
