"""Locality: the bias is a matter of choosing, the loss a divergence; both prefer what is here.

Letters: T tokens, C candidates of the router, K experts a token, D d_model.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.model.base import read_shard
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.locality import bias_for, entry_biases, local_shares, locality_loss, resident_share
from fomoe_flwr.model.moe import Routing, SigmaRouter
from fomoe_flwr.model.sigma_moe import Transformer
from fomoe_flwr.placement import full_residents
from tests.model.helpers import SMALL

BIAS = dataclasses.replace(SMALL, locality="bias", locality_target=0.7)
LOSS = dataclasses.replace(SMALL, locality="loss", locality_coefficient=0.2, locality_epsilon=0.1)
SOME = [[0, 2, 5], [1, 3]]


def mask(num_candidates: int, residents: list[int]) -> Tensor:
    return torch.tensor([candidate in residents for candidate in range(num_candidates)])


def drawn_logits(tokens: int, candidates: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, candidates, generator=generator, dtype=torch.float64)


CASES = st.integers(2, 7).flatmap(
    lambda candidates: st.tuples(
        st.just(candidates),
        st.sets(st.integers(0, candidates - 1), min_size=1, max_size=candidates - 1),
        st.integers(1, candidates),
        st.integers(0, 1000),
    )
)

# -- the bias ------------------------------------------------------------------------------------------------


@given(CASES, st.floats(-4, 4))
def test_the_share_under_a_bias_is_that_of_choosing_with_it(
    case: tuple[int, set[int], int, int], bias: float
) -> None:
    candidates, residents, top_k, seed = case
    logits_TC, resident_C = drawn_logits(9, candidates, seed), mask(candidates, list(residents))
    chosen_TK = (logits_TC + bias * resident_C).topk(top_k, dim=-1).indices
    expected = resident_C[chosen_TK].double().mean()
    share = resident_share(
        entry_biases(logits_TC, resident_C, top_k), torch.tensor(bias, dtype=torch.float64)
    )
    assert float(share) == pytest.approx(float(expected))


@given(CASES, st.lists(st.floats(-70, 70), min_size=2, max_size=6))
def test_the_share_never_falls_as_the_bias_grows(
    case: tuple[int, set[int], int, int], biases: list[float]
) -> None:
    candidates, residents, top_k, seed = case
    entries_TK = entry_biases(drawn_logits(9, candidates, seed), mask(candidates, list(residents)), top_k)
    shares = [float(resident_share(entries_TK, torch.tensor(bias))) for bias in sorted(biases)]
    assert shares == sorted(shares)
    least, most = (float(resident_share(entries_TK, torch.tensor(bias))) for bias in (-64.0, 64.0))
    # All that can be: the limits are as good as infinity.
    assert most == pytest.approx(min(top_k, len(residents)) / top_k)
    assert least == pytest.approx(max(0, top_k - (candidates - len(residents))) / top_k)


@given(CASES, st.floats(0.01, 1.0))
def test_bisection_finds_the_smallest_bias_that_reaches_the_target(
    case: tuple[int, set[int], int, int], target: float
) -> None:
    candidates, residents, top_k, seed = case
    entries_TK = entry_biases(drawn_logits(40, candidates, seed), mask(candidates, list(residents)), top_k)
    bias = bias_for(entries_TK, target)
    assert -64 <= bias <= 64
    if target <= float(resident_share(entries_TK, torch.tensor(64.0))):
        assert resident_share(entries_TK, bias) >= target
        if bias > -63:  # a little less is too little
            assert resident_share(entries_TK, bias - 1e-5) < target
    else:
        assert bias == 64


def test_on_one_batch_the_target_is_met_to_one_assignment() -> None:
    entries_TK = entry_biases(drawn_logits(500, 8, 0), mask(8, [1, 2, 6]), 2)
    for target in (0.1, 0.375, 0.5, 0.9):
        assert float(resident_share(entries_TK, bias_for(entries_TK, target))) == pytest.approx(
            target, abs=1.5e-3
        )


def test_entries_of_a_case_worked_out_by_hand() -> None:
    # Residents 5 and 2, ghosts 9, 8 and 1, two are chosen. The best resident must beat the second ghost: 3;
    # the second resident the first: 7.
    logits_TC = torch.tensor([[9.0, 5.0, 8.0, 2.0, 1.0]])
    torch.testing.assert_close(entry_biases(logits_TC, mask(5, [1, 3]), 2), torch.tensor([[3.0, 7.0]]))
    # One resident alone is never a token's second one; and if there is one ghost only, one is always there.
    assert entry_biases(logits_TC, mask(5, [1]), 2)[0, 1] == torch.inf
    assert entry_biases(logits_TC, mask(5, [0, 1, 2, 3]), 2)[0, 0] == -torch.inf


def gate_with(model, residents: list[int], seed: int = 0) -> SigmaRouter:
    gate = SigmaRouter(model, model.num_experts, residents)
    torch.nn.init.normal_(gate.weight, std=model.d_model**-0.5, generator=torch.Generator().manual_seed(seed))
    return gate


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(count, SMALL.d_model, generator=torch.Generator().manual_seed(seed))


def test_the_bias_decides_who_is_chosen_and_not_what_it_weighs() -> None:
    gate, plain = gate_with(BIAS, [0, 2]), gate_with(SMALL, [0, 2])
    gate.bias.fill_(64.0)
    x_TD = tokens(30, seed=1)
    routing, scores_TC = gate(x_TD), plain.scores(x_TD)
    assert (
        ((routing.chosen_TK == 0) | (routing.chosen_TK == 2)).sum(1).eq(2).all()
    )  # three a token, two are here
    torch.testing.assert_close(routing.weights_TK, scores_TC.gather(1, routing.chosen_TK), rtol=0, atol=0)
    gradients = torch.autograd.grad(routing.weights_TK.sum(), gate.weight)[0]
    expected = torch.autograd.grad(scores_TC.gather(1, routing.chosen_TK).sum(), plain.weight)[0]
    torch.testing.assert_close(gradients, expected)


def test_there_is_no_bias_in_evaluation() -> None:
    gate, plain = gate_with(BIAS, [0, 2]).eval(), gate_with(SMALL, [0, 2]).eval()
    gate.bias.fill_(64.0)
    x_TD = tokens(30, seed=1)
    assert all(a.equal(b) for a, b in zip(gate(x_TD), plain(x_TD), strict=True))
    assert gate.bias == 64  # and it does not move


def test_a_bias_of_zero_chooses_as_ever() -> None:
    gate, plain = gate_with(BIAS, [0, 2]), gate_with(SMALL, [0, 2])
    x_TD = tokens(30, seed=1)
    assert all(a.equal(b) for a, b in zip(gate(x_TD), plain(x_TD), strict=True))


def test_a_router_that_is_sure_of_everything_still_meets_the_target() -> None:
    """Most scores are 1 to the last bit; the logits behind them are not equal."""
    gate = gate_with(dataclasses.replace(BIAS, locality_target=0.5), [0, 2])
    gate.weight.data.mul_(40)
    x_TD = tokens(2000, seed=1)
    assert float((gate.scores(x_TD) == 1).float().mean()) > 0.2
    gate.bias.copy_(bias_for(entry_biases((x_TD @ gate.weight.T).detach(), gate.resident_C, gate.top_k), 0.5))
    assert float(gate.resident_C[gate(x_TD).chosen_TK].float().mean()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
def test_batch_after_batch_the_share_comes_to_the_target_and_stays(target: float) -> None:
    """Uniformly a third of the assignments hit a resident; the bias is always of the batches before."""
    gate = gate_with(dataclasses.replace(BIAS, locality_target=target), [0, 2])
    resident_C, shares = gate.resident_C, []
    for batch in range(40):
        shares.append(float(resident_C[gate(tokens(400, seed=batch)).chosen_TK].float().mean()))
    most = 2 / 3  # three a token, of two that are here
    assert abs(sum(shares[10:]) / 30 - min(target, most)) < 0.01
    assert all(abs(share - min(target, most)) < 0.06 for share in shares[10:])


def test_on_the_same_batch_the_bias_is_at_once_what_it_needs() -> None:
    gate = gate_with(BIAS, [0, 2, 5])
    x_TD = tokens(50, seed=1)
    needed = bias_for(entry_biases(x_TD @ gate.weight.T, gate.resident_C, gate.top_k), 0.7)
    for _ in range(3):
        gate(x_TD)
        assert float(gate.bias) == pytest.approx(float(needed), rel=1e-6)
        assert gate.trend == 0


def test_a_router_that_drifts_away_from_its_residents_is_kept_up_with() -> None:
    """Each step takes 0.3 from the logits of the residents: a bias that is a step late would stay 0.3 behind."""
    gate, batches, late = gate_with(BIAS, [0, 2, 5]), 30, []
    x_TD = tokens(400, seed=1)
    logits_TC = (x_TD @ gate.weight.T).detach()
    for step in range(batches):
        drifted_TC = logits_TC - 0.3 * step * gate.resident_C
        needed = bias_for(entry_biases(drifted_TC, gate.resident_C, gate.top_k), 0.7)
        late.append(float(needed - gate.bias))
        gate._choose_with_bias(drifted_TC)
    assert late[1] == pytest.approx(0.3, abs=1e-5)
    assert max(map(abs, late[15:])) < 1e-3
    assert float(gate.trend) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("model", [BIAS, LOSS], ids=["bias", "loss"])
def test_without_ghosts_there_is_nothing_to_prefer(model) -> None:
    everything = list(range(SMALL.num_experts))
    gate, plain = gate_with(model, everything), gate_with(SMALL, everything)
    x_TD = tokens(30, seed=1)
    for _ in range(2):
        assert all(a.equal(b) for a, b in zip(gate(x_TD), plain(x_TD), strict=True))
    assert gate.bias == 0


def site(model, residents: list[list[int]] = SOME) -> Transformer:
    return build(model, residents, "skip", initial_state(model, residents, "skip", 0), "cpu")


def batch(seed: int) -> Tensor:
    return torch.randint(SMALL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))


def test_the_bias_is_no_part_of_the_shard_and_goes_on_where_it_was() -> None:
    module, again = site(BIAS), site(BIAS)
    assert read_shard(module).keys() == read_shard(site(SMALL)).keys()
    for seed in range(3):
        module(batch(seed))
    biases = module.biases()
    assert len(biases) == SMALL.num_layers
    assert all(bias for bias, _ in biases)
    again.begin_round(biases, None)
    assert again.biases() == biases
    assert again(batch(7)).cross_entropy.equal(module(batch(7)).cross_entropy)
    # The trend goes on as it was, for the first batch after a synchronisation says none.
    assert [trend for _, trend in again.biases()] == [trend for _, trend in biases]
    assert again.biases() != biases
    again.begin_round([], None)
    assert again.biases() == [[0.0, 0.0]] * SMALL.num_layers
    assert site(SMALL).biases() == site(LOSS).biases() == []


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [BIAS, LOSS], ids=["bias", "loss"])
def test_a_compiled_model_is_as_local(model, backend: str) -> None:
    torch.compiler.reset()
    model = dataclasses.replace(model, num_layers=1)  # as good as two, in half the time
    eager, module = site(model), site(model)
    compiled = torch.compile(module, backend=backend)
    for seed in range(3):
        expected, losses = eager(batch(seed)), compiled(batch(seed))
        torch.testing.assert_close(losses.cross_entropy, expected.cross_entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses.balance, expected.balance, rtol=1e-4, atol=1e-5)
    for compiled_bias, eager_bias in zip(module.biases(), eager.biases(), strict=True):
        assert compiled_bias == pytest.approx(eager_bias, abs=1e-3)


# -- the loss ------------------------------------------------------------------------------------------------

SHARES = st.lists(st.floats(0.001, 1.0), min_size=3, max_size=9)


def plain_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def split(weights: list[float], num_residents: int) -> tuple[Tensor, Tensor]:
    """Shares that add up to 1, and the first few as residents."""
    share_C = torch.tensor(weights, dtype=torch.float64)
    return share_C / share_C.sum(), mask(len(weights), list(range(min(num_residents, len(weights) - 1))))


@given(SHARES, st.integers(1, 8), st.floats(0.01, 0.9))
def test_the_divergence_is_that_between_here_and_there_and_those_within(
    weights: list[float], num_residents: int, epsilon: float
) -> None:
    """KL = KL_Bern(m‖1-ε) + m·KL(D_c|R‖U) + (1-m)·KL(D_c|R̄‖U), m the share of the residents."""
    share_C, resident_C = split(weights, num_residents)
    here, there = share_C[resident_C].tolist(), share_C[~resident_C].tolist()
    m = sum(here)
    bernoulli = plain_kl([m, 1 - m], [1 - epsilon, epsilon])
    within = m * plain_kl([s / m for s in here], [1 / len(here)] * len(here))
    beyond = (1 - m) * plain_kl([s / (1 - m) for s in there], [1 / len(there)] * len(there))
    loss = float(locality_loss(share_C, resident_C, epsilon))
    assert loss == pytest.approx(bernoulli + within + beyond, rel=1e-9, abs=1e-12)
    assert 1 - m <= epsilon + math.sqrt(max(loss, 0) / 2) + 1e-12


def test_the_localised_shares_are_where_the_loss_is_zero() -> None:
    resident_C = mask(5, [1, 3])
    local_C = local_shares(resident_C, 0.1, torch.float64)
    torch.testing.assert_close(
        local_C, torch.tensor([0.1 / 3, 0.45, 0.1 / 3, 0.45, 0.1 / 3], dtype=torch.float64)
    )
    assert float(locality_loss(local_C, resident_C, 0.1)) == pytest.approx(0.0, abs=1e-15)
    assert torch.isfinite(
        locality_loss(resident_C / 2, resident_C, 0.1)
    )  # all here: a 0 in D_c is no trouble


def loss_of(gate: SigmaRouter, routing: Routing) -> Tensor:
    return gate.losses(routing.load_C, routing.share_C)[1]


@pytest.mark.parametrize("router", ["linear", "orthogonal", "grap"])
def test_its_gradients_are_those_of_finite_differences(router: str) -> None:
    model = dataclasses.replace(LOSS, router=router, num_experts=8)
    gate = SigmaRouter(model, 8, [0, 2, 5]).double()
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(5, 16, generator=generator, dtype=torch.float64).requires_grad_()
    rows_CD = torch.randn(8, 16, generator=generator, dtype=torch.float64).requires_grad_()

    def loss(x_TD: Tensor, rows_CD: Tensor) -> Tensor:
        values = {} if router == "grap" else {"weight": rows_CD}
        routing = torch.func.functional_call(gate, values, x_TD)
        return loss_of(gate, routing) + 0 * rows_CD.sum()

    assert torch.autograd.gradcheck(loss, (x_TD, rows_CD))
    assert torch.autograd.grad(loss(x_TD, rows_CD), x_TD)[0].any()


def test_the_whole_models_gradient_with_the_loss_is_that_of_finite_differences() -> None:
    """Of the routers' losses, in double precision, along a random direction in the space of all parameters."""
    module = site(dataclasses.replace(LOSS, experts_impl="loop")).double()
    tokens_BT = batch(0)
    module(tokens_BT).balance.backward()
    parameters = [p for p in module.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=step)
            value = float(module(tokens_BT).balance)
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=step)
        return value

    step = 1e-7
    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_the_loss_is_the_mean_over_layers_scaled_with_depth() -> None:
    module, tokens_BT = site(LOSS), batch(0)
    seen: list[Tensor] = []
    for moe in module.moe_layers:
        moe.gate.register_forward_hook(lambda gate, _inputs, routing: seen.append(loss_of(gate, routing)))
    difference = module(tokens_BT).balance - site(SMALL)(tokens_BT).balance
    # locality_coefficient 0.2 x base_num_layers 3 x the mean over layers.
    torch.testing.assert_close(difference, 0.2 * 3 * (seen[0] + seen[1]) / 2)


def test_descending_the_loss_brings_the_share_to_the_residents() -> None:
    gate = gate_with(dataclasses.replace(LOSS, locality_epsilon=0.2), [0, 2])
    x_TD = tokens(60, seed=1)
    x_TD[:, 0] = 1.0  # a feature by which the router can prefer some experts for every token
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(gate, gate(x_TD)).backward()
        optimizer.step()
    scores_TC = gate.scores(x_TD)
    share_C = (scores_TC / scores_TC.sum(1, keepdim=True)).mean(0).detach()
    assert float(share_C[[0, 2]].sum()) == pytest.approx(0.8, abs=0.05)


def test_full_residents_are_no_special_case_for_the_whole_model() -> None:
    everything = full_residents(SMALL.num_layers, SMALL.num_experts)
    tokens_BT = batch(0)
    for model in (BIAS, LOSS):
        assert site(model, everything)(tokens_BT).balance.equal(site(SMALL, everything)(tokens_BT).balance)
