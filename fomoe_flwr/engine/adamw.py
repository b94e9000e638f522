"""AdamW over a module's parameters, where a stack of experts is one tensor and each of its slots has its own age.

The update itself is PyTorch's (`torch.optim.adamw`, fused). Neighbouring slots of one age are updated together, so a
stack costs one call as long as all its experts have been at the site for equally long. Where several devices share a
parameter, each updates the rows that it has.

Moments are kept by tensor name outside of a round, because an expert may leave the site or come back.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from fomoe_flwr.config import TrainConfig
from fomoe_flwr.model.base import LanguageModel, NamedView, named_views
from fomoe_flwr.model.spec import Param, parameters
from fomoe_flwr.schedule import LrSchedule, warmup


@dataclass
class Moments:
    """AdamW's state of one named tensor. `reset_at` is the global step at which it was last reset."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    reset_at: int


@dataclass(frozen=True)
class Schedule:
    """Where a site is in the run's learning rate.

    Args:
        first_step: global step of the first update.
        stride: global steps for each step taken here.
        run: the run's, by global step.
        newcomer_reset_at: the step that counts as the reset of a tensor without moments; 0: it needs no warm-up of
            its own.
    """

    first_step: int
    stride: float
    run: LrSchedule
    newcomer_reset_at: int


class Piece(NamedTuple):
    """What of a parameter is on this device: all of it, or some rows.

    `views` has the slots of a stack that are here, counted from the first of them.
    """

    parameter: nn.Parameter
    views: list[NamedView]


def pieces_of(module: LanguageModel) -> list[Piece]:
    """The parameters of a module that has them all."""
    grouped = groupby(named_views(module), key=lambda view: id(view.parameter))
    return [Piece(views[0].parameter, views) for views in (list(group) for _, group in grouped)]


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that are on this device."""
    own: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own


@dataclass
class _Run:
    """Neighbouring slots of one age: views of the parameter and of its moments, or the whole of them."""

    parameter: nn.Parameter
    slots: slice | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    reset_at: int
    param: Param

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.slots is None else tensor[self.slots]

    @property
    def value(self) -> Tensor:
        return self.of(local(self.parameter.data))

    @property
    def gradient(self) -> Tensor | None:
        return None if self.parameter.grad is None else self.of(local(self.parameter.grad))


class StackedAdamW:
    """AdamW with CompleteP's learning rates and weight decays, and a warm-up of its own for what is new to the site.

    Args:
        moments: by name, of what is on this device; emptied while they are taken over, so that a model's moments are
            not held twice. A name without any starts afresh.
        adopt: moments may be changed in place; those of a whole parameter are then used where they are.
        pieces: what is on this device; None: all.
    """

    def __init__(
        self,
        module: LanguageModel,
        train: TrainConfig,
        schedule: Schedule,
        moments: MutableMapping[str, Moments],
        adopt: bool = False,
        pieces: Sequence[Piece] | None = None,
    ) -> None:
        self.train, self.schedule, self._adopt = train, schedule, adopt
        self.step_number: float = schedule.first_step
        self._given = set(moments)
        self._pieces = pieces_of(module) if pieces is None else pieces
        self.averages: list[tuple[Tensor, Tensor]] = []  # of each piece: exp_avg and exp_avg_sq
        table = parameters(module.config, module.resident_experts, module.routing)
        self._runs = [self._take_over(piece, table, moments) for piece in self._pieces]

    def _take_over(
        self, piece: Piece, table: Mapping[str, Param], moments: MutableMapping[str, Moments]
    ) -> list[_Run]:
        parameter, views = piece
        if not views:
            # A stack none of whose slots is here.
            self.averages.append((local(parameter.data),) * 2)
            return []
        param = table[views[0].name]
        known = [moments.pop(view.name, None) for view in views]
        ages = [
            (0, self.schedule.newcomer_reset_at) if own is None else (own.step, own.reset_at) for own in known
        ]
        if self._adopt and views[0].slot is None and known[0] is not None:
            exp_avg = known[0].exp_avg.to(parameter.device, torch.float32)
            exp_avg_sq = known[0].exp_avg_sq.to(parameter.device, torch.float32)
        else:
            exp_avg, exp_avg_sq = (torch.zeros_like(local(parameter.data)) for _ in range(2))
            for view, own in zip(views, known, strict=True):
                if own is not None:
                    view.of(exp_avg).copy_(own.exp_avg)
                    view.of(exp_avg_sq).copy_(own.exp_avg_sq)
        self.averages.append((exp_avg, exp_avg_sq))
        runs, start = [], 0
        for (step, reset_at), members in groupby(ages):
            end = start + len(list(members))
            slots = None if views[0].slot is None else slice(start, end)
            count = torch.tensor(float(step), device=parameter.device)
            run = _Run(parameter, slots, exp_avg, exp_avg_sq, count, reset_at, param)
            run.exp_avg, run.exp_avg_sq = run.of(exp_avg), run.of(exp_avg_sq)
            runs.append(run)
            start = end
        return runs

    def learning_rate(self, reset_at: int) -> float:
        """Of a tensor that was reset at a step, before CompleteP's multiplier; 0: with the run's schedule alone."""
        factor = self.schedule.run.factor(self.step_number)
        if reset_at > 0:
            factor = min(factor, warmup(self.step_number - reset_at, self.train.expert_warmup_steps))
        return self.train.lr * factor

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients of the module; a parameter without one stays as it is."""
        groups: dict[tuple[float, float], list[_Run]] = {}
        for run in [run for runs in self._runs for run in runs]:
            if run.gradient is not None and run.value.numel():
                lr = self.learning_rate(run.reset_at) * run.param.lr
                groups.setdefault((lr, self.train.weight_decay * run.param.decay), []).append(run)
        for (lr, weight_decay), runs in groups.items():
            adamw(
                [run.value for run in runs],
                [run.gradient for run in runs if run.gradient is not None],
                [run.exp_avg for run in runs],
                [run.exp_avg_sq for run in runs],
                [],
                [run.step for run in runs],
                fused=True,
                amsgrad=False,
                beta1=self.train.beta1,
                beta2=self.train.beta2,
                lr=lr,
                weight_decay=weight_decay,
                eps=self.train.eps,
                maximize=False,
            )
        self.step_number += self.schedule.stride

    def moments(self) -> dict[str, Moments]:
        """State by name, of every tensor that was ever updated or came with moments; views, no copies."""
        found: dict[str, Moments] = {}
        for piece, runs in zip(self._pieces, self._runs, strict=True):
            names = iter(piece.views)
            for run in runs:
                slots = len(run.exp_avg) if run.slots is not None else 1
                for slot in range(slots):
                    view, step = next(names), int(run.step)
                    if step or view.name in self._given:
                        average, square = run.exp_avg, run.exp_avg_sq
                        if run.slots is not None:
                            average, square = average[slot], square[slot]
                        found[view.name] = Moments(average, square, step, run.reset_at)
        return found
