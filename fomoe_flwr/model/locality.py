"""Preferring experts that are here (LocMoE, arXiv 2401.13920), where a router may also choose ghosts.

bias: a number of this site's own, added to the residents' logits when experts are chosen and nowhere else. To logits
      and not to the scores that come of them: of a router that is sure, many scores are 1 to the last bit, and
      no number lies between choosing all of those residents and choosing none.
loss: a term that draws the router's mean gate shares D_c towards the residents, `KL(D_c ‖ D_l)`.

With equal coverage the sites' locality gradients cancel when they are averaged, so a router that all share cannot be
local everywhere. The bias can, because it stays at its site.

Letters: T tokens, C candidates of the router, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIMIT = 64.0  # of a bias; logits are farther apart only where a sigmoid has long stopped to tell them apart
_HALVINGS = 26  # of the interval between the limits, down to the resolution of such a logit in fp32


def entry_biases(logits_TC: Tensor, resident_C: Tensor, top_k: int) -> Tensor:
    """The bias above which a token's j-th best resident is among its k experts, entries_TK.

    It must beat the ghost of rank k-j+1, for then k-j ghosts and j-1 residents are better. With too few residents
    the entry is at infinity, with too few ghosts at minus infinity.
    """
    residents_TK = logits_TC.masked_fill(~resident_C, -torch.inf).topk(top_k, dim=-1).values
    ghosts_TK = logits_TC.masked_fill(resident_C, -torch.inf).topk(top_k, dim=-1).values
    return ghosts_TK.flip(1) - residents_TK


def resident_share(entries_TK: Tensor, bias: Tensor) -> Tensor:
    """Share of the assignments that hit a resident under a bias. It grows with the bias, never falls."""
    return (entries_TK < bias).to(entries_TK.dtype).mean()


@torch.no_grad()
def bias_for(entries_TK: Tensor, target: float) -> Tensor:
    """The smallest bias under which the resident share reaches the target, by bisection.

    The limit where no bias reaches it, or any does. Reads nothing back from the device.
    """
    low, high = entries_TK.new_tensor(-_LIMIT), entries_TK.new_tensor(_LIMIT)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        reached = resident_share(entries_TK, middle) >= target
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def local_shares(resident_C: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """D_l: `(1-ε)/r` on each of the r residents, `ε/(C-r)` on each ghost; with a plain 0 there, the KL is infinite."""
    residents = resident_C.to(dtype).sum()
    ghosts = len(resident_C) - residents
    return torch.where(resident_C, (1 - epsilon) / residents, epsilon / ghosts)


def locality_loss(share_C: Tensor, resident_C: Tensor, epsilon: float) -> Tensor:
    """`KL(D_c ‖ D_l)` in nats.

    D_c is the mean over tokens of the normalised scores: it follows the assignments, and has a gradient.
    Where it is `δ`, at least `1 - ε - √(δ/2)` of D_c is on the residents (Pinsker).
    """
    local_C = local_shares(resident_C, epsilon, share_C.dtype)
    return torch.xlogy(share_C, share_C / local_C).sum()
