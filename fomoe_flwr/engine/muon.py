"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalised, is the step of a matrix.

The same numbers as `torch.optim.Muon` with adjust_lr_fn=match_rms_adamw, which takes one matrix after the other; here
all experts of a stack go through each matrix product together.

A step has singular values near 1 whatever the gradient's size, so its entries have a root mean square of 1/√(the longer
side). Multiplied by 0.2·√(the longer side) it is as large as AdamW's usually is, and the learning rate and weight decay
that were tuned for AdamW are good for Muon too (Liu et al., arXiv 2502.16982). That is so at the size for which they
were tuned; at others a step changes the layer's output by as much as it does there (`model/spec.py`, `reach`).

Nor does the size of a step depend on how many tokens an expert got: one that gets none goes on the way it went, until
its momentum is all but zero. An expert that was not at the site begins with none, and takes no step before its first
token.

Letters: E experts (1 for a matrix alone), N rows, M columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# As in torch.optim.Muon. Five steps of this polynomial bring singular values to between 0.7 and 1.2, and more do not
# bring them closer: it was chosen to be steep at zero.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPS = 1e-7  # least norm that a matrix is divided by
MOMENTUM = 0.95
RMS = 0.2  # of AdamW's steps, by Liu et al.


def direction(gradient: Tensor, momentum: Tensor) -> Tensor:
    """What is to be orthogonalised (Nesterov's momentum). Changes `momentum`, the mean of gradients, in place."""
    momentum.lerp_(gradient, 1 - MOMENTUM)
    return gradient.lerp(momentum, MOMENTUM)


def orthogonalised(direction_ENM: Tensor) -> Tensor:
    """U·Vᵀ of each matrix U·S·Vᵀ, nearly, by Newton-Schulz steps in bf16; zeros of zeros.

    Args:
        direction_ENM: a matrix alone may come as N x M.
    """
    a, b, c = _COEFFICIENTS
    step_ENM = direction_ENM.bfloat16()
    # So that the matrix times its transpose is of the shorter side.
    is_tall = step_ENM.size(-2) > step_ENM.size(-1)
    step_ENM = step_ENM.mT if is_tall else step_ENM
    step_ENM = step_ENM.reshape(-1, *step_ENM.shape[-2:])
    norm_E11 = torch.linalg.vector_norm(step_ENM, dim=(-2, -1), keepdim=True)
    step_ENM = step_ENM / norm_E11.clamp(min=_EPS)
    for _ in range(_STEPS):
        gram_ENN = step_ENM @ step_ENM.mT
        factor_ENN = torch.baddbmm(gram_ENN, gram_ENN, gram_ENN, beta=b, alpha=c)
        step_ENM = torch.baddbmm(step_ENM, factor_ENN, step_ENM, beta=a)
    return (step_ENM.mT if is_tall else step_ENM).reshape(direction_ENM.shape)


def take(value: Tensor, step_ENM: Tensor, shape: tuple[int, ...], lr: float, weight_decay: float) -> None:
    """Change the parameter by a step that `orthogonalised` gave, or by some rows of it.

    Args:
        shape: of the whole matrix.
    """
    value.mul_(1 - lr * weight_decay).add_(step_ENM, alpha=-lr * RMS * math.sqrt(max(shape)))
