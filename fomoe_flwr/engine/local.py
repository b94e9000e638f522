"""A site's model behind four verbs: load, train, update, state. On one device; `engine.several` has it on more."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig, TrainConfig
from fomoe_flwr.engine.device import autocast
from fomoe_flwr.engine.optimizer import Moments, Schedule, StackedOptimizer, fits, local, pieces_of
from fomoe_flwr.engine.speed import active_flops, known_peak
from fomoe_flwr.errors import WireError
from fomoe_flwr.load import Shares, averaged, difference
from fomoe_flwr.messages import Task
from fomoe_flwr.model.base import LanguageModel, Losses, load_shard, named_views
from fomoe_flwr.model.build import build
from fomoe_flwr.model.spec import MOMENTS, Residents, is_moment, moment_name, parameters
from fomoe_flwr.units import in_bytes, percent

log = logging.getLogger("fomoe.site")

STEPS_A_LOG_LINE = 10
# Steps at either end of a round whose losses are reported: one batch's loss says little, a jump is over after a few.
EDGE_STEPS = 3


@dataclass
class EngineState:
    """What the engine keeps from round to round besides the model, which the server sends."""

    moments: dict[str, Moments] = field(default_factory=dict)
    # Towards residents, with its trend, by layer (model.locality=bias); else empty.
    bias: list[list[float]] = field(default_factory=list)
    load: Shares | None = None  # the site's own, with model.balance=global


class Report(NamedTuple):
    """What a round of local steps came to."""

    tokens: int
    load_LE: list[list[int]]  # assignments of the router to each expert of each layer, ghosts too
    metrics: dict[str, float]


class Engine:
    """The model of a site with these residents.

    Memory at the most: the parameters, their gradients and the optimizer's moments (`state_bytes`), the shard as it was
    sent, and the activations of a piece of a batch (`plan/memory.py`).
    """

    devices = 1
    usable = True

    def __init__(self, model: ModelConfig, residents: Residents, routing: str, device: str) -> None:
        self.device = device
        self.module = build(model, residents, routing, None, device)
        self._optimizer: StackedOptimizer | None = None
        # With train.weights=bf16: the fp32 values of those parameters that are rounded.
        self._exact: dict[nn.Parameter, Tensor] = {}

    def load(self, task: Task, shard: Mapping[str, Tensor], state: EngineState) -> None:
        """Take over what the server sent, parameters and with LocalAdamW their moments, and the site's own state.

        Args:
            shard: what the round begins from; with strategy.delay=1 not what the server sent for it.
            state: its moments are emptied while they are taken over, so that they are not held twice.

        Raises:
            WireError: the shard is not what the task says.
        """
        self._task = task
        self._sent = {name: value for name, value in shard.items() if not is_moment(name)}
        self._shard_bytes = sum(tensor.numel() * tensor.itemsize for tensor in shard.values())
        self._hold_weights(task.train)
        self._put(self._sent)
        self.module.begin_round(state.bias, difference(task.global_load, state.load))
        self._own_load, self._update, self._optimizer = state.load, dict[str, Tensor](), None
        self._kept: dict[str, Tensor] = {}
        if task.strategy.inner == "gradient":
            self.new_tensors = 0
            return
        moments = state.moments
        if task.moments_travel:
            moments = {name: _moments_sent(shard, name, task.first_step) for name in self._sent}
        # Moments that are missing at the start, or dropped on purpose, are no reason for a warm-up.
        newcomer = task.first_step if task.strategy.keep_moments and task.round > 1 else 0
        table = parameters(task.model, task.residents, task.strategy.routing)
        new = (name for name in self._sent if not fits(moments.get(name), table[name], task.train))
        self.new_tensors = sum(1 for _ in new) if newcomer else 0
        schedule = Schedule(task.first_step, task.lr_stride, task.schedule, newcomer)
        self._optimizer = self._new_optimizer(schedule, moments)

    def loaded(self) -> dict[str, Tensor]:
        """What `load` took over, read back: views, by name."""
        travelling = self._moments_by_name() if self._task.moments_travel else {}
        return self._read() | travelling

    def evaluator(self, shard: Mapping[str, Tensor]) -> LanguageModel:
        """A model with these parameters, to evaluate with. What was loaded before is lost.

        Raises:
            WireError: the shard is not one of this site.
        """
        self._hold_weights(TrainConfig())
        load_shard(self.module, shard)
        return self.module

    def train(self, batches: Iterable[Tensor], keep: Collection[str] = ()) -> Report:
        """One local step for each batch tokens_BT; with inner=gradient the mean gradient over them and no step.

        Args:
            keep: the tensors whose values at the end are kept (`kept`).

        Raises:
            FloatingPointError: the loss is not finite; what was learnt is worthless and must not be sent.
        """
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        module, train = self.module, self._task.train
        module.train()
        module.recompute(train.recompute)
        for moe in module.moe_layers:
            moe.gate.load_C.zero_()
        losses = _Losses(torch.zeros((), device=self.device))
        compiled: Callable[[Tensor], Losses] = torch.compile(self._model) if train.compile else self._model
        tokens = 0
        for tokens_BT in batches:
            self._backward(compiled, tokens_BT, losses)
            tokens += tokens_BT[:, 1:].numel()
            if self._optimizer is not None:
                self._step(self._optimizer, losses, tokens)
        if self._optimizer is None:
            self._update = self._mean_gradients(losses.steps)
        else:
            # Before their place is taken.
            self._kept = {
                name: value.to("cpu", copy=True) for name, value in self._read().items() if name in keep
            }
            self._update = self._pseudo_gradient()
        self._sent = {}  # with it goes the message whose memory it is
        return self._report(losses, tokens)

    def update(self) -> dict[str, Tensor]:
        """The pseudo-gradient (or gradient) by name, and LocalAdamW's moments.

        In the model's own memory: it must be encoded before the next `load`.
        """
        return self._update | (self._moments_by_name() if self._task.moments_travel else {})

    def kept(self) -> dict[str, Tensor]:
        """Values at the end of the round, by name: fp32, in memory of their own."""
        kept, self._kept = self._kept, {}
        return kept

    def state(self) -> EngineState:
        """What the next `load` at this site wants back."""
        kept: dict[str, Moments] = {}
        if self._optimizer is not None and self._task.strategy.keep_moments and not self._task.moments_travel:
            kept = self._moments()
        return EngineState(kept, self.module.biases(), self._own_load)

    # ----- what is done in another way on several devices

    @property
    def _model(self) -> Callable[[Tensor], Losses]:
        return self.module

    def _hold_weights(self, train: TrainConfig) -> None:
        """Take memory for weights in the types in which they are to be held. They have no values until `_put`."""
        rounded = set[nn.Parameter]()
        if train.weights == "bf16":
            table = parameters(self.module.config, self.module.resident_experts, self.module.routing)
            rounded = {v.parameter for v in named_views(self.module) if table[v.name].is_hidden_matrix}
        for parameter in self._exact.keys() - rounded:
            del self._exact[parameter]
            parameter.data = torch.empty_like(parameter.data, dtype=torch.float32)
            parameter.grad_dtype = torch.float32
        for parameter in rounded:
            if parameter not in self._exact:
                self._exact[parameter] = torch.empty_like(parameter.data)
                parameter.data = torch.empty_like(parameter.data, dtype=torch.bfloat16)
            # The gradient of a product in bf16 has no more bits; those of several pieces of a batch are added up.
            parameter.grad_dtype = torch.bfloat16 if train.micro_batches == 1 else torch.float32

    def _put(self, shard: Mapping[str, Tensor]) -> None:
        load_shard(self.module, shard)
        for view in named_views(self.module):
            if view.parameter in self._exact:
                view.of(self._exact[view.parameter]).copy_(shard[view.name])

    def _read(self) -> dict[str, Tensor]:
        """The parameters by name."""
        views = named_views(self.module)
        return {view.name: view.of(self._exact.get(view.parameter, view.parameter.data)) for view in views}

    def _new_optimizer(self, schedule: Schedule, moments: dict[str, Moments]) -> StackedOptimizer:
        train, adopt = self._task.train, not self._task.moments_travel
        pieces = pieces_of(self.module, self._exact)
        return StackedOptimizer(self.module, train, schedule, moments, adopt, pieces)

    def _moments(self) -> dict[str, Moments]:
        """The optimizer's by name."""
        return {} if self._optimizer is None else self._optimizer.moments()

    def _rows(self, piece_BT: Tensor) -> Tensor:
        """What of a piece of a batch is worked on here."""
        return piece_BT

    def _of_a_piece(self, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a piece of a batch."""
        return nullcontext()

    def _averaged(self, loss: Tensor) -> Tensor:
        return loss

    def _clip(self, most: float) -> None:
        """Scale the gradients such that their norm is at most so large."""
        nn.utils.clip_grad_norm_(self.module.parameters(), most)

    def _gradients(self) -> dict[str, Tensor]:
        """The gradients by name, zeros where there are none; may be changed in place."""
        gradients = {
            parameter: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.module.parameters()
        }
        self.module.zero_grad(set_to_none=True)
        return {view.name: view.of(gradients[view.parameter]) for view in named_views(self.module)}

    def _largest(self, number: int) -> int:
        """Of any device."""
        return number

    # ----- steps

    def _backward(self, module: Callable[[Tensor], Losses], tokens_BT: Tensor, losses: _Losses) -> None:
        """The gradient of a batch, added to what is there; a piece of it after the other (train.micro_batches)."""
        tokens_BT = tokens_BT.to(self.device, non_blocking=True)
        total = torch.zeros((), device=self.device)
        pieces = tokens_BT.tensor_split(self._task.train.micro_batches)
        for number, piece_BT in enumerate(pieces, 1):
            share = len(piece_BT) / len(tokens_BT)
            with self._of_a_piece(number == len(pieces)):
                with autocast(self.device, self._task.train.dtype):
                    loss = module(self._rows(piece_BT))
                torch.autograd.backward(share * (loss.cross_entropy + loss.balance))
            total += share * loss.cross_entropy.detach()
        losses.add(self._averaged(total))

    def _step(self, optimizer: StackedOptimizer, losses: _Losses, tokens: int) -> None:
        if clip := self._task.train.grad_clip:
            self._clip(clip)
        optimizer.step()
        self.module.zero_grad(set_to_none=True)
        if losses.steps % STEPS_A_LOG_LINE == 0:
            seconds = time.perf_counter() - losses.started
            log.info(
                "step %d  loss %.4f  lr %.2e  %.0f ms/step  %.0f tokens/s  %s  %s",
                optimizer.step_number,
                losses.mean(),
                optimizer.learning_rate(0),
                1e3 * seconds / losses.steps,
                tokens / seconds,
                self._speed_in_words(tokens, seconds),
                in_bytes(self._memory_bytes()),
            )

    def flops(self, tokens: int) -> float:
        """Of the tokens of this round so far (`active_flops`)."""
        loads_LC = [moe.gate.load_C.tolist() for moe in self.module.moe_layers]
        return active_flops(self.module, self._task.train.seq_len, tokens, loads_LC)

    def _peak(self) -> float | None:
        """FLOP/s of the devices, where it is known."""
        peak = known_peak(self.device, self._task.train.dtype)
        return None if peak is None else self.devices * peak

    def _speed_in_words(self, tokens: int, seconds: float) -> str:
        per_second = self.flops(tokens) / seconds
        peak = self._peak()
        return f"{per_second / 1e12:.3g} Tflop/s" + (
            "" if peak is None else f" (MFU {percent(per_second / peak)})"
        )

    @torch.no_grad()
    def _mean_gradients(self, steps: int) -> dict[str, Tensor]:
        # In place: there is no room for the gradients twice.
        return {name: gradient.div_(steps) for name, gradient in self._gradients().items()}

    @torch.no_grad()
    def _pseudo_gradient(self) -> dict[str, Tensor]:
        """Parameters at the start minus parameters returned: a descent direction (FoMoE, algorithm 2).

        In the place of the parameters, which the next round overwrites anyway.
        """
        update = self._read()
        for name, value in self._sent.items():
            update[name].neg_().add_(value.to(update[name].device))
        return update

    def _moments_by_name(self) -> dict[str, Tensor]:
        """Moments under the names under which they travel; zeros of tensors without any are left out."""
        moments = self._moments()
        return {
            moment_name(moment, name): getattr(state, moment)
            for moment in MOMENTS
            for name, state in moments.items()
        }

    # ----- figures

    def _report(self, losses: _Losses, tokens: int) -> Report:
        mean_loss = losses.mean()  # waits for the device, so that the time below is true
        seconds = time.perf_counter() - losses.started
        if mean_loss != mean_loss or abs(mean_loss) == float("inf"):
            raise FloatingPointError(
                f"training loss is {mean_loss} after {losses.steps} steps; lower train.lr"
            )
        load_LE, resident, assigned = [], 0, 0
        for moe in self.module.moe_layers:
            load_E = [0] * moe.num_experts
            for expert, load in zip(moe.candidates, moe.gate.load_C.tolist(), strict=True):
                load_E[expert] = int(load)
            load_LE.append(load_E)
            assigned += sum(load_E)
            resident += sum(load_E[expert] for expert in moe.resident_experts)
        if self._task.model.balance == "global":
            self._own_load = averaged(self._own_load, load_LE)
        else:
            self._own_load = None
        first, last = (sum(map(float, edge)) / max(len(edge), 1) for edge in (losses.first, losses.last))
        metrics = {
            "train_loss": mean_loss,  # mean cross-entropy, nats a token
            "first_loss": first,  # of the first EDGE_STEPS steps: the model nearly as it was sent
            "last_loss": last,
            "seconds": seconds,
            "resident_share": resident / assigned if assigned else 1.0,
            "memory_bytes": self._largest(self._memory_bytes()),
            "activations_counted": float(self.device.startswith("cuda")),  # among memory_bytes
            "new_experts": self.new_tensors,
            "flops": self.flops(tokens),
        }
        if (peak := self._peak()) is not None:
            metrics["peak_flops"] = peak  # a second
        return Report(tokens, load_LE, metrics)

    def _memory_bytes(self) -> int:
        """What the round needed: on a GPU the allocator's peak.

        On a CPU what stood side by side in a training step: parameters and their gradients, moments, and the shard as
        it was sent. Activations do not count there.
        """
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.device)
        moments = {} if self._optimizer is None else self._optimizer.moments()
        gradients = (
            local(parameter).numel() * (parameter.grad_dtype or parameter.dtype).itemsize
            for parameter in self.module.parameters()
        )
        return (
            sum(local(parameter).nbytes for parameter in self.module.parameters())
            + sum(gradients)
            + sum(exact.nbytes for exact in self._exact.values())
            + sum(moment.nbytes for moment in moments.values())
            + self._shard_bytes
        )


def _moments_sent(shard: Mapping[str, Tensor], name: str, step: int) -> Moments:
    """Both moments of a parameter, as they came with it."""
    average, square = (moment_name(moment, name) for moment in MOMENTS)
    for key in (average, square):
        if key not in shard or shard[key].shape != shard[name].shape:
            raise WireError(f"shard lacks {key} of shape {tuple(shard[name].shape)}")
    return Moments(shard[average], shard[square], step, 0)


@dataclass
class _Losses:
    """Sums on the device; read once in a while, because reading waits for the device."""

    total: Tensor
    steps: int = 0
    first: list[Tensor] = field(default_factory=list)
    last: deque[Tensor] = field(default_factory=lambda: deque(maxlen=EDGE_STEPS))
    started: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor) -> None:
        self.total += loss
        self.steps += 1
        self.last.append(loss)
        if self.steps <= EDGE_STEPS:
            self.first.append(loss)

    def mean(self) -> float:
        return float(self.total) / max(self.steps, 1)
