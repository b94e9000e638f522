"""What messages say of objects: a round trip, and whatever a stranger may say instead."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr import wire
from fomoe_flwr.bundle_file import PAGE, padded
from fomoe_flwr.errors import WireError
from fomoe_flwr.store import messages
from fomoe_flwr.store.messages import (
    StoredBundle,
    StoredObject,
    StoredReply,
    StoredShard,
    in_objects,
    most_objects,
)
from tests.store.helpers import in_one_line

DIGEST = "0123456789abcdef" * 4
MUCH = 2**40

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
keys = st.text(min_size=1, max_size=100)
sizes = st.dictionaries(keys, st.integers(1, 2**40), min_size=1, max_size=6)
bundles = st.builds(StoredBundle, st.text(), digests, st.integers(0))


@given(
    st.dictionaries(keys, bundles, max_size=4),
    st.lists(st.text(), min_size=1, max_size=3),
    st.none() | st.text(),
)
def test_a_shard_comes_back(bundles: dict[str, StoredBundle], replies: list[str], folder: str | None) -> None:
    shard = StoredShard(bundles, replies, folder)
    again = StoredShard.from_json(shard.to_json())
    assert again == shard
    assert list(again.bundles) == list(bundles)


@given(st.lists(st.tuples(digests, sizes), min_size=1, max_size=3))
def test_a_reply_comes_back(parts: list[tuple[str, dict[str, int]]]) -> None:
    named = [
        StoredObject(digest, {f"{at}{key[1:]}": size for key, size in own.items()})
        for at, (digest, own) in enumerate(parts)
    ]
    reply = StoredReply(named)
    again = StoredReply.from_json(reply.to_json(), reply.nbytes + MUCH)
    assert again == reply
    assert [list(item.sizes) for item in again.objects] == [list(item.sizes) for item in named]


def test_the_bytes_of_an_object_are_its_bundles_each_from_a_page_on() -> None:
    assert StoredObject(DIGEST, {"a": 1}).nbytes == 1
    assert StoredObject(DIGEST, {"a": 1, "b": PAGE, "c": 7}).nbytes == 2 * PAGE + 7
    assert StoredReply([StoredObject(DIGEST, {"a": 1}), StoredObject(DIGEST, {"b": 2})]).nbytes == 3


def reply_text(sizes: object = None, digest: object = DIGEST, **more: object) -> str:
    return json.dumps(
        {"objects": [{"sha256": digest, "sizes": {"a": 5} if sizes is None else sizes, **more}]}
    )


HUGE = "9" * 5000
STRANGE = {
    "empty": "",
    "no JSON": "{",
    "a number": "7",
    "null": "null",
    "a list": '["objects"]',
    "a text": '"objects"',
    "no keys": "{}",
    "another key": '{"objects":[],"link":"http://here"}',
    "an older version": f'{{"sha256":"{DIGEST}","sizes":{{"a":5}}}}',
    "no list": '{"objects":{"0":1}}',
    "no objects": '{"objects":[]}',
    "numbers": '{"objects":[1]}',
    "lists": '{"objects":[[[1]]]}',
    "a second key": reply_text(name="replies/000001/0-0"),
    "twice a key": f'{{"objects":[{{"sha256":"{DIGEST}","sizes":{{"a":5,"a":5}}}}]}}',
    "a short digest": reply_text(digest="ff"),
    "a path for a digest": reply_text(digest="../" * 21 + "x"),
    "a digest with a line break": reply_text(digest=DIGEST + "\n"),
    "a digest of capitals": reply_text(digest="A" * 64),
    "a number for a digest": reply_text(digest=int("1" * 64)),
    "no bundles": reply_text({}),
    "sizes in a list": reply_text([5]),
    "a size of nothing": reply_text({"a": 0}),
    "a negative size": reply_text({"a": -5}),
    "one that makes up for another": reply_text({"a": 2**50, "b": -(2**50) + 1}),
    "true": reply_text({"a": True}),
    "a fraction": reply_text({"a": 5.0}),
    "a text for a size": reply_text({"a": "5"}),
    "null for a size": reply_text({"a": None}),
    "infinity": reply_text().replace("5}", "Infinity}"),
    "not a number": reply_text().replace("5}", "NaN}"),
    "a huge number": reply_text().replace("5}", f"{HUGE}}}"),
    "a large number": reply_text({"a": 10**300}),
    "a byte too many": reply_text({"a": 1001}),
    "a page too many": reply_text({"a": 1, "b": 1}),
    "a long name": reply_text({"a" * 101: 5}),
    "many bundles": reply_text({str(number): 1 for number in range(10**5)}),
    "many objects": json.dumps({"objects": [{"sha256": DIGEST, "sizes": {str(n): 1}} for n in range(10**4)]}),
    "deep": "[" * 10**6,
    "deep in a size": reply_text().replace("5}", "[" * 10**5),
    "too long": " " * 2**24 + reply_text(),
    "line breaks": '{"objects":[],"\\n\\u001b[31m":1}',
    "a lone surrogate": reply_text({"\ud800" * 200: 5}),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_a_stranger_says_is_refused_in_one_line(what: str) -> None:
    with pytest.raises(WireError) as caught:
        StoredReply.from_json(STRANGE[what], 1000)
    in_one_line(caught.value, "stored: ")
    assert len(str(caught.value)) < 500
    assert "http" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
almost = st.fixed_dictionaries(
    {
        "objects": st.lists(
            st.fixed_dictionaries(
                {"sha256": digests | json_values, "sizes": st.dictionaries(keys, json_values, max_size=4)}
            ),
            max_size=3,
        )
    }
)


@given(json_values | almost, st.integers(0, 2**36))
def test_anything_is_a_reply_within_its_bounds_or_refused(values: object, most: int) -> None:
    try:
        reply = StoredReply.from_json(json.dumps(values), most)
    except WireError as error:
        in_one_line(error)
        return
    assert 0 < reply.nbytes <= most
    assert StoredReply.from_json(reply.to_json(), most) == reply


def test_the_largest_that_is_allowed_and_a_byte_more() -> None:
    text = StoredReply([StoredObject(DIGEST, {"a": 10, "b": 20})]).to_json()
    assert StoredReply.from_json(text, PAGE + 20).nbytes == PAGE + 20
    with pytest.raises(WireError, match=f"{PAGE + 20} bytes, at most {PAGE + 19} are expected"):
        StoredReply.from_json(text, PAGE + 19)


def test_little_bundles_cannot_take_all_file_descriptors() -> None:
    """Each is mapped by itself. An honest reply has as few as `wire.split_bundle` makes of it."""
    most = 10 * wire.MAX_BUNDLE_BYTES

    def text(number: int) -> str:
        assert number * PAGE < most
        return reply_text({str(index): 1 for index in range(number)})

    assert len(StoredReply.from_json(text(22), most).objects[0].sizes) == 22
    with pytest.raises(WireError, match="23 bundles, at most 22"):
        StoredReply.from_json(text(23), most)


@given(st.lists(st.integers(1, 2 * wire.MAX_BUNDLE_BYTES), min_size=1, max_size=40), st.integers(0, 40))
def test_no_honest_reply_has_too_many_bundles_or_objects(tensors: list[int], dense: int) -> None:
    named = {str(index): nbytes for index, nbytes in enumerate(tensors)}
    parts = [
        sum(named[name] for name in some)
        for names in (list(named)[:dense], list(named)[dense:])
        for some in wire.split_bundle(names, named, wire.MAX_BUNDLE_BYTES)
    ]
    sizes = {str(index): nbytes for index, nbytes in enumerate(parts)}
    reply = StoredReply(
        [StoredObject(DIGEST, {key: sizes[key] for key in some}) for some in in_objects(sizes)]
    )
    # What `Expected.longest_reply` allows for is no less.
    most = sum(tensors) + len(parts) * PAGE
    assert StoredReply.from_json(reply.to_json(), most) == reply


@given(st.lists(st.integers(1, 10 * PAGE), max_size=30))
def test_objects_are_in_order_and_no_larger_than_a_store_takes(own: list[int]) -> None:
    largest = 12 * PAGE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "LARGEST", largest)
        sizes = {str(index): size for index, size in enumerate(own)}
        cut = list(in_objects(sizes))
        assert len(cut) <= most_objects(sum(padded(size) for size in own))
    assert [key for some in cut for key in some] == list(sizes)
    room = [sum(padded(sizes[key]) for key in some) for some in cut]
    assert all(0 < nbytes <= largest for nbytes in room)
    assert all(a + b > largest for a, b in itertools.pairwise(room))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"bundles":[],"replies":[]}', '{"bundles":{"a":{}},"replies":[]}',
        '{"bundles":{"a":{"link":"l","sha256":"../x","nbytes":1}},"replies":["l"]}',
        '{"bundles":{"a":{"link":"http://h/o?X-Amz-Signature=s","sha256":"/etc/x","nbytes":1}},"replies":["l"]}',
        '{"bundles":{"a":{"link":"l","sha256":7,"nbytes":1}},"replies":["l"]}',
        '{"bundles":{"a":{"link":"l","sha256":"%s","nbytes":"1"}},"replies":["l"]}' % ("0" * 64),
        '{"bundles":{"a":{"link":"l","sha256":"%s","nbytes":1.5}},"replies":["l"]}' % ("0" * 64),
        '{"bundles":{"a":{"link":5,"sha256":"%s","nbytes":1}},"replies":["l"]}' % ("0" * 64),
        '{"bundles":{},"replies":[null]}', '{"bundles":{},"replies":{"a":"l"}}',
        '{"bundles":{},"reply":"l"}', '{"bundles":{},"replies":[]}', "[" * 10**6,
    ],
)  # fmt: skip
def test_a_shard_of_another_version_is_said_without_its_links(text: str) -> None:
    with pytest.raises(WireError) as caught:
        StoredShard.from_json(text)
    in_one_line(caught.value, "stored: server and site differ in version")
