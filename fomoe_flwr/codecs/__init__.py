"""Codecs: how an update becomes the tensors that travel, and back. One file for each kind of codec.

No PyTorch at import: `fomoe plan` asks for byte counts and must not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fomoe_flwr.codecs.cast import Cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Part(NamedTuple):
    """A tensor that travels, and the dtype in which it does; it is cast while it is copied into its bundle."""

    tensor: Tensor
    dtype: torch.dtype


Parts = dict[str, Part]
# What an encoder must remember from round to round, by name (the error it has not sent yet); empty for most.
CodecState = dict[str, "Tensor"]


class Codec(Protocol):
    """What a codec offers. Encoding is deterministic."""

    def encode(self, named: Mapping[str, Tensor], state: CodecState) -> tuple[Parts, CodecState]:
        """What travels for these tensors, and what to remember for the next time."""

    def decode(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that arrived, by name.

        Raises:
            DtypeError: a part of another dtype than `encode` makes.
        """

    def nbytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Bytes of the parts of tensors of these shapes, without names and headers."""

    def round_trip(self, tensor: Tensor) -> Tensor:
        """A tensor as it arrives if nothing was remembered."""

    def digest(self, tensor: Tensor) -> bytes:
        """Digest of a tensor's values as they are after `decode`; sender and receiver get the same."""


CODECS: dict[str, Codec] = {"fp32": Cast("float32", 4), "bf16": Cast("bfloat16", 2)}
