"""The learning rate by global step, against PyTorch's own schedulers and closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.config import TrainConfig
from fomoe_flwr.schedule import LrSchedule, lr_schedule, warmup


def test_warmup_is_linear_and_then_constant() -> None:
    assert [warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, 0) == warmup(1000, 0) == 1.0
    assert warmup(0, 1) == 1.0
    assert LrSchedule(4).factor(1) == 0.5


def of_pytorch(shape: str, steps: int, length: int, final: float) -> list[float]:
    """The factors of so many steps, the last `length` of which decay."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = torch.optim.lr_scheduler
    scheduler = (
        schedulers.CosineAnnealingLR(optimizer, length, eta_min=final)
        if shape == "cosine"
        else schedulers.LinearLR(optimizer, 1.0, final, length)
    )
    factors = [1.0] * (steps - length)
    for _ in range(length):
        optimizer.step()
        scheduler.step()
        factors.append(optimizer.param_groups[0]["lr"])
    return factors


@pytest.mark.parametrize(("shape", "length"), [("cosine", 20), ("wsd", 7)])
def test_decays_are_pytorchs(shape: str, length: int) -> None:
    schedule = LrSchedule(0, shape, 20 - length, 20, 0.1)
    expected = of_pytorch(shape, 20, length, 0.1)
    assert [schedule.factor(step) for step in range(20)] == pytest.approx(expected, abs=1e-6)
    assert schedule.factor(19) == pytest.approx(0.1)
    assert schedule.factor(10**6) == pytest.approx(0.1)


@given(
    st.builds(
        LrSchedule,
        st.integers(0, 50),
        st.sampled_from(["constant", "cosine", "wsd"]),
        st.integers(50, 100),
        st.integers(101, 200),
        st.floats(0, 1),
    ),
    st.floats(0, 250),
)
def test_it_rises_in_the_warm_up_and_never_again(schedule: LrSchedule, step: float) -> None:
    now, after = schedule.factor(step), schedule.factor(step + 1)
    assert 0 <= now <= 1
    if step + 1 < schedule.warmup_steps:
        assert after > now
    elif step + 1 >= schedule.warmup_steps:
        assert after <= now + 1e-12 or step < schedule.warmup_steps


def test_the_schedule_of_a_run() -> None:
    train = TrainConfig(rounds=10, local_steps=20, warmup_steps=50)
    assert lr_schedule(train) == LrSchedule(50)
    train.warmup_fraction = 0.25
    assert lr_schedule(train) == LrSchedule(50)
    train.schedule = "cosine"
    assert lr_schedule(train) == LrSchedule(50, "cosine", 50, 200, 0.1)
    train.schedule = "wsd"
    assert lr_schedule(train) == LrSchedule(50, "wsd", 160, 200, 0.1)
    # Given in steps, a run that is prolonged is the same run.
    train.warmup_fraction, train.decay_until, train.decay_steps = None, 300, 30
    assert lr_schedule(train) == LrSchedule(50, "wsd", 270, 300, 0.1)
    train.rounds = 100
    assert lr_schedule(train) == LrSchedule(50, "wsd", 270, 300, 0.1)
