"""Residuals: what they bring back, what they may weigh, and that damage is refused in one line."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.errors import WireError
from fomoe_flwr.model.spec import expert_name, expert_of, gate_name
from fomoe_flwr.residual import (
    BLOCK,
    decode,
    encode,
    pack,
    part_name,
    relative_error,
    rounded,
    shared_experts,
    shared_in,
    shared_name,
    unpack,
)

FP32, BF16 = torch.float32, torch.bfloat16
UP, DOWN, GATE = (expert_name(0, 2, part) for part in ("up_proj", "down_proj", "gate"))

dtypes = st.sampled_from([BF16, FP32])
small_shapes = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)
large_shapes = st.sampled_from(
    [(BLOCK,), (BLOCK - 1,), (BLOCK + 1,), (65_537,), (3, BLOCK), (257, 512), (1, 131_073)]
)
ratios = st.floats(1.0, 200.0)
seeds = st.integers(0, 2**32 - 1)


def pair(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """A tensor and the shared one, some of whose entries are equal and some differences alike."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape, generator=generator)
    delta = torch.randn(shape, generator=generator) * torch.randint(0, 3, shape, generator=generator)
    return shared + (delta * 4).round() / 4 * 10.0 ** (seed % 7 - 3), shared


def payload(parts: dict[str, Tensor]) -> int:
    return sum(part.numel() * part.itemsize for part in parts.values())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """As in a site's process."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def some_state(num_experts: int = 4) -> dict[str, Tensor]:
    """A full state: two layers, an ordinary tensor, a router row and a moment."""
    generator = torch.Generator().manual_seed(1)
    state = {"model.norm.weight": torch.randn(5, generator=generator)}
    for layer in range(2):
        for expert in range(num_experts):
            state[expert_name(layer, expert, "up_proj")] = torch.randn(6, 5, generator=generator)
            state[expert_name(layer, expert, "down_proj")] = torch.randn(5, 6, generator=generator)
    state[GATE] = torch.randn(5, generator=generator)
    state[f"exp_avg_sq.{UP}"] = torch.rand(6, 5, generator=generator)
    return state


# What is shared


def test_shared_is_the_mean_over_all_experts() -> None:
    state = some_state()
    shared = shared_experts(state)
    assert set(shared) == {
        f"model.layers.{layer}.mlp.shared_mean.{part}.weight"
        for layer in range(2)
        for part in ("up_proj", "down_proj")
    }
    mean = torch.stack([state[expert_name(1, e, "up_proj")].double() for e in range(4)]).mean(0)
    found = shared["model.layers.1.mlp.shared_mean.up_proj.weight"]
    assert found.dtype == FP32
    torch.testing.assert_close(found.double(), mean, rtol=0, atol=1e-6)


def test_shared_does_not_depend_on_the_order_or_dtype_of_the_state() -> None:
    state = {name: tensor.to(BF16) for name, tensor in some_state().items()}
    one, other = shared_experts(state), shared_experts(dict(reversed(state.items())))
    assert all(same_bits(one[name], other[name]) for name in one)
    assert all(tensor.dtype == FP32 for tensor in one.values())


def test_shared_of_a_partial_state_is_refused() -> None:
    state = some_state()
    del state[expert_name(1, 2, "down_proj")]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.shared_mean\.down_proj.* expert 2 is not"):
        shared_experts(state)
    assert shared_experts({}) == {}


def test_only_projections_have_a_shared_tensor() -> None:
    assert shared_name(UP) == "model.layers.0.mlp.shared_mean.up_proj.weight"
    for name in (GATE, gate_name(0), f"exp_avg.{UP}", "model.norm.weight", shared_name(UP)):
        assert name is not None
        assert shared_name(name) is None


def test_the_ledger_counts_parts_as_experts_and_the_shared_as_dense() -> None:
    assert expert_of(part_name("indices", UP)) == (0, 2)
    assert expert_of(shared_name(UP) or "") is None


# What travels


def check_round_trip(shape: tuple[int, ...], seed: int, ratio: float, dtype: torch.dtype) -> None:
    """Through a bundle to two decoders, one of which flushes denormals and has the shared tensor rounded."""
    tensor, shared = pair(shape, seed)
    parts = encode(tensor, shared, ratio, dtype)
    arrived = wire.decode(wire.encode(parts, dtype))
    here = decode(parts, shared, shape)
    with flushed_denormals():
        there = decode(wire.decode(wire.encode(arrived, dtype)), shared.to(dtype), shape)
    assert here.dtype == FP32
    assert same_bits(here, there)
    assert relative_error(tensor, here, rounded(shared, dtype)) <= 1


@given(small_shapes, seeds, ratios, dtypes)
def test_two_decoders_get_the_same_bits(
    shape: tuple[int, ...], seed: int, ratio: float, dtype: torch.dtype
) -> None:
    check_round_trip(shape, seed, ratio, dtype)


@settings(max_examples=20)
@given(large_shapes, seeds, ratios, dtypes)
def test_two_decoders_get_the_same_bits_of_large_tensors(
    shape: tuple[int, ...], seed: int, ratio: float, dtype: torch.dtype
) -> None:
    check_round_trip(shape, seed, ratio, dtype)


def check_payload(shape: tuple[int, ...], seed: int, ratio: float, dtype: torch.dtype) -> None:
    """Within the ratio, and the next entry would not be; one entry where even that is too much."""
    tensor, shared = pair(shape, seed)
    parts = encode(tensor, shared, ratio, dtype)
    budget = tensor.numel() * dtype.itemsize / ratio
    entries = len(parts["values"])
    assert 1 <= entries <= tensor.numel()
    assert entries == 1 or payload(parts) <= budget
    # Two numbers of 16 bits share an fp32, so that an entry costs 4 bytes, then 8.
    dearest = dtype.itemsize + max(2, dtype.itemsize * (1 - entries % 2)) if dtype == FP32 else 4
    assert entries == tensor.numel() or payload(parts) + dearest > budget


@given(small_shapes, seeds, ratios, dtypes)
def test_payload_is_within_the_ratio(
    shape: tuple[int, ...], seed: int, ratio: float, dtype: torch.dtype
) -> None:
    check_payload(shape, seed, ratio, dtype)


@settings(max_examples=20)
@given(large_shapes, seeds, ratios, dtypes)
def test_payload_of_large_tensors_is_within_the_ratio(
    shape: tuple[int, ...], seed: int, ratio: float, dtype: torch.dtype
) -> None:
    check_payload(shape, seed, ratio, dtype)


@pytest.mark.parametrize(("dtype", "entry"), [(BF16, 4), (FP32, 6)])
def test_an_entry_costs_its_value_and_two_bytes(dtype: torch.dtype, entry: int) -> None:
    tensor, shared = pair((10, BLOCK), 5)
    parts = encode(tensor, shared, 50, dtype)
    odd = dtype == FP32 and len(parts["values"]) % 2  # half an fp32 is left over
    assert payload(parts) == len(parts["values"]) * entry + 10 * 2 + 2 * odd
    assert len(parts["values"]) >= (10 * BLOCK * dtype.itemsize / 50 - 20) / entry - 2


@given(small_shapes, seeds, dtypes)
def test_the_largest_differences_arrive(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    """Against a sort in Python, ties to the first: these but for rounding, all others from the shared one."""
    tensor, shared = pair(shape, seed)
    base = rounded(shared, dtype)
    parts = encode(tensor, shared, 1, dtype)
    delta = (tensor - base).flatten()
    kept = sorted(range(tensor.numel()), key=lambda i: (-abs(float(delta[i])), i))[: len(parts["values"])]
    assert torch.equal(parts["values"], delta[sorted(kept)].to(dtype))
    expected = base.flatten().clone()
    expected[kept] += delta[kept].to(dtype).float()
    assert torch.equal(decode(parts, shared, shape).flatten(), expected)


def test_whole_numbers_arrive_exactly() -> None:
    """Where no rounding is needed: as many entries differ as ratio 1 can bring, in several blocks."""
    shared = torch.zeros(2 * BLOCK)
    tensor = torch.zeros(2 * BLOCK)
    tensor[::3] = (torch.arange(len(tensor[::3])) % 255 - 127).float()
    assert torch.equal(decode(encode(tensor, shared, 1, BF16), shared, tensor.shape), tensor)
    tensor[-1] = 3e38  # beyond the first block, and the last place there is
    assert decode(encode(tensor, shared, 1e9, FP32), shared, tensor.shape).nonzero().tolist() == [
        [len(tensor) - 1]
    ]


def test_of_equal_differences_the_first_travel() -> None:
    shared = torch.zeros(100)
    decoded = decode(encode(torch.ones(100), shared, 10, BF16), shared, (100,))
    assert decoded.nonzero().flatten().tolist() == [0, 1, 2, 3]  # 20 bytes: 2 for the count, 4 x 4


@given(small_shapes, seeds, ratios, ratios, dtypes)
def test_more_bytes_never_mean_more_error(
    shape: tuple[int, ...], seed: int, one: float, other: float, dtype: torch.dtype
) -> None:
    tensor, shared = pair(shape, seed)
    base = rounded(shared, dtype)
    tight, loose = (
        relative_error(tensor, decode(encode(tensor, shared, ratio, dtype), shared, shape), base)
        for ratio in sorted((one, other), reverse=True)
    )
    assert loose <= tight <= 1


def test_the_error_falls_with_the_ratio() -> None:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(64, 512, generator=generator)
    tensor = shared + torch.randn(64, 512, generator=generator)
    base = rounded(shared, BF16)
    errors = [
        relative_error(tensor, decode(encode(tensor, shared, ratio, BF16), shared, tensor.shape), base)
        for ratio in (100, 50, 10, 4, 2, 1)
    ]
    assert all(more > less for more, less in itertools.pairwise(errors))
    assert errors[0] < 1
    assert errors[-1] < 0.3  # half of the entries, the larger ones: all but 7 % of a Gaussian's square


@given(small_shapes, seeds, dtypes)
def test_an_expert_equal_to_the_shared_one_has_no_residual(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    shared = rounded(pair(shape, seed)[0], dtype)
    parts = encode(shared, shared, 2, dtype)
    decoded = decode(parts, shared, shape)
    assert not parts["values"].any()
    assert same_bits(decoded, shared)
    assert relative_error(shared, decoded, shared) == 0


def test_relative_error_is_the_share_that_is_lost() -> None:
    shared, tensor = torch.ones(4), torch.tensor([4.0, 1.0, 5.0, 1.0])  # 5 away
    assert relative_error(tensor, shared, shared) == 1
    assert relative_error(tensor, tensor, shared) == 0
    assert relative_error(tensor, torch.tensor([4.0, 1.0, 1.0, 1.0]), shared) == 0.8
    assert relative_error(shared, tensor, shared) == math.inf


def test_denormals_do_not_tell_sites_apart() -> None:
    """Denormals anywhere: a decoder that flushes them must agree with one that does not."""
    tiny = torch.finfo(FP32).tiny
    shared = torch.tensor([tiny / 2, 1.5 * tiny, 1.5 * tiny, -0.0, 1.0])
    parts = {
        "values": torch.tensor([1.0, -tiny, tiny / 4, -0.0, -tiny / 2]),
        "indices": words([0, 1, 2, 3, 4, 0], FP32),
        "counts": words([5, 0], FP32),
    }
    here = decode(parts, shared, (5,))
    with flushed_denormals():
        there = decode(parts, shared, (5,))
    assert same_bits(here, there)
    assert here.tolist() == [1.0, 0.0, 1.5 * tiny, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_whole_numbers_travel_as_ordinary_numbers(dtype: torch.dtype) -> None:
    """Every index and the largest count: finite, normal, and the same after a cast with denormals flushed."""
    shared = torch.zeros(5 * BLOCK)
    tensor = shared.clone()
    tensor[:BLOCK] = 1
    parts = encode(tensor, shared, 1, dtype)
    for part in (parts["indices"], parts["counts"]):
        assert part.isfinite().all()
        assert float(part.min()) >= torch.finfo(FP32).tiny
    with flushed_denormals():
        cast = {name: part.double().float().to(dtype) for name, part in parts.items()}
    assert torch.equal(decode(cast, shared, tensor.shape), tensor)


# What is refused


@pytest.mark.parametrize("ratio", [0.99, 0.0, -1.0, math.nan, math.inf])
def test_a_ratio_that_saves_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number of at least 1"):
        encode(torch.ones(4), torch.zeros(4), ratio, BF16)


def test_other_dtypes_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        encode(torch.ones(4), torch.zeros(4), 2, torch.float16)
    with pytest.raises(ValueError, match="no residual from"):
        encode(torch.ones(4), torch.zeros(2, 2), 2, BF16)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of_shared", [False, True])
def test_values_that_are_not_finite_are_not_sent(bad: float, of_shared: bool) -> None:
    tensor, shared = torch.ones(9), torch.zeros(9)
    (shared if of_shared else tensor)[4] = bad
    with pytest.raises(WireError, match=f"^{UP}: its difference .* not finite"):
        pack({UP: tensor}, {shared_name(UP) or "": shared}, 1, BF16)


def test_a_value_that_bf16_cannot_hold_is_not_sent() -> None:
    largest = torch.full((3,), torch.finfo(FP32).max)
    with pytest.raises(WireError, match=r"not finite in torch\.bfloat16"):
        encode(largest, torch.zeros(3), 1, BF16)


def words(numbers: list[int], dtype: torch.dtype = BF16) -> Tensor:
    """Whole numbers as they travel."""
    return (torch.tensor(numbers, dtype=torch.int16) + 0x80).view(dtype)


def good_parts() -> dict[str, Tensor]:
    """Four values in a tensor of BLOCK + 100: two in each block."""
    return {
        "values": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=BF16),
        "indices": words([5, BLOCK - 1, 0, 99]),
        "counts": words([2, 2]),
    }


Change = Callable[[dict[str, Tensor]], object]

DAMAGE: list[tuple[str, Change, str]] = [
    ("no counts", lambda p: p.pop("counts"), "needs values, indices, counts"),
    ("values of another dtype", lambda p: p.update(values=p["values"].float()), "needs one of"),
    ("whole numbers", lambda p: p.update(indices=p["indices"].view(torch.int16)), "needs one of"),
    ("fp16", lambda p: p.update({k: v.view(torch.float16) for k, v in p.items()}), "needs one of"),
    ("all cast to fp32", lambda p: p.update({k: v.float() for k, v in p.items()}), "do not hold"),
    ("not flat", lambda p: p.update(values=p["values"].view(2, 2)), "needs flat parts"),
    ("a number", lambda p: p.update(values=p["values"][0]), "needs flat parts"),
    ("a value less", lambda p: p.update(values=p["values"][:3]), "do not add up"),
    ("an index less", lambda p: p.update(indices=p["indices"][:3]), "do not hold 4"),
    ("a count less", lambda p: p.update(counts=p["counts"][:1]), "do not hold 2"),
    ("counts too large", lambda p: p.update(counts=words([2, 3])), "do not add up"),
    ("counts too small", lambda p: p.update(counts=words([1, 2])), "do not add up"),
    ("a negative count", lambda p: p.update(counts=words([-1, 5])), "do not add up"),
    ("all in one block", lambda p: p.update(counts=words([4, 0])), "do not ascend"),
    ("a negative index", lambda p: p.update(indices=words([-1, 5, 0, 99])), "outside of its block"),
    ("an index beyond its block", lambda p: p.update(indices=words([5, BLOCK, 0, 99])), "outside"),
    ("an index beyond the tensor", lambda p: p.update(indices=words([5, 6, 0, 100])), "beyond"),
    ("indices that descend", lambda p: p.update(indices=words([6, 5, 0, 99])), "do not ascend"),
    ("an index twice", lambda p: p.update(indices=words([5, 5, 0, 99])), "do not ascend"),
    ("NaN", lambda p: p["values"].fill_(math.nan), "not finite"),
    ("infinity", lambda p: p["values"][3:].fill_(-math.inf), "not finite"),
]


@pytest.mark.parametrize(
    ("change", "reason"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE]
)
def test_damaged_parts_are_refused_in_one_line(change: Change, reason: str) -> None:
    parts, shared = good_parts(), torch.zeros(BLOCK + 100)
    assert decode(parts, shared, shared.shape).nonzero().flatten().tolist() == [
        5,
        BLOCK - 1,
        BLOCK,
        BLOCK + 99,
    ]
    change(parts)
    with pytest.raises(WireError, match=reason) as caught:
        decode(parts, shared, shared.shape)
    assert len(str(caught.value).splitlines()) == 1
    named = {part_name(part, UP): tensor for part, tensor in parts.items()}
    with pytest.raises(WireError, match=rf"^{UP}: .*{reason}"):
        unpack(named, {shared_name(UP) or "": shared})


def test_filling_that_is_an_entry_is_refused() -> None:
    """The unused half of an fp32 has one value only, so that equal tensors are equal bytes."""
    parts = {"values": torch.ones(1), "indices": words([1, 0], FP32), "counts": words([1, 0], FP32)}
    assert decode(parts, torch.zeros(3), (3,)).tolist() == [0, 1, 0]
    with pytest.raises(WireError, match="more indices than the 1"):
        decode({**parts, "indices": words([1, 2], FP32)}, torch.zeros(3), (3,))


def test_parts_for_another_shape_are_refused() -> None:
    with pytest.raises(WireError, match=r"residual for \[3\], but the shared tensor is \[2\]"):
        decode(good_parts(), torch.zeros(2), (3,))
    with pytest.raises(WireError, match="do not hold 1"):
        decode(good_parts(), torch.zeros(100), (100,))


def test_a_sum_that_is_not_finite_is_refused() -> None:
    parts = encode(torch.full((3,), 2e38), torch.zeros(3), 1, FP32)
    with pytest.raises(WireError, match="not finite"):
        decode(parts, torch.full((3,), 2e38), (3,))


bit_pairs = st.tuples(st.integers(-(2**15), 2**15 - 1), st.integers(-(2**15), 2**15 - 1))


def bits(pairs: list[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int16).flatten().view(dtype)


@given(
    st.lists(bit_pairs, max_size=4),
    st.lists(bit_pairs, max_size=4),
    st.lists(bit_pairs, max_size=1),
    st.integers(1, 2 * BLOCK),
    dtypes,
)
def test_any_bits_are_decoded_or_refused(
    values: list[tuple[int, int]],
    indices: list[tuple[int, int]],
    counts: list[tuple[int, int]],
    numel: int,
    dtype: torch.dtype,
) -> None:
    """Nothing but WireError comes of what a network may bring, and what is taken is finite."""
    parts = {"values": bits(values, dtype), "indices": bits(indices, dtype), "counts": bits(counts, dtype)}
    right = {**parts, "counts": words([len(parts["values"])] + [0] * (dtype == FP32), dtype)}
    for attempt in (parts, right):
        with contextlib.suppress(WireError):
            assert decode(attempt, torch.zeros(numel), (numel,)).isfinite().all()


# Beside ordinary tensors


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("beside", [False, True])
def test_a_mixed_bundle_becomes_ordinary_tensors(dtype: torch.dtype, beside: bool) -> None:
    """The receiver has the shared tensors from before, or gets them in the same bundle."""
    state = some_state()
    shared = shared_experts(state)
    moving = {name: state[name] for name in (UP, "model.norm.weight", DOWN, GATE, f"exp_avg_sq.{UP}")}
    packed = pack(moving, shared, 2, dtype)
    assert {name for name in packed if not name.startswith("residual.")} == moving.keys() - {UP, DOWN}
    blob = wire.encode({**packed, **(shared if beside else {})}, dtype)
    arrived = wire.decode(blob)
    kept = {name: tensor.to(dtype) for name, tensor in shared.items()}
    assert shared_in(arrived).keys() == (shared.keys() if beside else set())
    unpacked = unpack(arrived, {} if beside else kept)
    assert unpacked.keys() == moving.keys()
    for name in moving.keys() - {UP, DOWN}:
        assert unpacked[name] is arrived[name]
    for name in (UP, DOWN):
        base = shared[shared_name(name) or ""]
        assert same_bits(unpacked[name], decode(encode(state[name], base, 2, dtype), base, base.shape))
        assert 0 < relative_error(state[name], unpacked[name], rounded(base, dtype)) < 1


def test_without_residuals_nothing_is_touched() -> None:
    state = some_state()
    assert pack(state, {}, 50, BF16) == state
    unpacked = unpack(state, shared_experts(state))
    assert list(unpacked) == list(state)
    assert all(unpacked[name] is state[name] for name in state)


def test_shared_tensors_of_the_message_go_before_those_kept() -> None:
    state = some_state()
    shared = shared_experts(state)
    old = {name: tensor + 1 for name, tensor in shared.items()}
    packed = pack({UP: state[UP]}, shared, 2, FP32)
    assert same_bits(unpack({**packed, **shared}, old)[UP], unpack(packed, shared)[UP])


def test_bundles_that_make_no_sense_are_refused() -> None:
    state = some_state()
    shared = shared_experts(state)
    packed = pack({UP: state[UP]}, shared, 2, BF16)
    with pytest.raises(WireError, match=f"^{UP}: residual without a shared tensor"):
        unpack(packed, {})
    with pytest.raises(WireError, match=f"^{UP}: sent both whole and as a residual"):
        unpack({**packed, UP: state[UP]}, shared)
    with pytest.raises(WireError, match=r"^residual\.signs/x: a residual has no such part"):
        unpack({**packed, "residual.signs/x": state[UP]}, shared)
    with pytest.raises(WireError, match=rf"^{GATE}: residual without a shared tensor"):
        unpack({part_name("values", GATE): state[GATE]}, shared)
