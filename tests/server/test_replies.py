"""What becomes of a reply: refused with one word for what is wrong, held against the others, kept whole on the disk."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundle_file import bundle_digests
from fomoe_flwr.codecs import CASTS, LOSSY, Part, up_codec
from fomoe_flwr.config import StrategyConfig
from fomoe_flwr.errors import WireError
from fomoe_flwr.inputs import Inputs
from fomoe_flwr.messages import Reply
from fomoe_flwr.model.spec import expert_name
from fomoe_flwr.server import replies as replies_module
from fomoe_flwr.server.replies import (
    MOST_STARTS,
    Expected,
    Inbox,
    Norms,
    Refused,
    check_blobs,
    check_header,
    check_load,
    outliers,
)

DENSE, HELD, GHOST = "model.norm.weight", expert_name(0, 1, "up_proj"), expert_name(0, 2, "up_proj")
MOMENT = f"exp_avg_sq.{DENSE}"
CODEC = CASTS["fp32"]
MODEL = {
    DENSE: torch.ones(6),
    MOMENT: torch.ones(6),
    HELD: torch.ones(2, 3),
    GHOST: torch.ones(2, 3),
}
SENT = {name: value for name, value in MODEL.items() if name != GHOST}
EXPECTED = Expected(
    run="run",
    round=3,
    site="site-1",
    digests={name: CODEC.digest(value) for name, value in SENT.items()},
    shapes={name: value.shape for name, value in MODEL.items()},
    codec=CODEC,
    tokens=100,
    top_k=2,
    load_shape=(1, 3),
)
GOOD = Reply("run", 3, "site-1", 100, {"train_loss": 2.5}, wire.digests(SENT, CODEC), [[150, 50, 0]])


def header(**changes: Any) -> str:
    return dataclasses.replace(GOOD, **changes).to_json()


def blobs_of(named: Mapping[str, Tensor]) -> dict[str, bytes]:
    return wire.encode_bundles("all", {name: Part(value, value.dtype) for name, value in named.items()})


def in_one(**named: Tensor) -> dict[str, bytes]:
    """Of tensors of any name."""
    return {"one": wire.encode({name: Part(value, value.dtype) for name, value in named.items()})}


def checked(blobs: Mapping[str, bytes], expected: Expected = EXPECTED) -> Norms:
    """The check of bundles whose digests are in order."""
    return check_blobs(blobs, dataclasses.replace(GOOD, bundle_digests=bundle_digests(blobs)), expected).norms


def kind_of(blobs: Mapping[str, bytes], expected: Expected = EXPECTED) -> str:
    with pytest.raises(Refused) as refused:
        checked(blobs, expected)
    assert "\n" not in str(refused.value)
    return refused.value.kind


# -- the header ----------------------------------------------------------------------------------------------


def test_a_good_header_is_the_reply() -> None:
    assert check_header(header(), EXPECTED) == GOOD


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"run": "another"}, "run"),
        ({"round": 2}, "round"),
        ({"site": "site-2"}, "site"),
        ({"num_examples": 0}, "weight"),
        ({"num_examples": -5}, "weight"),
        ({"num_examples": 101}, "weight"),
        ({"num_examples": 2**200}, "weight"),
        ({"start_digests": b""}, "attestation"),
        ({"start_digests": GOOD.start_digests[:-1]}, "attestation"),
        ({"start_digests": GOOD.start_digests[:-1] + b"?"}, "attestation"),
        ({"metrics": {"train_loss": math.nan}}, "not_finite"),
        ({"metrics": {"train_loss": 10**400}}, "not_finite"),
    ],
)
def test_a_header_that_is_not_the_answer_is_refused(change: dict[str, Any], kind: str) -> None:
    with pytest.raises(Refused) as refused:
        check_header(header(**change), EXPECTED)
    assert refused.value.kind == kind
    assert "\n" not in str(refused.value)


def test_other_inputs_are_refused_but_text_of_its_own_is_its_own() -> None:
    expected = dataclasses.replace(EXPECTED, inputs=Inputs(tokenizer="a", corpus="b", partition="iid"))
    for inputs, kind in (
        (Inputs(), None),
        (expected.inputs, None),
        (Inputs(corpus="c", partition="own"), None),
        (Inputs(corpus="c", partition="iid"), "inputs"),
        (Inputs(tokenizer="c", partition="own"), "inputs"),
    ):
        text = header(inputs=inputs)
        if kind is None:
            assert check_header(text, expected).inputs == inputs
        else:
            with pytest.raises(Refused, match=r"data.*c, before [ab]") as refused:
                check_header(text, expected)
            assert refused.value.kind == kind


def test_another_start_is_named_by_its_first_tensor() -> None:
    other = SENT | {HELD: torch.zeros(2, 3)}
    with pytest.raises(Refused, match=rf"{HELD}.*\(1 such"):
        check_header(header(start_digests=wire.digests(other, CODEC)), EXPECTED)


@given(st.text(max_size=40) | st.dictionaries(st.text(max_size=5), st.integers()).map(json.dumps))
def test_any_text_is_refused_as_damaged(text: str) -> None:
    with pytest.raises(Refused) as refused:
        check_header(text, EXPECTED)
    assert refused.value.kind in ("damaged", "not_finite")


# -- where its tokens went -----------------------------------------------------------------------------------


@pytest.mark.parametrize("load_LE", [[[200, 0, 0]], [[0, 0, 0]], [[1, 2, 3]]])
def test_a_table_of_choices_is_read(load_LE: list[list[int]]) -> None:
    assert check_load(dataclasses.replace(GOOD, load_LE=load_LE), EXPECTED).tolist() == load_LE


def test_who_does_not_say_where_its_tokens_went_has_a_table_of_zeros() -> None:
    assert check_load(dataclasses.replace(GOOD, load_LE=[]), EXPECTED).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    "load_LE",
    [
        [[201, 0, 0]],  # more than top_k for each of its tokens
        [[1, -1, 0]],
        [[1, 2]],
        [[1, 2, 3], [1, 2, 3]],
        [[1, 2], [3]],
        [1, 2, 3],
        [[1.0, 2.0, 3.0]],
        [[True, False, True]],
        [["1", "2", "3"]],
        [[None, 1, 2]],
        [[2**63, 1, 2]],
        [[2**64, 1, 2]],
        [[2**63 - 1, 2**63 - 1, 2]],  # whose sum overflows
        [[{}, 1, 2]],
        [{"a": 1}],
    ],
)
def test_no_other_table_is(load_LE: Any) -> None:
    with pytest.raises(Refused) as refused:
        check_load(dataclasses.replace(GOOD, load_LE=load_LE), EXPECTED)
    assert refused.value.kind == "weight"


# -- the bundles ---------------------------------------------------------------------------------------------


def changed(**changes: Tensor) -> dict[str, bytes]:
    names = {
        "dense": DENSE,
        "held": HELD,
        "moment": MOMENT,
        "ghost": GHOST,
        "stranger": "model.stranger.weight",
    }
    return blobs_of(SENT | {names[key]: value for key, value in changes.items()})


@pytest.mark.parametrize("batch_bytes", [1, 30, 2**20])
@pytest.mark.parametrize("piece", [1, 4, 2**22])
def test_norms_are_root_mean_squares_by_kind(
    monkeypatch: pytest.MonkeyPatch, batch_bytes: int, piece: int
) -> None:
    """Whatever the size of what is looked at together."""
    monkeypatch.setattr(replies_module, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(replies_module, "PIECE", piece)
    dense, held, moment = torch.arange(6.0), torch.full((2, 3), -3.0), torch.full((6,), 0.5)
    norms = checked(changed(dense=dense, held=held, moment=moment))
    update = math.sqrt((55 + 6 * 9) / 12)
    assert norms == {"update": pytest.approx(update), "exp_avg_sq": pytest.approx(0.5)}
    scaled = checked(
        changed(dense=dense, held=held, moment=moment), dataclasses.replace(EXPECTED, step_scale=0.25)
    )
    assert scaled == {"update": pytest.approx(update / 4), "exp_avg_sq": pytest.approx(0.5)}


def test_a_site_may_send_less_than_it_holds() -> None:
    assert checked(blobs_of({DENSE: torch.ones(6)})) == {"update": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ({"dense": torch.tensor([1.0, 2, math.nan, 4, 5, 6])}, "not_finite"),
        ({"held": torch.full((2, 3), math.inf)}, "not_finite"),
        ({"moment": torch.tensor([1.0, 1, 1, 1, 1, -1e-9])}, "not_finite"),
        ({"dense": torch.ones(1, 6)}, "shape"),
        ({"dense": torch.ones(0)}, "shape"),
        ({"dense": torch.ones(6, dtype=torch.bfloat16)}, "dtype"),
        ({"dense": torch.ones(6, dtype=torch.int64)}, "dtype"),
        ({"ghost": torch.ones(2, 3)}, "not_held"),
        ({"stranger": torch.ones(2)}, "unknown_name"),
    ],
)
def test_a_tensor_that_does_not_belong_is_refused(what: dict[str, Tensor], kind: str) -> None:
    assert kind_of(changed(**what)) == kind


@pytest.mark.parametrize("up", LOSSY)
@pytest.mark.parametrize("batch_bytes", [1, 40, 10**6])
def test_a_tensor_in_parts_is_checked_whole_however_it_is_cut(
    up: Any, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into bundles, each of which has all parts of its tensors; and into what is looked at together."""
    generator = torch.Generator().manual_seed(0)
    named = {HELD: torch.randn(64, 80, generator=generator), DENSE: torch.randn(6, generator=generator)}
    codec = up_codec(StrategyConfig(up=up))
    expected = dataclasses.replace(
        EXPECTED, shapes={name: value.shape for name, value in named.items()}, codec=codec,
        digests=dict.fromkeys(named, b""),
    )  # fmt: skip
    blobs, _ = wire.encode_update(named, codec, {})
    norms = checked(blobs, expected)
    monkeypatch.setattr(replies_module, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(wire, "MAX_BUNDLE_BYTES", 100)
    cut, _ = wire.encode_update({**named, "model.embed_tokens.weight": named[HELD]}, codec, {})
    expected.shapes["model.embed_tokens.weight"] = named[HELD].shape  # type: ignore[index]
    expected = dataclasses.replace(expected, digests=dict.fromkeys(expected.shapes, b""))
    assert len(cut) == 3
    again = check_blobs(cut, dataclasses.replace(GOOD, bundle_digests=bundle_digests(cut)), expected)
    assert again.by_name[HELD] == again.by_name["model.embed_tokens.weight"]
    assert norms["update"] == pytest.approx(again.norms["update"], rel=0.01)


def test_numbers_so_large_that_their_square_overflows_are_finite() -> None:
    """They are no accident of arithmetic; what they are is for the comparison with the others to say."""
    norms = checked(changed(dense=torch.full((6,), 3e38)))
    assert norms["update"] > 1e38


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda blobs: {key: blob[:-1] for key, blob in blobs.items()}, "damaged"),
        (lambda blobs: {key: blob + b"\0" for key, blob in blobs.items()}, "damaged"),
        (lambda blobs: dict.fromkeys(blobs, b"garbage" * 20), "damaged"),
        (lambda blobs: {"all": blobs["all"], "again": blobs["all"]}, "damaged"),
        (lambda blobs: {}, "damaged"),
        (lambda blobs: {"all": wire.encode({})}, "damaged"),
        (lambda blobs: blobs | in_one(**{f"{DENSE}:": torch.ones(6)}), "damaged"),
        (lambda blobs: in_one(**{DENSE: torch.full((6,), math.nan), f"{DENSE}:": torch.ones(6)}), "damaged"),
    ],
    ids=[
        "truncated",
        "longer",
        "garbage",
        "a name twice",
        "nothing",
        "no tensor",
        "a name twice, otherwise written",
        "a bad tensor behind a good one",
    ],
)
def test_bundles_that_cannot_be_read_are_refused(damage: Any, kind: str) -> None:
    assert kind_of(damage(blobs_of(SENT))) == kind


@pytest.mark.parametrize("flip", [0, 40, -1], ids=["size", "header", "data"])
def test_bundles_are_held_against_their_digests(flip: int) -> None:
    blobs = blobs_of(SENT)
    reply = dataclasses.replace(GOOD, bundle_digests=bundle_digests(blobs))
    blob = bytearray(blobs["all"])
    blob[flip] ^= 1
    for arrived in ({"all": bytes(blob)}, {}, {"other": blobs["all"]}, blobs | {"more": blobs["all"]}):
        with pytest.raises(Refused) as refused:
            check_blobs(arrived, reply, EXPECTED)
        assert refused.value.kind == "digest"
    assert check_blobs(blobs, reply, EXPECTED)


@given(st.data())
def test_any_bytes_are_refused_or_good(data: st.DataObject) -> None:
    """Whatever arrives under digests that are in order; anything but Refused is a bug."""
    blob = bytearray(blobs_of(SENT)["all"])
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        norms = checked({"all": bytes(blob)})
    except Refused:
        return
    assert all(math.isfinite(norm) for norm in norms.values())


def named_bundle(name: str, **changes: Any) -> bytes:
    """A bundle of one tensor, as whoever likes may write it."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
    text = json.dumps({name: entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


MANY_DIGITS = "model.layers.0.mlp.experts." + "1" * 4301 + ".up_proj.weight"


@pytest.mark.parametrize(
    ("blobs", "kind", "said"),
    [
        ({"all": named_bundle(MANY_DIGITS)}, "damaged", "name of 4343 characters"),
        ({"all": named_bundle("\x1b[2J\nmodel")}, "unknown_name", r"\\x1b\[2J model"),
        ({"all": named_bundle("a\ud800")}, "unknown_name", r"a\\ud800"),
        ({"all": named_bundle("a" * 5000)}, "damaged", "header has"),
        ({"all": named_bundle(DENSE, shape=[1] * 9)}, "damaged", "whole numbers, and few"),
        (
            blobs_of(SENT) | {f"more {number}": wire.encode({}) for number in range(1100)},
            "damaged",
            "1101 bundles",
        ),
        (blobs_of(SENT) | {"more": wire.encode({})}, "damaged", "without tensors"),
    ],
    ids=[
        "digits",
        "escapes",
        "surrogate",
        "long",
        "dimensions",
        "1,100 empty bundles",
        "an empty bundle",
    ],
)
def test_what_is_made_to_break_a_parser_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, blobs: dict[str, bytes], kind: str, said: str
) -> None:
    monkeypatch.setattr(Expected, "longest_header", 4700)
    with pytest.raises(Refused, match=said) as refused:
        checked(blobs)
    assert refused.value.kind == kind
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= 3000


def test_numbers_of_thousands_of_digits_are_not_multiplied() -> None:
    """3,000 of them take minutes."""
    blob = named_bundle(DENSE, shape=[1])
    text = blob[8:-4].replace(b"[1]", b"[" + b",".join([b"9" * 4000] * 3000) + b"]")
    with pytest.raises(Refused, match="header has") as refused:
        checked({"all": len(text).to_bytes(8, "little") + text + bytes(4)})
    assert refused.value.kind == "damaged"


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (header().replace('"round":3', '"round":3,"round":3'), "damaged", "twice"),
        (header() + " " * 100_000, "damaged", "characters, at most"),
        (header(metrics={"loss": 1e300}), "not_finite", "at most 1e"),
        (header(metrics={"steps": 10**300}), "not_finite", "at most 1e"),
    ],
    ids=["a key twice", "long", "large", "a large integer"],
)
def test_a_header_that_is_made_to_break_something_is_refused(text: str, kind: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as refused:
        check_header(text, EXPECTED)
    assert refused.value.kind == kind


def test_names_of_metrics_are_shown_as_text() -> None:
    assert check_header(header(metrics={"\x1b[31mloss\n": 1.0}), EXPECTED).metrics == {"\\x1b[31mloss": 1.0}


def test_a_round_that_took_next_to_no_time_has_finite_figures() -> None:
    """Tokens a second would not be JSON, and would spoil the line of everyone's metrics."""
    assert check_header(header(metrics={"seconds": 5e-324}), EXPECTED).metrics == {"seconds": 0.0}


# -- outliers ------------------------------------------------------------------------------------------------


def norms(*values: float) -> dict[int, dict[str, float]]:
    return {site: {"update": value} for site, value in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "history", "bound", "expected"),
    [
        ((1.0, 1.2, 0.9), (), 10, set()),
        ((1.0, 1.2, 30.0), (), 10, {2}),
        ((1.0, 30.0), (), 10, {1}),  # two sites: it cannot hide in a median of its own
        ((30.0,), (), 10, set()),  # nobody to compare with
        ((30.0,), (1.0, 1.0), 10, {0}),  # but rounds before
        ((30.0, 31.0), (1.0, 1.0, 1.0), 10, {0, 1}),  # one other may be as bad
        ((30.0, 31.0, 29.0), (1.0,) * 32, 10, set()),  # what all have in common is no site's fault
        ((1.0, 30.0), (), 0, set()),  # switched off
        ((0.0, 0.0, 0.0), (), 10, set()),  # nothing learnt at all is no crime
        ((1.0, math.inf, 1.0), (), 10, {1}),
        ((0.001, 1.0, 1.0), (), 10, set()),  # small is allowed: a site with little to say
    ],
)
def test_outliers_by_hand(values: Any, history: Any, bound: float, expected: set[int]) -> None:
    found = outliers(norms(*values), [{"update": value} for value in history], bound)
    assert found.keys() == expected


def test_each_kind_of_tensor_is_compared_with_its_like() -> None:
    replies = {site: {"update": 1.0, "exp_avg_sq": 1e-8} for site in range(3)}
    replies[1] = {"update": 1.0, "exp_avg_sq": 1e-3}
    found = outliers(replies, [], 10)
    assert found.keys() == {1}
    assert all(word in found[1] for word in ("exp_avg_sq", "0.001", "1e-08", "strategy.norm_bound=10"))


@given(st.lists(st.floats(0.1, 0.9), min_size=2, max_size=9), st.floats(1.0, 1e6))
def test_one_bad_site_never_gets_a_good_one_refused(values: list[float], huge: float) -> None:
    assert set(outliers(norms(*values, huge * 100), [], 10)) == {len(values)}


# -- on the disk ---------------------------------------------------------------------------------------------

UPDATE = {DENSE: torch.arange(6.0), "model.embed_norm.weight": torch.ones(2, 3)}
UPDATE_SHAPES = {name: value.shape for name, value in UPDATE.items()}


def filled(folder: Path) -> Inbox:
    inbox = Inbox(folder, CASTS["bf16"])
    inbox.begin(3)
    parts, _ = CASTS["bf16"].encode(UPDATE, {})
    inbox.put(7, '{"a":"é"}', {"../../escape": wire.encode(parts)})  # a key is never a path
    return inbox


def test_a_reply_comes_back_as_it_arrived(tmp_path: Path) -> None:
    filled(tmp_path / "inbox").close()
    assert [path.name for path in tmp_path.iterdir()] == ["inbox"]
    again = Inbox(tmp_path / "inbox", CASTS["bf16"])
    assert again.begin(3) == [7]
    text, blobs = again.get(7)
    assert text == '{"a":"é"}'
    assert list(blobs) == ["../../escape"]
    assert wire.from_blobs(blobs.values()).keys() == UPDATE.keys()
    for _ in range(2):  # it can be read again
        tensors = again.tensors(7, {DENSE: (6,), "model.stranger": (2,)})
        assert tensors.keys() == {DENSE}
        assert torch.equal(tensors[DENSE], torch.arange(6.0).bfloat16())
    again.clear()
    assert not (tmp_path / "inbox").exists()


def test_another_round_and_what_is_half_written_is_dropped(tmp_path: Path) -> None:
    filled(tmp_path / "inbox").close()
    half = tmp_path / "inbox/round_00003/8.partial"
    half.mkdir()
    assert Inbox(tmp_path / "inbox", CODEC).begin(3) == [7]
    assert not half.exists()
    assert Inbox(tmp_path / "inbox", CODEC).begin(4) == []
    assert [path.name for path in (tmp_path / "inbox").iterdir()] == ["round_00004"]


def test_a_reply_can_be_dropped(tmp_path: Path) -> None:
    inbox = filled(tmp_path / "inbox")
    inbox.drop(7)
    assert inbox.begin(3) == []


def test_no_file_stays_open_when_its_tensors_are_gone(tmp_path: Path) -> None:
    """The replies of a hundred sites, where so many files may not be open."""
    inbox = Inbox(tmp_path / "inbox", CODEC)
    inbox.begin(1)
    for site in range(100):
        inbox.put(site, "{}", {"dense": blobs_of({DENSE: torch.full((6,), float(site))})["all"]})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    twenty_more = [number for number in range(100_000) if number not in opened][20]
    resource.setrlimit(resource.RLIMIT_NOFILE, (twenty_more, limits[1]))
    try:
        total = sum(float(inbox.tensors(site, {DENSE: (6,)})[DENSE].sum()) for site in range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert total == 6 * 99 * 100 / 2


def test_replies_that_a_server_has_died_of_are_dropped(tmp_path: Path) -> None:
    """A server that was killed may have been killed by one of them. Once or twice is chance."""
    filled(tmp_path / "inbox")
    for _ in range(MOST_STARTS - 1):
        assert Inbox(tmp_path / "inbox", CODEC).begin(3) == [7]
    assert Inbox(tmp_path / "inbox", CODEC).begin(3) == []


def test_a_damaged_bundle_is_not_read(tmp_path: Path) -> None:
    inbox = filled(tmp_path / "inbox")
    path = tmp_path / "inbox/round_00003/7/bundle-0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WireError, match=r"leave bytes over|do not hold"):
        inbox.tensors(7, UPDATE_SHAPES)


def test_what_somebody_else_put_there_is_no_reply(tmp_path: Path) -> None:
    for name in ("abc", "²", "3 copy"):
        (tmp_path / "inbox" / "round_00003" / name).mkdir(parents=True)
    assert Inbox(tmp_path / "inbox", CODEC).begin(3) == []
