"""The linear head's cross-entropy against PyTorch's own, of logits that are all there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_flwr.model import cross_entropy
from fomoe_flwr.model.cross_entropy import linear_cross_entropy

T, D, V = 37, 16, 29


def inputs(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = scale * torch.randn(T, D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(V, (T,), generator=generator)
    return hidden_TD.to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_(), targets_T


def plain(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, multiplier: float) -> Tensor:
    return F.cross_entropy(multiplier * (hidden_TD @ head_VD.T), targets_T)


@pytest.mark.parametrize("rows", [1, 5, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_loss_and_gradients_are_pytorchs(
    rows: int, dtype: torch.dtype, tolerance: float, multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_ROWS", rows)
    monkeypatch.setattr(cross_entropy, "_LOGITS_AT_ONCE", 0)
    *leaves, targets_T = inputs(torch.float64)
    expected = plain(*leaves, targets_T, multiplier)
    # As one term of a loss, with a factor of its own.
    wanted = torch.autograd.grad(3 * expected + leaves[0].sum(), leaves)

    *leaves, targets_T = inputs(dtype)
    loss = linear_cross_entropy(*leaves, targets_T, multiplier)
    gradients = torch.autograd.grad(3 * loss + leaves[0].sum(), leaves)

    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=tolerance, atol=tolerance)


def test_bf16_autocast_agrees_within_its_precision_and_sums_in_fp32() -> None:
    *leaves, targets_T = inputs(torch.float64)
    expected = plain(*leaves, targets_T, 0.5)
    wanted = torch.autograd.grad(expected, leaves)
    *leaves, targets_T = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*leaves, targets_T, 0.5)
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=0.02, atol=0.02)
    for gradient, reference in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), reference, rtol=0.03, atol=3e-3)


def test_large_logits_do_not_overflow() -> None:
    hidden_TD, head_VD, targets_T = inputs(torch.float32, scale=1e4)
    loss = linear_cross_entropy(hidden_TD, head_VD, targets_T)
    torch.testing.assert_close(loss, plain(hidden_TD, head_VD, targets_T, 1.0))
    loss.backward()
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.isfinite().all()


def test_only_what_is_asked_for_is_computed() -> None:
    hidden_TD, head_VD, targets_T = inputs(torch.float32)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden_TD, head_VD, targets_T).requires_grad
    frozen_VD = head_VD.detach()
    linear_cross_entropy(hidden_TD, frozen_VD, targets_T).backward()
    assert frozen_VD.grad is None
    assert hidden_TD.grad is not None


def test_a_second_backward_pass_is_refused() -> None:
    loss = linear_cross_entropy(*inputs(torch.float32))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()


def test_a_head_of_which_a_part_is_the_embedding_gets_both_gradients() -> None:
    """Tied: what is looked up at the input is multiplied by at the output."""
    generator = torch.Generator().manual_seed(1)
    tied_VD = torch.randn(V, D, generator=generator, requires_grad=True)
    tokens_T, targets_T = torch.randint(V, (2, T), generator=generator)
    expected = torch.autograd.grad(plain(tied_VD[tokens_T].tanh(), tied_VD, targets_T, 1.0), tied_VD)
    gradient = torch.autograd.grad(
        linear_cross_entropy(tied_VD[tokens_T].tanh(), tied_VD, targets_T), tied_VD
    )
    torch.testing.assert_close(gradient, expected)
