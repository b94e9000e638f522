"""Stand-ins: fitted to an expert, computed in a ghost's place, and taken over from the sites.

Letters: N tokens, D d_model, R rank, T tokens, E experts, L layers, M sites.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from fomoe_flwr.model.experts import LINEARS
from fomoe_flwr.model.moe import MoE
from fomoe_flwr.model.spec import standin_name
from fomoe_flwr.model.standins import Fit, Sample, as_tensors, fit, take_over
from tests.model.helpers import SMALL, plain_expert, poisoned_memory

MODEL = dataclasses.replace(SMALL, standins=8)
RESIDENTS = [0, 2, 5]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- from an expert to its stand-in --------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [200, 12, 3])
def test_a_fit_is_reduced_rank_ridge_regression(tokens: int) -> None:
    """Against the textbook's form, which inverts a matrix of D x D; with more tokens than dimensions and fewer."""
    rank, x_ND, y_ND = 2, normal(tokens, 6) + 3.0, normal(tokens, 5, seed=1) - 1.0
    found = fit(x_ND, y_ND, rank)
    x, y = x_ND - x_ND.mean(0), y_ND - y_ND.mean(0)
    ridge = 1e-2 * (x**2).sum() / tokens
    whole_DD = torch.linalg.inv(x.T @ x + ridge * torch.eye(6, dtype=x.dtype)) @ x.T @ y
    right = torch.linalg.svd(x @ whole_DD).Vh[:rank]
    expected_ND = x @ whole_DD @ right.T @ right + y_ND.mean(0)
    assert [part.shape for part in found] == [(rank, 6), (5, rank), (5,)]
    torch.testing.assert_close(x_ND @ found.down.T @ found.up.T + found.bias, expected_ND)


def test_what_is_affine_is_found() -> None:
    x_ND, map_DD = normal(500, 6), normal(6, 1, seed=1) @ normal(1, 6, seed=2)
    found = fit(x_ND, x_ND @ map_DD + 7.0, 1)
    error = (x_ND @ found.down.T @ found.up.T + found.bias) - (x_ND @ map_DD + 7.0)
    assert error.norm() < 1e-3 * (x_ND @ map_DD).norm()


def test_of_one_token_the_output_is_all_that_is_known() -> None:
    found = fit(normal(1, 6), normal(1, 5, seed=1), 8)
    assert not found.down.any()
    torch.testing.assert_close(found.bias, normal(1, 5, seed=1)[0])
    assert all(part.isfinite().all() for part in found)


def moe_layer(residents: list[int], impl: str = "loop") -> MoE:
    """All weights of expert e are the same whoever holds it."""
    moe = MoE(dataclasses.replace(MODEL, experts_impl=impl), residents, "skip")
    assert moe.standins is not None
    with torch.no_grad():
        moe.gate.weight.copy_(normal(6, 16))
        moe.experts.up_EHD.copy_(normal(6, 8, 16, seed=1)[residents])
        moe.experts.down_EDH.copy_(normal(6, 16, 8, seed=2)[residents])
        moe.standins.down_ERD.copy_(normal(6, 8, 16, seed=3))
        moe.standins.up_EDR.copy_(normal(6, 16, 8, seed=4))
        moe.standins.bias_ED.copy_(normal(6, 16, seed=5))
    return moe


def test_a_sample_fits_the_residents_that_were_chosen() -> None:
    moe, x_TD = moe_layer(RESIDENTS), normal(300, 16, seed=6).float()
    # Experts 0 and 2 for every token but the first, which alone chose expert 1, a ghost; nobody chose expert 5.
    chosen_TK = torch.tensor([[0, 2]]).repeat(300, 1)
    chosen_TK[0] = torch.tensor([0, 1])
    sample = Sample(batches=2)
    sample.add(x_TD[:100], chosen_TK[:100])
    sample.add(x_TD[100:], chosen_TK[100:])
    with torch.no_grad():
        found = sample.fit(moe.experts, RESIDENTS, 8)
        assert list(found) == [0, 2]
        for expert, x_ND in ((0, x_TD), (2, x_TD[1:])):
            slot = RESIDENTS.index(expert)
            y_ND = torch.stack(
                [plain_expert(x_D, moe.experts.up_EHD[slot], moe.experts.down_EDH[slot]) for x_D in x_ND]
            )
            own = found[expert]
            expected = fit(x_ND, y_ND, 8)
            torch.testing.assert_close(own.up @ own.down, expected.up @ expected.down, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(own.bias, expected.bias, atol=1e-3, rtol=1e-3)
            mean_D = y_ND.mean(0)
            left = (y_ND - x_ND @ own.down.T @ own.up.T - own.bias).square().sum()
            assert left < 0.8 * (y_ND - mean_D).square().sum()


def test_a_sample_keeps_so_many_tokens_of_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fomoe_flwr.model.standins.TOKENS", 10)
    moe, sample = moe_layer(RESIDENTS), Sample(batches=2)
    for batch in range(2):
        sample.add(normal(20, 16, seed=batch).float(), torch.zeros(20, 1, dtype=torch.long))
    seen: list[int] = []

    def experts(x_PD: Tensor, ends_E: Tensor) -> Tensor:
        seen.append(len(x_PD))
        return moe.experts(x_PD, ends_E)

    sample.fit(experts, RESIDENTS, 8)
    assert seen == [10]


# -- in a ghost's place --------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", LINEARS)
@pytest.mark.parametrize("residents", [RESIDENTS, [3], list(range(6))], ids=["some", "one", "all"])
def test_a_ghost_weighs_what_it_would_and_computes_its_stand_in(impl: str, residents: list[int]) -> None:
    """Outputs and gradients of the plain loop; zeros, and not nothing, for what no token reached."""
    with poisoned_memory():
        moe = moe_layer(residents, impl)
        assert moe.standins is not None
        x_TD, upstream_TD = normal(11, 16, seed=7).float(), normal(11, 16, seed=8).float()
        leaves = (moe.gate.weight, moe.experts.up_EHD, moe.experts.down_EDH, *moe.standins.parameters())
        y_TD = moe(x_TD)[0]
        gradients = torch.autograd.grad(y_TD, leaves, upstream_TD)

    plain = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gate, up, down, low, high, bias = plain
    rows = []
    for x_D in x_TD.double():
        scores_E = torch.sigmoid(gate @ x_D)
        y_D = torch.zeros(16, dtype=torch.float64)
        for expert in scores_E.topk(MODEL.top_k).indices.tolist():
            if expert in residents:
                slot = residents.index(expert)
                out_D = plain_expert(x_D, up[slot], down[slot])
            else:
                out_D = high[expert] @ (low[expert] @ x_D) + bias[expert]
            y_D = y_D + scores_E[expert] * out_D
        rows.append(y_D)
    expected_TD = torch.stack(rows)
    expected = torch.autograd.grad(expected_TD, plain, upstream_TD.double(), allow_unused=True)
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=1e-5, atol=1e-4)
    for gradient, wanted, leaf in zip(gradients, expected, plain, strict=True):
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-3)


# -- from the sites to the model -----------------------------------------------------------------------------


def of_value(value: float) -> Fit:
    return Fit(torch.full((8, 16), value), torch.full((16, 8), value), torch.full((16,), value))


def test_an_experts_stand_in_is_that_of_its_first_holder_that_has_one() -> None:
    """Layers 3 and 4 have experts. Nobody fits what it does not hold; what nobody fitted stays as it was."""
    holds_LEM = np.zeros((2, 6, 3), dtype=bool)
    holds_LEM[0, [0, 1], 0] = True  # site 0
    holds_LEM[0, [1, 2, 3], 1] = True
    holds_LEM[1, [5], 2] = True
    fitted = {
        2: as_tensors(4, {5: of_value(3.0)}, 6),
        0: as_tensors(3, {0: of_value(1.0), 4: of_value(9.0)}, 6),
        1: as_tensors(3, {1: of_value(2.0), 2: of_value(2.0)}, 6),
    }
    parts = of_value(0.0)._asdict()
    tensors = {
        standin_name(layer, part): torch.full((6, *value.shape), -1.0)
        for layer in (3, 4)
        for part, value in parts.items()
    }
    assert take_over(tensors, fitted, holds_LEM, [3, 4]) == 4
    for part in parts:
        assert tensors[standin_name(3, part)].flatten(1)[:, 0].tolist() == [1.0, 2.0, 2.0, -1.0, -1.0, -1.0]
        assert tensors[standin_name(4, part)].flatten(1)[:, 0].tolist() == [-1.0] * 5 + [3.0]


def test_a_layer_that_no_token_reached_is_not_sent() -> None:
    assert as_tensors(0, {}, 6) == {}
