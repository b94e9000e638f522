"""Codecs with few bits for each number and a scale for each block of neighbours: whole numbers, and signs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fomoe_flwr.codecs.lossy import Layout, Lossy, in_rows, magnitudes, nearest_bf16, unpacked
from fomoe_flwr.codecs.packing import pack, packed_bytes
from fomoe_flwr.errors import WireError

if TYPE_CHECKING:
    from torch import Tensor

INT_BLOCK = 64  # numbers; a scale is a quarter of a bit for each
SIGN_BLOCK = 256  # numbers; one sixteenth


@dataclass(frozen=True)
class Int(Lossy):
    """Whole numbers of 4 or 8 bits times a scale in bf16 (largest magnitude of a block / 7 or 127, rounded up).

    Rounding is to the nearest, halves to even, and nothing is cut off: a number is off by half its block's scale at the
    most.
    """

    bits: int

    @property
    def largest(self) -> int:
        """The whole numbers are -largest to largest, and are sent as 0 to 2 * largest."""
        return (1 << self.bits - 1) - 1

    def _layout(self, count: int) -> Layout:
        return _layout(count, INT_BLOCK, self.bits)

    def _encode(self, flat: Tensor) -> dict[str, Tensor]:
        import torch

        rows = in_rows(flat, INT_BLOCK)
        # By a tensor: for a number, CUDA multiplies by its inverse, and what that makes a bit too large would be
        # rounded up too far. In fp64, in which nothing becomes zero.
        scale = _bf16_above(rows.abs().amax(1).double() / flat.new_tensor(self.largest))
        # 0 / 0 in a block of zeros.
        whole = rows.div_(scale.float()[:, None]).round_().nan_to_num_(0.0)
        codes = whole.add_(self.largest).to(torch.uint8).view(-1)[: len(flat)]
        return {"scale": scale, "values": pack(codes, self.bits)}

    def _decode(self, parts: Mapping[str, Tensor], count: int) -> Tensor:
        import torch

        scale = magnitudes(parts, "scale")
        codes = unpacked(parts, "values", self.bits, count)
        if count and int(codes.max()) > 2 * self.largest:
            raise WireError(f"values: has one above {self.largest} scales")
        whole = codes.float().sub_(self.largest)
        rows = whole.view(-1, INT_BLOCK) if count % INT_BLOCK == 0 else in_rows(whole, INT_BLOCK)
        rows.mul_(scale[:, None])
        # The scale was rounded up: of the largest numbers in fp32 this may make more than fp32 holds.
        limit = torch.finfo(torch.float32).max
        if count and float(scale.max()) > limit / self.largest:
            rows.clamp_(-limit, limit)
        return rows.view(-1)[:count]


@dataclass(frozen=True)
class Sign(Lossy):
    """Signs times the mean magnitude of a block in bf16; a zero counts as positive.

    Of use with error feedback alone (arXiv 1901.09847).
    """

    def _layout(self, count: int) -> Layout:
        return _layout(count, SIGN_BLOCK, 1)

    def _encode(self, flat: Tensor) -> dict[str, Tensor]:
        import torch

        rows = in_rows(flat, SIGN_BLOCK)
        counts = rows.new_full((len(rows),), SIGN_BLOCK)
        counts[-1:] -= rows.numel() - len(flat)
        # In fp64, in which a sum of fp32 numbers does not overflow.
        scale = nearest_bf16(rows.abs().sum(1, dtype=torch.float64) / counts)
        return {"scale": scale, "values": pack((flat < 0).to(torch.uint8), 1)}

    def _decode(self, parts: Mapping[str, Tensor], count: int) -> Tensor:
        scale = magnitudes(parts, "scale")
        negative = unpacked(parts, "values", 1, count)
        rows = in_rows(negative, SIGN_BLOCK).float().mul_(-2).add_(1).mul_(scale[:, None])
        return rows.view(-1)[:count]


def _layout(count: int, block: int, bits: int) -> Layout:
    return {
        "scale": ((-(-count // block),), "bfloat16"),
        "values": ((packed_bytes(count, bits),), "uint8"),
    }


def _bf16_above(numbers: Tensor) -> Tensor:
    """Numbers that are not negative, rounded up to bf16."""
    import torch

    near = numbers.to(torch.bfloat16)
    # The next larger number has the next pattern of bits.
    return (near.view(torch.int16) + (near < numbers)).view(torch.bfloat16)
