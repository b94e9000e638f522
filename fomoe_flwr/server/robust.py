"""What one site can do to a mean by lying within the rules, and what bounds it.

A tensor that is far larger than its fellows' is scaled down to their median; a claim of tokens weighs a few times what
the other holders claim; the mean itself can be a coordinate-wise median or trimmed mean (Yin et al., arXiv 1803.01498).
Averages of AdamW's moments are kept to what AdamW could have made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fomoe_flwr.config import TrainConfig
from fomoe_flwr.model.spec import MOMENTS, expert_of, is_moment, moment_name

FEWEST = 3  # holders among which one liar is in the minority
NEWEST = 0.25  # weight of the newest round in what is usual for a tensor
MOST_WEIGHT = 4.0  # of a claim of tokens, in medians of the other holders'
PIECE = 2**20  # numbers of each holder that are sorted at a time
SLACK = 1.05  # of AdamW's own bound, for moments that the wire has rounded

Sizes = Mapping[int, Mapping[str, float]]  # by site and name
Factors = dict[int, dict[str, float]]  # by site and name; what is not there is 1


def clip(
    sizes: Sizes,
    usual: dict[str, float],
    bound: float,
    gradients: bool = False,
    apart: Callable[[str], bool] = lambda name: False,
) -> Factors:
    """By what tensors that are more than `bound` times as large as their fellows are multiplied: down to the median.

    The median is that of the holders. Where there are fewer than three, one of them could be the median: then what is
    usual for the tensor counts too, and for an expert the median of its layer's experts at all sites. What is usual is
    remembered as a share of the whole update, so that a learning rate that changes makes nothing unusual.

    Args:
        sizes: norm of each tensor as it goes into the mean.
        usual: of the rounds before, by name; brought up to date.
        bound: of what AdamW's steps come to, which is nearly the same at every site. Gradients differ more, and so do
            first moments, which are made of them: theirs is the square, and that of second moments, which are made of
            their squares, the fourth power. 0: nothing is scaled.
        gradients: updates are gradients, too.
        apart: whether a tensor is an expert's that is compared with its like alone.
    """
    factors: Factors = {}
    if not bound:
        return factors
    levels = _levels(sizes)
    known: dict[str, dict[int, float]] = {}
    families: dict[tuple[str, bool], list[float]] = {}
    for site in sorted(sizes):
        for name, size in sizes[site].items():
            # A tensor that nothing was learnt about (an expert without tokens) says nothing of the others.
            if size > 0 and 0 < (level := levels[_kind(name)]) < math.inf:
                known.setdefault(name, {})[site] = size / level
                families.setdefault((_family(name), apart(name)), []).append(size / level)
    medians = {family: statistics.median(members) for family, members in families.items()}
    for name, holders in known.items():
        values = list(holders.values())
        if len(values) >= FEWEST:
            ordinary = statistics.median(values)
        else:
            # Of two, the lower middle: who lies to be large must not move it.
            fellows = list(values) if len(values) > 1 else []
            if name in usual:
                fellows.append(usual[name])
            family = _family(name), apart(name)
            if len(families[family]) > len(values):
                fellows.append(medians[family])
            if not fellows:
                usual[name] = values[0]
                continue
            ordinary = statistics.median_low(fellows)
        most = bound ** _power(_kind(name), gradients)
        for site, value in holders.items():
            if value > most * ordinary:
                factors.setdefault(site, {})[name] = ordinary / value
                holders[site] = ordinary
        now = statistics.median(holders.values())
        usual[name] = usual.get(name, now) ** (1 - NEWEST) * now**NEWEST
    return factors


def _power(kind: str, gradients: bool) -> int:
    if kind == "update":
        return 2 if gradients else 1
    return 2 if kind == MOMENTS[0] else 4


def _kind(name: str) -> str:
    return name.partition(".")[0] if is_moment(name) else "update"


def _family(name: str) -> str:
    """The tensors of the same part of all experts of a layer; a dense tensor has none but itself."""
    expert = expert_of(name)
    return name if expert is None else name.replace(f".experts.{expert[1]}.", ".experts.*.")


def _levels(sizes: Sizes) -> dict[str, float]:
    """Size of the whole dense update, and of both moments, as the sites have it in the (lower) median."""
    norms: dict[str, dict[int, float]] = {kind: {} for kind in ("update", *MOMENTS)}
    for site, own in sizes.items():
        for name, size in own.items():
            if expert_of(name) is None:
                of_kind = norms[_kind(name)]
                of_kind[site] = math.hypot(of_kind.get(site, 0.0), size)
    return {kind: statistics.median_low(known.values()) if known else 0.0 for kind, known in norms.items()}


def capped(claims: Mapping[int, int]) -> dict[int, float]:
    """Tokens that each holder says its expert got, none more than `MOST_WEIGHT` times the median of the others'.

    Nobody can check such a claim. One that nobody else makes is alone in its mean, and weighs what it likes.
    """
    weights: dict[int, float] = {}
    for site, claim in claims.items():
        others = [other for key, other in claims.items() if key != site and other > 0]
        weights[site] = min(claim, MOST_WEIGHT * statistics.median(others)) if others else claim
    return weights


@torch.no_grad()
def robust_mean(kind: str, read: Callable[[int], Tensor], scales: Mapping[int, float]) -> Tensor:
    """Coordinate-wise median, or mean without the largest and smallest quarter (at least one), of a tensor; unweighted.

    Piece by piece, so that memory is a piece of each holder.

    Args:
        kind: median or trimmed.
        read: the tensor of a site, as it arrived.
        scales: by what each holder's is multiplied; at least three.
    """
    holders = sorted(scales)
    cut = (len(holders) - 1) // 2 if kind == "median" else max(1, len(holders) // 4)
    shape = read(holders[0]).shape
    result = torch.empty(shape, dtype=torch.float32)
    flat = result.view(-1)
    for at in range(0, flat.numel(), PIECE):
        rows = [read(site).reshape(-1)[at : at + PIECE].to(torch.float32) * scales[site] for site in holders]
        ordered = torch.stack(rows).sort(dim=0).values
        torch.mean(ordered[cut : len(holders) - cut], dim=0, out=flat[at : at + PIECE])
    return result


@torch.no_grad()
def keep_moments_possible(state: Mapping[str, Tensor], names: Iterable[str], train: TrainConfig) -> None:
    """Bound first moments by what AdamW can have beside such second ones, in place, coordinate by coordinate.

    By Cauchy and Schwarz |m| ≤ c·√v, with c² = (1-β₁)² / ((1-β₂)(1-β₁²/β₂)), whatever the gradients were; a mean of
    honest moments keeps it. Moments that somebody made up do not, and a step of m/√v goes as far as they like.

    Args:
        names: of parameters.
    """
    ratio = train.beta1**2 / train.beta2 if train.beta2 else math.inf
    if ratio >= 1:
        return
    most = SLACK * (1 - train.beta1) / math.sqrt((1 - train.beta2) * (1 - ratio))
    first, second = MOMENTS
    for name in names:
        limit = state[moment_name(second, name)].sqrt().add_(train.eps).mul_(most)
        state[moment_name(first, name)].clamp_(-limit, limit)
