"""What a site's device holds at the peak of a training step, by kind, in bytes.

State: weights, gradients, moments, and the shard as it was sent. On top come the activations of one piece of a batch
(`activations.py`), and what is there only in passing while a layer or the head is worked on.

The peak is one of two moments. When the backward pass begins, all activations are there, and gradients only if pieces
were there before (train.micro_batches). When it ends, all gradients are there, and the activations of one layer. In
between gradients come as activations go, in equal parts, so it is never more than at the larger end.

What an allocator rounds up or leaves between tensors is not counted, nor is the device's own share (a CUDA context
takes 0.3 to 0.5 GB), nor the corpus.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fomoe_flwr.config import RunConfig, StrategyConfig
from fomoe_flwr.model.spec import gradient_bytes, how_many, moment_bytes, table, weight_bytes
from fomoe_flwr.plan.activations import BF16, FP32, Held, Kept, Piece, held, kept, rows_of
from fomoe_flwr.plan.system import Amounts, PlanSite, held_parameters, held_share
from fomoe_flwr.turns import takes_turns

# As model/cross_entropy.py has them.
_ROWS, _LOGITS_AT_ONCE = 512, 2**22


# ----- state


class State(NamedTuple):
    """Bytes of a parameter, or of all of them."""

    weights: Any  # Amounts
    gradients: Any
    moments: Any
    shard: Any  # what the round begins from

    @property
    def total(self) -> Any:
        """Of all."""
        return sum(self)


def shard_bytes(strategy: StrategyConfig, device: str) -> int:
    """Of what a round begins from, which lies in the host's memory where a GPU computes.

    As it was sent; with strategy.delay=1 what the site has made of it, in fp32. Where parts of the model take turns, a
    tensor that rests has its update since then beside it: at the most all of them.
    """
    if device.startswith("cuda"):
        return 0
    if takes_turns(strategy):
        return 2 * FP32
    sent = BF16 if strategy.down != "fp32" and not strategy.delay else FP32
    # With them come both moments.
    return 3 * sent if strategy.outer == "local_adamw" else sent


def on_gpu(device: str) -> bool:
    """Whether to count activations as on a GPU: also where nobody knows (auto), for there they are more as a rule."""
    return device != "cpu"


def state_of(config: RunConfig, residents: Amounts, device: str = "auto") -> State:
    """Bytes of the state of a site with so many residents a layer, by kind.

    With plan.bytes_per_parameter nobody knows the kinds: all of it is `weights`.
    """
    model, train, strategy = config.model, config.train, config.strategy
    numbers = held_parameters(config, residents)
    if config.plan.bytes_per_parameter is not None:
        more = 6 if takes_turns(strategy) else 2 * strategy.delay
        return State(numbers * (config.plan.bytes_per_parameter + more), 0, 0, 0)
    rows = [
        (param, how_many(model, param, residents) * param.numel) for param in table(model, strategy.routing)
    ]
    weights, gradients, moments = (
        sum(count * of(param, train) for param, count in rows)
        for of in (weight_bytes, gradient_bytes, moment_bytes)
    )
    # Who sends gradients has no optimizer.
    moments = moments * (strategy.inner != "gradient")
    return State(weights, gradients, moments, numbers * shard_bytes(strategy, device))


def state_a_parameter(config: RunConfig, device: str = "auto") -> State:
    """Bytes of a parameter, by kind: the mean over those of the whole model."""
    everything = float(config.model.num_experts)
    numbers = float(held_parameters(config, everything))
    return State(*(float(part) / numbers for part in state_of(config, everything, device)))


def state_bytes(config: RunConfig, residents: Amounts, device: str = "auto") -> Amounts:
    """`state_of`, all of it."""
    total: Amounts = state_of(config, residents, device).total
    return total


# ----- the peak of a step


class Memory(NamedTuple):
    """Bytes on a site's device at the peak of a step."""

    weights: Any  # Amounts
    gradients: Any  # those that are there at that moment
    moments: Any
    shard: Any
    activations: Kept
    passing: Any  # while a layer or the head is worked on

    @property
    def state(self) -> Any:
        """What is there whatever the batch is."""
        return self.weights + self.gradients + self.moments + self.shard

    @property
    def total(self) -> Any:
        """Of all."""
        return self.state + self.activations.total + self.passing


def memory(config: RunConfig, site: PlanSite, residents: Amounts) -> Memory:
    """At a site with so many residents a layer."""
    state = state_of(config, residents, site.device)
    piece, pieces = piece_of(config, site)
    share = np.vectorize(lambda count: held_share(config, count), otypes=[float])(residents)
    experts = held(config.model, config.strategy.routing, residents, share)
    whole = kept(config.model, config.strategy.routing, piece, experts)
    layer, gradients = _layer(config, piece, experts, whole)
    begins = Memory(
        *state._replace(gradients=state.gradients if pieces > 1 else 0.0 * state.gradients),
        whole,
        np.maximum(_head(config, piece), layer),
    )
    # Of the activations those of the first layer and, where the head is the embedding, its gradient, to which that of
    # looking tokens up is added.
    layers = config.model.num_layers
    left = Kept(*(part / layers for part in whole))._replace(head=0.0)
    embedding = 2.0 * config.model.vocab_size * config.model.d_model * FP32
    ends = Memory(*state, left, np.maximum(layer - gradients, embedding))
    return _larger(begins, ends)


def memory_bytes(config: RunConfig, site: PlanSite, residents: Amounts) -> Amounts:
    """`memory`, all of it."""
    total: Amounts = memory(config, site, residents).total
    return total


def piece_of(config: RunConfig, site: PlanSite) -> tuple[Piece, int]:
    """The largest piece of a step's batch, and how many there are."""
    train = config.train
    pieces = min(train.micro_batches, site.batch_size)
    rows = -(-site.batch_size // pieces)
    return Piece(rows, train.seq_len, train.dtype == "bf16", train.recompute, on_gpu(site.device)), pieces


def _layer(config: RunConfig, piece: Piece, experts: Held, whole: Kept) -> tuple[Any, Any]:
    """What is there in passing in a layer's backward pass; and how much of it are gradients of experts, in fp32.

    The gradients of a stack of experts are made in the dtype of the products, and turned into fp32 all together.
    """
    model, t, w, low = config.model, piece.tokens, piece.width, piece.low
    stacks = 3 if model.hf else 2
    numbers = experts.residents * model.d_model * model.d_expert * stacks
    rows = rows_of(piece, experts)
    # Rows gathered again, their gradient once for each projection and once in fp32, and those of projections.
    bytes_ = rows * (model.d_model * (stacks * w + low * FP32) + model.d_expert * (stacks - 1) * w)
    bytes_ = bytes_ + numbers * (FP32 + low * BF16) + 5 * t * model.d_model * FP32
    if piece.recompute != "none":
        again = kept(model, config.strategy.routing, piece._replace(recompute="none"), experts)
        attention = (again.attention - whole.attention) / model.num_layers
        bytes_ = np.maximum(bytes_ + again.experts / model.num_layers, 2 * attention)
    return bytes_, numbers * FP32


def _head(config: RunConfig, piece: Piece) -> float:
    """What is there in passing in `linear_cross_entropy`: a piece of the logits, and in bf16 what is made of the
    hidden states and of the head, and a piece's part of its gradient."""
    model, t, w = config.model, piece.tokens, piece.width
    rows = min(t, max(_ROWS, _LOGITS_AT_ONCE // model.vocab_size))
    bytes_ = rows * model.vocab_size * FP32 + (t * FP32 + rows * w) * model.d_model
    if piece.low:
        bytes_ += rows * model.vocab_size * BF16 + (t + 2 * model.vocab_size) * model.d_model * BF16
    return float(bytes_)


def _larger(one: Memory, other: Memory) -> Memory:
    """Of two moments that with more, case by case."""
    first = one.total >= other.total

    def of(a: Any, b: Any) -> Any:
        found = np.where(first, a, b)
        return found if found.ndim else float(found)

    activations = Kept(*(of(a, b) for a, b in zip(one.activations, other.activations, strict=True)))
    rest = {
        name: of(getattr(one, name), getattr(other, name)) for name in Memory._fields if name != "activations"
    }
    return Memory(activations=activations, **rest)
