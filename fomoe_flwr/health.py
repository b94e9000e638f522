"""How healthy the routing is: pure functions, each with its closed form.

Load figures take two tables: how often each expert was chosen (`load_LE`), and how many tokens could have chosen it
(`offered_LE`: all tokens in skip mode, those of its holders in partitioned mode). An expert that was offered to
nobody, because its holders did not answer, counts nowhere. What is not defined is nan.

Letters: L layers, E experts of a layer, T tokens, C candidates of a router.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A load that is spread as over fewer than this share of the experts is a collapse. A router that sends all tokens to
# the same k of N_e experts spreads it over k of them, and k is far below N_e / 2 wherever routing is worth having.
COLLAPSED_BELOW = 0.5
# An expert dominates that is more than so far on the way from an even share of the tokens to all of them.
DOMINANT_FROM = 0.75
# An expert is dying that gets less than this share of what it would get if all got the same.
DYING_BELOW = 0.1

_NAMED = 8  # layers, and experts of a layer, that a line names

Loads = NDArray[np.int64]
Figures = NDArray[np.float64]


# ----- load


def load_entropy(load_LE: Loads, offered_LE: Loads) -> Figures:
    """Entropy of each layer's load as a share of its maximum: `-Σ_e p_e log p_e / log n`, p_e = load_e / Σ load.

    n is the number of experts offered. 1: all got the same; 0: one got all.
    """
    offered = offered_LE > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        share_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
        terms_LE = np.where(
            share_LE > 0, share_LE * np.log(share_LE), np.where(np.isnan(share_LE), np.nan, 0.0)
        )
        entropy_L: Figures = np.abs(terms_LE.sum(axis=1)) / np.log(offered.sum(axis=1))  # abs: no -0
    entropy_L[offered.sum(axis=1) < 2] = np.nan
    return entropy_L


def load_variation(load_LE: Loads, offered_LE: Loads) -> Figures:
    """Coefficient of variation of each layer's load: its standard deviation over the experts, by its mean.

    0: all got the same; √(n - 1): one of n got all.
    """
    offered = offered_LE > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        number_L = offered.sum(axis=1)
        mean_L = load_LE.sum(axis=1) / number_L
        variance_L = (np.square(load_LE - mean_L[:, None]) * offered).sum(axis=1) / number_L
        variation_L: Figures = np.sqrt(variance_L) / mean_L
    return variation_L


def load_ratio(load_LE: Loads, offered_LE: Loads) -> Figures:
    """Most over least loaded expert of each layer; one that got nothing counts as if it had got one token."""
    offered = offered_LE > 0
    least_L = np.where(offered, load_LE, np.iinfo(np.int64).max).min(axis=1)
    ratio_L: Figures = load_LE.max(axis=1) / np.maximum(least_L, 1)
    return np.where(offered.any(axis=1), ratio_L, np.nan)


def dead_experts(load_LE: Loads, offered_LE: Loads) -> NDArray[np.bool_]:
    """Which experts no token chose, of those that one could have chosen."""
    dead_LE: NDArray[np.bool_] = (load_LE == 0) & (offered_LE > 0)
    return dead_LE


def chosen_share(load_LE: Loads, offered_LE: Loads) -> Figures:
    """Share of the tokens that chose each expert, of those that could have: `load / offered`, at most 1."""
    share_LE: Figures = np.zeros(load_LE.shape)
    return np.divide(load_LE, offered_LE, out=share_LE, where=offered_LE > 0)


def dominant_experts(load_LE: Loads, offered_LE: Loads) -> NDArray[np.bool_]:
    """Which experts got most of the tokens: more than three quarters of the way from an even share to all tokens.

    An even share is `e = Σ load / Σ offered` (k / N_e in skip mode), so an expert dominates from e + 3/4 (1 - e) on.
    Half-way would be too soon: in the first steps of a healthy run some experts get so much before load balancing acts.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        even_L1 = load_LE.sum(axis=1, keepdims=True) / offered_LE.sum(axis=1, keepdims=True)
    dominant_LE: NDArray[np.bool_] = chosen_share(load_LE, offered_LE) > even_L1 + DOMINANT_FROM * (
        1 - even_L1
    )
    return dominant_LE


def resident_share(load_LE: Loads, held_LE: NDArray[np.bool_]) -> Figures:
    """Share of each layer's assignments whose expert is held: `Σ_{e held} load_e / Σ_e load_e`."""
    with np.errstate(invalid="ignore"):
        share_L: Figures = (load_LE * held_LE).sum(axis=1) / load_LE.sum(axis=1)
    return share_L


def symptoms(load_LE: Loads, offered_LE: Loads, layers: Sequence[int] | None = None) -> list[str]:
    """What is wrong with the load, a phrase for each layer that is sick; empty where all is well.

    Sick is a layer whose load is spread as over fewer than half of its experts (exp H < n/2), and one with an
    expert that is dead or dominant.

    Args:
        layers: their numbers, where the model has others without experts.
    """
    entropy_L, share_LE = load_entropy(load_LE, offered_LE), chosen_share(load_LE, offered_LE)
    dead_LE, dominant_LE = dead_experts(load_LE, offered_LE), dominant_experts(load_LE, offered_LE)
    found = []
    for layer, entropy in enumerate(entropy_L.tolist()):
        number = int((offered_LE[layer] > 0).sum())
        if not load_LE[layer].any():  # nobody has said anything, which is no sign of death
            continue
        parts = []
        if number**entropy < COLLAPSED_BELOW * number:
            parts.append(f"load as if only {number**entropy:.1f} of {number} experts were used")
        for expert in np.flatnonzero(dominant_LE[layer])[:_NAMED].tolist():
            parts.append(f"expert {expert} is chosen by {share_LE[layer, expert]:.0%} of the tokens")
        if dead_LE[layer].any():
            dead = np.flatnonzero(dead_LE[layer]).tolist()
            parts.append(f"no token chose {'expert' if len(dead) == 1 else 'experts'} {_some(dead)}")
        if parts:
            number = layer if layers is None else layers[layer]
            found.append(f"layer {number}: {', '.join(parts)}")
    return found


def symptoms_line(found: Sequence[str]) -> str:
    """The phrases of `symptoms` as one line."""
    more = len(found) - _NAMED
    rest = [f"and {more} more {'layer' if more == 1 else 'layers'}"] if more > 0 else []
    return "; ".join([*found[:_NAMED], *rest])


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:_NAMED])) + (", …" if len(numbers) > _NAMED else "")


# ----- routers on the same tokens


def top_k_sets(scores_TC: Tensor, top_k: int) -> Tensor:
    """Which candidates each token chooses, as a mask of the scores' shape."""
    chosen_TK = scores_TC.topk(top_k, dim=-1).indices
    return torch.zeros_like(scores_TC, dtype=torch.bool).scatter_(-1, chosen_TK, True)


def agreement(one_TC: Tensor, other_TC: Tensor) -> float:
    """Mean overlap of two routers' top-k sets on the same tokens: `Σ_t |A_t ∩ B_t| / (T·k)`.

    1: they choose alike; routers that know nothing of each other have k/C. Look at the load, too: routers that have
    all collapsed onto the same experts agree.
    """
    return float((one_TC & other_TC).sum()) / float(one_TC.sum())


def gate_shares(scores_TC: Tensor) -> Tensor:
    """Each token's scores, normalised to a distribution over the candidates; double precision."""
    scores_TC = scores_TC.double()
    return scores_TC / scores_TC.sum(-1, keepdim=True)


def js_distance(one_TC: Tensor, other_TC: Tensor) -> float:
    """Jensen-Shannon distance of two routers' gate shares on the same tokens, 0 to 1.

    The root of the mean over the tokens of the divergence in bits, `(KL(p‖m) + KL(q‖m)) / 2` with m = (p + q)/2.
    Token by token, and not of the mean shares: those are near uniform wherever load is balanced, so two routers
    that send every token somewhere else would look the same.
    """
    mean_TC = (one_TC + other_TC) / 2
    divergence_T = (_relative_entropy(one_TC, mean_TC) + _relative_entropy(other_TC, mean_TC)) / 2
    return math.sqrt(max(float(divergence_T.mean()) / math.log(2), 0.0))


def _relative_entropy(p_TC: Tensor, q_TC: Tensor) -> Tensor:
    # Where p is 0 the term is 0, and q may be 0, too.
    terms_TC: Tensor = torch.special.xlogy(p_TC, p_TC) - torch.special.xlogy(p_TC, q_TC)
    return terms_TC.sum(-1)


def relative_change(before: Tensor, after: Tensor) -> float:
    """`‖after - before‖ / ‖before‖`; nan where there was nothing before."""
    size = float(torch.linalg.vector_norm(before))
    return float(torch.linalg.vector_norm(after - before)) / size if size else math.nan


# ----- the model and its loss


def mean_cosine(experts: Iterable[Sequence[Tensor]]) -> float:
    """Mean cosine similarity over all pairs of experts, each given as its tensors; nan for fewer than two.

    `(‖Σ_i u_i‖² - n) / (N(N - 1))`, u_i the expert's parameters as one unit vector, n = N the experts: one pass over
    the parameters, whatever the number of pairs. An expert of zeros has no direction: it counts in N but not
    in n, that is, it has cosine 0 with everybody.
    """
    sums: list[Tensor] = []
    number, directed = 0, 0
    for tensors in experts:
        number += 1
        norm = math.hypot(*map(float, torch._foreach_norm(list(tensors))))
        if not norm:
            continue
        directed += 1
        if not sums:
            sums = [torch.zeros_like(tensor) for tensor in tensors]
        torch._foreach_add_(sums, list(tensors), alpha=1 / norm)
    if number < 2:
        return math.nan
    square = sum(float(torch.linalg.vector_norm(total)) ** 2 for total in sums)
    return (square - directed) / (number * (number - 1))


def loss_spike(first: Mapping[str, float], last_before: Mapping[str, float]) -> float:
    """How much the loss jumped when the sites took over the averaged model, nats a token.

    Mean over the sites of (loss of the round's first steps - loss of the last steps of the site's round before). Of
    the sites that have both; nan where none has. Other batches are compared with each other, so it carries their
    noise. Negative: the averaged model is better than the sites' own.
    """
    jumps = [first[site] - last_before[site] for site in sorted(first) if site in last_before]
    return sum(jumps) / len(jumps) if jumps else math.nan
