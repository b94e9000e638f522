"""The plainest codec: every tensor in another dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fomoe_flwr.codecs.lossy import Layout, check_layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fomoe_flwr.codecs import CodecState, Parts

# Of a tensor; enough to notice a difference, small enough to send for every tensor and round.
DIGEST_BYTES = 8


@dataclass(frozen=True)
class Cast:
    """All tensors as `dtype` (PyTorch's name of it)."""

    dtype: str

    def layout(self, shape: Sequence[int]) -> Layout:
        return {"": (tuple(shape), self.dtype)}

    def encode(self, named: Mapping[str, Tensor], state: CodecState) -> tuple[Parts, CodecState]:
        from fomoe_flwr.codecs import Part

        dtype = self._dtype()
        return {name: Part(tensor, dtype) for name, tensor in named.items()}, {}

    def decode_one(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        check_layout(parts, self.layout(shape))
        return parts[""]

    def round_trip(self, tensor: Tensor) -> Tensor:
        """A tensor as it arrives."""
        return tensor.to(self._dtype())

    def digest(self, tensor: Tensor) -> bytes:
        """Digest of a tensor's values as they are after decoding; sender and receiver get the same."""
        import torch

        flat = tensor.detach().to("cpu", self._dtype()).contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().data if len(flat) else b""  # strides of nothing may be anything
        return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

    def _dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
