"""strategy.delay=1: by hand, how far a site moves what it was sent, and from what each tensor begins."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.codecs import LOSSY, decode, up_codec
from fomoe_flwr.config import ModelConfig, RunConfig, StrategyConfig, TrainConfig
from fomoe_flwr.messages import Task
from fomoe_flwr.server.outer import OuterOptimizer
from fomoe_flwr.site.delay import Sent, gain, sent, start
from tests.clients.helpers import task_of
from tests.server.federation import config_of

DENSE = "model.norm.weight"
# In layer 1 the site holds experts 2 and 5: one with another site, one alone.
SHARED, ALONE = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 5))
NEW = "model.layers.0.mlp.experts.7.up_proj.weight"


def config(*overrides: str) -> RunConfig:
    return config_of("strategy.up=fp32", "strategy.down=fp32", "strategy.delay=1", *overrides)


def task(config: RunConfig, round_: int) -> Task:
    """Of three sites that are asked."""
    made = task_of(config, round_=round_, residents=[[0, 7], [2, 5]], counted_round=round_ - 1)
    return dataclasses.replace(made, asked=3, holders=[[2, 2], [2, 1]])


def encoded(config: RunConfig, update: dict[str, Tensor]) -> dict[str, bytes]:
    return wire.encode_update(update, up_codec(config.strategy), {})[0]


# -- the gain of a step --------------------------------------------------------------------------------------


@given(
    st.none() | st.floats(0, 2),
    st.none() | st.floats(0, 0.99),
    st.integers(0, 3),
    st.sampled_from(["nesterov", "average"]),
)
def test_the_gain_is_what_a_new_mean_adds_to_the_servers_step(
    lr: float | None, momentum: float | None, rounds_before: int, outer: str
) -> None:
    """Whatever momentum has gathered: the step is linear in the mean."""
    if outer == "average":
        lr = momentum = None
    strategy = StrategyConfig(outer=outer, outer_lr=lr, outer_momentum=momentum)
    ends = []
    for mean in (0.0, 1.0):
        state = {DENSE: torch.zeros(1)}
        optimizer = OuterOptimizer(state, strategy, ModelConfig(), TrainConfig())
        for value in [*[0.5] * rounds_before, mean]:
            optimizer.step({DENSE: torch.tensor([value])}, 0)
        ends.append(float(state[DENSE]))
    assert ends[0] - ends[1] == pytest.approx(gain(strategy), abs=1e-5)


# -- the start of a tensor -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("outer", "moved"), [("average", 1.0), ("nesterov", 0.7 * 1.9)])
def test_the_own_update_counts_by_who_holds_the_tensor(outer: str, moved: float) -> None:
    """Three sites share what is dense, two an expert; one that is held alone moves as the server moves it."""
    settings = config(f"strategy.outer={outer}")
    before = {name: torch.full((2, 2), 10.0) for name in (DENSE, SHARED, ALONE)}
    update = {name: torch.full((2, 2), 6.0) for name in before}
    own = sent(task(settings, 1), encoded(settings, update))
    arrived = {name: torch.full((2, 2), -1.0) for name in before}
    begun, known = start(task(settings, 2), arrived, before, own, round_=1)
    assert known
    for name, sharers in ((DENSE, 3), (SHARED, 2), (ALONE, 1)):
        torch.testing.assert_close(begun[name], torch.full((2, 2), 10.0 - moved / math.sqrt(sharers) * 6.0))


@pytest.mark.parametrize("up", ["bf16", *LOSSY])
def test_what_an_encoder_kept_back_is_not_counted(up: str) -> None:
    """The server has not read it yet; it comes with a later update."""
    settings = config(f"strategy.up={up}")
    generator = torch.Generator().manual_seed(0)
    update, before = ({SHARED: torch.randn(64, 70, generator=generator)} for _ in range(2))
    blobs = encoded(settings, update)
    own = sent(task(settings, 1), blobs)
    # A run that goes on may ask for another codec.
    other = config("strategy.up=int4" if up != "int4" else "strategy.up=topk")
    begun, _ = start(task(other, 2), {SHARED: torch.zeros(64, 70)}, before, own, round_=1)
    read = decode(up_codec(settings.strategy), wire.from_blobs(blobs.values()), {SHARED: (64, 70)})[SHARED]
    assert not torch.equal(read.float(), update[SHARED])
    expected = before[SHARED] - torch.tensor(gain(settings.strategy) / math.sqrt(2)) * read.float()
    torch.testing.assert_close(begun[SHARED], expected)


def test_what_is_not_known_begins_as_it_comes() -> None:
    settings = config()
    before = {DENSE: torch.ones(2)}
    arrived = {DENSE: torch.zeros(2), NEW: torch.zeros(3)}
    own = sent(task(settings, 4), encoded(settings, {DENSE: torch.ones(2)}))
    begun, known = start(task(settings, 5), arrived, before, own, round_=4)
    assert not known
    assert begun[NEW] is arrived[NEW]
    assert begun[DENSE].equal(torch.ones(2) - torch.tensor(gain(settings.strategy) / math.sqrt(3)))
    # A reply that does not count, an absence; a first round, a state that was lost or is of a run without a delay.
    for state, update in ((3, own), (4, Sent()), (0, Sent())):
        begun, known = start(task(settings, 5), arrived, before, update, state)
        assert not known
        assert all(begun[name] is tensor for name, tensor in arrived.items())


def test_an_expert_that_has_left_is_nobodys_business() -> None:
    settings = config()
    before = {DENSE: torch.ones(2), SHARED: torch.ones(2, 2)}
    own = sent(task(settings, 1), encoded(settings, before))
    begun, known = start(task(settings, 2), {DENSE: torch.zeros(2)}, before, own, round_=1)
    assert known
    assert begun.keys() == {DENSE}


def test_what_did_not_come_since_the_site_began_to_delay_is_not_known() -> None:
    """It was its tensor's turn, and nobody has kept what the message before had brought."""
    settings = config("strategy.fragments=2")
    own = sent(task(settings, 3), encoded(settings, {DENSE: torch.ones(2)}))
    arrived = {DENSE: torch.zeros(2)}
    begun, known = start(task(settings, 4), arrived, {}, own, round_=3)
    assert not known
    assert begun[DENSE] is arrived[DENSE]
