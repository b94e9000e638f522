"""The local loop of a site: K steps from the shard it was sent, and the pseudo-gradient of what it holds.

The optimizer is `torch.optim.AdamW` over *named* tensors: each expert is a parameter of its own that shares memory
with its slice of the stack. So moments are kept by name, and an expert that is new to the site has its own
step count and warm-up.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fomoe_flwr.config import ModelConfig, TrainConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.model.scaling import lr_multiplier
from fomoe_flwr.model.transformer import Losses, NamedView, Transformer, named_views

log = logging.getLogger("fomoe.site")

STEPS_A_LOG_LINE = 10
EDGE_STEPS = 3  # of either end of a round: one batch's loss says little, and a jump is over after a few steps


@dataclass
class Moments:
    """AdamW's state of one parameter. `born` is the global step at which it was last reset."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    born: int


class TrainReport(NamedTuple):
    """What a round of local steps came to."""

    train_loss: float  # mean cross-entropy, nats a token
    tokens: int
    seconds: float
    resident_share: float  # share of the router's assignments that hit a resident
    load_LE: list[list[int]]  # assignments of the router to each expert of each layer, ghosts too
    first_loss: float  # mean of the first EDGE_STEPS steps: the model nearly as it was sent
    last_loss: float  # and of the last ones


def resolve_device(device: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"train.device={device}: PyTorch sees no GPU here; allowed are auto, cpu")
    return device


def use_cpu(threads: int) -> None:
    """Number of CPU threads of this thread's operators, from here on; 0 leaves it as it is. And no denormals.

    As a model becomes sure, the smallest probabilities of attention and softmax underflow into denormal numbers,
    with which x86 computes many times slower: at a site of the demo, after its 200 steps, a backward pass took
    190 ms instead of 80. Not set back by a site: sites may share a process, and a part of the setting is the
    whole process's.
    """
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def threads_for_a_while(threads: int) -> Iterator[None]:
    """The number alone, for the server between rounds: evaluate as a site would, then average on all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: str, dtype: str) -> AbstractContextManager[None]:
    """bf16 matrix products over fp32 weights, or nothing."""
    context: AbstractContextManager[None] = torch.autocast(
        torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == "bf16"
    )
    return context


def warmup(step: float, steps: int) -> float:
    """Linear warm-up: 1/steps at step 0, 1 from step `steps - 1` on."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


class LocalAdamW:
    """AdamW over a model's named tensors, with CompleteP's learning rates and warm-up for what is new.

    Args:
        moments: state by name; a name without any starts afresh.
        first_step: global step of the first update; the warm-up counts global steps.
        newborn: the step at which a name without moments counts as born; 0: it needs no warm-up of its own.
        adopt: the moments given may be changed in place; else they are copied.
        pace: global steps for each step taken here.
    """

    def __init__(
        self,
        module: Transformer,
        model: ModelConfig,
        train: TrainConfig,
        warmup_steps: int,
        first_step: int,
        moments: Mapping[str, Moments],
        newborn: int = 0,
        adopt: bool = False,
        pace: float = 1.0,
    ) -> None:
        self.train, self.warmup_steps, self.pace = train, warmup_steps, pace
        self.step_number: float = first_step
        self.leaves: list[tuple[NamedView, nn.Parameter]] = []
        groups: dict[tuple[float, int], list[nn.Parameter]] = {}
        self.born: dict[str, int] = {}
        for view in named_views(module):
            leaf = view.parameter if view.slot is None else nn.Parameter(view.of(view.parameter.data))
            self.leaves.append((view, leaf))
            self.born[view.name] = moments[view.name].born if view.name in moments else newborn
            key = (lr_multiplier(model, view.name), self.born[view.name])
            groups.setdefault(key, []).append(leaf)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": leaves, "lr": 0.0, "multiplier": multiplier, "born": born}
                for (multiplier, born), leaves in groups.items()
            ],
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=True,
        )
        for view, leaf in self.leaves:
            if view.name in moments:
                saved = moments[view.name]
                self.optimizer.state[leaf] = {
                    "step": torch.tensor(float(saved.step), device=leaf.device),
                    "exp_avg": saved.exp_avg.to(leaf.device, torch.float32, copy=not adopt),
                    "exp_avg_sq": saved.exp_avg_sq.to(leaf.device, torch.float32, copy=not adopt),
                }

    def learning_rate(self, born: int) -> float:
        """Of a tensor born at a step, before CompleteP's multiplier. Born later than 0: a warm-up of its own."""
        factor = warmup(self.step_number, self.warmup_steps)
        if born > 0:
            factor = min(factor, warmup(self.step_number - born, self.train.expert_warmup_steps))
        return self.train.lr * factor

    def step(self) -> None:
        """One update from the gradients of the module."""
        for view, leaf in self.leaves:
            if view.slot is not None:
                grad = view.parameter.grad
                leaf.grad = None if grad is None else grad[view.slot]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(group["born"]) * group["multiplier"]
        self.optimizer.step()
        for view, leaf in self.leaves:
            if view.slot is not None:
                leaf.grad = None  # else the views hold this step's gradients until the next one's are there
        self.step_number += self.pace

    def moments(self) -> dict[str, Moments]:
        """State by name (no copy)."""
        return {
            view.name: Moments(
                state["exp_avg"], state["exp_avg_sq"], int(state["step"]), self.born[view.name]
            )
            for view, leaf in self.leaves
            if (state := self.optimizer.state.get(leaf))
        }


@dataclass
class _Losses:
    """Sums on the device; read once in a while, because reading waits for the device."""

    total: Tensor
    steps: int = 0
    first: list[Tensor] = field(default_factory=list)
    last: deque[Tensor] = field(default_factory=lambda: deque(maxlen=EDGE_STEPS))
    started: float = field(default_factory=time.perf_counter)

    def mean(self) -> float:
        return float(self.total) / max(self.steps, 1)


def _backward(
    module: Callable[[Tensor], Losses], tokens_BT: Tensor, device: str, dtype: str, losses: _Losses
) -> None:
    with autocast(device, dtype):
        loss = module(tokens_BT.to(device, non_blocking=True))
    torch.autograd.backward(loss.cross_entropy + loss.balance)
    step_loss = loss.cross_entropy.detach()
    losses.total += step_loss
    losses.steps += 1
    losses.last.append(step_loss)
    if losses.steps <= EDGE_STEPS:
        losses.first.append(step_loss)


def train_adamw(
    module: Transformer, optimizer: LocalAdamW, batches: Iterable[Tensor], train: TrainConfig, device: str
) -> TrainReport:
    """K steps of AdamW, one for each batch tokens_BT, with the gradient clipped to a global norm.

    Raises:
        FloatingPointError: the loss is not finite; what was learnt is worthless and must not be sent.
    """
    losses = _begin(module, device)
    compiled = torch.compile(module) if train.compile else module
    tokens = 0
    for tokens_BT in batches:
        _backward(compiled, tokens_BT, device, train.dtype, losses)
        if train.grad_clip:
            nn.utils.clip_grad_norm_(module.parameters(), train.grad_clip)
        optimizer.step()
        module.zero_grad(set_to_none=True)
        tokens += tokens_BT[:, 1:].numel()
        if losses.steps % STEPS_A_LOG_LINE == 0:
            seconds = time.perf_counter() - losses.started
            log.info(
                "step %d  loss %.4f  lr %.2e  %.0f ms/step  %.0f tokens/s",
                optimizer.step_number,
                losses.mean(),
                optimizer.learning_rate(0),
                1e3 * seconds / losses.steps,
                tokens / seconds,
            )
    return _finish(module, losses, tokens)


def train_gradient(
    module: Transformer, batches: Iterable[Tensor], train: TrainConfig, device: str
) -> tuple[TrainReport, dict[str, Tensor]]:
    """The mean gradient over the batches, by name, without a step (data parallel: the server steps).

    Raises:
        FloatingPointError: the loss is not finite.
    """
    losses = _begin(module, device)
    compiled = torch.compile(module) if train.compile else module
    tokens = 0
    for tokens_BT in batches:
        _backward(compiled, tokens_BT, device, train.dtype, losses)
        tokens += tokens_BT[:, 1:].numel()
    means = {}  # in place: there is no room for the gradients twice
    for parameter in module.parameters():
        grad = parameter.grad
        means[parameter] = torch.zeros_like(parameter) if grad is None else grad.div_(losses.steps)
    module.zero_grad(set_to_none=True)
    gradients = {view.name: view.of(means[view.parameter]) for view in named_views(module)}
    return _finish(module, losses, tokens), gradients


def _begin(module: Transformer, device: str) -> _Losses:
    module.train()
    for moe in module.moe_layers:
        moe.gate.load_C.zero_()
    return _Losses(torch.zeros((), device=device))


def _finish(module: Transformer, losses: _Losses, tokens: int) -> TrainReport:
    mean_loss = losses.mean()  # waits for the device, so that the time below is true
    seconds = time.perf_counter() - losses.started
    if mean_loss != mean_loss or abs(mean_loss) == float("inf"):
        raise FloatingPointError(f"training loss is {mean_loss} after {losses.steps} steps; lower train.lr")
    load_LE, resident, assigned = [], 0, 0
    for moe in module.moe_layers:
        load_C = [int(load) for load in moe.gate.load_C.tolist()]
        load_E = [0] * moe.num_experts
        for expert, load in zip(moe.candidates, load_C, strict=True):
            load_E[expert] = load
        load_LE.append(load_E)
        assigned += sum(load_E)
        resident += sum(load_E[expert] for expert in moe.resident_experts)
    share = resident / assigned if assigned else 1.0
    first, last = (sum(map(float, edge)) / max(len(edge), 1) for edge in (losses.first, losses.last))
    return TrainReport(mean_loss, tokens, seconds, share, load_LE, first, last)


@torch.no_grad()
def evaluate(module: Transformer, batches: Iterable[Tensor], dtype: str, device: str) -> tuple[float, int]:
    """Mean cross-entropy (nats a token) and number of tokens."""
    module.eval()
    total, tokens = 0.0, 0
    for tokens_BT in batches:
        count = tokens_BT[:, 1:].numel()
        with autocast(device, dtype):
            total += float(module(tokens_BT.to(device)).cross_entropy) * count
        tokens += count
    return total / max(tokens, 1), tokens
