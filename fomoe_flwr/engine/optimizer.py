"""Steps of a module's parameters, where a stack of experts is one tensor and each of its slots has its own age.

AdamW's update is PyTorch's (`torch.optim.adamw`, fused), Muon's is in `muon.py`. Neighbouring slots of one age are
updated together, so a stack costs one call as long as all its experts have been at the site for equally long. Where
several devices share a parameter, each updates the rows that it has.

Moments are kept by tensor name outside of a round, because an expert may leave the site or come back.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from fomoe_flwr.config import TrainConfig
from fomoe_flwr.engine import muon
from fomoe_flwr.model.base import LanguageModel, NamedView, named_views
from fomoe_flwr.model.spec import Param, by_muon, parameters
from fomoe_flwr.schedule import LrSchedule, warmup


@dataclass
class Moments:
    """An optimizer's state of one named tensor. `reset_at` is the global step at which it was last reset."""

    exp_avg: Tensor
    exp_avg_sq: Tensor | None  # None: Muon's, which has one
    step: int
    reset_at: int

    @property
    def nbytes(self) -> int:
        return self.exp_avg.nbytes + (0 if self.exp_avg_sq is None else self.exp_avg_sq.nbytes)


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

    `views` has the slots of a stack that are here, counted from the first of them; `exact` its values in fp32, if the
    parameter has them rounded (train.weights=bf16).
    """

    parameter: nn.Parameter
    views: list[NamedView]
    exact: Tensor | None = None


def pieces_of(module: LanguageModel, exact: Mapping[nn.Parameter, Tensor] | None = None) -> list[Piece]:
    """The parameters of a module that has them all.

    Args:
        exact: values in fp32 of those that are rounded.
    """
    grouped = groupby(named_views(module), key=lambda view: id(view.parameter))
    found = [(views[0].parameter, views) for views in (list(group) for _, group in grouped)]
    return [Piece(parameter, views, (exact or {}).get(parameter)) for parameter, views in found]


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that are on this device."""
    own: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own


def moments_dtype(train: TrainConfig) -> torch.dtype:
    """In which moments are kept (train.moments)."""
    return torch.bfloat16 if train.moments == "bf16" else torch.float32


def fits(own: Moments | None, param: Param, train: TrainConfig) -> bool:
    """Whether this is what the optimizer of a tensor keeps; a run may go on with another one."""
    return own is not None and (own.exp_avg_sq is None) == by_muon(param, train)


@dataclass
class _Run:
    """Neighbouring slots of one age: views of the parameter and of its moments, or the whole of them."""

    parameter: nn.Parameter
    exact: Tensor | None
    slots: slice | None
    exp_avg: Tensor
    exp_avg_sq: Tensor | None
    step: Tensor
    reset_at: int
    param: Param

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.slots is None else tensor[self.slots]

    @property
    def value(self) -> Tensor:
        return self.of(local(self.parameter.data) if self.exact is None else self.exact)

    @property
    def gradient(self) -> Tensor | None:
        """In fp32."""
        return None if self.parameter.grad is None else self.of(local(self.parameter.grad)).float()

    def round(self) -> None:
        """Give the model what it is to have of the exact values."""
        if self.exact is not None:
            self.of(local(self.parameter.data)).copy_(self.value)

    def orthogonalised(self, direction: Tensor) -> Tensor:
        """Muon's step; of a matrix some of whose rows are here, their part of the whole one's."""
        parameter = self.parameter.data
        if self.slots is not None or not isinstance(parameter, DTensor):
            return muon.orthogonalised(direction)
        # Its steps are in bf16 anyway, so half the bytes travel. Every device then takes the steps of the whole matrix.
        rows = DTensor.from_local(
            direction.bfloat16(),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        whole = muon.orthogonalised(rows.full_tensor())
        return local(
            distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        )


class StackedOptimizer:
    """AdamW or Muon with CompleteP's learning rates and decays, and a warm-up of its own for what is new to the site.

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
        self._given: set[str] = set()
        self._pieces = pieces_of(module) if pieces is None else pieces
        self.averages: list[tuple[Tensor, Tensor | None]] = []  # of each piece: exp_avg and exp_avg_sq
        table = parameters(module.config, module.resident_experts, module.routing)
        self._runs = [self._take_over(piece, table, moments) for piece in self._pieces]

    def _take_over(
        self, piece: Piece, table: Mapping[str, Param], moments: MutableMapping[str, Moments]
    ) -> list[_Run]:
        parameter, views, exact = piece
        if not views:
            # A stack none of whose slots is here.
            self.averages.append((local(parameter.data),) * 2)
            return []
        param = table[views[0].name]
        found = [moments.pop(view.name, None) for view in views]
        known = [own if fits(own, param, self.train) else None for own in found]
        self._given.update(view.name for view, own in zip(views, known, strict=True) if own is not None)
        ages = [
            (0, self.schedule.newcomer_reset_at) if own is None else (own.step, own.reset_at) for own in known
        ]
        exp_avg = self._moment(piece, [None if own is None else own.exp_avg for own in known])
        exp_avg_sq = None
        if not by_muon(param, self.train):
            exp_avg_sq = self._moment(piece, [None if own is None else own.exp_avg_sq for own in known])
        self.averages.append((exp_avg, exp_avg_sq))
        runs, start = [], 0
        for (step, reset_at), members in groupby(ages):
            end = start + len(list(members))
            slots = None if views[0].slot is None else slice(start, end)
            count = torch.tensor(float(step), device=parameter.device)
            run = _Run(parameter, exact, slots, exp_avg, exp_avg_sq, count, reset_at, param)
            run.exp_avg = run.of(exp_avg)
            run.exp_avg_sq = None if exp_avg_sq is None else run.of(exp_avg_sq)
            runs.append(run)
            start = end
        return runs

    def _moment(self, piece: Piece, known: list[Tensor | None]) -> Tensor:
        """One moment of all that is here of a parameter; zeros where none is known."""
        parameter, views, _ = piece
        if self._adopt and views[0].slot is None and known[0] is not None:
            return known[0].to(parameter.device, moments_dtype(self.train))
        moment = torch.zeros_like(local(parameter.data), dtype=moments_dtype(self.train))
        for view, own in zip(views, known, strict=True):
            if own is not None:
                view.of(moment).copy_(own)
        return moment

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
            # What of a matrix is here may be nothing, and still the other devices wait for this one (Muon).
            if run.parameter.grad is None or not run.parameter.numel():
                continue
            rate, param = self.learning_rate(run.reset_at), run.param
            lr, weight_decay = rate * param.lr, self.train.weight_decay * param.decay
            if by_muon(param, self.train):
                # Weights decay by as much in a step as with AdamW's factor of the learning rate.
                self._step_by_muon(run, rate * param.muon, weight_decay * param.lr / param.muon)
            elif run.value.numel():
                groups.setdefault((lr, weight_decay), []).append(run)
        for (lr, weight_decay), runs in groups.items():
            # What is not in fp32 is copied for the step, that of one stack at a time.
            in_place = self.train.moments == self.train.weights == "fp32"
            for some in [runs] if in_place else [[run] for run in runs]:
                self._step_by_adamw(some, lr, weight_decay)
        self.step_number += self.schedule.stride

    def _step_by_adamw(self, runs: list[_Run], lr: float, weight_decay: float) -> None:
        averages = [run.exp_avg.float() for run in runs]
        squares = [run.exp_avg_sq.float() for run in runs if run.exp_avg_sq is not None]
        adamw(
            [run.value for run in runs],
            [run.gradient for run in runs if run.gradient is not None],
            averages,
            squares,
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
        for run, average, square in zip(runs, averages, squares, strict=True):
            assert run.exp_avg_sq is not None
            # Of fp32 these are the moments themselves, and nothing is copied.
            run.exp_avg.copy_(average)
            run.exp_avg_sq.copy_(square)
            run.round()

    def _step_by_muon(self, run: _Run, lr: float, weight_decay: float) -> None:
        gradient, momentum = run.gradient, run.exp_avg.float()
        assert gradient is not None
        step = run.orthogonalised(muon.direction(gradient, momentum))
        run.exp_avg.copy_(momentum)
        muon.take(run.value, step, run.param.shape, lr, weight_decay)
        run.step += 1
        run.round()

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
                            average = average[slot]
                            square = None if square is None else square[slot]
                        found[view.name] = Moments(average, square, step, run.reset_at)
        return found
