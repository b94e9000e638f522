"""Cross-entropy of a linear head without ever holding all logits: a few rows at a time, gradients made on the way.

With a vocabulary of 200 k, the logits of a batch are larger than everything else together. The gradient of a row's
logits follows from the row alone (softmax minus the target), so it is made while they are at hand, and goes at once
into those of the hidden states and of the head. So a step has three matrix products of the size of the logits, where
computing them again in the backward pass would have four, and keeps none of them.

Letters: T tokens, D d_model, V vocabulary, N rows of a piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.model.experts import compute_dtype

# Rows of a piece: so many that the matrix products are efficient, and as many more as these numbers of logits allow.
_ROWS = 512
_LOGITS_AT_ONCE = 2**22


def linear_cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, multiplier: float = 1.0
) -> Tensor:
    """Mean of -log softmax(multiplier · head · hidden)[target] over the tokens, nats, fp32 (fp64 of fp64).

    Matrix products are in autocast's dtype where it is on; softmax and sums are in fp32. It can be differentiated once.

    Args:
        targets_T: int64, each below V.
    """
    wanted = torch.is_grad_enabled()
    wants_hidden, wants_head = wanted and hidden_TD.requires_grad, wanted and head_VD.requires_grad
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, head_VD, targets_T, multiplier, compute_dtype(hidden_TD), wants_hidden, wants_head
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        targets_T: Tensor,
        multiplier: float,
        dtype: torch.dtype,
        wants_hidden: bool,
        wants_head: bool,
    ) -> Tensor:
        count, exact = len(targets_T), torch.promote_types(torch.float32, hidden_TD.dtype)
        rows, head = hidden_TD.to(dtype), head_VD.to(dtype)
        total = torch.zeros((), dtype=exact, device=hidden_TD.device)
        hidden_grad_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        head_grad_VD = torch.zeros_like(head_VD, dtype=exact) if wants_head else None
        at_once = max(_ROWS, _LOGITS_AT_ONCE // len(head_VD))
        for start in range(0, count, at_once):
            rows_ND = rows[start : start + at_once]
            targets_N1 = targets_T[start : start + at_once, None]
            logits_NV = (rows_ND @ head.T).to(exact)
            if multiplier != 1.0:
                logits_NV *= multiplier
            logits_NV -= logits_NV.amax(1, keepdim=True)
            total -= logits_NV.gather(1, targets_N1).sum()
            shares_NV = logits_NV.exp_()
            sums_N1 = shares_NV.sum(1, keepdim=True)
            total += sums_N1.log().sum()
            if hidden_grad_TD is None and head_grad_VD is None:
                continue
            shares_NV /= sums_N1
            shares_NV.scatter_add_(1, targets_N1, shares_NV.new_full((1, 1), -1.0).expand_as(targets_N1))
            # Of the mean, times the multiplier: small numbers, which the head's gradient can add up in place.
            shares_NV *= multiplier / count
            grad_NV = shares_NV.to(dtype)
            if hidden_grad_TD is not None:
                hidden_grad_TD[start : start + at_once] = grad_NV @ head
            if head_grad_VD is not None:
                if dtype == exact:
                    head_grad_VD.addmm_(grad_NV.T, rows_ND)
                else:
                    head_grad_VD += grad_NV.T @ rows_ND
        # Not saved for the backward pass as tensors are: they are changed in it, where no third copy fits.
        ctx.gradients = hidden_grad_TD, None if head_grad_VD is None else head_grad_VD.to(head_VD.dtype)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a linear cross-entropy are used up; compute the loss again")
        hidden_grad_TD, head_grad_VD = ctx.gradients
        ctx.gradients = None
        for gradient in (hidden_grad_TD, head_grad_VD):
            if gradient is not None:
                gradient *= grad
        return hidden_grad_TD, head_grad_VD, None, None, None, None, None
