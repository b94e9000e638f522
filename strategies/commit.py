"""The second half of a round: what the good replies do to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from fomoe_flwr import wire
from fomoe_flwr.config import RunConfig
from fomoe_flwr.model.capacity import least_tokens
from fomoe_flwr.model.names import expert_of, is_moment
from fomoe_flwr.outer import OuterOptimizer, RunningMean, restore_orthogonality
from strategies.inbox import Inbox
from strategies.round import Round, SiteResult

CHUNK_BYTES = 64 * 2**20  # of the model that is averaged and stepped at a time


def updated_experts(current: Round, share: float) -> set[tuple[int, int]]:
    """(layer, expert) of those of which at least this share of the holders, and at least one, answered well."""
    holds_LEM = current.placement.holds_LEM
    good_LE = holds_LEM[:, :, sorted(current.results)].sum(axis=2)
    enough_LE = good_LE >= np.maximum(np.ceil(share * holds_LEM.sum(axis=2)), 1)
    return {(layer, expert) for layer, expert in np.argwhere(enough_LE).tolist()}


def starved_experts(current: Round, config: RunConfig) -> tuple[set[tuple[int, int]], int]:
    """(layer, expert) of those that got too few tokens at their holders to learn from them; and the least number.

    A site that does not say where its tokens went may have given them all to any expert it holds.
    """
    strategy, results = config.strategy, current.results
    tokens = sum(result.tokens for result in results.values())
    least = least_tokens(strategy.capacity_floor, strategy.capacity_delta, config.model.d_model, tokens)
    tokens_LE = np.zeros(current.placement.holds_LEM.shape[:2], dtype=np.int64)
    for site, result in results.items():
        got_LE = result.load_LE if result.load_LE.any() else np.full_like(tokens_LE, result.tokens)
        tokens_LE += got_LE * current.placement.holds_LEM[:, :, site]
    return {(layer, expert) for layer, expert in np.argwhere(tokens_LE < least).tolist()}, least


def commit(
    current: Round,
    outer: OuterOptimizer,
    inbox: Inbox,
    config: RunConfig,
    updated: set[tuple[int, int]],
    steps: Sequence[int],
) -> None:
    """The mean of each name over its holders, and the outer step; a piece of the model at a time.

    So the server needs no second model for the sums, whatever the number of sites. Sites are added in their own
    order, not in that of arrival, so the result does not depend on the network.

    Args:
        updated: the experts that take part; the others keep their values and their momentum.
        steps: local steps by site.
    """
    state, train = outer.state, config.train
    names = [name for name in state if (expert := expert_of(name)) is None or expert in updated]
    sizes = {name: state[name].numel() * state[name].itemsize for name in names}
    # Gradient clipping, which outer=adamw does, needs the whole gradient at once.
    limit = math.inf if config.strategy.outer == "adamw" else CHUNK_BYTES
    nominal = train.local_steps * train.batch_size * train.seq_len  # an ordinary weight is exactly 1
    scales = step_scales(current.results, steps) if config.strategy.inner == "adamw" else {}
    for chunk in wire.split_bundle(names, sizes, limit):
        mean = RunningMean()
        for site in sorted(current.results):
            weight = partial(_weight, current.results[site], config.strategy.expert_weighting, nominal)
            mean.add(inbox.tensors(site, chunk), weight, partial(_scale, scales.get(site, 1.0)))
            inbox.release(site)
        outer.step(mean.finish(), (current.number - 1) * train.local_steps, config.warmup_steps)
    if config.model.router == "orthogonal":
        restore_orthogonality(state)


def step_scales(results: Mapping[int, SiteResult], steps: Sequence[int]) -> dict[int, float]:
    """By what each site's pseudo-gradient is multiplied so that sites that took more steps do not pull harder.

    A pseudo-gradient grows with the steps that made it. Each is divided by its own K and multiplied by the mean K,
    weighted by tokens as the mean of the pseudo-gradients is, so the round goes as far as its sites did on average
    (as FedNova does for SGD, arXiv 2007.07481). Where all take the same number of steps every factor is exactly 1.
    """
    tokens = sum(result.tokens for result in results.values())
    mean = sum(result.tokens * steps[site] for site, result in results.items()) / tokens if tokens else 0.0
    return {site: mean / steps[site] for site in results}


def _scale(scale: float, name: str) -> float:
    return 1.0 if is_moment(name) else scale  # LocalAdamW's moments are states and not sums of steps


def _weight(result: SiteResult, weighting: str, nominal: int, name: str) -> float:
    """A name weighs the tokens of its site, or those its expert really got."""
    expert = expert_of(name)
    if expert is None or weighting == "tokens":
        return result.tokens / nominal
    return float(result.load_LE[expert]) / nominal
