"""The fewest tokens from which an expert can learn what is its own: LocMoE's least capacity (arXiv 2401.13920)."""

from __future__ import annotations

import math


def separation_probability(delta: float, d_model: int) -> float:
    """Probability that a token of random direction has a cosine above `delta` with an expert's router row.

    The squared cosine of two random directions is Beta(½, (d-1)/2) distributed. The paper's p_δ is of the event on
    both sides; a row chooses the tokens on its own side, which is half.
    """
    from scipy.special import betainc  # slow to import, and only a run with a floor needs it

    return 0.5 * (1.0 - float(betainc(0.5, (d_model - 1) / 2, delta**2)))


def least_tokens(confidence: float, delta: float, d_model: int, tokens: int) -> int:
    """Tokens of which at least one is above `delta` with this confidence: `⌈ln η / ln(1-p)⌉`, η = 1 - confidence.

    Args:
        confidence: below 1; 0 asks for nothing.
        tokens: that there are; more than all of them cannot be asked for.
    """
    if confidence == 0:
        return 0
    p = separation_probability(delta, d_model)
    return max(1, min(math.ceil(math.log(1 - confidence) / math.log1p(-p)), tokens)) if p > 0 else tokens
