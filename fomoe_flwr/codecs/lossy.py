"""What the lossy codecs have in common: which tensors they take, what is checked of what arrives, and error feedback.

A codec of this kind sees a tensor as one row of numbers (row-major) and makes a few parts of it, whose sizes follow
from the tensor's shape alone: so bytes are known before anything is encoded, and a receiver can check them. Norms,
biases and other tensors with fewer than two dimensions travel whole, in fp32: they are a thousandth of a model, and
sensitive.

What is not finite in a tensor makes its block's scale not finite, which a receiver refuses as such.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fomoe_flwr.codecs.packing import unpack
from fomoe_flwr.errors import DtypeError, NotFiniteError, WireError

if TYPE_CHECKING:
    from torch import Tensor

Layout = dict[str, tuple[tuple[int, ...], str]]  # shape and dtype by part

# Numbers of a tensor that are worked on at once: a constant amount of memory, and most of it in the cache. A multiple
# of 8 chunks of every codec, so that the parts of a tensor are those of its pieces, end to end and in whole bytes.
PIECE = 2**20
WHOLE = "whole"
BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4}


class Lossy(ABC):
    """A codec under which what arrives is only near to what was sent."""

    def layout(self, shape: Sequence[int]) -> Layout:
        """The parts of a tensor of this shape by suffix: shape and dtype (PyTorch's name of it)."""
        if len(shape) < 2:
            return {WHOLE: (tuple(shape), "float32")}
        return self._layout(math.prod(shape))

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of an fp32 tensor as `layout` says, on its device. The same tensor makes the same parts.

        Needs the memory of the parts twice and a constant amount; of a tensor that is not contiguous, a copy too.
        """
        import torch

        tensor = tensor.detach()
        if tensor.ndim < 2:
            return {WHOLE: tensor.clone()}
        pieces = [self._encode(piece) for piece in torch.split(tensor.reshape(-1), PIECE)]
        return {suffix: torch.cat([piece[suffix] for piece in pieces]) for suffix in pieces[0]}

    def decode(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The tensor of this shape that arrived: fp32, contiguous, finite, in memory of its own.

        Raises:
            WireError: a part is missing or too many, has another shape, or values that `encode` never makes.
            DtypeError: a part of another dtype.
            NotFiniteError: the sender's tensor was not finite.
        """
        import torch

        check_layout(parts, self.layout(shape))
        if WHOLE in parts:
            check_finite(parts, WHOLE)
            return parts[WHOLE].clone()
        device = next(iter(parts.values())).device
        flat = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
        begins = dict.fromkeys(parts, 0)
        for piece in torch.split(flat, PIECE):
            own = {}
            for suffix, ((length, *_), _) in self._layout(len(piece)).items():
                own[suffix] = parts[suffix][begins[suffix] : begins[suffix] + length]
                begins[suffix] += length
            piece.copy_(self._decode(own, len(piece)))
        return flat.view(tuple(shape))

    @abstractmethod
    def _layout(self, count: int) -> Layout:
        """The parts of so many numbers."""

    @abstractmethod
    def _encode(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a piece (1-D)."""

    @abstractmethod
    def _decode(self, parts: Mapping[str, Tensor], count: int) -> Tensor:
        """The piece of these parts, whose shapes and dtypes are right: `count` numbers, 1-D."""


def with_feedback(
    codec: Lossy, named: Mapping[str, Tensor], state: Mapping[str, Tensor], decay: float
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Encode with error feedback (arXiv 1901.09847): what is lost now is added to what is sent the next time.

    A tensor that is not finite leaves nothing behind: its receiver refuses it, and its remains would spoil all rounds
    after.

    Args:
        state: what was left over the last time, by name; none for a name that is new.
        decay: share of it that is added, 0 to 1. With 0 nothing is remembered.

    Returns:
        The parts by name and suffix, and what is left over now (fp32): of these names alone.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    left: dict[str, Tensor] = {}
    for name, tensor in named.items():
        wanted = tensor.detach()
        if decay and name in state:
            wanted = (decay * state[name]).add_(wanted)
        parts[name] = codec.encode(wanted)
        if not decay:
            continue
        try:
            arrived = codec.decode(parts[name], wanted.shape)
        except NotFiniteError:
            continue
        left[name] = arrived.neg_().add_(wanted)
    return parts, left


# ----- for the codecs


def in_rows(flat: Tensor, length: int) -> Tensor:
    """A copy of a row of numbers, cut into rows; the last one is filled up with zeros."""
    rows = -(-len(flat) // length)
    filled = flat.new_zeros(rows * length)
    filled[: len(flat)] = flat
    return filled.view(rows, length)


def nearest_bf16(numbers: Tensor) -> Tensor:
    """The numbers in bf16. Rounding makes none infinite that was not."""
    import torch

    largest = torch.finfo(torch.bfloat16).max
    return torch.where(numbers.isinf(), numbers, numbers.clamp(-largest, largest)).to(torch.bfloat16)


def check_finite(parts: Mapping[str, Tensor], suffix: str) -> None:
    """Refuse a part with a value that is not finite.

    Raises:
        NotFiniteError: there is one.
    """
    if not bool(parts[suffix].isfinite().all()):
        raise NotFiniteError(f"{suffix}: has values that are not finite")


def magnitudes(parts: Mapping[str, Tensor], suffix: str) -> Tensor:
    """A part that holds sizes, in fp32.

    Raises:
        NotFiniteError: one is not finite.
        WireError: one has a minus.
    """
    check_finite(parts, suffix)
    if bool(parts[suffix].signbit().any()):
        raise WireError(f"{suffix}: has negative values")
    return parts[suffix].float()


def unpacked(parts: Mapping[str, Tensor], suffix: str, width: int, count: int) -> Tensor:
    """The numbers of a part that was packed.

    Raises:
        WireError: bits after the last number.
    """
    packed = parts[suffix]
    if (used := count * width % 8) and int(packed[-1]) >> used:
        raise WireError(f"{suffix}: has bits after its last number")
    return unpack(packed, width, count)


def check_layout(parts: Mapping[str, Tensor], layout: Layout) -> None:
    """Hold the parts of a tensor against their layout.

    Raises:
        WireError, DtypeError: they differ.
    """
    for suffix, (shape, dtype) in layout.items():
        at = f"{suffix}: " if suffix else ""
        if suffix not in parts:
            raise WireError(f"{at}missing")
        part = parts[suffix]
        if str(part.dtype) != f"torch.{dtype}":
            raise DtypeError(f"{at}dtype {part.dtype}, agreed is torch.{dtype}")
        if tuple(part.shape) != shape:
            raise WireError(f"{at}shape {list(part.shape)}, expected {list(shape)}")
    if over := parts.keys() - layout.keys():
        raise WireError(f"{min(over)!r:.80}: not expected, only {', '.join(layout)}")
