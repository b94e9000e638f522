"""Muon's step in closed form, and who takes it. Against `torch.optim.Muon` it stands in test_optimizer.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.engine import muon
from fomoe_flwr.engine.optimizer import Moments, Schedule, StackedOptimizer, fits
from fomoe_flwr.model.base import read_shard
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.spec import by_muon, parameters
from fomoe_flwr.schedule import LrSchedule
from tests.engine.helpers import MODEL, SOME, TRAIN, is_hidden, set_gradients
from tests.model.stock_models import CONFIGS, stock

MUON = dataclasses.replace(TRAIN, optimizer="muon")


def newton_schulz(value: float) -> float:
    """What five steps make of a singular value, by the polynomial of Jordan et al."""
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


def matrices(experts: int, rows: int, columns: int, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns U_ENR and V_EMR, and singular values S_ER from 0.1 to 1, of matrices of this rank."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(experts, side, rank, generator=generator, dtype=torch.float64)).Q
        for side in (rows, columns)
    )
    return u, v, 0.1 + 0.9 * torch.rand(experts, rank, generator=generator, dtype=torch.float64)


@given(
    experts=st.integers(1, 4),
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 2**20),
)
def test_singular_values_become_what_the_polynomial_makes_of_them(
    experts: int, rows: int, columns: int, scale: float, seed: int
) -> None:
    """Singular vectors stay. Of any size alike, wide and tall, and each matrix as if it were alone."""
    u, v, s = matrices(experts, rows, columns, min(rows, columns), seed)
    step = muon.orthogonalised((scale * u @ torch.diag_embed(s) @ v.mT).float()).double()
    normed = s / s.norm(dim=-1, keepdim=True)
    wanted = (
        u
        @ torch.diag_embed(
            torch.tensor([[newton_schulz(x) for x in row] for row in normed.tolist()])
        ).double()
        @ v.mT
    )
    # bf16 has 8 bits, there are fifteen products one after the other, and the polynomial is steep.
    assert (step - wanted).norm() <= 0.1 * wanted.norm()
    assert step.shape == (experts, rows, columns)
    alone = torch.stack(
        [muon.orthogonalised((scale * u @ torch.diag_embed(s) @ v.mT)[e].float()) for e in range(experts)]
    )
    assert (step - alone.double()).norm() <= 0.01 * wanted.norm()


def test_of_nothing_comes_nothing() -> None:
    """An expert that never got a token, and a layer without experts; neither spoils its neighbours."""
    step = muon.orthogonalised(torch.stack([torch.zeros(4, 6), torch.eye(4, 6)]))
    assert not step[0].any()
    assert step[1].float().norm() == pytest.approx(2 * newton_schulz(0.5), rel=0.1)
    assert muon.orthogonalised(torch.zeros(0, 4, 6)).shape == (0, 4, 6)


@pytest.mark.parametrize("shape", [(48, 48), (16, 64), (64, 16)])
def test_a_step_is_as_large_as_adamws_usually_is(shape: tuple[int, int]) -> None:
    """Root mean square of 0.2·lr, but for what the polynomial leaves of singular values (0.7 to 1.2)."""
    generator = torch.Generator().manual_seed(0)
    value = torch.zeros(shape)
    muon.take(value, muon.orthogonalised(torch.randn(shape, generator=generator)), shape, 0.01, 0.0)
    assert 0.7 * 0.002 < float(value.square().mean().sqrt()) < 1.2 * 0.002


def test_weights_decay_and_momentum_is_nesterovs() -> None:
    """By hand: m = 0.95·2 + 0.05·4 = 2.1; the step goes along 0.05·4 + 0.95·2.1, and a 1 x 1 matrix has its sign."""
    momentum, gradient = torch.tensor([[2.0]]), torch.tensor([[4.0]])
    found = muon.direction(gradient, momentum)
    assert momentum.item() == pytest.approx(2.1)
    assert found.item() == pytest.approx(0.05 * 4 + 0.95 * 2.1)
    value = torch.tensor([[3.0]])
    muon.take(value, torch.tensor([[1.0]]), (1, 1), 0.01, 0.5)
    assert value.item() == pytest.approx(3 * (1 - 0.01 * 0.5) - 0.01 * 0.2)


# -- who takes it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
def test_the_matrices_inside_layers_are_muons(routing: str) -> None:
    model = dataclasses.replace(MODEL, num_shared_experts=1, standins=0 if routing == "partitioned" else 8)
    table = parameters(model, SOME, routing)
    assert {name for name, param in table.items() if by_muon(param, MUON)} == {
        name for name in table if is_hidden(name)
    }
    assert not any(by_muon(param, TRAIN) for param in table.values())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_matrices_inside_layers_of_stock_models_are_muons(family: str) -> None:
    """Neither embedding, head, router, norms, biases, nor a gate of one row."""
    model = stock(family)
    residents = [[0, 2] for _ in range(model.num_layers)]
    chosen = {name for name, p in parameters(model, residents, "skip").items() if by_muon(p, MUON)}
    assert all(name.endswith(".weight") and ".layers." in name for name in chosen)
    parts = {name.split(".")[-2] for name in chosen}
    assert {"o_proj", "gate_proj", "up_proj", "down_proj"} <= parts
    assert all("proj" in part for part in parts)


def test_a_run_that_goes_on_with_the_other_optimizer_begins_its_matrices_anew() -> None:
    """With a warm-up, as what is new to the site; and the rest goes on."""
    shard = initial_state(MODEL, SOME, "skip", seed=0)
    table = parameters(MODEL, SOME, "skip")
    for before, after in ((TRAIN, MUON), (MUON, TRAIN)):
        module = build(MODEL, SOME, "skip", shard, "cpu")
        moments: dict[str, Moments] = {}
        for train, first_step in ((before, 0), (after, 10)):
            optimizer = StackedOptimizer(
                module, train, Schedule(first_step, 1.0, LrSchedule(0), first_step), moments
            )
            set_gradients(module, 0)
            optimizer.step()
            moments = optimizer.moments()
        assert moments.keys() == read_shard(module).keys()
        for name, own in moments.items():
            assert fits(own, table[name], after)
            assert (own.step, own.reset_at) == ((1, 10) if is_hidden(name) else (2, 0))


def test_the_factor_of_the_learning_rate_along_the_widths() -> None:
    """Twice as wide: √2 less for a square matrix. Twice as many chosen experts: half, as with AdamW."""
    base = dataclasses.replace(MODEL, base_d_model=16, base_d_expert=8)
    assert {p.muon for p in parameters(base, SOME, "skip").values()} == {1.0}
    wide = dataclasses.replace(base, d_model=32, d_expert=16, top_k=4)
    factors = {
        name.split(".")[-2]: p.muon for name, p in parameters(wide, SOME, "skip").items() if is_hidden(name)
    }
    root = 1 / math.sqrt(2)
    assert factors == {
        "q_proj": pytest.approx(root), "k_proj": pytest.approx(root), "v_proj": pytest.approx(root),
        "o_proj": pytest.approx(root), "up_proj": pytest.approx(root), "down_proj": pytest.approx(root / 2),
    }  # fmt: skip
