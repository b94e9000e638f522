"""A codec that sends the largest numbers of each chunk alone, in few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fomoe_flwr.codecs.lossy import Layout, Lossy, magnitudes, nearest_bf16, unpacked
from fomoe_flwr.codecs.packing import pack, packed_bytes
from fomoe_flwr.errors import WireError

if TYPE_CHECKING:
    from torch import Tensor

INDEX_BITS = 12
CHUNK = 1 << INDEX_BITS  # numbers
FITS = 2  # more gain less than a tenth of the error


@dataclass(frozen=True)
class TopK(Lossy):
    """Of each chunk the ceil(density * length) largest by magnitude, of equal ones those that come first.

    As in SparseLoCo (arXiv 2508.15706), but for two choices:

    - Its chunks are tiles of 64 x 64 of a matrix, here they are neighbours in row-major order, which cuts up any shape.
      This gives up that a row shares its quota with the rows beside it: a row of large numbers is cut to its own
      chunk's share, while quiet rows send small ones.
    - A number is sent as its sign and one of 2^(bits - 1) levels, evenly spaced from the lower to the upper of the two
      that are sent for its chunk. These are fitted as in Lloyd's method (IEEE Trans. Inf. Theory 28, 1982): first they
      are the smallest and the largest selected magnitude, then, twice, the mean of what is nearest to each. Two bits
      and a single scale (levels s/3 and s, s fitted) would cost 2 bytes less a chunk, and more than three times the
      error, for normal, Laplace and Student-t numbers alike.

    Zeros among the largest (a chunk with few other numbers) arrive as the lower level; error feedback takes that back.
    """

    density: float = 1 / 64
    bits: int = 2  # of a number, 2 to 8

    def _layout(self, count: int) -> Layout:
        kept = self._kept(count)
        return {
            "levels": ((-(-count // CHUNK), 2), "bfloat16"),
            "index": ((packed_bytes(kept, INDEX_BITS),), "uint8"),
            "values": ((packed_bytes(kept, self.bits),), "uint8"),
        }

    def _encode(self, flat: Tensor) -> dict[str, Tensor]:
        import torch

        chunks, rest = divmod(len(flat), CHUNK)
        rows = [flat[: chunks * CHUNK].view(chunks, CHUNK), flat[chunks * CHUNK :].view(-1, max(rest, 1))]
        parts = [self._encode_rows(row) for row in rows]
        levels, index, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"levels": levels, "index": pack(index, INDEX_BITS), "values": pack(values, self.bits)}

    def _encode_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, indices and codes of chunks of equal length."""
        import torch

        index = _largest(rows, self._kept(rows.shape[1]))
        selected = rows.gather(1, index)
        sizes = selected.abs().double()
        levels = nearest_bf16(_fit(sizes, self._steps))
        low, high = levels.double()[:, :1], levels.double()[:, 1:]
        span = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
        step = ((sizes - low) / span).clamp(0, 1).mul(self._steps).round().nan_to_num(0.0)
        codes = step.to(torch.uint8) + (selected < 0) * (self._steps + 1)
        return levels, index.view(-1), codes.to(torch.uint8).view(-1)

    def _decode(self, parts: Mapping[str, Tensor], count: int) -> Tensor:
        import torch

        levels = magnitudes(parts, "levels")
        if bool((levels[:, 0] > levels[:, 1]).any()):
            raise WireError("levels: has a lower one above the upper one")
        kept = self._kept(count)
        index = unpacked(parts, "index", INDEX_BITS, kept).long()
        chunk = torch.arange(kept, device=index.device) // self._kept(CHUNK)
        place = chunk * CHUNK + index
        if bool((place[1:] <= place[:-1]).any()):
            raise WireError("index: has one twice, or not in ascending order")
        if kept and int(place[-1]) >= count:
            raise WireError("index: has one beyond the last number")
        codes = unpacked(parts, "values", self.bits, kept)
        share = (codes & self._steps) / levels.new_tensor(self._steps)
        low, high = levels[chunk].unbind(1)
        sizes = low * (1 - share) + high * share
        return levels.new_zeros(count).scatter_(0, place, torch.where(codes > self._steps, -sizes, sizes))

    @property
    def _steps(self) -> int:
        """From the lower level to the upper one."""
        return (1 << self.bits - 1) - 1

    def _kept(self, count: int) -> int:
        """Numbers that are sent of so many."""
        chunks, rest = divmod(count, CHUNK)
        return chunks * math.ceil(self.density * CHUNK) + math.ceil(self.density * rest)


def _largest(rows: Tensor, kept: int) -> Tensor:
    """Where the largest numbers of each row are, in ascending order."""
    import torch

    # The bits of numbers that are not negative are in the numbers' order, NaN at the end. With the place below them no
    # two are equal, which leaves `topk` no choice.
    place = torch.arange(rows.shape[1], device=rows.device)
    keys = (rows.abs().view(torch.int32).long() << INDEX_BITS) | (CHUNK - 1 - place)
    index: Tensor = keys.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values
    return index


def _fit(sizes: Tensor, steps: int) -> Tensor:
    """The lower and upper level of each row."""
    import torch

    low, high = sizes.amin(1, keepdim=True), sizes.amax(1, keepdim=True)
    for _ in range(FITS):
        half = (high - low) / (2 * steps)
        near_low, near_high = sizes <= low + half, sizes >= high - half
        low, high = (
            torch.where(near, sizes, 0).sum(1, keepdim=True) / near.sum(1, keepdim=True)
            for near in (near_low, near_high)
        )
    return torch.cat([low, high], dim=1)
