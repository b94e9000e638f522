"""AdamW and Muon over stacks, held against PyTorch's with a leaf for every slot; and what is new to a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fomoe_flwr.config import TrainConfig
from fomoe_flwr.engine.optimizer import Moments, Schedule, StackedOptimizer
from fomoe_flwr.model.base import named_views, read_shard
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import by_muon, expert_name, moment_bytes, parameters
from fomoe_flwr.schedule import LrSchedule
from tests.engine.helpers import (
    FULL,
    MODEL,
    SOME,
    TRAIN,
    WARMUP,
    decay_of,
    is_hidden,
    multiplier_of,
    muon_multiplier_of,
    set_gradients,
)

NEWCOMER = expert_name(0, 2, "up_proj")
START = 100  # global step at which the rounds of most tests begin

MUON = dataclasses.replace(TRAIN, optimizer="muon")
BF16 = dataclasses.replace(TRAIN, moments="bf16")
MUON_BF16 = dataclasses.replace(MUON, moments="bf16")

routings = pytest.mark.parametrize("routing", ["skip", "partitioned"])
optimizers = pytest.mark.parametrize("train", [TRAIN, MUON], ids=["adamw", "muon"])


def site(residents: Sequence[Sequence[int]] = SOME, routing: str = "skip") -> Transformer:
    return build(MODEL, residents, routing, initial_state(MODEL, residents, routing, seed=0), "cpu")


def optimizer_of(
    module: Transformer,
    moments: dict[str, Moments] | None = None,
    train: TrainConfig = TRAIN,
    first_step: int = 0,
    stride: float = 1.0,
    warmup_steps: int = WARMUP,
    newcomer_reset_at: int = 0,
) -> StackedOptimizer:
    schedule = Schedule(first_step, stride, LrSchedule(warmup_steps), newcomer_reset_at)
    return StackedOptimizer(module, train, schedule, {} if moments is None else moments)


def copied(moments: dict[str, Moments]) -> dict[str, Moments]:
    return {
        name: dataclasses.replace(
            m, exp_avg=m.exp_avg.clone(), exp_avg_sq=None if m.exp_avg_sq is None else m.exp_avg_sq.clone()
        )
        for name, m in moments.items()
    }


def same(got: Tensor | None, wanted: Tensor | None) -> bool:
    return got is wanted is None or (got is not None and wanted is not None and got.equal(wanted))


# -- the reference -------------------------------------------------------------------------------------------


class OneLeafASlot:
    """PyTorch's optimizers over a parameter of its own for every name, with the schedule written out."""

    def __init__(
        self,
        module: Transformer,
        moments: dict[str, Moments],
        first_step: int,
        stride: float,
        newcomer: int,
        optimizer: str = "adamw",
    ) -> None:
        self.step_number, self.stride = float(first_step), stride
        self.leaves: dict[str, nn.Parameter] = {}
        self.reset_at: dict[str, int] = {}
        self.views = named_views(module)
        for view in self.views:
            leaf = nn.Parameter(view.of(view.parameter.data).clone())
            self.leaves[view.name] = leaf
            self.reset_at[view.name] = moments[view.name].reset_at if view.name in moments else newcomer
        self.by_muon = {name for name in self.leaves if optimizer == "muon" and is_hidden(name)}
        self.adamw = torch.optim.AdamW(
            self.groups(self.leaves.keys() - self.by_muon), lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True
        )
        self.optimizers: list[torch.optim.Optimizer] = [self.adamw]
        if self.by_muon:
            self.muon = torch.optim.Muon(
                self.groups(self.by_muon), lr=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append(self.muon)
        for name, given_ in moments.items():
            if name in self.by_muon:
                self.muon.state[self.leaves[name]] = {"momentum_buffer": given_.exp_avg.clone()}
            else:
                assert given_.exp_avg_sq is not None
                self.adamw.state[self.leaves[name]] = {
                    "step": torch.tensor(float(given_.step)),
                    "exp_avg": given_.exp_avg.clone(),
                    "exp_avg_sq": given_.exp_avg_sq.clone(),
                }

    def groups(self, names: Collection[str]) -> list[dict[str, Any]]:
        """What a weight loses in a step is the same, whatever the factor of the learning rate."""
        lost = {name: decay_of(name) * multiplier_of(name) for name in names}
        return [
            {"params": [self.leaves[name]], "name": name, "weight_decay": lost[name] / self.multiplier(name)}
            for name in names
        ]

    def multiplier(self, name: str) -> float:
        return muon_multiplier_of(name) if name in self.by_muon else multiplier_of(name)

    def step(self) -> None:
        for group in [group for optimizer in self.optimizers for group in optimizer.param_groups]:
            name = group["name"]
            factor = min(1.0, (self.step_number + 1) / WARMUP)
            if self.reset_at[name]:
                factor = min(factor, (self.step_number - self.reset_at[name] + 1) / 5)
            group["lr"] = 0.01 * factor * self.multiplier(name)
        for view in self.views:
            grad = view.parameter.grad
            self.leaves[view.name].grad = None if grad is None else view.of(grad).clone()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step_number += self.stride

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """By name, of every leaf that was ever updated or came with moments."""
        states = {**self.adamw.state, **(self.muon.state if self.by_muon else {})}
        return {name: state for name, leaf in self.leaves.items() if (state := states.get(leaf))}


# A slot was never at the site, or for long, or came a while ago; experts come and go one by one, so neighbours differ.
ages = st.sampled_from([None, (60, 0), (3, 97), (1, 98)])


@routings
@optimizers
@given(data=st.data())
@settings(max_examples=25)
def test_slots_of_any_ages_are_stepped_as_leaves_of_their_own(
    routing: str, train: TrainConfig, data: st.DataObject
) -> None:
    """Bit for bit: parameters, moments, step counts and resets; also where a gradient or some rows are missing.

    But for what Muon orthogonalises: in bf16 a product of many matrices may be rounded otherwise than one of one.
    """
    module = site(FULL, routing)
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for name, value in read_shard(module).items():
        age = data.draw(ages) if "experts" in name else (60, 0)
        if age is not None:
            average, square = (torch.randn(value.shape, generator=generator) for _ in range(2))
            one = train is MUON and is_hidden(name)
            moments[name] = Moments(average, None if one else square**2, *age)
    first_step, stride = data.draw(st.sampled_from([(START, 1.0), (START, 2.5), (2, 0.5)]))
    reference = OneLeafASlot(module, moments, first_step, stride, first_step, train.optimizer)
    optimizer = optimizer_of(
        module, copied(moments), train, first_step=first_step, stride=stride, newcomer_reset_at=first_step
    )
    before = {name: value.clone() for name, value in read_shard(module).items()}
    without = data.draw(st.sampled_from(["", "experts.up_EHD", "q_proj", "gate"]))
    for step in range(4):
        set_gradients(module, step)
        for path, parameter in module.named_parameters():
            if without and without in path and step == 1:
                parameter.grad = None
            elif "experts" in path and parameter.grad is not None:
                parameter.grad[step % 4] = 0  # no token came to this expert
        optimizer.step()
        reference.step()
    stepped = read_shard(module)
    for name, leaf in reference.leaves.items():
        if name in reference.by_muon:
            assert (stepped[name] - leaf).norm() <= 0.01 * (leaf - before[name]).norm(), name
        else:
            assert stepped[name].equal(leaf.data), name
    got = optimizer.moments()
    for name, wanted in reference.moments().items():
        assert got[name].reset_at == reference.reset_at[name]
        if name in reference.by_muon:
            assert got[name].exp_avg.equal(wanted["momentum_buffer"]), name
            assert got[name].exp_avg_sq is None
            known = moments[name].step if name in moments else 0
            assert got[name].step - known in (3, 4)  # in one there may have been no gradient
        else:
            assert got[name].exp_avg.equal(wanted["exp_avg"]), name
            assert same(got[name].exp_avg_sq, wanted["exp_avg_sq"]), name
            assert got[name].step == int(wanted["step"])


def test_a_step_of_a_single_weight_by_hand() -> None:
    # AdamW's first step is lr·g/|g| = lr, whatever the gradient's size; decay takes lr·0.1·w before, but not of norms.
    module = site()
    optimizer = optimizer_of(module, warmup_steps=0)
    set_gradients(module, 0)
    for weight in (norm := module.model.norm.weight, embedding := module.model.embed_tokens.weight):
        weight.data.fill_(1.0)
        weight.grad = torch.full_like(weight, -123.0)
    optimizer.step()
    torch.testing.assert_close(norm.data, torch.full_like(norm, 1 + 0.01))
    torch.testing.assert_close(embedding.data, torch.full_like(embedding, 1 - 0.01 * 0.1 + 0.01))


def test_what_has_no_gradient_stays_and_gets_no_moments() -> None:
    module = site()
    optimizer = optimizer_of(module)
    before = {name: value.clone() for name, value in read_shard(module).items()}
    module.model.norm.weight.grad = torch.ones(MODEL.d_model)
    optimizer.step()
    changed = {name for name, value in read_shard(module).items() if not value.equal(before[name])}
    assert changed == {"model.norm.weight"}
    assert set(optimizer.moments()) == {"model.norm.weight"}


def test_a_layer_without_residents_has_nothing_to_step() -> None:
    module = site([[], [1]])
    optimizer = optimizer_of(module)
    set_gradients(module, 0)
    optimizer.step()
    assert optimizer.moments().keys() == read_shard(module).keys()


# -- what is kept --------------------------------------------------------------------------------------------


@routings
def test_moments_are_those_of_the_shard_by_name_and_shape(routing: str) -> None:
    module = site(routing=routing)
    optimizer = optimizer_of(module)
    set_gradients(module, 0)
    optimizer.step()
    shard, moments = read_shard(module), optimizer.moments()
    assert moments.keys() == shard.keys()
    for name, state in moments.items():
        assert state.exp_avg_sq is not None
        assert state.exp_avg.shape == state.exp_avg_sq.shape == shard[name].shape
        assert (state.step, state.reset_at) == (1, 0)


@routings
@pytest.mark.parametrize("train", [TRAIN, MUON, BF16, MUON_BF16], ids=["adamw", "muon", "bf16", "muon bf16"])
def test_saved_moments_go_on_bit_for_bit(routing: str, train: TrainConfig) -> None:
    straight, interrupted = site(routing=routing), site(routing=routing)
    optimizer, half = optimizer_of(straight, train=train), optimizer_of(interrupted, train=train)
    for step in range(6):
        if step == 3:
            half = optimizer_of(interrupted, copied(half.moments()), train, first_step=3)
        for module, stepper in ((straight, optimizer), (interrupted, half)):
            set_gradients(module, step)
            stepper.step()
    expected, wanted = read_shard(straight), optimizer.moments()
    assert all(value.equal(expected[name]) for name, value in read_shard(interrupted).items())
    for name, state in half.moments().items():
        assert state.exp_avg.equal(wanted[name].exp_avg)
        assert same(state.exp_avg_sq, wanted[name].exp_avg_sq)
        assert (state.step, state.reset_at) == (wanted[name].step, wanted[name].reset_at)


@pytest.mark.parametrize(("train", "exact"), [(BF16, TRAIN), (MUON_BF16, MUON)], ids=["adamw", "muon"])
def test_moments_in_bf16_are_rounded_after_a_step_and_nothing_else_is(
    train: TrainConfig, exact: TrainConfig
) -> None:
    """Parameters have the bits of steps with the same moments in fp32; stacks of two ages, too."""
    rounded, reference = site(FULL), site(FULL)
    optimizer = with_a_newcomer(rounded, train)
    for step in range(5):
        moments = {
            name: dataclasses.replace(
                own,
                exp_avg=own.exp_avg.float(),
                exp_avg_sq=None if own.exp_avg_sq is None else own.exp_avg_sq.float(),
            )
            for name, own in optimizer.moments().items()
        }
        stepper = optimizer_of(reference, moments, exact, START + step, newcomer_reset_at=START)
        for module, one in ((rounded, optimizer), (reference, stepper)):
            set_gradients(module, step)
            one.step()
        wanted = read_shard(reference)
        assert all(value.equal(wanted[name]) for name, value in read_shard(rounded).items())
        exactly = stepper.moments()
        for name, own in optimizer.moments().items():
            assert own.step == exactly[name].step
            assert same(own.exp_avg, exactly[name].exp_avg.bfloat16())
            square = exactly[name].exp_avg_sq
            assert same(own.exp_avg_sq, None if square is None else square.bfloat16())


@pytest.mark.parametrize("train", [TRAIN, MUON, BF16, MUON_BF16], ids=["adamw", "muon", "bf16", "muon bf16"])
def test_the_bytes_that_are_kept_are_those_that_plans_count(train: TrainConfig) -> None:
    module = site()
    optimizer = optimizer_of(module, train=train)
    set_gradients(module, 0)
    optimizer.step()
    table = parameters(MODEL, SOME, "skip")
    for name, own in optimizer.moments().items():
        assert own.nbytes == table[name].numel * moment_bytes(table[name], train)


@pytest.mark.parametrize(("before", "after"), [(TRAIN, BF16), (BF16, TRAIN)], ids=["to bf16", "to fp32"])
def test_a_run_may_go_on_with_another_type_of_moments(before: TrainConfig, after: TrainConfig) -> None:
    """They are rounded, and neither lost nor warmed up."""
    module = site()
    first = optimizer_of(module, train=before)
    set_gradients(module, 0)
    first.step()
    kept = copied(first.moments())
    optimizer = optimizer_of(module, copied(kept), after, first_step=1, newcomer_reset_at=1)
    for name, own in optimizer.moments().items():
        assert own.exp_avg.dtype == (torch.bfloat16 if after is BF16 else torch.float32)
        assert own.exp_avg.equal(kept[name].exp_avg.to(own.exp_avg.dtype))
        assert (own.step, own.reset_at) == (1, 0)


def test_given_moments_are_copied_and_not_held_twice() -> None:
    """Their tensors may be a message's, which nobody writes to; their table is emptied, so that they can be freed."""
    module = site()
    shape = read_shard(module)[NEWCOMER].shape
    own = Moments(torch.zeros(shape), torch.zeros(shape), 3, 0)
    moments = {NEWCOMER: own, "of an expert that went away": own}
    optimizer = optimizer_of(module, moments)
    assert NEWCOMER not in moments
    set_gradients(module, 0)
    optimizer.step()
    assert not own.exp_avg.any()
    assert own.exp_avg_sq is not None
    assert not own.exp_avg_sq.any()
    assert optimizer.moments()[NEWCOMER].step == 4
    assert optimizer.moments().keys() == read_shard(module).keys()


def test_moments_that_were_given_are_there_before_the_first_step() -> None:
    """LocalAdamW's at the start of a run: zeros, of step 0."""
    module = site()
    zeros: Tensor = torch.zeros(read_shard(module)[NEWCOMER].shape)
    assert optimizer_of(module, {NEWCOMER: Moments(zeros, zeros, 0, 0)}).moments().keys() == {NEWCOMER}


# -- warm-up and what is new to the site ---------------------------------------------------------------------


def with_a_newcomer(module: Transformer, train: TrainConfig = TRAIN) -> StackedOptimizer:
    """At global step 100 the site has had all its names for 60 steps, but one expert's tensor just came."""
    table = parameters(MODEL, module.resident_experts, module.routing)
    moments = {
        name: Moments(
            torch.zeros_like(value),
            None if by_muon(table[name], train) else torch.full_like(value, 2**-13),
            60,
            0,
        )
        for name, value in read_shard(module).items()
        if name != NEWCOMER
    }
    return optimizer_of(module, moments, train, START, newcomer_reset_at=START)


def test_a_newcomer_warms_up_and_counts_by_itself() -> None:
    module = site()
    optimizer = with_a_newcomer(module)
    rates = []
    for step in range(7):
        rates.append((optimizer.learning_rate(0), optimizer.learning_rate(START)))
        set_gradients(module, step)
        optimizer.step()
    assert [old for old, _ in rates] == [pytest.approx(0.01)] * 7  # the run's warm-up is long over
    assert [new for _, new in rates] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01])
    moments = optimizer.moments()
    assert (moments[NEWCOMER].step, moments[NEWCOMER].reset_at) == (7, START)
    assert {(m.step, m.reset_at) for name, m in moments.items() if name != NEWCOMER} == {(67, 0)}


def test_a_newcomer_goes_on_warming_up_in_the_next_round() -> None:
    """Its reset is part of what is kept: the second half of a warm-up is the second half."""
    module = site()
    optimizer = with_a_newcomer(module)
    for step in range(3):
        set_gradients(module, step)
        optimizer.step()
    resumed = optimizer_of(module, optimizer.moments(), first_step=103, newcomer_reset_at=103)
    assert resumed.moments()[NEWCOMER].reset_at == START
    assert resumed.learning_rate(START) == pytest.approx(0.008)


def test_a_newcomer_in_the_runs_warmup_takes_the_smaller_rate() -> None:
    optimizer = optimizer_of(site(), first_step=10, warmup_steps=100, newcomer_reset_at=10)
    assert optimizer.learning_rate(10) == pytest.approx(0.01 * 11 / 100)  # its own would be 1/5
    optimizer.step_number = 99
    assert optimizer.learning_rate(98) == pytest.approx(0.01 * 2 / 5)  # the run's is over


def test_a_stride_goes_through_the_schedule_faster() -> None:
    module = site()
    optimizer = optimizer_of(module, stride=2.0, warmup_steps=8)
    rates = []
    for step in range(4):
        rates.append(optimizer.learning_rate(0))
        set_gradients(module, step)
        optimizer.step()
    assert rates == pytest.approx([0.01 * count / 8 for count in (1, 3, 5, 7)])
    assert optimizer.step_number == 8
