"""The three routers, and whose load they balance.

Letters: T tokens, D d_model, C candidates of the router, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.load import averaged, difference
from fomoe_flwr.model.base import named_views, read_shard
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.moe import SigmaRouter, cosine_logits, grap_logits, linear_logits, orthonormal_rows
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.model.spec import gate_name, moment_name, parameter_counts, parameter_shapes, parameters
from fomoe_flwr.placement import full_residents
from fomoe_flwr.server.outer import restore_orthogonality
from tests.model.helpers import SMALL

SMALL = dataclasses.replace(SMALL, num_experts=8)  # it must divide d_model = 16
FULL = full_residents(SMALL.num_layers, SMALL.num_experts)
SOME = [[0, 2, 5], [1, 3]]
ROUTERS = ("linear", "orthogonal", "grap")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def with_router(router: str, model: ModelConfig = SMALL) -> ModelConfig:
    return dataclasses.replace(model, router=router)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def is_orthonormal(rows_CD: Tensor, atol: float = 1e-6) -> bool:
    return torch.allclose(
        rows_CD @ rows_CD.T, torch.eye(len(rows_CD), dtype=rows_CD.dtype), rtol=0, atol=atol
    )


# -- GrAP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "d_model"), [(1, 4), (4, 4), (4, 12), (8, 256)])
def test_grap_is_a_linear_router_with_fixed_orthogonal_rows(num_experts: int, d_model: int) -> None:
    """LocMoE's rows are n/d on slice i and 0 elsewhere: W Wᵀ = (n/d)·I; times √(d/n) they are orthonormal."""
    width = d_model // num_experts
    rows_CD = (
        torch.eye(num_experts, dtype=torch.float64).repeat_interleave(width, dim=1) * num_experts / d_model
    )
    identity_CC = torch.eye(num_experts, dtype=torch.float64)
    torch.testing.assert_close(rows_CD @ rows_CD.T, identity_CC * num_experts / d_model, **TOLERANCE)
    scaled_CD = rows_CD * math.sqrt(d_model / num_experts)
    torch.testing.assert_close(scaled_CD @ scaled_CD.T, identity_CC, **TOLERANCE)
    x_TD = drawn(7, d_model)
    torch.testing.assert_close(grap_logits(x_TD, num_experts), linear_logits(x_TD, scaled_CD), **TOLERANCE)


def test_grap_of_a_case_worked_out_by_hand() -> None:
    # Slices (1, 3) and (-2, 4): means 2 and 1, times √(4/2).
    logits_TC = grap_logits(torch.tensor([[1.0, 3.0, -2.0, 4.0]]), 2)
    torch.testing.assert_close(logits_TC, math.sqrt(2) * torch.tensor([[2.0, 1.0]]))


def test_grap_has_nothing_to_learn_to_send_or_to_keep() -> None:
    model = with_router("grap")
    names = set(parameter_shapes(model, FULL, "skip"))
    assert not any("gate" in name for name in names)
    assert initial_state(model, FULL, "skip", 0).keys() == names
    with torch.device("meta"):
        module = Transformer(model, FULL, "skip")
    assert {view.name for view in named_views(module)} == names
    counts = parameter_counts(model)
    assert counts.router == 0
    assert counts.total == sum(parameter.numel() for parameter in module.parameters())
    assert counts.total == parameter_counts(SMALL).total - parameter_counts(SMALL).router


# -- orthogonal ----------------------------------------------------------------------------------------------


def test_an_orthogonal_router_starts_with_orthonormal_rows_and_the_rest_as_ever() -> None:
    linear, orthogonal = (initial_state(with_router(router), FULL, "skip", 3) for router in ROUTERS[:2])
    gates = [gate_name(layer) for layer in range(SMALL.num_layers)]
    for name in gates:
        assert is_orthonormal(orthogonal[name])
        assert not is_orthonormal(linear[name], atol=0.1)
    assert all(orthogonal[name].equal(linear[name]) for name in linear.keys() - set(gates))
    rows = parameters(SMALL, FULL, "skip")
    assert parameters(with_router("orthogonal"), FULL, "skip") == rows


def test_its_logits_are_cosines_times_the_root_of_the_width() -> None:
    x_TD, rows_CD = drawn(5, 16), drawn(8, 16, seed=1)
    for token, logits_C in enumerate(cosine_logits(x_TD, rows_CD)):
        for row, logit in enumerate(logits_C):
            a_D, b_D = x_TD[token], rows_CD[row]
            assert logit == pytest.approx(4 * float(a_D @ b_D / (a_D.norm() * b_D.norm())))
    louder_CD = rows_CD * torch.arange(1.0, 9.0).unsqueeze(
        1
    )  # no row wins by its length, no token by its own
    torch.testing.assert_close(cosine_logits(3 * x_TD, louder_CD), cosine_logits(x_TD, rows_CD), **TOLERANCE)


def test_for_a_normalised_token_and_orthonormal_rows_it_is_the_linear_router() -> None:
    x_TD, rows_CD = drawn(5, 16), orthonormal_rows(drawn(8, 16, seed=1))
    x_TD = 4 * x_TD / x_TD.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosine_logits(x_TD, rows_CD), linear_logits(x_TD, rows_CD), **TOLERANCE)


@given(st.integers(1, 8), st.integers(0, 10_000))
def test_the_projection_is_the_inverse_root_times_the_rows(num_rows: int, seed: int) -> None:
    """(W Wᵀ)^(-1/2) W, from the eigenvectors of W Wᵀ and not from the singular ones of W."""
    rows_CD = drawn(num_rows, 8, seed=seed)
    values_C, vectors_CC = torch.linalg.eigh(rows_CD @ rows_CD.T)
    assume(values_C[0] > 1e-4 * values_C[-1])  # the inverse root itself loses its digits there
    expected_CD = vectors_CC @ torch.diag(values_C**-0.5) @ vectors_CC.T @ rows_CD
    projected_CD = orthonormal_rows(rows_CD)
    torch.testing.assert_close(projected_CD, expected_CD, rtol=1e-7, atol=1e-7)
    assert is_orthonormal(projected_CD, atol=1e-12)
    torch.testing.assert_close(orthonormal_rows(projected_CD), projected_CD, **TOLERANCE)


def test_no_other_orthonormal_rows_are_nearer() -> None:
    rows_CD = drawn(3, 8)
    nearest = (orthonormal_rows(rows_CD) - rows_CD).norm()
    for seed in range(50):
        other_CD = orthonormal_rows(rows_CD + 0.3 * drawn(3, 8, seed=seed + 1))
        assert (other_CD - rows_CD).norm() >= nearest


def test_rows_that_have_become_equal_are_told_apart_again() -> None:
    rows_CD = drawn(1, 8).expand(3, 8)
    assert is_orthonormal(orthonormal_rows(rows_CD), atol=1e-12)


def test_the_server_restores_what_averaging_broke_and_touches_nothing_else() -> None:
    states = [initial_state(with_router("orthogonal"), FULL, "skip", seed) for seed in (1, 2)]
    state = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    state |= {moment_name("exp_avg", name): state[name].clone() for name in map(gate_name, range(2))}
    before = {name: tensor.clone() for name, tensor in state.items()}
    restore_orthogonality(state, range(SMALL.num_layers))
    for name, tensor in state.items():
        if name in map(gate_name, range(2)):
            assert not is_orthonormal(before[name], atol=0.1)
            assert is_orthonormal(tensor)
        else:
            assert tensor.equal(before[name])


# -- all three -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_logits_start_with_a_standard_deviation_of_one(router: str) -> None:
    """So none of them starts flat or decided."""
    model = dataclasses.replace(SMALL, d_model=256, num_experts=16, router=router)
    gate = SigmaRouter(model, 16)
    if router != "grap":
        state = initial_state(model, full_residents(2, 16), "skip", 0)
        gate.weight.data.copy_(state[gate_name(0)])
    x_TD = torch.nn.functional.layer_norm(drawn(2000, 256).float(), (256,))
    assert float(gate.scores(x_TD).detach().logit().std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("router", ROUTERS)
def test_scores_are_sigmoids_in_fp32_under_autocast_too(router: str) -> None:
    gate = SigmaRouter(with_router(router), SMALL.num_experts)
    if router != "grap":
        torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    x_TD = drawn(5, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate(x_TD)
    expected_TC = torch.sigmoid(
        {
            "linear": lambda: linear_logits(x_TD, gate.weight),
            "orthogonal": lambda: cosine_logits(x_TD, gate.weight),
            "grap": lambda: grap_logits(x_TD, SMALL.num_experts),
        }[router]()
    )
    weights_TK, chosen_TK = expected_TC.topk(SMALL.top_k, dim=-1)
    assert routing.chosen_TK.equal(chosen_TK)
    torch.testing.assert_close(routing.weights_TK, weights_TK)
    assert gate.losses(routing.load_C, routing.share_C)[1] == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_are_those_of_finite_differences(router: str) -> None:
    gate = SigmaRouter(with_router(router), SMALL.num_experts).double()
    rows_CD = drawn(8, 16, seed=1).requires_grad_()

    def weights_and_loss(x_TD: Tensor, rows_CD: Tensor) -> tuple[Tensor, Tensor]:
        values = {} if router == "grap" else {"weight": rows_CD}
        routing = torch.func.functional_call(gate, values, x_TD)
        # + 0·rows: gradcheck asks for every input's gradient, and GrAP's rows are not there.
        balance, _ = gate.losses(routing.load_C, routing.share_C)
        return routing.weights_TK + 0 * rows_CD.sum(), balance + 0 * rows_CD.sum()

    assert torch.autograd.gradcheck(weights_and_loss, (drawn(4, 16).requires_grad_(), rows_CD))


@pytest.mark.parametrize("router", ROUTERS[1:])  # the linear one: test_sigma_moe.py
def test_a_compiled_model_routes_as_the_eager_one(router: str) -> None:
    torch.compiler.reset()
    model = dataclasses.replace(with_router(router), num_layers=1)  # as good as two, in half the time
    state = initial_state(model, SOME, "skip", 0)
    eager, module = (build(model, SOME, "skip", state, "cpu") for _ in range(2))
    compiled = torch.compile(module, backend="aot_eager")
    tokens_BT = torch.randint(SMALL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    for offset_LE in (None, [[1.0] + [-1 / 7] * 7]):  # from the second round on it may be known
        for each in (eager, module):
            each.begin_round([], offset_LE)
        expected, losses = eager(tokens_BT), compiled(tokens_BT)
        torch.testing.assert_close(losses.cross_entropy, expected.cross_entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses.balance, expected.balance, rtol=1e-4, atol=1e-5)


# -- whose load is balanced ----------------------------------------------------------------------------------


def balance_gradients(module: Transformer, tokens_BT: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    module(tokens_BT).balance.backward()
    return {
        view.name: view.of(view.parameter.grad).clone()
        for view in named_views(module)
        if view.parameter.grad is not None
    }


def load_of(module: Transformer) -> list[list[int]]:
    return [[int(load) for load in moe.gate.load_C] for moe in module.moe_layers]


@pytest.mark.parametrize("router", ROUTERS)
def test_with_the_global_load_sites_together_balance_as_one_site_with_all_their_data(router: str) -> None:
    """Mean of the sites' gradients = gradient on the union; with each site's own load alone it is not."""
    model = dataclasses.replace(SMALL, router=router, experts_impl="loop")
    module = build(model, FULL, "skip", initial_state(model, FULL, "skip", 0), "cpu").double()
    union_BT = torch.randint(SMALL.vocab_size, (6, 8), generator=torch.Generator().manual_seed(1))
    parts = [union_BT[start : start + 2] for start in (0, 2, 4)]
    expected, union_LE = balance_gradients(module, union_BT), load_of(module)

    def mean_over_sites(globally: bool) -> dict[str, Tensor]:
        sites = []
        for part_BT in parts:
            module.begin_round([], None)
            balance_gradients(module, part_BT)
            own, together = averaged(None, load_of(module)), averaged(None, union_LE)
            module.begin_round([], difference(together, own) if globally else None)
            sites.append(balance_gradients(module, part_BT))
        return {name: sum(site[name] for site in sites) / 3 for name in expected}

    together, each = mean_over_sites(globally=True), mean_over_sites(globally=False)
    for name, value in expected.items():
        torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(each[name], value, rtol=1e-3) for name, value in expected.items())


def test_a_global_load_is_for_one_round_and_changes_no_choice() -> None:
    module = build(SMALL, FULL, "skip", initial_state(SMALL, FULL, "skip", 0), "cpu")
    tokens_BT = torch.randint(SMALL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    own = module(tokens_BT)
    loads = load_of(module)
    module.begin_round([], [[1.0] + [-1 / 7] * 7] * 2)
    forced = module(tokens_BT)
    assert load_of(module) == loads
    assert forced.cross_entropy.equal(own.cross_entropy)
    assert not forced.balance.isclose(own.balance)
    module.begin_round([], None)
    assert module(tokens_BT).balance.equal(own.balance)
    assert read_shard(module).keys() == parameter_shapes(SMALL, FULL, "skip").keys()
