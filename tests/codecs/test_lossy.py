"""The lossy codecs: what arrives, its bytes, what is refused, and what error feedback makes of the rest."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.codecs import lossy, nbytes
from fomoe_flwr.codecs.blocks import INT_BLOCK, SIGN_BLOCK, Int, Sign
from fomoe_flwr.codecs.lossy import Lossy, with_feedback
from fomoe_flwr.codecs.packing import pack, unpack
from fomoe_flwr.codecs.topk import CHUNK, TopK
from fomoe_flwr.errors import DtypeError, NotFiniteError, WireError

CODECS: dict[str, Lossy] = {
    "int8": Int(8),
    "int4": Int(4),
    "sign": Sign(),
    "topk": TopK(),
    "topk8": TopK(density=0.1, bits=8),
    "all3": TopK(density=1.0, bits=3),
}
# Numbers, one number, whole blocks and chunks, one more and one less, and nothing.
SHAPES = [(), (7,), (0,), (0, 3), (1, 1), (3, 5), (1, 64), (5, 13), (2, 3, 43), (64, 64), (17, 241), (91, 90)]
LARGEST, SMALLEST = torch.finfo(torch.float32).max, 2.0**-149
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
few = settings(max_examples=15)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any finite numbers: zeros, subnormals and the largest, and many of them equal."""
    shape = draw(st.sampled_from(SHAPES))
    values = draw(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20)
    )
    mixed = np.random.default_rng(draw(st.integers(0, 9))).choice(np.array(values, dtype=np.float32), shape)
    return torch.from_numpy(np.asarray(mixed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks(tensor: Tensor, size: int) -> list[Tensor]:
    return [tensor.flatten()[at : at + size] for at in range(0, tensor.numel(), size)]


def square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


# ----- what arrives


@codecs
@few
@given(tensor=tensors())
def test_parts_are_as_announced_and_always_the_same(codec: Lossy, tensor: Tensor) -> None:
    parts, layout = codec.encode(tensor), codec.layout(tensor.shape)
    assert list(parts) == list(layout)
    for suffix, (shape, dtype) in layout.items():
        assert (tuple(parts[suffix].shape), str(parts[suffix].dtype)) == (shape, f"torch.{dtype}")
    assert nbytes(codec, [tensor.shape]) == sum(part.nbytes for part in parts.values())
    again = codec.encode(tensor.clone())
    assert all(part.equal(again[suffix]) for suffix, part in parts.items())


@codecs
@few
@given(tensor=tensors())
@example(tensor=torch.full((3, 100), LARGEST))
@example(tensor=torch.full((3, 100), -SMALLEST))
@example(tensor=torch.tensor([[LARGEST, -SMALLEST, 0.0, -LARGEST]]))
def test_what_arrives_is_a_tensor_of_its_own_no_further_off_than_zeros(codec: Lossy, tensor: Tensor) -> None:
    tensor = tensor.clone()
    before = tensor.clone()
    parts = codec.encode(tensor)
    arrived = codec.decode(parts, tensor.shape)
    assert (arrived.shape, arrived.dtype, arrived.is_contiguous()) == (tensor.shape, torch.float32, True)
    assert bool(arrived.isfinite().all())
    assert square(tensor - arrived) <= square(tensor) * (1 + 1e-6)
    kept = {suffix: part.clone() for suffix, part in parts.items()}
    arrived.fill_(1)
    assert tensor.equal(before)
    tensor.fill_(2)
    assert all(part.equal(kept[suffix]) for suffix, part in parts.items())


@codecs
def test_small_tensors_arrive_exactly(codec: Lossy) -> None:
    for tensor in (
        torch.tensor(0.1),
        torch.tensor([0.1, 3e38, -1e-45]),
        torch.zeros(0),
        torch.arange(6.0)[::2],
    ):
        assert codec.layout(tensor.shape) == {"whole": (tuple(tensor.shape), "float32")}
        assert codec.decode(codec.encode(tensor), tensor.shape).equal(tensor)


@codecs
def test_the_order_in_memory_does_not_count(codec: Lossy) -> None:
    tensor = normal(70, 60).requires_grad_()
    plain = codec.encode(tensor.T.contiguous())
    assert all(part.equal(plain[suffix]) for suffix, part in codec.encode(tensor.T).items())


@codecs
def test_pieces_change_nothing(codec: Lossy, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = normal(10, 8 * CHUNK // 4 + 1)
    whole = codec.encode(tensor)
    arrived = codec.decode(whole, tensor.shape)
    monkeypatch.setattr(lossy, "PIECE", 8 * CHUNK)
    assert all(part.equal(whole[suffix]) for suffix, part in codec.encode(tensor).items())
    assert codec.decode(whole, tensor.shape).equal(arrived)
    assert tensor.numel() > 8 * CHUNK
    assert tensor.numel() % CHUNK


def test_bytes_are_known_without_pytorch() -> None:
    code = (
        "import sys; from fomoe_flwr.codecs import blocks, nbytes, topk; shapes = [(1 << 10, 1 << 12)];"
        "print(*(nbytes(c, shapes) for c in (blocks.Int(4), blocks.Sign(), topk.TopK())), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count = 1 << 22
    sizes = (count // 2 + count // 32, count // 8 + count // 128, 1024 * (64 * 14 // 8 + 4))
    assert said.split() == [*map(str, sizes), "False"]


# ----- whole numbers and signs


@pytest.mark.parametrize("bits", [4, 8])
@few
@given(tensor=tensors())
@example(tensor=torch.full((3, 100), LARGEST))
@example(tensor=torch.tensor([[-SMALLEST, 0.0]]))
def test_a_whole_number_is_off_by_half_a_scale_at_most(bits: int, tensor: Tensor) -> None:
    parts = Int(bits).encode(tensor)
    arrived = Int(bits).decode(parts, tensor.shape)
    if tensor.ndim < 2:
        return
    for scale, own, there in zip(
        parts["scale"].double(), blocks(tensor, INT_BLOCK), blocks(arrived, INT_BLOCK), strict=True
    ):
        largest = own.abs().max().double() / (2 ** (bits - 1) - 1)
        # Rounded up in 8 bits (fewer near 2^-133); a number over its scale is rounded once more, in fp32.
        assert largest <= scale <= largest * (1 + 2**-7) + 2**-133
        assert bool(((own.double() - there.double()).abs() <= scale / 2 * (1 + 2**-16)).all())
        assert bool(own.any()) == bool(scale)


def test_whole_numbers_by_hand() -> None:
    tensor = torch.tensor([[7.0, -3.5, 2.5, 0.4], [-7.0, 0.0, 1.0, -0.6]])
    parts = Int(4).encode(tensor)
    assert parts["scale"].tolist() == [1.0]
    # -7 to 7 are sent as 0 to 14; halves go to even.
    assert bytes(parts["values"].tolist()) == bytes([14 | 3 << 4, 9 | 7 << 4, 0 | 7 << 4, 8 | 6 << 4])
    assert Int(4).decode(parts, (2, 4)).tolist() == [[7, -4, 2, 0], [-7, 0, 1, -1]]


def test_signs_by_hand() -> None:
    tensor = torch.cat([torch.full((SIGN_BLOCK,), -2.0), torch.tensor([3.0, 0.0, -6.0])]).view(1, -1)
    parts = Sign().encode(tensor)
    assert parts["scale"].tolist() == [2.0, 3.0]
    assert Sign().decode(parts, tensor.shape)[0].tolist() == [-2.0] * SIGN_BLOCK + [3.0, 3.0, -3.0]


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_multiples_of_a_scale_arrive_exactly(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    whole = torch.randint(
        -largest, largest + 1, (9, INT_BLOCK), generator=torch.Generator().manual_seed(0)
    ).float()
    whole[:, 5] = largest
    tensor = whole * normal(9, 1).abs().bfloat16().float()
    assert Int(bits).decode(Int(bits).encode(tensor), tensor.shape).equal(tensor)


@pytest.mark.parametrize("codec", [Sign(), TopK(), TopK(density=0.1)])
def test_a_second_round_trip_changes_nothing(codec: Lossy) -> None:
    once = codec.decode(codec.encode(normal(80, 70)), (80, 70))
    assert codec.decode(codec.encode(once), (80, 70)).equal(once)


# ----- the largest numbers


def largest_by_hand(values: list[float], kept: int) -> dict[int, float]:
    """What arrives of a chunk, by place, with 2 bits."""
    places = sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:kept])
    sizes = [abs(values[i]) for i in places]
    low, high = min(sizes), max(sizes)
    for _ in range(2):
        half = (high - low) / 2
        near_low, near_high = [s for s in sizes if s <= low + half], [s for s in sizes if s >= high - half]
        low, high = sum(near_low) / len(near_low), sum(near_high) / len(near_high)
    low, high = torch.tensor([low, high]).bfloat16().tolist()
    # In the middle the even one of codes 0 and 1 is the lower.
    nearest = [low if size <= (low + high) / 2 else high for size in sizes]
    return {i: math.copysign(size, values[i]) for i, size in zip(places, nearest, strict=True)}


@pytest.mark.parametrize("density", [1 / 64, 0.07])
@pytest.mark.parametrize("count", [1, 99, CHUNK, 2 * CHUNK + 100])
@pytest.mark.parametrize("spread", [3, 1000])
def test_the_largest_are_those_of_a_plain_loop(density: float, count: int, spread: int) -> None:
    tensor = (normal(1, count) * spread).round()
    wanted = [0.0] * count
    for begin, own in zip(itertools.count(0, CHUNK), blocks(tensor, CHUNK)):
        for place, value in largest_by_hand(own.tolist(), math.ceil(density * len(own))).items():
            wanted[begin + place] = value
    codec = TopK(density)
    assert codec.decode(codec.encode(tensor), tensor.shape)[0].tolist() == wanted


@settings(max_examples=15, deadline=None)
@given(holders=st.integers(1, 4), count=st.integers(1, 3 * 64).map(lambda n: 64 * n), seed=st.integers(0, 9))
def test_what_all_holders_sent_is_in_what_is_sent_down(holders: int, count: int, seed: int) -> None:
    """`down_density` is density times the holders: of the sum of their updates only the values are rounded."""
    generator = torch.Generator().manual_seed(seed)
    updates = [torch.randn(1, count, generator=generator) for _ in range(holders)]
    up, down = TopK(1 / 64), TopK(holders / 64)
    total = sum(up.decode(up.encode(update), update.shape) for update in updates)
    arrived = down.decode(down.encode(total), total.shape)
    assert bool((arrived[total != 0] != 0).all())


def test_two_magnitudes_need_no_more_than_two_bits() -> None:
    tensor = torch.zeros(1, CHUNK)
    tensor[0, 100:163], tensor[0, 7] = 0.5, -96.0
    assert TopK().decode(TopK().encode(tensor), tensor.shape).equal(tensor)


@pytest.mark.parametrize(("bits", "most"), [(2, 0.0045), (3, 0.0016), (4, 0.0005), (8, 0.00001)])
def test_more_bits_are_nearer(bits: int, most: float) -> None:
    """Normal numbers: share of the selected numbers' squares; 0.0039 is the least that two levels leave."""
    tensor = normal(64, CHUNK)
    codec = TopK(bits=bits)
    arrived = codec.decode(codec.encode(tensor), tensor.shape)
    selected = tensor * (arrived != 0)
    assert int((arrived != 0).sum()) == 64 * 64
    assert square(selected - arrived) < most * square(selected)


# ----- what is not finite, and what no encoder makes


@codecs
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (70, 65)])
def test_what_is_not_finite_is_refused_as_such(codec: Lossy, bad: float, shape: tuple[int, ...]) -> None:
    for place in (0, math.prod(shape) - 1):
        tensor = normal(*shape)
        tensor.view(-1)[place] = bad
        with pytest.raises(NotFiniteError, match=r"^(whole|scale|levels): has values that are not finite$"):
            codec.decode(codec.encode(tensor), shape)
        # Nor by a NaN with all its bits set, which a careless sum makes a zero of.
        tensor.view(-1).view(torch.int32)[place] = -1
        with pytest.raises(NotFiniteError):
            codec.decode(codec.encode(tensor), shape)


@codecs
@pytest.mark.parametrize("shape", [(5,), (3, 5), (70, 65)])
def test_other_parts_are_refused_by_name(codec: Lossy, shape: tuple[int, ...]) -> None:
    good = codec.encode(normal(*shape))
    for suffix, part in good.items():
        without = {other: value for other, value in good.items() if other != suffix}
        with pytest.raises(WireError, match=f"^{suffix}: missing$"):
            codec.decode(without, shape)
        with pytest.raises(DtypeError, match=f"^{suffix}: dtype torch.float64, agreed is torch"):
            codec.decode(good | {suffix: part.double()}, shape)
        with pytest.raises(WireError, match=rf"^{suffix}: shape \[.*\], expected \[.*\]$"):
            codec.decode(good | {suffix: part[:-1]}, shape)
        with pytest.raises(WireError, match=rf"^{suffix}: shape"):
            codec.decode(good | {suffix: part[None]}, shape)
    with pytest.raises(WireError, match=r"^'zeros': not expected, only"):
        codec.decode(good | {"zeros": torch.zeros(2)}, shape)


@pytest.mark.parametrize("codec", [Int(8), Int(4), Sign(), TopK()])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -0.0])
def test_a_scale_is_finite_and_not_negative(codec: Lossy, bad: float) -> None:
    parts = codec.encode(normal(70, 65))
    suffix = next(iter(parts))
    parts[suffix].view(-1)[-1] = bad
    kind, said = (WireError, "negative") if math.isfinite(bad) else (NotFiniteError, "not finite")
    with pytest.raises(kind, match=f"^{suffix}: has .*{said}"):
        codec.decode(parts, (70, 65))


def test_values_beyond_the_whole_numbers_are_refused() -> None:
    for bits in (4, 8):
        parts = Int(bits).encode(normal(70, 65))
        parts["values"][9] = 255
        with pytest.raises(WireError, match=f"^values: has one above {2 ** (bits - 1) - 1} scales$"):
            Int(bits).decode(parts, (70, 65))


@pytest.mark.parametrize(("codec", "suffix"), [(Int(4), "values"), (Sign(), "values"), (TopK(), "index")])
def test_bits_after_the_last_number_are_refused(codec: Lossy, suffix: str) -> None:
    parts = codec.encode(normal(3, 5))
    parts[suffix][-1] |= 128
    with pytest.raises(WireError, match=f"^{suffix}: has bits after its last number$"):
        codec.decode(parts, (3, 5))


def test_levels_out_of_order_are_refused() -> None:
    parts = TopK().encode(normal(70, 65))
    parts["levels"] = parts["levels"].flip(1)
    with pytest.raises(WireError, match=r"^levels: has a lower one above the upper one$"):
        TopK().decode(parts, (70, 65))


@pytest.mark.parametrize(
    ("at", "change", "said"),
    [
        (5, lambda index: index[4], "one twice, or not in ascending order"),
        (5, lambda index: index[6], "one twice, or not in ascending order"),
        (-1, lambda index: index[-2] - 1, "one twice, or not in ascending order"),
        (-1, lambda index: 70 * 65 - CHUNK, "one beyond the last number"),
        (-1, lambda index: CHUNK - 1, "one beyond the last number"),
    ],
)
def test_places_that_cannot_be_are_refused(at: int, change: object, said: str) -> None:
    parts = TopK().encode(normal(70, 65))
    index = unpack(parts["index"], 12, 64 + 8)
    assert callable(change)
    index[at] = int(change(index))
    with pytest.raises(WireError, match=f"^index: has {said}$"):
        TopK().decode(parts | {"index": pack(index, 12)}, (70, 65))


# ----- error feedback


@codecs
@few
@given(tensor=tensors())
def test_what_is_left_over_is_what_was_not_sent(codec: Lossy, tensor: Tensor) -> None:
    before = tensor.clone()
    parts, left = with_feedback(codec, {"x": tensor}, {}, 1.0)
    assert left["x"].equal(tensor - codec.decode(parts["x"], tensor.shape))
    wanted = tensor + left["x"]
    if bool(wanted.isfinite().all()):
        carried = left["x"].clone()
        parts, after = with_feedback(codec, {"x": tensor}, left, 1.0)
        assert after["x"].equal(wanted - codec.decode(parts["x"], tensor.shape))
        assert left["x"].equal(carried)
    assert tensor.equal(before)


def test_feedback_fades_and_belongs_to_the_names_that_are_sent() -> None:
    tensor, old = normal(9, 9), normal(9, 9, seed=1)
    codec = Int(4)
    parts, left = with_feedback(codec, {"x": tensor, "new": tensor}, {"x": old, "gone": old}, 0.5)
    assert left.keys() == {"x", "new"}
    assert left["x"].equal(0.5 * old + tensor - codec.decode(parts["x"], (9, 9)))
    assert parts["new"]["values"].equal(codec.encode(tensor)["values"])
    parts, left = with_feedback(codec, {"x": tensor}, {"x": old}, 0.0)
    assert left == {}
    assert parts["x"]["values"].equal(codec.encode(tensor)["values"])


@codecs
def test_what_is_not_finite_leaves_nothing_behind(codec: Lossy) -> None:
    good, bad = normal(9, 9), torch.full((9, 9), math.nan)
    parts, left = with_feedback(codec, {"good": good, "bad": bad}, {"bad": good}, 1.0)
    assert left.keys() == {"good"}
    with pytest.raises(NotFiniteError):
        codec.decode(parts["bad"], (9, 9))


def distance_after(codec: Lossy, decay: float) -> float:
    """How far from the optimum gradient descent ends, of how far it began, at two sites whose data differ.

    f_m(x) = |x - optimum ∓ apart|² / 2: what is large at one site is as large at the other, with the other sign. Where
    only that is sent, the mean of both is nothing.
    """
    optimum, apart = normal(4, 8), torch.zeros(4, 8)
    apart[0, :2] = 8.0
    x = torch.zeros(4, 8)
    states: list[dict[str, Tensor]] = [{}, {}]
    for step in range(100):
        mean = torch.zeros(4, 8)
        for site, sign in enumerate((1, -1)):
            gradient = x - optimum - sign * apart
            parts, states[site] = with_feedback(codec, {"x": gradient}, states[site], decay)
            mean += codec.decode(parts["x"], x.shape) / 2
        x = x - 0.1 * 0.98**step * mean
    return math.sqrt(square(x - optimum) / square(optimum))


def test_only_feedback_reaches_the_optimum_of_sites_that_differ() -> None:
    codec = TopK(density=1 / 16)
    assert distance_after(codec, 0.0) > 0.9
    assert distance_after(codec, 1.0) < 0.1
