"""The server's half of a round: the mean of each name over its holders, and the outer optimizer.

Every name is averaged over the replies that carry it, so an expert's mean takes its holders and nobody else
without a special case. The outer optimizers are PyTorch's own; a name nobody returned has no gradient, and
PyTorch leaves such a tensor and its momentum as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fomoe_flwr.config import ModelConfig, StrategyConfig, TrainConfig
from fomoe_flwr.model.gates import orthonormal_rows
from fomoe_flwr.model.names import MOMENTS, is_gate, is_moment, moment_name
from fomoe_flwr.model.scaling import lr_multiplier
from fomoe_flwr.training import threads_for_a_while, warmup

Reply = Mapping[str, Tensor]


class RunningMean:
    """Weighted mean of each name, folded in one reply at a time: memory is one sum, however many sites there are."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    @torch.no_grad()
    def add(
        self, reply: Reply, weight: Callable[[str], float], scale: Callable[[str], float] = lambda name: 1.0
    ) -> None:
        """Fold a reply in. A name of weight 0 counts as not sent (an expert that no token reached).

        Args:
            scale: by which the values are multiplied, weights apart.
        """
        old_sums, old_values, alphas = [], [], []
        for name, value in reply.items():
            w = weight(name)
            if w == 0:
                continue
            alpha = w * scale(name)
            if name in self._sums:
                old_sums.append(self._sums[name])
                old_values.append(value)
                alphas.append(alpha)
            else:
                # A new tensor in one pass; the reply's own memory is read-only and must not be kept.
                self._sums[name] = torch.mul(value.to(torch.float32), alpha)
            self._weights[name] = self._weights.get(name, 0.0) + w
        # One call for each factor (there are few): a call for each name would cost more than the sums.
        for factor in sorted(set(alphas)):
            chosen = [i for i, alpha in enumerate(alphas) if alpha == factor]
            torch._foreach_add_([old_sums[i] for i in chosen], [old_values[i] for i in chosen], alpha=factor)

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
    adamw: `torch.optim.AdamW` on mean gradients (data parallel), clipped, with the inner learning rates.
    """

    def __init__(
        self, state: dict[str, Tensor], strategy: StrategyConfig, model: ModelConfig, train: TrainConfig
    ) -> None:
        self.state, self.strategy, self.train = state, strategy, train
        self._parameters = {name: torch.nn.Parameter(t) for name, t in state.items() if not is_moment(name)}
        self._optimizer = self._build(model)

    def _build(self, model: ModelConfig) -> torch.optim.Optimizer:
        strategy, train = self.strategy, self.train
        tensors = list(self._parameters.values())
        if strategy.outer == "nesterov":
            momentum = strategy.outer_momentum
            nesterov = momentum > 0  # PyTorch refuses Nesterov without momentum, which is a plain step
            return torch.optim.SGD(
                tensors, lr=strategy.outer_lr, momentum=momentum, nesterov=nesterov, fused=True
            )
        if strategy.outer == "adamw":
            groups: dict[float, list[Tensor]] = {}
            for name, tensor in self._parameters.items():
                groups.setdefault(lr_multiplier(model, name), []).append(tensor)
            return torch.optim.AdamW(
                [{"params": params, "multiplier": multiplier} for multiplier, params in groups.items()],
                betas=(train.beta1, train.beta2),
                eps=train.eps,
                weight_decay=train.weight_decay,
                fused=True,
            )
        return torch.optim.SGD(tensors, lr=1.0, fused=True)

    @torch.no_grad()
    def step(self, means: Mapping[str, Tensor], step_number: int, warmup_steps: int) -> None:
        """Apply one round's means.

        Args:
            means: pseudo-gradients of parameters and values of moments; a name may be missing.
            step_number: global step, for adamw's warm-up.
        """
        for name, value in means.items():
            if is_moment(name):
                self.state[name].copy_(value)
            else:
                self._parameters[name].grad = value
        if self.strategy.outer == "adamw":
            if self.train.grad_clip:
                torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.train.grad_clip)
            for group in self._optimizer.param_groups:
                group["lr"] = self.train.lr * warmup(step_number, warmup_steps) * group["multiplier"]
        if self.strategy.outer == "nesterov" and self.strategy.outer_momentum:
            # Fused SGD refuses names with a momentum beside names without (first returned in a later round).
            for parameter in self._parameters.values():
                if parameter.grad is not None and "momentum_buffer" not in self._optimizer.state[parameter]:
                    self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

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
            self._optimizer.state[self._parameters[name]][buffer] = value.clone()


def restore_orthogonality(state: Mapping[str, Tensor]) -> None:
    """Make the rows of each layer's router orthonormal again, in place: the mean of such rotations is none.

    By one thread, so that the bits do not depend on how many there are.
    """
    with threads_for_a_while(1):
        for name, tensor in state.items():
            if is_gate(name):
                tensor.copy_(orthonormal_rows(tensor))


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
