"""The second half of a round: means over holders, PyTorch's own optimizers, and who takes part in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fomoe_flwr.codecs import CASTS
from fomoe_flwr.config import ModelConfig, RunConfig, StrategyConfig, TrainConfig
from fomoe_flwr.model.moe import orthonormal_rows
from fomoe_flwr.model.spec import MOMENTS, expert_name, gate_name, moment_name
from fomoe_flwr.placement import Placement
from fomoe_flwr.server import outer as outer_module
from fomoe_flwr.server.outer import (
    MOST_SCALE,
    Contribution,
    OuterOptimizer,
    RunningMean,
    commit,
    least_tokens,
    separation_probability,
    starved_experts,
    step_scales,
    updated_experts,
    with_moments,
)
from fomoe_flwr.server.replies import Inbox
from fomoe_flwr.wire import encode_update

NORM = "model.norm.weight"  # learns at lr
UP, DOWN = (f"model.layers.0.mlp.experts.3.{part}_proj.weight" for part in ("up", "down"))
NAMES = (NORM, UP, DOWN)
# lr multipliers: base width over width for `up`, base expert width over expert width for `down`.
MODEL = ModelConfig(d_model=16, d_expert=8, base_d_model=32, base_d_expert=24)
MULTIPLIERS = {NORM: 1.0, UP: 2.0, DOWN: 3.0}


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def state_of(seed: int = 0, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 4, generator=generator) for name in names}


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


# -- the mean ------------------------------------------------------------------------------------------------


def mean_of(*replies: tuple[Mapping[str, Tensor], float]) -> dict[str, Tensor]:
    mean = RunningMean()
    for reply, weight in replies:
        mean.add(reply, lambda _name, weight=weight: weight)
    return mean.finish()


def test_each_name_is_averaged_over_its_holders_only() -> None:
    # Three sites of weight 1, 3, 2; the expert is at the first and the last.
    means = mean_of(
        ({NORM: numbers(1, 0), UP: numbers(6)}, 1),
        ({NORM: numbers(3, 4)}, 3),
        ({NORM: numbers(0, 9), UP: numbers(0)}, 2),
    )
    torch.testing.assert_close(means, {NORM: numbers(10 / 6, 5), UP: numbers(2)})


def test_equal_weights_give_the_plain_mean() -> None:
    states = [state_of(seed) for seed in range(4)]
    means = mean_of(*[(state, 1) for state in states])
    expected = {name: torch.stack([state[name] for state in states]).mean(0) for name in NAMES}
    torch.testing.assert_close(means, expected)


def test_one_holder_alone_gives_its_own_value() -> None:
    means = mean_of(({UP: numbers(3, -5)}, 7))
    torch.testing.assert_close(means, {UP: numbers(3, -5)})


def test_weights_may_differ_by_name() -> None:
    """`expert_weighting=routed`: an expert counts by its tokens, the rest by the site's."""
    mean = RunningMean()
    mean.add({NORM: numbers(0), UP: numbers(0)}, {NORM: 10, UP: 1}.__getitem__)
    mean.add({NORM: numbers(1), UP: numbers(1)}, {NORM: 10, UP: 3}.__getitem__)
    torch.testing.assert_close(mean.finish(), {NORM: numbers(0.5), UP: numbers(0.75)})


def test_weight_zero_counts_as_not_sent() -> None:
    """Even a value that is not a number: no token reached this expert."""
    mean = RunningMean()
    mean.add({NORM: numbers(1), UP: numbers(torch.nan)}, {NORM: 1, UP: 0}.__getitem__)
    mean.add({NORM: numbers(3), UP: numbers(5)}, {NORM: 1, UP: 2}.__getitem__)
    mean.add({DOWN: numbers(1)}, lambda _name: 0)
    torch.testing.assert_close(mean.finish(), {NORM: numbers(2), UP: numbers(5)})


def test_sums_are_fp32_whatever_came_over_the_wire() -> None:
    halves = [numbers(1 + 2**-7).to(torch.bfloat16), numbers(1).to(torch.bfloat16)]
    means = mean_of(*[({NORM: half}, 1) for half in halves])
    assert means[NORM].dtype == torch.float32
    assert means[NORM].equal(numbers(1 + 2**-8))  # bf16 would have rounded it


def test_replies_are_not_written_to() -> None:
    reply, other = state_of(0), state_of(1)
    before = copied(reply)
    mean_of((reply, 1), (other, 2))
    assert all(reply[name].equal(before[name]) for name in reply)


def test_nothing_folded_gives_no_mean() -> None:
    assert RunningMean().finish() == {}


def test_a_finished_mean_starts_again_empty() -> None:
    mean = RunningMean()
    mean.add({NORM: numbers(4)}, lambda _name: 1)
    mean.finish()
    mean.add({NORM: numbers(2)}, lambda _name: 1)
    torch.testing.assert_close(mean.finish(), {NORM: numbers(2)})


# -- outer optimizers ----------------------------------------------------------------------------------------


def optimizer_for(
    state: dict[str, Tensor], strategy: StrategyConfig, train: TrainConfig | None = None
) -> OuterOptimizer:
    return OuterOptimizer(state, strategy, MODEL, train or TrainConfig())


def gradients_of_round(number: int, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    return {name: 0.1 * value for name, value in state_of(100 + number, names).items()}


NESTEROV = StrategyConfig(outer="nesterov", outer_lr=0.7, outer_momentum=0.9)
AVERAGE = StrategyConfig(outer="average")
LOCAL_ADAMW = StrategyConfig(outer="local_adamw")
ADAMW = StrategyConfig(outer="adamw", inner="gradient")
FEDADAM = StrategyConfig(outer="adamw")


def test_nesterov_is_pytorchs_sgd_over_several_rounds() -> None:
    state = state_of()
    reference = {name: torch.nn.Parameter(value.clone()) for name, value in state.items()}
    expected = torch.optim.SGD(reference.values(), lr=0.7, momentum=0.9, nesterov=True)
    outer = optimizer_for(state, NESTEROV)
    for number in range(4):
        outer.step(gradients_of_round(number), number)
        for name, gradient in gradients_of_round(number).items():
            reference[name].grad = gradient
        expected.step()
        for name in NAMES:
            torch.testing.assert_close(state[name], reference[name].data)


def test_nesterovs_first_two_rounds_by_hand() -> None:
    # b1 = g = 1,            step = lr·(g + 0.9·b1) = 0.7·1.9   -> 10 - 1.33 = 8.67
    # b2 = 0.9·1 + 2 = 2.9,  step = 0.7·(2 + 0.9·2.9) = 3.227   -> 5.443
    state = {NORM: numbers(10)}
    outer = optimizer_for(state, NESTEROV)
    outer.step({NORM: numbers(1)}, 0)
    torch.testing.assert_close(state[NORM], numbers(8.67))
    outer.step({NORM: numbers(2)}, 1)
    torch.testing.assert_close(state[NORM], numbers(5.443))


def test_without_momentum_nesterov_is_a_plain_step() -> None:
    state = {NORM: numbers(10)}
    outer = optimizer_for(state, StrategyConfig(outer="nesterov", outer_lr=0.5, outer_momentum=0.0))
    for number in range(2):
        outer.step({NORM: numbers(1)}, number)
    torch.testing.assert_close(state[NORM], numbers(9))


@pytest.mark.parametrize("strategy", [NESTEROV, AVERAGE, LOCAL_ADAMW, ADAMW], ids=lambda s: s.outer)
def test_a_pseudo_gradient_is_descended(strategy: StrategyConfig) -> None:
    """The sites returned smaller parameters than they were sent: the global ones must get smaller."""
    state = state_of()
    before = copied(state)
    optimizer_for(state, strategy).step({name: torch.ones(3, 4) for name in NAMES}, 10)
    assert all((state[name] < before[name]).all() for name in NAMES)


@pytest.mark.parametrize("strategy", [NESTEROV, AVERAGE, LOCAL_ADAMW, ADAMW], ids=lambda s: s.outer)
def test_what_nobody_returned_stays_as_it_was_with_its_momentum(strategy: StrategyConfig) -> None:
    state = with_moments(state_of())
    outer = optimizer_for(state, strategy)
    outer.step(gradients_of_round(0), 0)  # all names, so that there is a momentum to keep
    before, buffers = copied(state), copied(outer.state_tensors())

    outer.step(gradients_of_round(1, [NORM]), 1)

    assert not state[NORM].equal(before[NORM])
    assert all(state[name].equal(before[name]) for name in state if name != NORM)
    after = outer.state_tensors()
    assert after.keys() == buffers.keys()
    for key in buffers:
        assert after[key].equal(buffers[key]) == (not key.endswith(NORM)), key


@pytest.mark.parametrize("strategy", [NESTEROV, AVERAGE, LOCAL_ADAMW, ADAMW], ids=lambda s: s.outer)
def test_what_is_first_returned_in_a_later_round_begins_there(strategy: StrategyConfig) -> None:
    """An expert whose holders were all away at first: its momentum starts in the round that brings it."""
    train = TrainConfig(grad_clip=0)  # a common norm would couple the names
    state, alone = state_of(), state_of(names=[UP])
    alone[UP] = state[UP].clone()
    outer, fresh = optimizer_for(state, strategy, train), optimizer_for(alone, strategy, train)
    outer.step(gradients_of_round(0, [NORM]), 0)
    for number in (1, 2):
        gradients = gradients_of_round(number)
        fresh.step({UP: gradients[UP].clone()}, number)
        outer.step(gradients, number)
        assert state[UP].equal(alone[UP])


def test_average_is_the_mean_of_what_the_sites_returned() -> None:
    state = state_of()
    sent = copied(state)
    returned = [state_of(seed) for seed in (1, 2, 3)]
    mean = mean_of(*[({name: sent[name] - reply[name] for name in NAMES}, 1) for reply in returned])
    optimizer_for(state, AVERAGE).step(mean, 0)
    expected = {name: torch.stack([reply[name] for reply in returned]).mean(0) for name in NAMES}
    torch.testing.assert_close(state, expected)


def test_average_has_no_memory() -> None:
    state = {NORM: numbers(10)}
    outer = optimizer_for(state, AVERAGE)
    for number in range(3):
        outer.step({NORM: numbers(1)}, number)
    torch.testing.assert_close(state[NORM], numbers(7))
    assert outer.state_tensors() == {}


def test_local_adamw_averages_parameters_and_replaces_moments_by_their_means() -> None:
    state = with_moments({NORM: numbers(10)})
    means = {
        NORM: numbers(4),
        moment_name("exp_avg", NORM): numbers(0.5),
        moment_name("exp_avg_sq", NORM): numbers(2),
    }
    outer = optimizer_for(state, LOCAL_ADAMW)
    for left in (6, 2):  # moments are replaced, parameters descend by the pseudo-gradient
        outer.step(copied(means), 0)
        torch.testing.assert_close(state[NORM], numbers(left))
        torch.testing.assert_close(state[moment_name("exp_avg", NORM)], numbers(0.5))
        torch.testing.assert_close(state[moment_name("exp_avg_sq", NORM)], numbers(2))


def test_missing_moments_start_at_zero_and_known_ones_are_kept() -> None:
    known = moment_name("exp_avg", NORM)
    state = with_moments({NORM: numbers(10), UP: numbers(1, 2), known: numbers(3)})
    assert set(state) == {NORM, UP} | {moment_name(moment, name) for moment in MOMENTS for name in (NORM, UP)}
    assert state[known].equal(numbers(3))
    assert state[moment_name("exp_avg_sq", UP)].equal(numbers(0, 0))


@pytest.mark.parametrize("grad_clip", [0.0, 0.05, 100.0], ids=["off", "clipped", "below the limit"])
def test_adamw_is_pytorchs_on_mean_gradients_clipped_and_warmed_up(grad_clip: float) -> None:
    given = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.1}
    train = TrainConfig(lr=0.02, grad_clip=grad_clip, warmup_steps=4, **given)
    state = state_of()
    reference = {name: torch.nn.Parameter(value.clone()) for name, value in state.items()}
    expected = torch.optim.AdamW(
        [
            {"params": [parameter], "weight_decay": 0.0 if name == NORM else 0.1 / MULTIPLIERS[name]}
            for name, parameter in reference.items()
        ],
        lr=0.0,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    outer = optimizer_for(state, ADAMW, train)
    for number in range(6):
        outer.step(gradients_of_round(number), number)
        for name, gradient in gradients_of_round(number).items():
            reference[name].grad = gradient
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(reference.values(), grad_clip)
        for group, name in zip(expected.param_groups, NAMES, strict=True):
            group["lr"] = 0.02 * min(1.0, (number + 1) / 4) * MULTIPLIERS[name]
        expected.step()
        for name in NAMES:
            torch.testing.assert_close(state[name], reference[name].data)


@pytest.mark.parametrize(("given", "lr"), [(None, 0.003), (0.02, 0.02)], ids=["default", "given"])
def test_adamw_on_mean_pseudo_gradients_has_a_learning_rate_of_its_own(
    given: float | None, lr: float
) -> None:
    """No clipping, no warm-up and no decay: the sites' AdamW has seen to them."""
    train = TrainConfig(lr=0.5, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1, grad_clip=0.05)
    state = state_of()
    reference = {name: torch.nn.Parameter(value.clone()) for name, value in state.items()}
    expected = torch.optim.AdamW(
        [{"params": [reference[name]], "lr": lr * MULTIPLIERS[name]} for name in NAMES],
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=0.0,
    )
    outer = optimizer_for(state, StrategyConfig(outer="adamw", outer_lr=given), train)
    for number in range(4):
        outer.step(gradients_of_round(number), number)
        for name, gradient in gradients_of_round(number).items():
            reference[name].grad = gradient
        expected.step()
        for name in NAMES:
            torch.testing.assert_close(state[name], reference[name].data)


def test_momenta_are_kept_by_name() -> None:
    outer = optimizer_for(state_of(), NESTEROV)
    outer.step(gradients_of_round(0), 0)
    tensors = outer.state_tensors()
    assert set(tensors) == {f"momentum_buffer/{name}" for name in NAMES}
    torch.testing.assert_close(tensors[f"momentum_buffer/{UP}"], gradients_of_round(0)[UP])


@pytest.mark.parametrize(
    "strategy", [NESTEROV, AVERAGE, LOCAL_ADAMW, ADAMW, FEDADAM], ids=lambda s: f"{s.outer} {s.inner}"
)
def test_a_saved_optimizer_goes_on_bit_for_bit(strategy: StrategyConfig) -> None:
    state = with_moments(state_of())
    outer = optimizer_for(state, strategy)
    for number in range(3):
        outer.step(gradients_of_round(number), number)

    resumed_state = copied(state)
    resumed = optimizer_for(resumed_state, strategy)
    resumed.load_state_tensors(copied(outer.state_tensors()))
    for number in range(3, 6):
        outer.step(gradients_of_round(number), number)
        resumed.step(gradients_of_round(number), number)

    assert all(state[name].equal(resumed_state[name]) for name in state)
    saved, again = outer.state_tensors(), resumed.state_tensors()
    assert saved.keys() == again.keys()
    assert all(saved[key].equal(again[key]) for key in saved)


def test_loading_takes_copies() -> None:
    """What a checkpoint was read into must not change under the optimizer's hands, nor the other way round."""
    outer = optimizer_for(state_of(), NESTEROV)
    saved = {f"momentum_buffer/{name}": torch.ones(3, 4) for name in NAMES}
    outer.load_state_tensors(saved)
    outer.step(gradients_of_round(0), 0)
    assert all((value == 1).all() for value in saved.values())


# -- from replies to a new model -----------------------------------------------------------------------------

SHARED, FIRST, SECOND = (expert_name(0, expert, "up_proj") for expert in range(3))
# One layer, three experts: 0 at all three sites, 1 at site 0, 2 at site 1.
PLACEMENT = Placement(np.array([[[True, True, True], [True, False, False], [False, True, False]]]))
SENT = {0: (NORM, SHARED, FIRST), 1: (NORM, SHARED, SECOND), 2: (NORM, SHARED)}
STEPS = RunConfig().train.local_steps


def contribution(*load_E: int, site: int = 0, tokens: int = 100, steps: int = STEPS) -> Contribution:
    holds_LE = PLACEMENT.holds_LEM[:, :, site]
    return Contribution(tokens, steps, np.array([load_E], dtype=np.int64), holds_LE, {})


def reply(site: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(site)
    return {name: torch.randn(40, generator=generator) * 1e4**site for name in SENT[site]}


def committed(
    folder: Path,
    arrivals: Sequence[int],
    strategy: StrategyConfig,
    updated: set[tuple[int, int]] | None = None,
    steps: Sequence[int] = (STEPS,) * 3,
) -> dict[str, Tensor]:
    """The model after a round in which the replies arrived in this order; it was zero before."""
    strategy.up = strategy.down = "fp32"
    config = RunConfig(strategy=strategy)
    inbox = Inbox(folder, CASTS["fp32"])
    assert inbox.begin(1) == []
    contributions = {}
    for site in arrivals:
        inbox.put(site, "", encode_update(reply(site), CASTS["fp32"], {})[0])
        contributions[site] = contribution(site, 0, 0, site=site, tokens=100 + site, steps=steps[site])
    state = {name: torch.zeros(40) for name in (NORM, SHARED, FIRST, SECOND)}
    optimizer = OuterOptimizer(state, strategy, ModelConfig(num_experts=3, num_layers=1), config.train)
    updated = updated_experts(PLACEMENT, contributions, 0.5) if updated is None else updated
    commit(1, optimizer, inbox, config, contributions, updated, {})
    inbox.clear()
    return state


@pytest.mark.parametrize("outer", ["average", "nesterov", "adamw"])
def test_any_order_of_arrival_and_any_size_of_piece_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str
) -> None:
    expected = committed(tmp_path, [0, 1, 2], StrategyConfig(outer=outer))
    assert all(value.any() for value in expected.values())
    for order, size in itertools.product(itertools.permutations(range(3)), (1, 200, 2**20)):
        monkeypatch.setattr(outer_module, "CHUNK_BYTES", size)
        got = committed(tmp_path, order, StrategyConfig(outer=outer))
        assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_each_name_is_the_weighted_mean_of_its_senders(tmp_path: Path) -> None:
    state = committed(tmp_path, [2, 0, 1], StrategyConfig(outer="average"))
    replies = [reply(site) for site in range(3)]
    mean = sum((100 + site) * replies[site][NORM] for site in range(3)) / 303
    torch.testing.assert_close(state[NORM], -mean)
    torch.testing.assert_close(state[FIRST], -replies[0][FIRST])
    torch.testing.assert_close(state[SECOND], -replies[1][SECOND])


def test_experts_may_weigh_the_tokens_they_got(tmp_path: Path) -> None:
    state = committed(tmp_path, [0, 1, 2], StrategyConfig(outer="average", expert_weighting="routed"))
    torch.testing.assert_close(state[SHARED], -(reply(1)[SHARED] + 2 * reply(2)[SHARED]) / 3)


def test_an_expert_that_is_held_back_keeps_its_value(tmp_path: Path) -> None:
    state = committed(tmp_path, [0, 1, 2], StrategyConfig(), updated={(0, 1), (0, 2)})
    assert not state[SHARED].any()
    assert state[FIRST].any()
    assert state[NORM].any()


def test_updates_of_unequal_steps_are_averaged_by_tokens_as_they_are(tmp_path: Path) -> None:
    """An update of one step weighs its tokens, and is not made as long as others'."""
    steps = (10, 40, 1)
    for inner in ("adamw", "gradient"):
        state = committed(tmp_path, [0, 1], StrategyConfig(outer="average", inner=inner), steps=steps)
        expected = -sum((100 + site) * reply(site)[NORM] for site in range(2)) / 201
        torch.testing.assert_close(state[NORM], expected)


def test_step_scales_by_hand() -> None:
    equal = {
        site: contribution(site=site, tokens=tokens, steps=50) for site, tokens in enumerate((7, 1001, 333))
    }
    assert step_scales(equal, "tokens", None) == {0: 1.0, 1: 1.0, 2: 1.0}  # exactly
    # Weights 3 : 1, so the mean K is 25; each site's own K is taken out.
    unequal = {
        0: contribution(1, 9, 9, tokens=300, steps=30),
        1: contribution(3, 9, 9, site=1, tokens=100, steps=10),
    }
    assert step_scales(unequal, "tokens", None) == {0: 25 / 30, 1: 25 / 10}
    assert step_scales(unequal, "tokens", (0, 0)) == {0: 25 / 30, 1: 25 / 10}
    # By the tokens that the expert got: 1 : 3, a mean K of 15.
    assert step_scales(unequal, "routed", (0, 0)) == {0: 15 / 30, 1: 15 / 10}
    assert step_scales({}, "tokens", None) == {}


def test_an_expert_is_scaled_by_its_own_holders_alone() -> None:
    """Site 1 took a single step, and site 0 many; each of them alone holds an expert."""
    very = {0: contribution(tokens=3100, steps=31), 1: contribution(site=1, tokens=100, steps=1)}
    assert step_scales(very, "tokens", (0, 1)) == {0: 1.0}
    assert step_scales(very, "tokens", (0, 2)) == {1: 1.0}
    # What both hold is bounded: a step is not taken for thirty.
    dense = step_scales(very, "tokens", None)
    assert dense[1] == MOST_SCALE
    assert dense[0] == pytest.approx((31 * 31 + 1) / 32 / 31)


def test_orthogonal_routers_are_projected_after_the_step(tmp_path: Path) -> None:
    gate = gate_name(0)
    config = RunConfig(
        model=ModelConfig(router="orthogonal", d_model=8, num_layers=1),
        strategy=StrategyConfig(outer="nesterov", up="fp32", down="fp32"),
    )
    inbox = Inbox(tmp_path, CASTS["fp32"])
    inbox.begin(1)
    rows = {name: torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) for name in (gate, NORM)}
    inbox.put(0, "", encode_update(rows, CASTS["fp32"], {})[0])
    state = {name: torch.eye(3, 8) for name in rows}
    optimizer = OuterOptimizer(state, config.strategy, config.model, config.train)
    commit(1, optimizer, inbox, config, {0: contribution(1, 0, 0)}, set(), {})
    stepped = state[NORM]  # the same start and the same update
    torch.testing.assert_close(state[gate], orthonormal_rows(stepped))
    assert not torch.allclose(state[gate], stepped)


# -- who takes part ------------------------------------------------------------------------------------------


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
def test_which_experts_have_enough_holders(
    good: list[int], share: float, expected: set[tuple[int, int]]
) -> None:
    assert updated_experts(PLACEMENT, good, share) == expected


# With a confidence of 0.95 eight tokens are the least in 256 dimensions (below).
FLOOR = RunConfig(model=ModelConfig(d_model=256), strategy=StrategyConfig(capacity_floor=0.95))


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        (([3, 8, 0], [3, 0, 8], [2, 0, 0]), set()),  # expert 0 gets 8 tokens from its three holders together
        (([3, 8, 0], [3, 0, 8], [1, 0, 0]), {(0, 0)}),
        (([9, 7, 0], [9, 90, 8], [9, 90, 0]), {(0, 1)}),  # a ghost's tokens reach nobody
        (([0, 0, 0], [9, 0, 8], [9, 0, 0]), set()),  # site 0 does not say; expert 1 is only there
    ],
)
def test_starved_is_who_got_too_few_tokens_at_its_holders_together(
    loads: Sequence[list[int]], expected: set[tuple[int, int]]
) -> None:
    contributions = {site: contribution(*load_E, site=site) for site, load_E in enumerate(loads)}
    assert starved_experts(PLACEMENT, contributions, FLOOR) == (expected, 8)
    assert starved_experts(PLACEMENT, contributions, RunConfig()) == (
        set(),
        0,
    )  # without a floor nobody starves


# -- the least number of tokens, against Monte Carlo ---------------------------------------------------------

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
