"""One site's share of a mean: what is far larger than its fellows' is scaled down, and nothing honest is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.config import TrainConfig
from fomoe_flwr.messages import Task
from fomoe_flwr.model.spec import expert_name, moment_name
from fomoe_flwr.server import robust
from fomoe_flwr.server.robust import MOST_WEIGHT, capped, clip, keep_moments_possible, robust_mean
from fomoe_flwr.server.rounds import RoundObserver, Server
from tests.server.federation import answer_to, config_of, constant, play, server_of

DENSE, OTHER = "model.norm.weight", "model.embed_norm.weight"
EXPERTS = [expert_name(0, expert, "up_proj") for expert in range(4)]


def sizes(*sites: Mapping[str, float]) -> dict[int, Mapping[str, float]]:
    return dict(enumerate(sites))


# -- which tensors are scaled down ---------------------------------------------------------------------------


def test_a_tensor_that_is_far_larger_than_its_fellows_comes_down_to_their_median() -> None:
    """The rest of the same reply stays as it is."""
    honest = {DENSE: 1.0, OTHER: 2.0}
    factors = clip(sizes(honest, honest, honest, {DENSE: 50.0, OTHER: 2.0}), {}, 3.0)
    assert factors == {3: {DENSE: pytest.approx(1 / 50)}}


@pytest.mark.parametrize(("bound", "clipped"), [(0.0, False), (3.0, True), (6.0, False)])
def test_the_bound_can_be_moved_and_switched_off(bound: float, clipped: bool) -> None:
    assert bool(clip(sizes({DENSE: 1.0}, {DENSE: 1.1}, {DENSE: 5.0}), {}, bound)) is clipped


def test_a_lone_holder_is_held_against_the_other_experts_of_its_layer() -> None:
    """The liar of one site in four, in the first round, when nothing is usual yet."""
    reply = [{DENSE: 1.0, EXPERTS[site]: 0.5} for site in range(4)]
    reply[2] = {DENSE: 1.0, EXPERTS[2]: 40.0}
    assert clip(sizes(*reply), {}, 3.0) == {2: {EXPERTS[2]: pytest.approx(0.5 / 40)}}


def test_a_lone_holder_is_held_against_what_was_usual() -> None:
    """Also if all sizes have changed since, as they do with the learning rate."""
    usual: dict[str, float] = {}
    assert clip(sizes({DENSE: 1.0, OTHER: 2.0}), usual, 3.0) == {}
    assert clip(sizes({DENSE: 100.0, OTHER: 200.0}), usual, 3.0) == {}
    found = clip(sizes({DENSE: 1.0, OTHER: 1.0, EXPERTS[0]: 1.0}), usual | {EXPERTS[0]: 0.1}, 3.0)
    assert found == {0: {EXPERTS[0]: pytest.approx(0.1 * math.sqrt(2))}}


@pytest.mark.parametrize(("liar", "expected"), [(30.0, {1}), (1e-6, set())])
def test_of_two_holders_the_liar_neither_hides_nor_gets_the_other_scaled(
    liar: float, expected: set[int]
) -> None:
    """Large, it would be the median's better half; small, it would make the honest one look large."""
    replies = [{DENSE: 1.0, EXPERTS[0]: 1.0}, {DENSE: 1.0, EXPERTS[0]: liar}]
    replies += [{DENSE: 1.0, EXPERTS[1]: 1.1}, {DENSE: 1.0, EXPERTS[1]: 0.9}]
    assert clip(sizes(*replies), {}, 3.0).keys() == expected


def test_who_learnt_nothing_about_an_expert_does_not_make_the_others_large() -> None:
    replies = [{DENSE: 1.0, EXPERTS[0]: size} for size in (0.0, 0.0, 1.0, 0.0)]
    assert clip(sizes(*replies), {}, 3.0) == {}


def test_gradients_and_moments_may_differ_more_than_steps() -> None:
    moment = moment_name("exp_avg_sq", DENSE)
    replies = sizes(*({DENSE: size, moment: size} for size in (1.0, 1.0, 1.0, 5.0)))
    assert clip(replies, {}, 3.0) == {3: {DENSE: pytest.approx(0.2)}}
    assert clip(replies, {}, 3.0, gradients=True) == {}


@settings(max_examples=40)
@given(st.lists(st.floats(0.6, 1.7), min_size=3, max_size=9), st.floats(1e2, 1e300) | st.just(math.inf))
def test_one_liar_never_gets_an_honest_site_scaled(honest: list[float], huge: float) -> None:
    replies = sizes(*({DENSE: value} for value in [*honest, huge]))
    usual: dict[str, float] = {}
    assert clip(replies, usual, 3.0).keys() == {len(honest)}
    assert 0.5 < usual[DENSE] < 3


# -- in a round ----------------------------------------------------------------------------------------------


def start_of(folder: Path, *overrides: str) -> tuple[Server, dict[str, Tensor]]:
    settings = (
        "strategy.up=fp32",
        "strategy.down=fp32",
        "strategy.outer=average",
        "strategy.overlap=4",
        *overrides,
    )
    server = server_of(config_of(*settings), folder)
    return server, {name: value.clone() for name, value in server.state.tensors.items()}


def flipped(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
    return constant(-5.0 if task.name == "site-3" else 1.0)(task, shard)


@pytest.mark.parametrize(("mean", "step"), [("mean", 0.5), ("median", 1.0), ("trimmed", 1.0)])
def test_a_flipped_and_fivefold_update_does_not_turn_the_model_round(
    tmp_path: Path, mean: str, step: float
) -> None:
    """(1 + 1 + 1 - 1) / 4; unbounded it would be (3 - 5) / 4."""
    server, before = start_of(tmp_path, f"strategy.mean={mean}")
    assert play(server, 1, flipped)
    for name, value in server.state.tensors.items():
        torch.testing.assert_close(value, before[name] - step)
    assert server.round.clipped == {"site-3": len(before)}
    assert server.round.failures == {}


def test_honest_sites_are_not_scaled(tmp_path: Path) -> None:
    config = config_of("strategy.outer=local_adamw", "strategy.overlap=2")
    server = server_of(config, tmp_path)
    for number in (1, 2):
        assert play(server, number, None)
        assert server.round.clipped == {}
    assert server.memory()["usual"].keys() == server.state.tensors.keys()


def test_moments_that_somebody_made_up_cannot_make_a_step_of_any_length(tmp_path: Path) -> None:
    """m/√v of what is sent on is at most what AdamW could have had, and honest sites are not refused for it."""

    def made_up(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {"exp_avg": 1e-3, "exp_avg_sq": 1e-6}
        if task.name == "site-3":
            values = {"exp_avg": -8e-3, "exp_avg_sq": 0.0}
        return {
            name: torch.full_like(value, values.get(name.partition(".")[0], 0.0))
            for name, value in shard.items()
        }

    server, _ = start_of(tmp_path, "strategy.outer=local_adamw")
    assert play(server, 1, made_up)
    assert server.round.failures == {}
    state = server.state.tensors
    ratio = state[moment_name("exp_avg", DENSE)].abs() / state[moment_name("exp_avg_sq", DENSE)].sqrt()
    assert ratio.max() < 1.3


def test_a_claim_of_tokens_has_a_bound_of_what_the_others_claim(tmp_path: Path) -> None:
    """Expert 0 has got 20 tokens at each site, so says everyone; one says 384, which is all that it could have."""
    server, before = start_of(
        tmp_path, "strategy.expert_weighting=routed", "strategy.clip=0", "strategy.norm_bound=0"
    )
    sites = server.begin(1, range(4), 60.0)
    out = server.outgoing(sites, training=True)
    for site in sites:
        load_LE = np.zeros((2, 8), dtype=int)
        load_LE[:, 0] = 384 if site == 3 else 20
        answer = constant(1.0 if site == 3 else 0.0)
        assert server.take(site, *answer_to(out[site], answer, load_LE=load_LE.tolist()))
    assert server.close(1, 0.5, RoundObserver())
    name = expert_name(0, 0, "up_proj")
    torch.testing.assert_close(server.state.tensors[name], before[name] - MOST_WEIGHT / (3 + MOST_WEIGHT))


# -- the pieces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "weights"),
    [
        ({0: 10, 1: 12, 2: 1000}, {0: 10, 1: 12, 2: 44.0}),
        ({0: 10, 1: 1000}, {0: 10, 1: 40.0}),
        ({0: 0, 1: 1000}, {0: 0, 1: 1000}),  # nobody else's tokens came to this expert
        ({0: 30, 1: 100, 2: 60}, {0: 30, 1: 100, 2: 60}),
        ({5: 7}, {5: 7}),
    ],
)
def test_claims_by_hand(claims: dict[int, int], weights: dict[int, float]) -> None:
    assert capped(claims) == weights


@pytest.mark.parametrize("holders", range(3, 10))
@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_robust_means_are_numpys(monkeypatch: pytest.MonkeyPatch, holders: int, piece: int) -> None:
    monkeypatch.setattr(robust, "PIECE", piece)
    sent = torch.randn(holders, 3, 5, generator=torch.Generator().manual_seed(holders))
    scales = {site: 1.0 + site / 10 for site in range(holders)}
    values = sent.numpy() * np.array(list(scales.values()), dtype=np.float32)[:, None, None]
    median = robust_mean("median", lambda site: sent[site], scales)
    np.testing.assert_allclose(median.numpy(), np.median(values, axis=0), rtol=1e-5)
    cut = max(1, holders // 4)
    trimmed = np.sort(values, axis=0)[cut : holders - cut].mean(axis=0)
    np.testing.assert_allclose(
        robust_mean("trimmed", lambda site: sent[site], scales).numpy(), trimmed, rtol=1e-5
    )


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)])
def test_moments_of_any_gradients_are_possible(betas: tuple[float, float]) -> None:
    """Honest ones are not touched, not even of the gradients that reach the bound: β₁²/β₂ times the one before."""
    train = TrainConfig(beta1=betas[0], beta2=betas[1])
    steps, ratio = 60, betas[0] / betas[1]
    gradients = torch.randn(steps, 50, generator=torch.Generator().manual_seed(0)) ** 3
    gradients[:, 0] = torch.tensor([ratio ** (steps - 1 - step) for step in range(steps)])
    first, second = torch.zeros(50), torch.zeros(50)
    for gradient in gradients:
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
    state = {
        moment_name("exp_avg", DENSE): first.bfloat16().float(),
        moment_name("exp_avg_sq", DENSE): second.bfloat16().float(),
    }
    before = {name: value.clone() for name, value in state.items()}
    keep_moments_possible(state, [DENSE], train)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    bound = (1 - betas[0]) / math.sqrt((1 - betas[1]) * (1 - betas[0] ** 2 / betas[1]))
    assert float(first[0] / second[0].sqrt()) == pytest.approx(bound, rel=0.01)
    state[moment_name("exp_avg", DENSE)] += 100
    keep_moments_possible(state, [DENSE], train)
    assert bool((state[moment_name("exp_avg", DENSE)] <= 1.06 * bound * (second.sqrt() + 1e-8)).all())
