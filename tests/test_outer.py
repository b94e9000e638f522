"""Server arithmetic: means over holders, PyTorch's own optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fomoe_flwr.config import ModelConfig, StrategyConfig, TrainConfig
from fomoe_flwr.model.spec import MOMENTS, moment_name
from fomoe_flwr.outer import OuterOptimizer, RunningMean, with_moments

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


def test_nesterov_is_pytorchs_sgd_over_several_rounds() -> None:
    state = state_of()
    reference = {name: torch.nn.Parameter(value.clone()) for name, value in state.items()}
    expected = torch.optim.SGD(reference.values(), lr=0.7, momentum=0.9, nesterov=True)
    outer = optimizer_for(state, NESTEROV)
    for number in range(4):
        outer.step(gradients_of_round(number), number, 0)
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
    outer.step({NORM: numbers(1)}, 0, 0)
    torch.testing.assert_close(state[NORM], numbers(8.67))
    outer.step({NORM: numbers(2)}, 1, 0)
    torch.testing.assert_close(state[NORM], numbers(5.443))


def test_without_momentum_nesterov_is_a_plain_step() -> None:
    state = {NORM: numbers(10)}
    outer = optimizer_for(state, StrategyConfig(outer="nesterov", outer_lr=0.5, outer_momentum=0.0))
    for number in range(2):
        outer.step({NORM: numbers(1)}, number, 0)
    torch.testing.assert_close(state[NORM], numbers(9))


@pytest.mark.parametrize("strategy", [NESTEROV, AVERAGE, LOCAL_ADAMW, ADAMW], ids=lambda s: s.outer)
def test_a_pseudo_gradient_is_descended(strategy: StrategyConfig) -> None:
    """The sites returned smaller parameters than they were sent: the global ones must get smaller."""
    state = state_of()
    before = copied(state)
    optimizer_for(state, strategy).step({name: torch.ones(3, 4) for name in NAMES}, 10, 1)
    assert all((state[name] < before[name]).all() for name in NAMES)


@pytest.mark.parametrize("strategy", [NESTEROV, AVERAGE, LOCAL_ADAMW, ADAMW], ids=lambda s: s.outer)
def test_what_nobody_returned_stays_as_it_was_with_its_momentum(strategy: StrategyConfig) -> None:
    state = with_moments(state_of())
    outer = optimizer_for(state, strategy)
    outer.step(gradients_of_round(0), 0, 0)  # all names, so that there is a momentum to keep
    before, buffers = copied(state), copied(outer.state_tensors())

    outer.step(gradients_of_round(1, [NORM]), 1, 0)

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
    outer.step(gradients_of_round(0, [NORM]), 0, 0)
    for number in (1, 2):
        gradients = gradients_of_round(number)
        fresh.step({UP: gradients[UP].clone()}, number, 0)
        outer.step(gradients, number, 0)
        assert state[UP].equal(alone[UP])


def test_average_is_the_mean_of_what_the_sites_returned() -> None:
    state = state_of()
    sent = copied(state)
    returned = [state_of(seed) for seed in (1, 2, 3)]
    mean = mean_of(*[({name: sent[name] - reply[name] for name in NAMES}, 1) for reply in returned])
    optimizer_for(state, AVERAGE).step(mean, 0, 0)
    expected = {name: torch.stack([reply[name] for reply in returned]).mean(0) for name in NAMES}
    torch.testing.assert_close(state, expected)


def test_average_has_no_memory() -> None:
    state = {NORM: numbers(10)}
    outer = optimizer_for(state, AVERAGE)
    for number in range(3):
        outer.step({NORM: numbers(1)}, number, 0)
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
        outer.step(copied(means), 0, 0)
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
    train = TrainConfig(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1, grad_clip=grad_clip)
    state = state_of()
    reference = {name: torch.nn.Parameter(value.clone()) for name, value in state.items()}
    expected = torch.optim.AdamW(
        [{"params": [parameter]} for parameter in reference.values()],
        lr=0.0,
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=0.1,
    )
    outer = optimizer_for(state, ADAMW, train)
    for number in range(6):
        outer.step(gradients_of_round(number), number, warmup_steps=4)
        for name, gradient in gradients_of_round(number).items():
            reference[name].grad = gradient
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(reference.values(), grad_clip)
        for group, name in zip(expected.param_groups, NAMES, strict=True):
            group["lr"] = 0.02 * min(1.0, (number + 1) / 4) * MULTIPLIERS[name]
        expected.step()
        for name in NAMES:
            torch.testing.assert_close(state[name], reference[name].data)


def test_momenta_are_kept_by_name() -> None:
    outer = optimizer_for(state_of(), NESTEROV)
    outer.step(gradients_of_round(0), 0, 0)
    tensors = outer.state_tensors()
    assert set(tensors) == {f"momentum_buffer/{name}" for name in NAMES}
    torch.testing.assert_close(tensors[f"momentum_buffer/{UP}"], gradients_of_round(0)[UP])


@pytest.mark.parametrize("strategy", [NESTEROV, AVERAGE, LOCAL_ADAMW, ADAMW], ids=lambda s: s.outer)
def test_a_saved_optimizer_goes_on_bit_for_bit(strategy: StrategyConfig) -> None:
    state = with_moments(state_of())
    outer = optimizer_for(state, strategy)
    for number in range(3):
        outer.step(gradients_of_round(number), number, 4)

    resumed_state = copied(state)
    resumed = optimizer_for(resumed_state, strategy)
    resumed.load_state_tensors(copied(outer.state_tensors()))
    for number in range(3, 6):
        outer.step(gradients_of_round(number), number, 4)
        resumed.step(gradients_of_round(number), number, 4)

    assert all(state[name].equal(resumed_state[name]) for name in state)
    saved, again = outer.state_tensors(), resumed.state_tensors()
    assert saved.keys() == again.keys()
    assert all(saved[key].equal(again[key]) for key in saved)


def test_loading_takes_copies() -> None:
    """What a checkpoint was read into must not change under the optimizer's hands, nor the other way round."""
    outer = optimizer_for(state_of(), NESTEROV)
    saved = {f"momentum_buffer/{name}": torch.ones(3, 4) for name in NAMES}
    outer.load_state_tensors(saved)
    outer.step(gradients_of_round(0), 0, 0)
    assert all((value == 1).all() for value in saved.values())
