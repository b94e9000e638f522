"""Differences to the public model: what travels down where a shard is not sent whole.

The public model is what all sites hold: bf16, the same bits at the server and at every site. A message moves it towards
the server's model by as much as a lossy codec lets through; what that loses is still in the difference of the next
round. So the receiver needs no state but the tensors themselves, and a lossless codec would give just what bf16 gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fomoe_flwr.codecs.cast import Cast
from fomoe_flwr.codecs.lossy import Layout, Lossy
from fomoe_flwr.errors import WireError

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = Cast("bfloat16")  # what a public tensor travels as to a site that does not hold the one before


@dataclass(frozen=True)
class Differences:
    """How a tensor travels to a site that holds the public one before it.

    One with fewer than two dimensions is sent whole: the codec would send its difference in fp32, twice the bytes.
    """

    lossy: Lossy

    def layout(self, shape: Sequence[int]) -> Layout:
        """The parts of a tensor of this shape by suffix: shape and dtype (PyTorch's name of it)."""
        return WHOLE.layout(shape) if len(shape) < 2 else self.lossy.layout(shape)

    def encode(self, tensor: Tensor, public: Tensor) -> dict[str, Tensor]:
        """The parts that move the public tensor towards the server's; in memory of their own.

        Args:
            tensor: fp32.
        """
        # Towards what of it bf16 can hold: a difference that rounding would swallow must take no place in a message.
        target = WHOLE.round_trip(tensor.detach())
        return {"": target} if target.ndim < 2 else self.lossy.encode(target.float().sub_(public))

    def decode(self, parts: Mapping[str, Tensor], public: Tensor | None) -> Tensor:
        """The public tensor after these parts, bf16.

        Args:
            public: the one before; None: not at hand.

        Raises:
            WireError: they are not what `encode` makes, or came as a difference to a tensor that is not at hand;
                DtypeError, NotFiniteError: of this kind.
        """
        if "" in parts:
            return WHOLE.decode_one(parts, parts[""].shape)
        if public is None:
            raise WireError("came as a difference to what is not here")
        return WHOLE.round_trip(self.lossy.decode(parts, public.shape).add_(public))
