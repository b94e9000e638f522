"""Three ways from a token to one logit for each expert; the sigmoid and the top-k after them are the same.

linear       rows that learn (σ-MoE).
orthogonal   rows that learn and are kept orthonormal (LocMoE, arXiv 2401.13920): logits are cosines, so no row can win
             by its length, and no two start alike.
grap         LocMoE's grouped average pooling: fixed rows, each the mean of a slice. Nothing to learn, to send or to
             average, so no two sites' routers can drift apart.

All three have logits of standard deviation 1 for a normalised token of random direction, so they start alike.

Letters: T tokens, D d_model, C candidates of the router.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_logits(x_TD: Tensor, rows_CD: Tensor) -> Tensor:
    """A scalar product with each row."""
    return x_TD @ rows_CD.T


def cosine_logits(x_TD: Tensor, rows_CD: Tensor) -> Tensor:
    """The cosine with each row, times √d: between random directions its standard deviation is 1/√d."""
    return math.sqrt(x_TD.shape[1]) * (F.normalize(x_TD, dim=1) @ F.normalize(rows_CD, dim=1).T)


def grap_logits(x_TD: Tensor, num_candidates: int) -> Tensor:
    """Logit c is the mean of the c-th of n equal slices of the token, times √(d/n).

    That makes the fixed rows orthonormal. Without it the scores would all be next to ½: a mean over d/n numbers is
    that much smaller than one of them.
    """
    slices_TCW = x_TD.view(len(x_TD), num_candidates, -1)  # W = d/n
    return slices_TCW.mean(2) * math.sqrt(slices_TCW.shape[2])


@torch.no_grad()
def orthonormal_rows(rows_CD: Tensor) -> Tensor:
    """The orthonormal rows nearest to these: `(W Wᵀ)^(-1/2) W`, which is U Vᵀ where W = U S Vᵀ.

    From the singular vectors and not from the inverse root, which does not exist where rows have become dependent.
    """
    left_CC, _, right_CD = torch.linalg.svd(rows_CD.double(), full_matrices=False)
    nearest_CD: Tensor = (left_CC @ right_CD).to(rows_CD.dtype)
    return nearest_CD
