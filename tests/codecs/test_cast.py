"""The codecs that send every tensor in one dtype: what arrives, how many bytes it is, and the digest of both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.codecs import CASTS, decode, nbytes
from fomoe_flwr.codecs.cast import DIGEST_BYTES
from fomoe_flwr.errors import DtypeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
codecs = pytest.mark.parametrize("codec", list(CASTS))

# A colon is what parts of a tensor have in their names.
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and ":" not in name)


@st.composite
def fp32_tensors(draw: st.DrawFn) -> Tensor:
    """Any shape and any numbers: both zeros and infinities, subnormals; no NaN, which no update that counts has."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    count = math.prod(shape)
    values = draw(st.lists(st.floats(width=32, allow_nan=False), min_size=count, max_size=count))
    return torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))


named_tensors = st.dictionaries(names, fp32_tensors(), max_size=4)


def sent(codec: str, named: Mapping[str, Tensor]) -> bytes:
    parts, _ = CASTS[codec].encode(named, {})
    return wire.encode(parts)


def test_every_wire_dtype_has_a_codec() -> None:
    assert CASTS.keys() == DTYPES.keys()


@codecs
@given(named=named_tensors)
def test_what_arrives_is_pytorchs_cast(codec: str, named: dict[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    arrived = decode(CASTS[codec], wire.decode(sent(codec, named)), shapes)
    assert list(arrived) == list(named)
    for name, tensor in named.items():
        wanted = tensor.to(DTYPES[codec])
        assert (arrived[name].dtype, arrived[name].shape) == (wanted.dtype, wanted.shape)
        assert arrived[name].view(-1).tolist() == wanted.view(-1).tolist()
        assert CASTS[codec].round_trip(tensor).equal(wanted)


@codecs
@given(named=named_tensors)
def test_a_second_round_trip_changes_nothing(codec: str, named: dict[str, Tensor]) -> None:
    once = wire.decode(sent(codec, named))
    assert sent(codec, {name: tensor.float() for name, tensor in once.items()}) == sent(codec, named)


@codecs
@given(named=named_tensors)
def test_the_bytes_are_those_announced(codec: str, named: dict[str, Tensor]) -> None:
    parts, _ = CASTS[codec].encode(named, {})
    announced = nbytes(CASTS[codec], [tuple(tensor.shape) for tensor in named.values()])
    blob = wire.encode(parts)
    header = 8 + int.from_bytes(blob[:8], "little")
    assert announced == len(blob) - header
    assert announced == sum(part.tensor.numel() * part.dtype.itemsize for part in parts.values())


@codecs
@given(named=named_tensors)
def test_both_sides_get_the_same_digest(codec: str, named: dict[str, Tensor]) -> None:
    """The sender from its bytes or its tensor; the receiver from what arrived, in its own fp32 model too."""
    digest = CASTS[codec].digest
    blob = sent(codec, named)
    by_bytes = wire.blob_digests(blob)
    assert by_bytes == {name: digest(tensor) for name, tensor in named.items()}
    arrived = wire.decode(blob)
    assert by_bytes == {name: digest(tensor) for name, tensor in arrived.items()}
    in_model = {name: torch.empty(tensor.shape).copy_(tensor) for name, tensor in arrived.items()}
    assert by_bytes == {name: digest(tensor) for name, tensor in in_model.items()}
    assert wire.digests(in_model, CASTS[codec]) == b"".join(by_bytes[name] for name in sorted(named))


@codecs
def test_a_digest_is_short_and_sees_one_bit(codec: str) -> None:
    """Also in a tensor that is not contiguous; a change that the wire rounds away is none."""
    digest, tensor = CASTS[codec].digest, torch.arange(6.0).view(2, 3)
    assert len(digest(tensor)) == DIGEST_BYTES
    assert digest(tensor.T) == digest(tensor.T.contiguous()) != digest(tensor)
    changed = tensor.clone()
    changed[1, 2] *= 1 + 2**-20
    assert (digest(changed) == digest(tensor)) == (codec == "bf16")
    changed[1, 2] *= -1
    assert digest(changed) != digest(tensor)


@codecs
def test_nothing_is_remembered_and_another_dtype_is_refused(codec: str) -> None:
    _, state = CASTS[codec].encode({"x": torch.ones(2)}, {})
    assert state == {}
    for dtype in (*DTYPES.values(), torch.int8, torch.float16):
        if dtype != DTYPES[codec]:
            with pytest.raises(DtypeError, match="x: .*" + str(dtype)):
                decode(CASTS[codec], {"x": torch.ones(2, dtype=dtype)}, {"x": (2,)})
