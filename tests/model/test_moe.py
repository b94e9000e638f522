"""Router, dispatcher and the σ-MoE layer: what a ghost expert does, and above all what it does not.

Letters: T tokens, C candidates of the router, K experts a token, E residents, D d_model, H d_expert.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.model import moe as moe_module
from fomoe_flwr.model.experts import LINEARS
from fomoe_flwr.model.moe import MoE, SigmaRouter, dispatch, router_losses
from fomoe_flwr.model.sigma_moe import Block, rope_tables
from tests.model.helpers import SMALL, plain_moe, poisoned_memory

ALL = list(range(SMALL.num_experts))
TOKENS = 11


@pytest.fixture(params=[*LINEARS, "padded"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """model.experts_impl; `padded` is the grouped one as it is on a GPU, where nobody waits for a count."""
    if request.param != "padded":
        return request.param
    monkeypatch.setattr(moe_module, "_padded", lambda _: True)
    return "grouped"


def layer(residents: Sequence[int], routing: str, model: ModelConfig = SMALL, seed: int = 0) -> MoE:
    """An MoE layer whose expert e has the same weights whoever holds it."""
    generator = torch.Generator().manual_seed(seed)
    rows_CD = torch.randn(model.num_experts, model.d_model, generator=generator) * model.d_model**-0.5
    ups_EHD = torch.randn(model.num_experts, model.d_expert, model.d_model, generator=generator) / 4
    downs_EDH = torch.randn(model.num_experts, model.d_model, model.d_expert, generator=generator) / 3
    moe = MoE(model, residents, routing)
    with torch.no_grad():
        moe.gate.weight.copy_(rows_CD if routing == "skip" else rows_CD[list(residents)])
        moe.experts.up_EHD.copy_(ups_EHD[list(residents)])
        moe.experts.down_EDH.copy_(downs_EDH[list(residents)])
    return moe


def tokens(seed: int = 1, count: int = TOKENS) -> Tensor:
    return torch.randn(count, SMALL.d_model, generator=torch.Generator().manual_seed(seed))


def plain(moe: MoE, x_TD: Tensor, candidates: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The layer by the plain loop, in double precision; y_TD and the leaves (x, router, up, down)."""
    weights = (x_TD, moe.gate.weight, moe.experts.up_EHD, moe.experts.down_EDH)
    leaves = [tensor.detach().double().requires_grad_() for tensor in weights]
    x, gate, up, down = leaves
    rows = {expert: gate[index] for index, expert in enumerate(candidates)}
    experts = {expert: (up[slot], down[slot]) for slot, expert in enumerate(moe.resident_experts)}
    return plain_moe(x, rows, experts, min(SMALL.top_k, len(candidates))), leaves


def computed(moe: MoE, x_TD: Tensor, upstream_TD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The layer's output and its gradients for x, router, up, down."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD = moe(x_TD)[0]
    leaves = (x_TD, moe.gate.weight, moe.experts.up_EHD, moe.experts.down_EDH)
    return y_TD, torch.autograd.grad(y_TD, leaves, upstream_TD)


def assert_is_plain(moe: MoE, candidates: Sequence[int]) -> None:
    x_TD, upstream_TD = tokens(), tokens(seed=2)
    expected_TD, leaves = plain(moe, x_TD, candidates)
    # A layer that nobody chose has no path to its weights: its gradient is zero.
    expected = torch.autograd.grad(expected_TD, leaves, upstream_TD.double(), allow_unused=True)
    y_TD, gradients = computed(moe, x_TD, upstream_TD)
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=1e-5, atol=1e-6)
    for gradient, wanted, leaf in zip(gradients, expected, leaves, strict=True):
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-6)


# -- skip mode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisoned", [False, True], ids=["clean", "poisoned"])
@pytest.mark.parametrize("residents", [ALL, [0, 2, 5], [4]], ids=["all", "half", "one"])
def test_skip_mode_is_the_loop_over_residents(impl: str, residents: list[int], poisoned: bool) -> None:
    """Output and all gradients, the router's included: ghosts contribute nothing, the others' scores stay."""
    moe = layer(residents, "skip", dataclasses.replace(SMALL, experts_impl=impl))
    if poisoned:
        with poisoned_memory():
            assert_is_plain(moe, ALL)
    else:
        assert_is_plain(moe, ALL)


def test_skip_mode_with_all_experts_here_is_the_full_model() -> None:
    """Everybody resident: skip and partitioned routing are the same function, bit for bit."""
    x_TD, upstream_TD = tokens(), tokens(seed=2)
    skip_TD, skip = computed(layer(ALL, "skip"), x_TD, upstream_TD)
    partitioned_TD, partitioned = computed(layer(ALL, "partitioned"), x_TD, upstream_TD)
    assert skip_TD.equal(partitioned_TD)
    assert all(a.equal(b) for a, b in zip(skip, partitioned, strict=True))


def test_sites_that_share_out_the_experts_add_up_to_the_full_model() -> None:
    """No renormalisation: a missing expert does not change the weight of the others."""
    x_TD = tokens()
    parts = [layer(residents, "skip")(x_TD)[0] for residents in ([0, 3], [1, 2], [4, 5])]
    torch.testing.assert_close(torch.stack(parts).sum(0), layer(ALL, "skip")(x_TD)[0])


def test_a_router_row_learns_only_from_the_tokens_its_expert_computed() -> None:
    moe = layer([0, 2], "skip")
    _, (_, router_CD, _, _) = computed(moe, tokens(), tokens(seed=2))
    assert router_CD[[0, 2]].any(dim=1).all()
    assert not router_CD[[1, 3, 4, 5]].any()


def test_all_chosen_experts_are_ghosts(impl: str) -> None:
    """Not a single pair stays: the layer's output and every gradient are exact zeros, on poisoned memory too."""
    moe = layer([5], "skip", dataclasses.replace(SMALL, experts_impl=impl))
    x_TD = tokens().abs()
    with torch.no_grad():  # positive tokens: the larger a row, the better its score
        moe.gate.weight.copy_(
            torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, -1.0]).unsqueeze(1).expand_as(moe.gate.weight)
        )
    with poisoned_memory():
        y_TD, gradients = computed(moe, x_TD, torch.ones_like(x_TD))
    assert not y_TD.any()
    assert not any(gradient.any() for gradient in gradients)


def test_a_token_whose_experts_are_all_ghosts_goes_on_along_the_residual() -> None:
    """Peri-LN would turn a small error into a large one: the branch must be exactly zero."""
    block = Block(SMALL, [5], "skip")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        block.pre_feedforward_layernorm.weight.fill_(1.0)
        # Scores by the sign of feature 0 after the norm: tokens with a positive one want the resident too.
        block.mlp.gate.weight.zero_()
        block.mlp.gate.weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, -1.0, -2.0, -3.0])
    x_BSD = tokens(count=8).unsqueeze(0)
    tables = rope_tables(8, SMALL.d_model // SMALL.num_heads, SMALL.rope_theta, x_BSD.device)
    with torch.no_grad():
        attended_BSD = block.self_attn(block.input_layernorm(x_BSD), *tables)
        residual_SD = (x_BSD + block.multiplier * block.post_attention_layernorm(attended_BSD))[0]
        wants_ghosts_S = block.pre_feedforward_layernorm(residual_SD)[:, 0] > 0
        y_SD = block(x_BSD, *tables)[0][0]
        block.mlp.experts.down_EDH.zero_()
        without_experts_SD = block(x_BSD, *tables)[0][0]
    assert wants_ghosts_S.any()
    assert not wants_ghosts_S.all()
    torch.testing.assert_close(without_experts_SD, residual_SD)
    assert y_SD[wants_ghosts_S].equal(without_experts_SD[wants_ghosts_S])
    torch.testing.assert_close(y_SD[wants_ghosts_S], residual_SD[wants_ghosts_S])
    assert ((y_SD - residual_SD)[~wants_ghosts_S].abs().amax(dim=1) > 0.1).all()


def test_shared_experts_compute_every_token() -> None:
    model = dataclasses.replace(SMALL, num_shared_experts=2)
    moe = layer([0], "skip", model)
    assert moe.shared_experts is not None
    routed_TD = layer([0], "skip")(tokens())[0]
    up, down = moe.shared_experts.up_proj.weight, moe.shared_experts.down_proj.weight
    hidden_TH = tokens() @ up.T
    expected_TD = routed_TD + (hidden_TH * torch.sigmoid(hidden_TH)) @ down.T
    assert up.shape == (2 * SMALL.d_expert, SMALL.d_model)
    torch.testing.assert_close(moe(tokens())[0], expected_TD, rtol=1e-5, atol=1e-6)


def test_bf16_agrees_within_its_precision() -> None:
    moe = layer([0, 2, 5], "skip")
    expected_TD, _ = plain(moe, tokens(), ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = moe(tokens())[0]
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=0.03, atol=0.03)


# -- partitioned mode ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("residents", [ALL, [0, 2, 3, 5], [1, 4], [3]])
def test_partitioned_mode_is_the_loop_among_the_residents_alone(residents: list[int]) -> None:
    assert_is_plain(layer(residents, "partitioned"), residents)


@pytest.mark.parametrize(("num_residents", "experts_a_token"), [(1, 1), (2, 2), (3, 3), (6, 3)])
def test_partitioned_mode_chooses_as_many_as_there_are(num_residents: int, experts_a_token: int) -> None:
    moe = layer(ALL[:num_residents], "partitioned")
    assert moe.gate(tokens()).chosen_TK.shape == (TOKENS, experts_a_token)


# -- the router ----------------------------------------------------------------------------------------------


def router(rows_CD: Sequence[Sequence[float]], top_k: int) -> SigmaRouter:
    gate = SigmaRouter(dataclasses.replace(SMALL, d_model=len(rows_CD[0]), top_k=top_k), len(rows_CD))
    gate.weight = nn.Parameter(torch.tensor(rows_CD))
    return gate


def test_scores_are_sigmoids_and_are_not_renormalised() -> None:
    # ln 3 has the sigmoid 3/4.
    routing = router([[math.log(3)], [0.0], [-math.log(3)]], top_k=2)(torch.ones(1, 1))
    assert routing.chosen_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.75, 0.5]]))


def test_scores_are_computed_in_fp32_under_autocast() -> None:
    """A rounded score would flip choices: the two logits differ by less than bf16 can tell."""
    gate = router([[1.0], [1.0 + 2**-12]], top_k=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate(torch.ones(1, 1))
    assert routing.chosen_TK.tolist() == [[1]]
    assert routing.weights_TK.dtype == torch.float32


def balance_loss(gate: SigmaRouter, x_TD: Tensor) -> Tensor:
    routing = gate(x_TD)
    return gate.losses(routing.load_C, routing.share_C)[0]


def test_balance_loss_is_one_at_perfect_balance() -> None:
    # Token c prefers candidate c: each is chosen once, and by symmetry every mean share is 1/C.
    gate = router((4 * torch.eye(4)).tolist(), top_k=1)
    torch.testing.assert_close(balance_loss(gate, torch.eye(4)), torch.tensor(1.0))


def test_balance_loss_of_a_case_worked_out_by_hand() -> None:
    # ln 3 has the sigmoid 3/4, -ln 3 has 1/4.
    #   token 1: x = (1, 0): logits ( ln 3, -ln 3), scores (3/4, 1/4), shares (3/4, 1/4), chooses 0
    #   token 2: x = (0, 1): logits (0, -ln 3),     scores (1/2, 1/4), shares (2/3, 1/3), chooses 0
    # f = (1, 0); P = ((3/4 + 2/3)/2, …) = (17/24, 7/24); C · Σ f·P = 2 · 17/24 = 17/12.
    gate = router([[math.log(3), 0.0], [-math.log(3), -math.log(3)]], top_k=1)
    torch.testing.assert_close(balance_loss(gate, torch.eye(2)), torch.tensor(17 / 12))


def test_balance_loss_is_the_number_of_candidates_over_k_when_all_choose_alike() -> None:
    # Candidates 0 and 1 have score ~1 and all tokens; 2 to 5 have score ~0. f = P = (1/2, 1/2, 0, …); 6 · 1/2.
    gate = router([[20.0], [20.0], [-20.0], [-20.0], [-20.0], [-20.0]], top_k=2)
    torch.testing.assert_close(balance_loss(gate, torch.ones(5, 1)), torch.tensor(3.0))


def test_the_balance_loss_pushes_scores_of_the_overloaded_down() -> None:
    gate = router([[1.0], [0.5], [0.0]], top_k=1)
    balance_loss(gate, torch.ones(4, 1)).backward()
    assert gate.weight.grad is not None
    assert gate.weight.grad[0] > 0  # descending makes the score smaller
    assert (gate.weight.grad[1:] < 0).all()


def test_load_counts_assignments_to_every_candidate_while_training() -> None:
    moe = layer([0, 2], "skip")
    x_TD = tokens()
    for _ in range(3):
        _, routing = moe(x_TD)
        router_losses([moe.gate], [routing])
    chosen = routing.chosen_TK.flatten().tolist()
    assert moe.gate.load_C.tolist() == [3.0 * chosen.count(expert) for expert in ALL]
    assert moe.gate.load_C.sum() == 3 * TOKENS * SMALL.top_k


def test_load_does_not_count_evaluation() -> None:
    moe = layer(ALL, "skip").eval()
    _, routing = moe(tokens())
    router_losses([moe.gate], [routing])
    assert not moe.gate.load_C.any()


# -- the dispatcher ------------------------------------------------------------------------------------------


def test_dispatch_sorts_pairs_by_resident_and_drops_ghosts() -> None:
    # Experts 1 and 3 of four are here, in slots 0 and 1; slot 2 means ghost.
    chosen_TK = torch.tensor([[3, 0], [1, 3], [2, 0]])
    pairs = dispatch(chosen_TK, slot_C=torch.tensor([2, 0, 2, 1]), num_slots=2)
    assert pairs.pairs_P.tolist() == [
        2,
        0,
        3,
    ]  # (token 1, expert 1), (token 0, expert 3), (token 1, expert 3)
    assert pairs.offsets_E.tolist() == [1, 3]
    assert pairs.offsets_E.dtype == torch.int32


def test_the_last_offset_is_the_number_of_rows() -> None:
    """grouped_mm leaves rows behind it uninitialised, so there must be none."""
    generator = torch.Generator().manual_seed(0)
    for num_slots in (1, 3, 5):
        slots = [*range(num_slots), *[num_slots] * (8 - num_slots)]
        slot_C = torch.tensor(slots)[torch.randperm(8, generator=generator)]
        chosen_TK = torch.rand(20, 8, generator=generator).topk(2).indices
        pairs = dispatch(chosen_TK, slot_C, num_slots)
        kept = [slot_C[expert].item() for expert in chosen_TK.flatten() if slot_C[expert] < num_slots]
        assert pairs.offsets_E[-1] == len(pairs.pairs_P) == len(kept)
        assert slot_C[chosen_TK.flatten()[pairs.pairs_P]].tolist() == sorted(kept)


def test_a_padded_dispatch_leaves_the_ghosts_behind_the_last_offset() -> None:
    chosen_TK, slot_C = torch.tensor([[3, 0], [1, 3], [2, 0]]), torch.tensor([2, 0, 2, 1])
    pairs = dispatch(chosen_TK, slot_C, num_slots=2, padded=True)
    assert pairs.padded
    assert pairs.pairs_P.tolist() == [2, 0, 3, 1, 4, 5]
    assert pairs.offsets_E.tolist() == [1, 3]
    # Where no candidate is a ghost there is nothing to pad.
    assert not dispatch(chosen_TK, torch.arange(4), num_slots=4, ghosts=False, padded=True).padded


def test_dispatch_of_ghosts_alone_is_empty() -> None:
    pairs = dispatch(torch.tensor([[0, 1]]), slot_C=torch.tensor([1, 1, 0]), num_slots=1)
    assert pairs.pairs_P.tolist() == []
    assert pairs.offsets_E.tolist() == [0]


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("routing", "rows"), [("skip", 6), ("partitioned", 2)])
def test_only_residents_are_allocated(routing: str, rows: int) -> None:
    moe = layer([1, 4], routing)
    shapes = {name: tuple(parameter.shape) for name, parameter in moe.named_parameters()}
    assert shapes == {
        "gate.weight": (rows, SMALL.d_model),
        "experts.up_EHD": (2, SMALL.d_expert, SMALL.d_model),
        "experts.down_EDH": (2, SMALL.d_model, SMALL.d_expert),
    }
