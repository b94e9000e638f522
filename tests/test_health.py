"""Every figure against a case worked out by hand, and its bounds against whatever hypothesis finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fomoe_flwr import health

LOADS = arrays.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(2, 6)), elements=st.integers(0, 50))


def table(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def everyone(load_LE: np.ndarray, tokens: int = 100) -> np.ndarray:
    return np.full_like(load_LE, tokens)


# ----- load


def test_entropy_of_loads_worked_out_by_hand() -> None:
    load_LE = table([5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [2, 1, 1, 0])
    expected = [
        1.0,
        0.0,
        math.log(2) / math.log(4),
        1.5 * math.log(2) / math.log(4),
    ]  # the last: 1/2, 1/4, 1/4
    assert health.load_entropy(load_LE, everyone(load_LE)).tolist() == pytest.approx(expected)


def test_variation_and_ratio_of_loads_worked_out_by_hand() -> None:
    load_LE = table([5, 5, 5, 5], [20, 0, 0, 0], [2, 4, 4, 6])
    variation = [0.0, math.sqrt(3), math.sqrt(2) / 4]  # √(n - 1); then mean 4, variance (4 + 0 + 0 + 4)/4 = 2
    assert health.load_variation(load_LE, everyone(load_LE)).tolist() == pytest.approx(variation)
    assert health.load_ratio(load_LE, everyone(load_LE)).tolist() == [1.0, 20.0, 3.0]  # 20 to at least one


def test_an_expert_whose_holders_did_not_answer_counts_nowhere() -> None:
    load_LE, offered_LE = table([6, 6, 0, 0]), table([10, 10, 10, 0])
    assert health.load_entropy(load_LE, offered_LE).tolist() == pytest.approx([math.log(2) / math.log(3)])
    assert health.load_variation(load_LE, offered_LE).tolist() == pytest.approx([math.sqrt(8) / 4])
    assert health.dead_experts(load_LE, offered_LE).tolist() == [[False, False, True, False]]


def test_figures_of_a_layer_that_nobody_reported_are_not_defined() -> None:
    nothing = table([0, 0, 0])
    for figure in (health.load_entropy, health.load_variation, health.load_ratio):
        assert np.isnan(figure(nothing, nothing)).all()
    assert not health.dead_experts(nothing, nothing).any()
    assert health.symptoms(nothing, nothing) == []
    assert health.symptoms(nothing, everyone(nothing)) == []


def test_one_expert_alone_has_no_entropy() -> None:
    assert np.isnan(health.load_entropy(table([7]), table([7]))).all()
    assert health.symptoms(table([7]), table([7])) == []


@given(LOADS)
def test_load_figures_keep_their_bounds(load_LE: np.ndarray) -> None:
    load_LE[:, 0] += 1  # a layer that got nothing has no figures
    offered_LE, number = everyone(load_LE), load_LE.shape[1]
    entropy, variation = health.load_entropy(load_LE, offered_LE), health.load_variation(load_LE, offered_LE)
    assert ((entropy >= 0) & (entropy <= 1 + 1e-12)).all()
    assert ((variation >= 0) & (variation <= math.sqrt(number - 1) + 1e-12)).all()
    assert (health.load_ratio(load_LE, offered_LE) >= 1).all()
    even = (load_LE == load_LE[:, :1]).all(axis=1)
    assert (np.isclose(entropy, 1) == even).all()
    assert (np.isclose(variation, 0) == even).all()


@given(LOADS, st.integers(2, 9))
def test_load_figures_know_neither_order_nor_size(load_LE: np.ndarray, factor: int) -> None:
    load_LE[:, 0] += 1
    other_LE = factor * load_LE[:, ::-1]
    for figure in (health.load_entropy, health.load_variation):
        assert figure(other_LE, everyone(other_LE)) == pytest.approx(figure(load_LE, everyone(load_LE)))


def test_resident_share() -> None:
    held_LE = np.array([[True, True, False, False], [False, False, False, True], [True] * 4])
    share_L = health.resident_share(table([1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 0, 0]), held_LE)
    assert share_L[:2].tolist() == [0.3, 0.4]
    assert np.isnan(share_L[2])


# ----- a layer that is sick


def test_an_expert_dominates_from_three_quarters_of_the_way_from_its_even_share_to_all_tokens() -> None:
    # 100 tokens choose 2 of 4 experts: an even share is 50 of them, and three quarters of the other 50 are 37.5.
    load_LE = table([87, 41, 36, 36], [88, 40, 36, 36])
    dominant_LE = health.dominant_experts(load_LE, everyone(load_LE))
    assert dominant_LE.tolist() == [[False] * 4, [True, False, False, False]]


def test_nobody_dominates_where_every_token_takes_all() -> None:
    load_LE = table([100, 100])
    assert not health.dominant_experts(load_LE, everyone(load_LE)).any()


def test_a_healthy_load_has_no_symptoms() -> None:
    load_LE = table([60, 50, 40, 50], [72, 70, 48, 10])
    assert health.symptoms(load_LE, everyone(load_LE)) == []


def test_symptoms_name_layer_and_expert() -> None:
    load_LE = table([50, 50, 50, 50], [0, 100, 99, 1])
    (found,) = health.symptoms(load_LE, everyone(load_LE))
    assert found == (
        "layer 1: expert 1 is chosen by 100% of the tokens, expert 2 is chosen by 99% of the tokens, "
        "no token chose expert 0"
    )


def test_a_collapse_is_told_as_the_number_of_experts_that_are_left() -> None:
    load_LE = table([100, 100, 0, 0, 0, 0, 0, 0])
    (found,) = health.symptoms(load_LE, everyone(load_LE, tokens=200))
    assert (
        found
        == "layer 0: load as if only 2.0 of 8 experts were used, no token chose experts 2, 3, 4, 5, 6, 7"
    )


@given(st.integers(3, 64), st.data())
def test_a_router_that_sends_all_tokens_to_the_same_experts_is_found_out(
    number: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, number - 1))
    chosen = data.draw(st.permutations(range(number)))[:top_k]
    load_LE = np.zeros((1, number), dtype=np.int64)
    load_LE[0, chosen] = 100
    (found,) = health.symptoms(load_LE, everyone(load_LE))
    assert found.startswith("layer 0: ")
    assert f"expert {min(chosen)} is chosen by 100% of the tokens" in found
    assert ("load as if" in found) == (top_k < number / 2)


def test_a_long_list_of_symptoms_is_cut() -> None:
    load_LE = np.zeros((12, 40), dtype=np.int64)
    load_LE[:, :2] = 100
    line = health.symptoms_line(health.symptoms(load_LE, everyone(load_LE)))
    assert "no token chose experts 2, 3, 4, 5, 6, 7, 8, 9, …" in line
    assert "layer 7" in line
    assert "layer 8" not in line
    assert line.endswith("; and 4 more layers")


# ----- routers on the same tokens


def test_agreement_worked_out_by_hand() -> None:
    one_TC = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.9, 0.8]])
    other_TC = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.8, 0.9, 0.1, 0.2]])
    one, other = health.top_k_sets(one_TC, 2), health.top_k_sets(other_TC, 2)
    assert one.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert health.agreement(one, other) == 0.25  # one of two, none of two
    assert health.agreement(one, one) == 1.0


def test_distance_worked_out_by_hand() -> None:
    one_TC, other_TC = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    # First token: one bit, the most there is; second: none.
    assert health.js_distance(one_TC.double(), other_TC.double()) == pytest.approx(math.sqrt(0.5))
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): (log 4/3 + log(2/3)/2 + log(2)/2) / 2
    expected = (math.log(4 / 3) + math.log(2 / 3) / 2 + math.log(2) / 2) / 2 / math.log(2)
    assert health.js_distance(one_TC[:1].double(), other_TC[1:].double()) == pytest.approx(
        math.sqrt(expected)
    )


def test_routers_that_send_each_token_elsewhere_are_far_apart_though_their_means_are_equal() -> None:
    one_TC = health.gate_shares(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    other_TC = one_TC.flip(0)
    assert torch.equal(one_TC.mean(0), other_TC.mean(0))
    assert health.js_distance(one_TC, other_TC) > 0.7


def test_shares_add_up_to_one() -> None:
    shares_TC = health.gate_shares(torch.tensor([[0.2, 0.6], [0.5, 0.5]]))
    torch.testing.assert_close(shares_TC, torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64))


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_agreement_and_distance_are_symmetric_and_bounded(seed: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one_TC, other_TC = (torch.rand(5, 4, generator=generator) for _ in range(2))
    sets = [health.top_k_sets(scores_TC, top_k) for scores_TC in (one_TC, other_TC)]
    shares = [health.gate_shares(scores_TC) for scores_TC in (one_TC, other_TC)]
    assert 0 <= health.agreement(*sets) <= 1
    assert health.agreement(*sets) == health.agreement(*reversed(sets))
    assert 0 <= health.js_distance(*shares) <= 1
    assert health.js_distance(*shares) == pytest.approx(health.js_distance(*reversed(shares)))
    assert health.js_distance(shares[0], shares[0]) == 0


def test_relative_change() -> None:
    assert health.relative_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(0.2)
    assert math.isnan(health.relative_change(torch.zeros(2), torch.ones(2)))


# ----- the model and its loss


def test_mean_cosine_worked_out_by_hand() -> None:
    def expert(*values: float) -> list[torch.Tensor]:
        return [
            torch.tensor(values[:1], dtype=torch.float64),
            torch.tensor(values[1:], dtype=torch.float64),
        ]  # in two tensors, as an expert is

    assert health.mean_cosine([expert(3, 4), expert(6, 8)]) == pytest.approx(1)
    assert health.mean_cosine([expert(1, 0), expert(0, 2)]) == pytest.approx(0)
    assert health.mean_cosine([expert(1, 0), expert(-5, 0)]) == pytest.approx(-1)
    assert health.mean_cosine([expert(1, 0), expert(1, 1), expert(0, 1)]) == pytest.approx(math.sqrt(2) / 3)
    assert health.mean_cosine([expert(1, 0), expert(1, 0), expert(0, 0)]) == pytest.approx(1 / 3)
    assert math.isnan(health.mean_cosine([expert(1, 0)]))


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_mean_cosine_is_the_mean_over_the_pairs(seed: int, number: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = [
        [torch.randn(2, 3, generator=generator), torch.randn(4, generator=generator)] for _ in range(number)
    ]
    flat = [torch.cat([tensor.flatten() for tensor in expert]) for expert in experts]
    pairs = [(i, j) for i in range(number) for j in range(i)]
    expected = sum(float(torch.cosine_similarity(flat[i], flat[j], dim=0)) for i, j in pairs) / len(pairs)
    assert health.mean_cosine(experts) == pytest.approx(expected, abs=1e-5)


def test_spike_is_the_mean_jump_of_the_sites_that_have_both_losses() -> None:
    assert health.loss_spike(
        {"a": 3.0, "b": 2.0, "new": 9.0}, {"a": 2.5, "b": 2.1, "away": 0.0}
    ) == pytest.approx(0.2)
    assert math.isnan(health.loss_spike({"a": 3.0}, {}))
