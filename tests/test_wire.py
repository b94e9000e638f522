"""The wire: every bit arrives, damage is named and nothing else is ever raised, and each byte is counted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.bundles import BUNDLE, as_array, blobs_of, header_in
from fomoe_flwr.codecs import CASTS, Part
from fomoe_flwr.errors import WireError
from fomoe_flwr.model.spec import expert_name
from fomoe_flwr.wire import (
    Traffic,
    byte_classes,
    decode,
    encode_bundles,
    encode_update,
    from_blobs,
    read_header,
    split_bundle,
)

FP32, BF16 = torch.float32, torch.bfloat16
DENSE = "model.norm.weight"
EXPERT = expert_name(0, 3, "up_proj")

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
# Bit patterns that a careless cast would change: -0.0, both infinities, NaNs with a payload, subnormals.
SPECIAL = (
    0x80000000,
    0x7F800000,
    0xFF800000,
    0x7FC00000,
    0xFFC01234,
    0x7F800001,
    0x00000001,
    0x807FFFFF,
    0x7F7FFFFF,
)
words = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 2**32 - 1))


@st.composite
def fp32_tensors(draw: st.DrawFn) -> Tensor:
    """Any shape, any bits."""
    shape = draw(shapes)
    count = math.prod(shape)
    bits = np.array(draw(st.lists(words, min_size=count, max_size=count)), dtype=np.uint32)
    return torch.from_numpy(bits.view(np.float32).reshape(shape).copy())


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == FP32 else torch.int16).flatten().tolist()


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].shape == other[name].shape
        assert bits(one[name]) == bits(other[name])


def parts(named: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Part]:
    return {name: Part(tensor, dtype) for name, tensor in named.items()}


def encode(named: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    return wire.encode(parts(named, dtype))


named_fp32 = st.dictionaries(names, fp32_tensors(), max_size=4)


def example() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {DENSE: torch.randn(5, generator=generator), EXPERT: torch.randn(2, 3, generator=generator)}


# -- round trip ----------------------------------------------------------------------------------------------


@given(named_fp32)
def test_fp32_arrives_bit_for_bit(named: dict[str, Tensor]) -> None:
    assert_same_bits(decode(encode(named, FP32)), named)


@given(named_fp32)
def test_bf16_arrives_bit_for_bit(named: dict[str, Tensor]) -> None:
    """All 2^16 patterns may occur: the upper halves of any words."""
    halves = {
        name: (value.view(torch.int32) >> 16).to(torch.int16).view(BF16) for name, value in named.items()
    }
    assert_same_bits(decode(encode(halves, BF16)), halves)


@given(named_fp32)
def test_a_cast_on_the_way_is_pytorchs_own(named: dict[str, Tensor]) -> None:
    decoded = decode(encode(named, BF16))
    for name, value in named.items():
        expected = value.to(BF16)
        assert decoded[name].isnan().equal(value.isnan())
        # The payload of a NaN is not promised: PyTorch itself has two, by the length of the tensor.
        known = ~value.isnan()
        assert bits(decoded[name][known]) == bits(expected[known])


@given(named_fp32)
def test_what_bf16_can_say_survives_the_cast(named: dict[str, Tensor]) -> None:
    representable = {name: value.nan_to_num().to(BF16).float() for name, value in named.items()}
    decoded = decode(encode(representable, BF16))
    assert_same_bits({name: value.float() for name, value in decoded.items()}, representable)


def test_every_bf16_pattern_survives() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    assert_same_bits(decode(encode({"x": every}, BF16)), {"x": every})


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@given(st.data())
def test_a_bundle_carries_integers_beside_floats(data: st.DataObject) -> None:
    """What a codec makes of a tensor: codes of a few bits, positions, and a scale."""
    named: dict[str, Tensor] = {"scale": data.draw(fp32_tensors())}
    for dtype in INTEGERS:
        info = torch.iinfo(dtype)
        values = data.draw(st.lists(st.integers(info.min, info.max), max_size=5))
        named[str(dtype)] = torch.tensor(values, dtype=dtype)
    blob = wire.encode({name: Part(tensor, tensor.dtype) for name, tensor in named.items()})
    decoded, theirs = decode(blob), safetensors.torch.load(blob)
    assert list(decoded) == list(named)
    for name, tensor in named.items():
        assert decoded[name].dtype == theirs[name].dtype == tensor.dtype
        if name != "scale":
            assert decoded[name].tolist() == theirs[name].tolist() == tensor.tolist()
    assert byte_classes(blob)["dense"] == sum(tensor.numel() * tensor.itemsize for tensor in named.values())


def test_a_tensor_need_not_be_contiguous() -> None:
    transposed = torch.arange(6.0).view(2, 3).T
    assert_same_bits(decode(encode({"x": transposed}, FP32)), {"x": transposed.contiguous()})


def test_reading_copies_nothing() -> None:
    blob = encode(example(), FP32)
    start = np.frombuffer(blob, dtype=np.uint8).ctypes.data
    for tensor in decode(blob).values():
        assert start < tensor.data_ptr() < start + len(blob)


def test_a_decoded_tensor_keeps_its_bytes_alive() -> None:
    decoded = decode(encode(example(), FP32))  # nobody else holds the blob
    _ = [encode({"x": torch.full((8,), float(i))}, FP32) for i in range(50)]
    assert_same_bits(decoded, example())


# -- the format is safetensors -------------------------------------------------------------------------------


@given(named_fp32, st.sampled_from([FP32, BF16]))
def test_the_safetensors_library_reads_our_bundles(named: dict[str, Tensor], dtype: torch.dtype) -> None:
    blob = encode(named, dtype)
    ours, theirs = decode(blob), safetensors.torch.load(blob)
    assert_same_bits(ours, {name: theirs[name] for name in ours})
    assert theirs.keys() == named.keys()


@given(named_fp32, st.sampled_from([FP32, BF16]), st.sampled_from([None, {"made by": "somebody"}]))
def test_we_read_the_safetensors_librarys_files(
    named: dict[str, Tensor], dtype: torch.dtype, metadata: dict[str, str] | None
) -> None:
    cast = {name: value.to(dtype) for name, value in named.items()}
    decoded = decode(safetensors.torch.save(cast, metadata))
    assert decoded.keys() == cast.keys()
    assert_same_bits({name: decoded[name] for name in cast}, cast)


# -- damage --------------------------------------------------------------------------------------------------


def test_every_truncation_is_an_error() -> None:
    blob = encode(example(), FP32)
    for length in range(len(blob)):
        with pytest.raises(WireError) as error:
            decode(blob[:length])
        assert "\n" not in str(error.value)


def test_bytes_left_over_are_an_error() -> None:
    with pytest.raises(WireError, match="leave bytes over"):
        decode(encode(example(), FP32) + b"\0")


def decode_or_refuse(blob: bytes) -> None:
    """Anything but a WireError is a bug."""
    try:
        decoded = decode(blob)
    except WireError:
        return
    assert sum(byte_classes(blob).values()) == len(blob)
    for tensor in decoded.values():
        tensor.sum()  # reading it stays within the bytes


@given(st.data())
def test_flipped_bytes_are_refused_or_read(data: st.DataObject) -> None:
    blob = bytearray(encode(example(), data.draw(st.sampled_from([FP32, BF16]))))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse(bytes(blob))


@given(st.binary(max_size=100))
def test_garbage_is_refused_or_read(blob: bytes) -> None:
    decode_or_refuse(blob)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64"]) | json_values,
        "shape": st.lists(st.integers(-2, 5) | st.integers(-(2**70), 2**70) | json_values, max_size=3)
        | json_values,
        "data_offsets": st.lists(st.integers(-2, 20) | json_values, min_size=2, max_size=2) | json_values,
    }
)


def with_header(header: object, body: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@given(
    json_values | st.dictionaries(names, entries | json_values, max_size=3), st.sampled_from([b"", bytes(16)])
)
def test_any_header_is_refused_or_read(header: object, body: bytes) -> None:
    decode_or_refuse(with_header(header, body))


def entry(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


def test_the_header_that_the_next_test_damages_is_a_good_one() -> None:
    assert decode(with_header(entry()))["x"].equal(torch.zeros(4))


@pytest.mark.parametrize(
    ("header", "body", "said"),
    [
        (b"\xff\xfe{", bytes(16), "not JSON"),
        (b"[" * 100_000, bytes(16), "not JSON"),
        ([1], bytes(16), "not a table of names"),
        ({"x": None}, bytes(16), "x: unreadable entry"),
        (entry(dtype="F16"), bytes(16), "x: unreadable entry.*F16"),
        (entry(dtype=["F32"]), bytes(16), "x: unreadable entry"),
        (entry(shape=[4.0]), bytes(16), "whole numbers"),
        (entry(shape=[math.inf]), bytes(16), "whole numbers"),
        (entry(shape="4"), bytes(16), "whole numbers"),
        (entry(shape=[-2, -2]), bytes(16), "whole numbers"),
        (entry(data_offsets=[0, math.inf]), bytes(16), "whole numbers"),
        (entry(data_offsets=[-16, 0]), bytes(16), "whole numbers"),
        (entry(data_offsets=[0]), bytes(16), "x: unreadable entry"),
        (entry(shape=[3]), bytes(16), "do not hold F32 "),
        (entry(data_offsets=[8, 24]), bytes(16), "do not hold F32 "),
        (entry(shape=[2**62, 4, 0], data_offsets=[0, 0]), b"", "cannot have the shape"),
        (entry(shape=[0, 2**70], data_offsets=[0, 0]), b"", "cannot have the shape"),
        (entry() | {"y": entry()["x"]}, bytes(16), "overlap"),
        # The sum of the sizes is right: an overlap, and a gap as large.
        (entry() | {"y": entry(data_offsets=[8, 24])["x"]}, bytes(32), "overlap"),
        (entry() | {"y": entry(data_offsets=[0, 16])["x"]}, bytes(32), "overlap"),
        (entry() | {"y": entry(data_offsets=[24, 40])["x"]}, bytes(40), "leave bytes over at y"),
        (entry(data_offsets=[4, 20]), bytes(20), "leave bytes over at x"),
        ({}, bytes(16), "leave bytes over"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_header_is_named(header: object, body: bytes, said: str) -> None:
    with pytest.raises(WireError, match=said):
        decode(with_header(header, body))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=5), st.integers(0, 8))
def test_a_bundle_is_read_exactly_where_its_tensors_tile_it(places: list[tuple[int, int]], size: int) -> None:
    header = {
        str(index): {"dtype": "U8", "shape": [length], "data_offsets": [begin, begin + length]}
        for index, (begin, length) in enumerate(places)
    }
    # How often each byte is named, and whether an empty tensor lies at the end of another one.
    named = [sum(begin <= at < begin + length for begin, length in places) for at in range(size)]
    ends = {0} | {begin + length for begin, length in places if length}
    tiled = all(count == 1 for count in named) and all(begin + length <= size for begin, length in places)
    tiled &= all(begin in ends for begin, _ in places)
    try:
        entries = read_header(with_header(header, bytes(size)))
    except WireError:
        assert not tiled
    else:
        assert tiled
        assert [entry.begin for entry in entries] == sorted(entry.begin for entry in entries)


def test_a_header_longer_than_the_blob_is_not_believed() -> None:
    with pytest.raises(WireError, match="truncated"):
        decode((2**63).to_bytes(8, "little") + bytes(100))


# -- bundles -------------------------------------------------------------------------------------------------


def record_of(blobs: Mapping[str, bytes]) -> ArrayRecord:
    return ArrayRecord({key: as_array(blob) for key, blob in blobs.items()})


def test_a_group_is_one_array_of_bytes() -> None:
    blobs = encode_bundles("dense", parts(example(), BF16))
    assert blobs == {"dense": encode(example(), BF16)}
    array = as_array(blobs["dense"])
    assert (array.dtype, array.shape, array.stype) == ("uint8", (len(array.data),), BUNDLE)
    assert array.data == blobs["dense"]
    assert blobs_of(record_of(blobs)) == blobs
    assert bundle_digests(blobs) == {"dense": hashlib.sha256(blobs["dense"]).hexdigest()}


def test_an_empty_group_is_no_bundle() -> None:
    assert encode_bundles("expert-1", {}) == {}


def test_no_bundle_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_BUNDLE_BYTES", 100)
    named = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each: two fit
    blobs = encode_bundles("dense", parts(named, FP32))
    assert {key: list(decode(blob)) for key, blob in blobs.items()} == {
        "dense": ["t0", "t1"],
        "dense.1": ["t2", "t3"],
        "dense.2": ["t4"],
    }
    assert_same_bits(from_blobs(blobs.values()), named)


@given(st.lists(st.integers(0, 60), max_size=12))
def test_bundles_are_cut_in_order_and_only_where_they_must_be(lengths: list[int]) -> None:
    sizes = {str(index): length for index, length in enumerate(lengths)}
    bundles = list(split_bundle(list(sizes), sizes, 50))
    assert [name for bundle in bundles for name in bundle] == list(sizes)
    totals = [sum(sizes[name] for name in bundle) for bundle in bundles]
    for bundle, total in zip(bundles, totals, strict=True):
        assert total <= 50 or len(bundle) == 1  # a tensor larger than the limit travels alone
    for total, following in zip(totals, bundles[1:], strict=False):
        assert total + sizes[following[0]] > 50


def test_an_update_is_dense_and_experts_apart() -> None:
    moment = f"exp_avg.{EXPERT}"
    named = example() | {moment: torch.zeros(2, 3)}
    blobs, state = encode_update(named, CASTS["fp32"], {})
    assert {key: set(decode(blob)) for key, blob in blobs.items()} == {
        "dense": {DENSE},
        "expert": {EXPERT, moment},
    }
    assert state == {}
    assert from_blobs(blobs.values()).keys() == named.keys()


def test_a_name_sent_twice_is_an_error() -> None:
    blob = encode({"x": torch.zeros(1)}, FP32)
    with pytest.raises(WireError, match="x: sent twice"):
        from_blobs([blob, blob])


def test_a_foreign_array_is_an_error() -> None:
    record = ArrayRecord({"dense": Array(dtype="uint8", shape=(1,), stype="pickle", data=b"x")})
    with pytest.raises(WireError, match=r"dense.*pickle.*fomoe\.safetensors"):
        blobs_of(record)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"config": ConfigRecord({"task": "{}"})}, "{}"),
        ({"config": ConfigRecord({"task": b"{}"})}, ""),
        ({"config": ConfigRecord({"reply": "{}"})}, ""),
        ({"config": ArrayRecord()}, ""),
        ({}, ""),
    ],
)
def test_a_header_is_text_or_none(record: dict[str, ConfigRecord | ArrayRecord], text: str) -> None:
    assert header_in(RecordDict(record), "config", "task") == text


# -- traffic -------------------------------------------------------------------------------------------------


def test_traffic_adds_up_to_the_payload_by_class_and_by_site() -> None:
    named = example() | {f"exp_avg.{EXPERT}": torch.zeros(2, 3)}
    blob = encode(named, BF16)
    traffic = Traffic()
    traffic.count(7, [byte_classes(blob)], 30)
    assert traffic.dense == 2 * 5
    assert traffic.expert == 2 * (6 + 6)  # an expert's moment is the expert's
    assert traffic.other == len(blob) - 2 * 17 + 30
    assert traffic.total == len(blob) + 30

    traffic.count(7, [byte_classes(blob)] * 2, 30)
    traffic.count(2, [], 12)
    assert traffic.by_site == {7: 3 * len(blob) + 60, 2: 12}
    assert sum(traffic.by_site.values()) == traffic.total


@given(named_fp32, st.sampled_from([FP32, BF16]))
def test_the_classes_of_a_bundle_add_up_to_its_length(named: dict[str, Tensor], dtype: torch.dtype) -> None:
    blob = encode(named, dtype)
    classes = byte_classes(blob)
    assert sum(classes.values()) == len(blob)
    assert classes["dense"] == sum(value.numel() for value in named.values()) * dtype.itemsize


@pytest.mark.parametrize("damaged", [b"", b"garbage", with_header(entry(data_offsets=[0, math.inf]))])
def test_a_damaged_bundle_counts_with_all_its_bytes(damaged: bytes) -> None:
    """It crossed the wire all the same, and what it says of its sizes is not believed."""
    assert byte_classes(damaged) == {"dense": 0, "expert": 0, "other": len(damaged)}
