"""The learning rate of a run by global step: warm-up, then constant, cosine, or constant with a linear end (WSD).

A global step is a nominal local step of the run: `train.local_steps` of them make a round, whatever a single site does.
WSD is the trapezoid of Hu et al. (arXiv 2404.06395).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_flwr.config import TrainConfig


@dataclass(frozen=True)
class LrSchedule:
    """Factors of `train.lr`.

    Args:
        warmup_steps: length of the linear warm-up.
        shape: of the decay: constant (there is none), cosine, or wsd (linear).
        decay_from, decay_until: the steps between which the factor falls from 1 to `final`.
        final: factor from there on.
    """

    warmup_steps: int
    shape: str = "constant"
    decay_from: int = 0
    decay_until: int = 0
    final: float = 1.0

    def factor(self, step: float) -> float:
        """Of the update at this global step, counted from 0."""
        return min(warmup(step, self.warmup_steps), self._decay(step))

    def _decay(self, step: float) -> float:
        if self.shape == "constant":
            return 1.0
        # As the warm-up, which is over with its last step: the step before `decay_until` has the final rate.
        done = (step + 1 - self.decay_from) / max(self.decay_until - self.decay_from, 1)
        done = min(max(done, 0.0), 1.0)
        left = 1 - done if self.shape == "wsd" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left


def warmup(step: float, steps: int) -> float:
    """Linear warm-up: 1/steps at step 0, 1 from step `steps - 1` on."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def lr_schedule(train: TrainConfig) -> LrSchedule:
    """That of a run."""
    whole = train.rounds * train.local_steps
    warmup_steps = train.warmup_steps
    if train.warmup_fraction is not None:
        warmup_steps = round(train.warmup_fraction * whole)
    if train.schedule == "constant":
        return LrSchedule(warmup_steps)
    until = whole if train.decay_until is None else train.decay_until
    since = warmup_steps
    if train.schedule == "wsd":
        length = math.ceil(until / 5) if train.decay_steps is None else train.decay_steps
        since = until - length
    return LrSchedule(warmup_steps, train.schedule, since, until, train.final_lr)
