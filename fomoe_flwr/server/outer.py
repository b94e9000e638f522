"""What the good replies of a round do to the model: the mean of each name over its holders, and the outer optimizer.

Every name is averaged over the replies that carry it, so an expert's mean takes its holders and nobody else
without a special case. The outer optimizers are PyTorch's own; a name nobody returned has no gradient, and
PyTorch leaves such a tensor and its momentum as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.config import OUTER_LR, OUTER_MOMENTUM, ModelConfig, RunConfig, StrategyConfig, TrainConfig
from fomoe_flwr.engine.device import cpu_threads
from fomoe_flwr.mapped import fill, in_pieces, release
from fomoe_flwr.model.moe import orthonormal_rows
from fomoe_flwr.model.spec import MOMENTS, gate_name, is_moment, moment_name, parameters, place_of
from fomoe_flwr.placement import Placement, full_residents
from fomoe_flwr.schedule import lr_schedule
from fomoe_flwr.server.replies import Inbox
from fomoe_flwr.server.robust import FEWEST, Factors, capped, clip, keep_moments_possible, robust_mean

CHUNK_BYTES = 64 * 2**20  # of the model that is averaged and stepped at a time
# Of `step_scales`: a pseudo-gradient of very few steps is mostly noise, and must not be taken for a long one.
MOST_SCALE = 4.0


class RunningMean:
    """Weighted mean of each name, folded in one reply at a time: memory is one sum, however many sites there are."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    @torch.no_grad()
    def add(
        self,
        reply: Mapping[str, Tensor],
        weight: Callable[[str], float],
        scale: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        """Fold a reply in. A name of weight 0 counts as not sent (an expert that no token reached).

        Args:
            scale: by which the values are multiplied, weights apart.
        """
        # By factor: sums and the values that are added to them.
        later: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for name, value in reply.items():
            w = weight(name)
            if w == 0:
                continue
            alpha = w * scale(name)
            if name in self._sums:
                sums, values = later.setdefault(alpha, ([], []))
                sums.append(self._sums[name])
                values.append(value)
            else:
                # A new tensor in one pass; the reply's own memory is read-only and must not be kept.
                self._sums[name] = torch.mul(value.to(torch.float32), alpha)
            self._weights[name] = self._weights.get(name, 0.0) + w
        # One call for each factor (there are few): a call for each name would cost more than the sums.
        for factor, (sums, values) in later.items():
            torch._foreach_add_(sums, values, alpha=factor)

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """The means, in the memory of the sums. The object is empty afterwards."""
        sums, self._sums = self._sums, {}
        weights, self._weights = self._weights, {}
        if sums:
            torch._foreach_div_(list(sums.values()), [weights[name] for name in sums])
        return sums


class OuterOptimizer:
    """Applies the means to the global state, in place, name by name.

    nesterov: `torch.optim.SGD(nesterov=True)` on the mean pseudo-gradient (DiLoCo, arXiv 2311.08105).
    average: parameters minus mean pseudo-gradient, that is the mean of what the sites returned.
    local_adamw: the same for parameters; both Adam moments are replaced by their means.
    adamw: `torch.optim.AdamW` with CompleteP's factors. Of mean gradients (data parallel) it is the one optimizer, so
        they are clipped, and learning rate, warm-up and weight decay are the inner ones. Of mean pseudo-gradients it
        is FedAdam (arXiv 2003.00295, with AdamW's bias correction): its learning rate is its own, and clipping,
        warm-up and decay are left to the inner optimizer, which has seen to them.

    Args:
        room: zeros for the buffers, by `<buffer>/<name>`, each taken at the first update of its name; what is not
            there gets memory of its own then.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        strategy: StrategyConfig,
        model: ModelConfig,
        train: TrainConfig,
        room: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.state, self.strategy, self.train = state, strategy, train
        self._room, self._buffers = room or {}, outer_buffers(strategy)
        self._parameters = {name: torch.nn.Parameter(t) for name, t in state.items() if not is_moment(name)}
        self._schedule = lr_schedule(train)
        self._optimizer = self._build(model)

    def _build(self, model: ModelConfig) -> torch.optim.Optimizer:
        strategy, train = self.strategy, self.train
        tensors = list(self._parameters.values())
        if strategy.outer not in OUTER_LR:
            return torch.optim.SGD(tensors, lr=1.0, fused=True)
        lr = OUTER_LR[strategy.outer] if strategy.outer_lr is None else strategy.outer_lr
        if strategy.outer == "nesterov":
            momentum = _momentum(strategy)
            nesterov = momentum > 0  # PyTorch refuses Nesterov without momentum, which is a plain step
            return torch.optim.SGD(tensors, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        weight_decay = train.weight_decay if self.takes_gradients else 0.0
        groups: dict[tuple[float, float], list[Tensor]] = {}
        everything = full_residents(model.num_layers, model.num_experts)
        table = parameters(model, everything, strategy.routing)
        for name, tensor in self._parameters.items():
            groups.setdefault((table[name].lr, table[name].decay), []).append(tensor)
        return torch.optim.AdamW(
            [
                {
                    "params": params,
                    "multiplier": factor,
                    "lr": lr * factor,
                    "weight_decay": weight_decay * decay,
                }
                for (factor, decay), params in groups.items()
            ],
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            fused=True,
        )

    @property
    def takes_gradients(self) -> bool:
        """Whether the means are gradients, from which this is the only step (data parallel)."""
        return self.strategy.inner == "gradient" and self.strategy.outer == "adamw"

    @torch.no_grad()
    def step(self, means: Mapping[str, Tensor], step_number: int) -> None:
        """Apply one round's means.

        Args:
            means: pseudo-gradients of parameters and values of moments; a name may be missing.
            step_number: global step, for the learning rate where the means are gradients.
        """
        for name, value in means.items():
            if is_moment(name):
                self.state[name].copy_(value)
            else:
                self._parameters[name].grad = value
        if self.takes_gradients:
            if self.train.grad_clip:
                torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.train.grad_clip)
            for group in self._optimizer.param_groups:
                group["lr"] = self.train.lr * self._schedule.factor(step_number) * group["multiplier"]
        if self._buffers:
            # Fused SGD refuses names with a momentum beside names without (first returned in a later round).
            for name, parameter in self._parameters.items():
                if parameter.grad is not None and not self._optimizer.state[parameter]:
                    self._begin(name, parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _begin(self, name: str, parameter: Tensor) -> None:
        """The optimizer's state of a name at its first update, as PyTorch would have it, but where there is room."""
        own = self._optimizer.state[parameter]
        if self.strategy.outer == "adamw":
            own["step"] = torch.zeros(())
        for buffer in self._buffers:
            room = self._room.get(f"{buffer}/{name}")
            own[buffer] = torch.zeros_like(parameter) if room is None else room

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's own state, for a checkpoint: `<buffer>/<name>`."""
        return {
            f"{key}/{name}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`."""
        for key, value in tensors.items():
            buffer, _, name = key.partition("/")
            room = self._room.get(key)
            self._optimizer.state[self._parameters[name]][buffer] = (
                torch.empty_like(value) if room is None else room
            )
        fill(self.state_tensors(), tensors.items())


def outer_buffers(strategy: StrategyConfig) -> tuple[str, ...]:
    """Names of the tensors that the outer optimizer keeps for each parameter, of the parameter's shape."""
    if strategy.outer == "adamw":
        return MOMENTS
    return ("momentum_buffer",) if strategy.outer == "nesterov" and _momentum(strategy) else ()


def _momentum(strategy: StrategyConfig) -> float:
    return OUTER_MOMENTUM if strategy.outer_momentum is None else strategy.outer_momentum


def restore_orthogonality(state: Mapping[str, Tensor], layers: Iterable[int]) -> None:
    """Make the rows of these layers' routers orthonormal again, in place: the mean of such rotations is none.

    By one thread, so that the bits do not depend on how many there are.
    """
    with cpu_threads(1):
        for layer in layers:
            gate_ED = state[gate_name(layer)]
            gate_ED.copy_(orthonormal_rows(gate_ED))


def with_moments(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with zeros for the moments it lacks (LocalAdamW averages them like parameters)."""
    parameters = {name: tensor for name, tensor in state.items() if not is_moment(name)}
    moments = {
        key: state.get(key, torch.zeros_like(tensor))
        for moment in MOMENTS
        for name, tensor in parameters.items()
        for key in (moment_name(moment, name),)
    }
    return parameters | moments


# ----- the second half of a round


class Contribution(NamedTuple):
    """One site's good reply, as far as the means need it."""

    tokens: int
    local_steps: int
    load_LE: NDArray[np.int64]  # its routers' choices, ghosts too; all zero: not said
    holds_LE: NDArray[np.bool_]  # the experts it holds
    norms: Mapping[str, float]  # of each tensor that it sent


Contributions = Mapping[int, Contribution]  # by site


def updated_experts(placement: Placement, sites: Collection[int], share: float) -> set[tuple[int, int]]:
    """(layer, expert) of those of which at least this share of the holders, and at least one, answered well."""
    good_LE = placement.holds_LEM[:, :, sorted(sites)].sum(axis=2)
    enough_LE = good_LE >= np.maximum(np.ceil(share * placement.holds_LEM.sum(axis=2)), 1)
    return {(layer, expert) for layer, expert in np.argwhere(enough_LE).tolist()}


def starved_experts(
    placement: Placement, contributions: Contributions, config: RunConfig
) -> tuple[set[tuple[int, int]], int]:
    """(layer, expert) of those that got too few tokens at their holders to learn from them; and the least number.

    A site that does not say where its tokens went may have given them all to any expert it holds.
    """
    strategy = config.strategy
    tokens = sum(contribution.tokens for contribution in contributions.values())
    least = least_tokens(strategy.capacity_floor, strategy.capacity_delta, config.model.d_model, tokens)
    tokens_LE = np.zeros(placement.holds_LEM.shape[:2], dtype=np.int64)
    for contribution in contributions.values():
        load_LE = contribution.load_LE
        got_LE = load_LE if load_LE.any() else np.full_like(tokens_LE, contribution.tokens)
        tokens_LE += got_LE * contribution.holds_LE
    return {(layer, expert) for layer, expert in np.argwhere(tokens_LE < least).tolist()}, least


def commit(
    round_: int,
    outer: OuterOptimizer,
    inbox: Inbox,
    config: RunConfig,
    contributions: Contributions,
    updated: set[tuple[int, int]],
    usual: dict[str, float],
    resting: Collection[str] = (),
    sole_LE: NDArray[np.bool_] | None = None,
) -> Factors:
    """The mean of each name over its holders, and the outer step; a piece of the model at a time.

    So the server needs no second model for the sums, whatever the number of sites. Sites are added in their own
    order, not in that of arrival, so the result does not depend on the network.

    Args:
        updated: the experts that take part; the others keep their values and their momentum.
        usual: sizes of the rounds before (`robust.clip`); brought up to date.
        resting: tensors that are not due.
        sole_LE: the experts that rest longer than others, so that their updates are of more steps.

    Returns:
        By what the tensors that were far larger than their fellows were multiplied.
    """
    state, train = outer.state, config.train
    names = [
        name
        for name in state
        if name not in resting and ((place := place_of(config.model, name)) is None or place in updated)
    ]
    sizes = {name: state[name].numel() * state[name].itemsize for name in names}
    # Gradients are clipped, for which the whole of them is needed at once.
    limit = math.inf if outer.takes_gradients else CHUNK_BYTES
    nominal = train.local_steps * train.batch_size * train.seq_len  # an ordinary weight is exactly 1
    weighting = config.strategy.expert_weighting
    # Where all took the same number of steps every factor is 1.
    scaled = (
        config.strategy.inner == "adamw" and len({site.local_steps for site in contributions.values()}) > 1
    )
    scales = cache(partial(step_scales, contributions, weighting))

    weights = cache(partial(_weights, contributions, weighting))

    def weight_of(site: int, name: str) -> float:
        return weights(place_of(config.model, name)).get(site, 0.0) / nominal

    def step_scale(site: int, name: str) -> float:
        # LocalAdamW's moments are states and not sums of steps.
        return scales(place_of(config.model, name)).get(site, 1.0) if scaled and not is_moment(name) else 1.0

    def rests_longer(name: str) -> bool:
        place = place_of(config.model, name)
        return sole_LE is not None and place is not None and bool(sole_LE[place])

    taking_part = {
        site: {
            name: norm
            for name in names
            if (norm := own.norms.get(name)) is not None and weight_of(site, name)
        }
        for site, own in contributions.items()
    }
    factors = clip(
        {
            site: {name: norm * step_scale(site, name) for name, norm in own.items()}
            for site, own in taking_part.items()
        },
        usual,
        config.strategy.clip,
        config.strategy.inner == "gradient",
        rests_longer,
    )

    def factor(site: int, name: str) -> float:
        return factors.get(site, {}).get(name, 1.0)

    def read(name: str, site: int) -> Tensor:
        return inbox.tensors(site, {name: state[name].shape})[name]

    for chunk in wire.split_bundle(names, sizes, limit):
        means: dict[str, Tensor] = {}
        if config.strategy.mean != "mean":
            for name in chunk:
                # These are unweighted, so here a site must not pull harder for its steps.
                holders = {
                    site: step_scale(site, name) * factor(site, name)
                    for site in sorted(taking_part)
                    if name in taking_part[site]
                }
                if len(holders) >= FEWEST:
                    means[name] = robust_mean(config.strategy.mean, partial(read, name), holders)
        rest = [name for name in chunk if name not in means]
        mean = RunningMean()
        for site in sorted(contributions):
            named = inbox.tensors(site, {name: state[name].shape for name in rest})
            mean.add(named, partial(weight_of, site), partial(factor, site))
            # Not kept until the next site's is there.
            del named
        outer.step(means | mean.finish(), (round_ - 1) * train.local_steps)
        release()
    if config.strategy.outer == "local_adamw":
        stepped = [name for name in names if not is_moment(name)]
        keep_moments_possible(state, in_pieces(stepped, lambda name: 3 * sizes[name]), train)
    if config.model.router == "orthogonal":
        due = (layer for layer in range(config.model.num_layers) if gate_name(layer) not in resting)
        restore_orthogonality(state, due)
    return factors


def step_scales(
    contributions: Contributions, weighting: str, expert: tuple[int, int] | None
) -> dict[int, float]:
    """By what each site's pseudo-gradient is multiplied where it is held against those of sites with other K.

    A pseudo-gradient grows with the steps that made it. Each is divided by its own K and multiplied by the mean K of
    the sites that hold the same tensor, weighted as its mean is. So sizes can be compared, and an unweighted median
    does not go as far as the site with the fewest steps. The weighted mean needs none of it (docs/method.md). Where
    all took the same number of steps every factor is exactly 1.

    Args:
        expert: (layer, expert); None: what all sites hold.

    Returns:
        By site, of those that take part; at most `MOST_SCALE` and at least its inverse.
    """
    weights = _weights(contributions, weighting, expert)
    total = sum(weights.values())
    if not total:
        return {}
    mean = sum(weight * contributions[index].local_steps for index, weight in weights.items()) / total
    return {
        index: min(max(mean / contributions[index].local_steps, 1 / MOST_SCALE), MOST_SCALE)
        for index in weights
    }


def _weights(
    contributions: Contributions, weighting: str, expert: tuple[int, int] | None
) -> Mapping[int, float]:
    """What a tensor weighs in its mean, by holder: the tokens of its site, which are at most what it was asked for
    (`replies.check_header`), or those its expert is said to have got.
    """
    holders = {
        index: site for index, site in contributions.items() if expert is None or site.holds_LE[expert]
    }
    if expert is None or weighting == "tokens":
        return {index: site.tokens for index, site in holders.items()}
    return capped({index: int(site.load_LE[expert]) for index, site in holders.items()})


# ----- the fewest tokens from which an expert can learn what is its own (LocMoE, arXiv 2401.13920)


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
