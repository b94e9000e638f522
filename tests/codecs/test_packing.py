"""Numbers of 1 to 16 bits in bytes and back, against Python's own integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.codecs.packing import pack, packed_bytes, unpack


@pytest.mark.parametrize("width", range(1, 17))
@settings(max_examples=15)
@given(data=st.data())
def test_the_stream_is_one_long_number_and_is_read_back(width: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    packed = pack(torch.tensor(numbers, dtype=torch.int64), width)
    stream = sum(number << place * width for place, number in enumerate(numbers))
    assert bytes(packed.tolist()) == stream.to_bytes(packed_bytes(len(numbers), width), "little")
    assert unpack(packed, width, len(numbers)).tolist() == numbers


@pytest.mark.parametrize("width", [1, 3, 8])
def test_small_numbers_may_come_in_bytes(width: int) -> None:
    numbers = (torch.arange(237, 256) % 2**width).to(torch.uint8)
    assert pack(numbers, width).equal(pack(numbers.long(), width))
    assert unpack(pack(numbers, width), width, 19).equal(numbers)
