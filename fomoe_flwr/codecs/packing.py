"""Whole numbers of a few bits as bytes without gaps: the first number in the lowest bits, zeros at the end."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def packed_bytes(count: int, width: int) -> int:
    """Bytes of so many numbers of `width` bits."""
    return -(-count * width // 8)


def pack(numbers: Tensor, width: int) -> Tensor:
    """The numbers (1-D, each below 2^width) as uint8, 1-D.

    Args:
        width: 1 to 16 bits.
    """
    import torch

    count = len(numbers)
    if width == 8:
        return numbers.to(torch.uint8)
    if width == 4:
        return _pack_pairs(numbers.to(torch.uint8))
    numbers_G, bytes_G, shifts = _group(width)
    groups = -(-count // numbers_G)
    columns = numbers.new_zeros(groups * numbers_G, dtype=_wide_enough(width))
    columns[:count] = numbers
    columns = columns.view(groups, numbers_G)
    packed = numbers.new_zeros((groups, bytes_G), dtype=torch.uint8)
    for number, byte, shift in shifts:
        packed[:, byte] |= _shifted(columns[:, number], shift).to(torch.uint8)
    return packed.view(-1)[: packed_bytes(count, width)]


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` numbers of what `pack` made: uint8, or int32 if they are wider than 8 bits."""
    import torch

    # The two widths of which there are most have ways of their own, several times as fast.
    if width == 8:
        return packed[:count]
    if width == 4:
        return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)[:count]
    numbers_G, bytes_G, shifts = _group(width)
    groups = -(-count // numbers_G)
    columns = packed.new_zeros(groups * bytes_G, dtype=_wide_enough(width))
    columns[: len(packed)] = packed
    columns = columns.view(groups, bytes_G)
    numbers = columns.new_zeros((groups, numbers_G))
    for number, byte, shift in shifts:
        numbers[:, number] |= _shifted(columns[:, byte], -shift)
    return numbers.bitwise_and_((1 << width) - 1).view(-1)[:count]


def _pack_pairs(numbers: Tensor) -> Tensor:
    """Numbers of 4 bits, of which each pair is read as one of 16 bits."""
    import torch

    even = numbers.new_zeros(-(-len(numbers) // 2) * 2)
    even[: len(numbers)] = numbers
    if sys.byteorder == "big":
        return even[::2] | even[1::2] << 4
    pairs = even.view(torch.int16)
    return (pairs | pairs >> 4).bitwise_and_(255).to(torch.uint8)


def _group(width: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """A group is the fewest numbers that fill whole bytes: how many numbers, how many bytes, and which number has bits
    in which byte, so many places to the left of where they are in the number."""
    common = math.gcd(width, 8)
    numbers, size = 8 // common, width // common
    places = [(number, byte, number * width - 8 * byte) for number in range(numbers) for byte in range(size)]
    return numbers, size, [place for place in places if -width < place[2] < 8]


def _shifted(numbers: Tensor, places: int) -> Tensor:
    return numbers << places if places >= 0 else numbers >> -places


def _wide_enough(width: int) -> torch.dtype:
    import torch

    # What is shifted out of a uint8 is what the mask, or the next byte, would cut off anyway.
    return torch.uint8 if width <= 8 else torch.int32
