"""The kernel seam: every implementation is the same function, forward and backward, whatever the memory held before.

Letters: P rows, E experts, D d_model, H d_expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fomoe_flwr.model.experts import LINEARS, plain_experts
from tests.model.helpers import plain_expert, poisoned_memory

D, H = 24, 8

# Rows of each expert.
LOADS = {
    "several experts": [3, 1, 4],
    "an expert without a row": [0, 2, 0, 0, 3, 0],
    "a single expert": [5],
    "one row": [0, 1],
    "no row at all": [0, 0, 0],
    "a single expert without a row": [0],
}

implementations = pytest.mark.parametrize("name", LINEARS)
loads = pytest.mark.parametrize("load_E", LOADS.values(), ids=LOADS.keys())


def inputs(load_E: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_PD, up_EHD, down_EDH with gradients wanted, and offsets_E."""
    generator = torch.Generator().manual_seed(seed)
    x_PD = torch.randn(sum(load_E), D, generator=generator)
    up_EHD = torch.randn(len(load_E), H, D, generator=generator) * D**-0.5
    down_EDH = torch.randn(len(load_E), D, H, generator=generator) * H**-0.5
    offsets_E = torch.tensor(load_E).cumsum(0).to(torch.int32)
    return x_PD.requires_grad_(), up_EHD.requires_grad_(), down_EDH.requires_grad_(), offsets_E


def plain_loop(x_PD: Tensor, up_EHD: Tensor, down_EDH: Tensor, load_E: Sequence[int]) -> Tensor:
    """The reference: row after row."""
    experts_P = [expert for expert, load in enumerate(load_E) for _ in range(load)]
    rows = [
        plain_expert(x_D, up_EHD[expert], down_EDH[expert])
        for x_D, expert in zip(x_PD, experts_P, strict=True)
    ]
    # The zero keeps a graph where there is no row, so that gradients are zeros and not missing.
    return torch.stack(rows) if rows else x_PD + 0 * (up_EHD.sum() + down_EDH.sum())


def in_double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@implementations
@loads
@pytest.mark.parametrize("poisoned", [False, True], ids=["clean", "poisoned"])
def test_output_and_gradients_are_the_plain_loops(name: str, load_E: list[int], poisoned: bool) -> None:
    *tensors, offsets_E = inputs(load_E)
    reference = in_double(tensors)
    upstream_PD = torch.randn(sum(load_E), D, generator=torch.Generator().manual_seed(1))
    expected_PD = plain_loop(*reference, load_E)
    expected = torch.autograd.grad(expected_PD, reference, upstream_PD.double())

    if poisoned:
        with poisoned_memory():
            y_PD = plain_experts(LINEARS[name], *tensors, offsets_E)
            gradients = torch.autograd.grad(y_PD, tensors, upstream_PD)
    else:
        y_PD = plain_experts(LINEARS[name], *tensors, offsets_E)
        gradients = torch.autograd.grad(y_PD, tensors, upstream_PD)

    torch.testing.assert_close(y_PD.double(), expected_PD, rtol=1e-5, atol=2e-6)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-6)


@implementations
@loads
def test_bf16_autocast_agrees_within_its_precision(name: str, load_E: list[int]) -> None:
    *tensors, offsets_E = inputs(load_E)
    reference = in_double(tensors)
    expected_PD = plain_loop(*reference, load_E)
    expected = torch.autograd.grad(expected_PD.sum(), reference)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_PD = plain_experts(LINEARS[name], *tensors, offsets_E)
    gradients = torch.autograd.grad(y_PD.float().sum(), tensors)

    assert y_PD.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients)  # weights stay fp32
    # bf16 has 8 bits of mantissa; a handful of rounded products add up.
    torch.testing.assert_close(y_PD.double(), expected_PD, rtol=0.03, atol=0.03)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=0.03, atol=0.08)


@implementations
def test_bf16_weights_and_inputs_need_no_autocast(name: str) -> None:
    load_E = [2, 0, 3]
    *tensors, offsets_E = inputs(load_E)
    halves = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in tensors]
    expected_PD = plain_loop(*in_double(tensors), load_E)
    y_PD = plain_experts(LINEARS[name], *halves, offsets_E)
    y_PD.sum().backward()
    torch.testing.assert_close(y_PD.double(), expected_PD, rtol=0.03, atol=0.03)
    assert all(half.grad is not None and half.grad.dtype == torch.bfloat16 for half in halves)


@implementations
@loads
def test_the_gradient_of_a_plain_sum_has_stride_zero_and_is_taken(name: str, load_E: list[int]) -> None:
    *tensors, offsets_E = inputs(load_E)
    reference = in_double(tensors)
    expected = torch.autograd.grad(plain_loop(*reference, load_E).sum(), reference)
    gradients = torch.autograd.grad(plain_experts(LINEARS[name], *tensors, offsets_E).sum(), tensors)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-6)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_narrowest_sizes_the_configuration_allows_work(name: str, dtype: torch.dtype) -> None:
    """grouped_mm wants strides that are multiples of 16 bytes: 8 numbers of bf16."""
    generator = torch.Generator().manual_seed(0)
    x_PD, up_EHD, down_EDH = (
        torch.randn(*size, generator=generator).to(dtype) for size in [(3, 8), (2, 8, 8), (2, 8, 8)]
    )
    y_PD = plain_experts(LINEARS[name], x_PD, up_EHD, down_EDH, torch.tensor([1, 3], dtype=torch.int32))
    expected_PD = plain_loop(x_PD.double(), up_EHD.double(), down_EDH.double(), [1, 2])
    torch.testing.assert_close(
        y_PD.double(), expected_PD, rtol=0.05, atol=0.5 if dtype == torch.bfloat16 else 1e-5
    )


def test_an_expert_without_a_row_gets_a_gradient_of_exact_zeros() -> None:
    for linear in LINEARS.values():
        x_PD, up_EHD, down_EDH, offsets_E = inputs([2, 0, 1])
        with poisoned_memory():
            plain_experts(linear, x_PD, up_EHD, down_EDH, offsets_E).square().sum().backward()
        assert up_EHD.grad is not None
        assert down_EDH.grad is not None
        assert not up_EHD.grad[1].any()
        assert not down_EDH.grad[1].any()
        assert up_EHD.grad[0].any()


def test_the_poison_reaches_what_nobody_wrote() -> None:
    """Without this the tests above could pass on zeros: grouped_mm leaves rows past the last offset as they were."""
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(64).isnan().all()
        rows = torch.nn.functional.grouped_mm(
            torch.ones(4, 8), torch.ones(1, 8, 8), offs=torch.tensor([1], dtype=torch.int32)
        )
        assert rows[1:].isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
