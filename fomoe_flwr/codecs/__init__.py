"""Codecs: how an update becomes the tensors that travel, and back. One file for each kind of codec.

No PyTorch at import: `fomoe plan` asks for byte counts and must not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fomoe_flwr.codecs.blocks import Int, Sign
from fomoe_flwr.codecs.cast import Cast
from fomoe_flwr.codecs.lossy import BYTES, Layout, Lossy, with_feedback
from fomoe_flwr.codecs.public import WHOLE, Differences
from fomoe_flwr.codecs.topk import TopK
from fomoe_flwr.errors import WireError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fomoe_flwr.config import StrategyConfig


class Part(NamedTuple):
    """A tensor that travels, and the dtype in which it does; it is cast while it is copied into its bundle."""

    tensor: Tensor
    dtype: torch.dtype


# By name: that of the tensor, or with a suffix behind it where a tensor travels in several parts (`part_name`).
Parts = dict[str, Part]
# What an encoder must remember from round to round, by name (the error it has not sent yet); empty for some.
CodecState = dict[str, "Tensor"]


class Codec(Protocol):
    """What a codec offers. Encoding is deterministic."""

    def layout(self, shape: Sequence[int]) -> Layout:
        """The parts of a tensor of this shape by suffix: shape and dtype (PyTorch's name of it)."""

    def encode(self, named: Mapping[str, Tensor], state: CodecState) -> tuple[Parts, CodecState]:
        """What travels for these tensors, and what to remember for the next time."""

    def decode_one(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The tensor of this shape whose parts arrived, by suffix.

        Raises:
            WireError: they are not what `encode` makes; DtypeError, NotFiniteError: of this kind.
        """


@dataclass(frozen=True)
class Lossily:
    """A lossy codec for a site's updates: what it loses is remembered, and sent the next time.

    Args:
        feedback: share of what was lost that is added the next time; 0: nothing is remembered.
    """

    lossy: Lossy
    feedback: float

    def layout(self, shape: Sequence[int]) -> Layout:
        return self.lossy.layout(shape)

    def encode(self, named: Mapping[str, Tensor], state: CodecState) -> tuple[Parts, CodecState]:
        parts, left = with_feedback(self.lossy, named, state, self.feedback)
        return {
            part_name(name, suffix): Part(part, part.dtype)
            for name, own in parts.items()
            for suffix, part in own.items()
        }, left

    def decode_one(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        return self.lossy.decode(parts, shape)


# The plainest, both ways.
CASTS = {"fp32": Cast("float32"), "bf16": Cast("bfloat16")}
LOSSY = ("int8", "int4", "topk", "sign")
FEEDBACK = 0.95  # where strategy.feedback is null (SparseLoCo's, arXiv 2508.15706)


def _lossy(name: str, density: float, bits: int) -> Lossy:
    known: dict[str, Lossy] = {"int8": Int(8), "int4": Int(4), "topk": TopK(density, bits), "sign": Sign()}
    return known[name]


def up_codec(strategy: StrategyConfig) -> Codec:
    """That of a site's updates."""
    if strategy.up in CASTS:
        return CASTS[strategy.up]
    feedback = FEEDBACK if strategy.feedback is None else strategy.feedback
    return Lossily(_lossy(strategy.up, strategy.density, strategy.value_bits), feedback)


def down_codec(strategy: StrategyConfig) -> Cast:
    """That of the tensors that sites are sent whole."""
    return CASTS.get(strategy.down, WHOLE)


def down_differences(strategy: StrategyConfig) -> Differences | None:
    """How a round's tensors travel to sites that hold those of the last round; None: whole."""
    if strategy.down in CASTS:
        return None
    density = strategy.density if strategy.down_density is None else strategy.down_density
    return Differences(_lossy(strategy.down, density, strategy.value_bits))


# ----- tensors in several parts


def part_name(name: str, suffix: str) -> str:
    """Under which a part of a tensor travels."""
    return f"{name}:{suffix}" if suffix else name


def of_part(part: str) -> tuple[str, str]:
    """The inverse of `part_name`: the tensor's name, and the suffix.

    Raises:
        WireError: a name that `part_name` never makes; it would stand for the same part as another one.
    """
    name, _, suffix = part.partition(":")
    if part_name(name, suffix) != part:
        raise WireError(f"{part}: no name of a tensor or of one of its parts")
    return name, suffix


def grouped(parts: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parts by name and suffix."""
    named: dict[str, dict[str, Tensor]] = {}
    for part, tensor in parts.items():
        name, suffix = of_part(part)
        named.setdefault(name, {})[suffix] = tensor
    return named


def decode(
    codec: Codec, parts: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The tensors that arrived, by name.

    Args:
        shapes: of the tensors, at least of those that arrived.

    Raises:
        WireError: as `Codec.decode_one`, with the tensor's name.
    """
    return {name: decoded(codec, name, own, shapes[name]) for name, own in grouped(parts).items()}


def decoded(codec: Codec, name: str, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """One of them."""
    with errors_of(name):
        return codec.decode_one(parts, shape)


def received(
    codec: Differences, parts: Mapping[str, Tensor], public: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The public tensors that a message brings, by name.

    Args:
        public: those that its receiver holds.

    Raises:
        WireError: as `Differences.decode`, with the tensor's name.
    """
    shard = {}
    for name, own in grouped(parts).items():
        with errors_of(name):
            shard[name] = codec.decode(own, public.get(name))
    return shard


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """A WireError of its parts gets the tensor's name."""
    try:
        yield
    except WireError as error:
        raise type(error)(f"{name}: {error}") from error


def nbytes(codec: Codec | Lossy | Differences, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of the parts of tensors of these shapes, without names and headers."""
    return sum(
        math.prod(size) * BYTES[dtype] for shape in shapes for size, dtype in codec.layout(shape).values()
    )
