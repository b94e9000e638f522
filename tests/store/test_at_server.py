"""The server's half: each bundle once, replies that are what was announced, and nothing left behind."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fomoe_flwr.bundle_file import PAGE
from fomoe_flwr.errors import StoreError, WireError
from fomoe_flwr.store import at_server
from fomoe_flwr.store.at_server import StoredMessages
from fomoe_flwr.store.at_site import send_reply
from fomoe_flwr.store.links import Patience
from fomoe_flwr.store.messages import StoredObject, StoredReply, StoredShard
from fomoe_flwr.store.objects import Store
from fomoe_flwr.store.transfer import send
from tests.store.helpers import PIECE, QUICK, in_one_line, sha256, some_bytes
from tests.store.servers import Line

MOST = 10**6


def put(
    sent: StoredMessages, bundles: dict[int, dict[str, bytes]], round_: int = 1
) -> dict[int, StoredShard]:
    return sent.put(bundles, dict.fromkeys(bundles, MOST), round_, 60)


def answer(store: Store, shard: StoredShard, tmp_path: Path, content: bytes = b"reply") -> StoredReply:
    return send_reply({"dense": content}, shard, tmp_path / "site", store.shared, QUICK)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    return tmp_path / "inbox" / "round_00001"


@pytest.mark.parametrize("sites", [1, 2, 7])
def test_each_bundle_is_stored_once_whatever_the_number_of_sites(
    bucket: Store, line: Line, sites: int
) -> None:
    """And travels once: also if the same bytes are two objects in memory."""
    size = 50 * PIECE
    common, shared = some_bytes(size), some_bytes(size, 1)
    bundles = {
        site: {
            "dense": common,
            "expert-1": shared if site % 2 else bytes(bytearray(shared)),
            "expert-2": some_bytes(size, 10 + site),
        }
        for site in range(sites)
    }
    before = line.uploaded
    shards = put(StoredMessages(bucket), bundles)
    unique = {blob for own in bundles.values() for blob in own.values()}
    assert len(unique) == 2 + sites
    assert bucket.names() == {sha256(blob): size for blob in unique}
    assert len(unique) * size < line.uploaded - before < len(unique) * (size + 2000)
    links = {bundle.link for shard in shards.values() for bundle in shard.bundles.values()}
    assert len(links) == 2 + sites
    assert len({link for shard in shards.values() for link in shard.replies}) == sites
    for site, shard in shards.items():
        assert {key: bundle.sha256 for key, bundle in shard.bundles.items()} == {
            key: sha256(blob) for key, blob in bundles[site].items()
        }


def test_each_bundle_is_one_file(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), "run", QUICK)
    bundles = {site: {"dense": b"common", "expert": bytes(bytearray(b"own"))} for site in range(5)}
    put(StoredMessages(store), bundles)
    files = [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert sorted(files) == sorted([sha256(b"common"), sha256(b"own")])


def test_a_message_is_short(store: Store) -> None:
    bundles = {0: {f"expert-{number}": some_bytes(10 * PIECE, number) for number in range(8)}}
    assert len(put(StoredMessages(store), bundles)[0].to_json()) < 10_000


def test_replies_come_back(store: Store, tmp_path: Path, inbox: Path) -> None:
    sent = StoredMessages(store)
    shards = put(sent, {site: {"dense": b"x"} for site in range(3)})
    for site, shard in shards.items():
        update = {"dense": some_bytes(3 * PIECE, site), "expert": some_bytes(7, site)}
        reply = send_reply(dict(update), shard, tmp_path / f"site-{site}", store.shared, QUICK)
        blobs = sent.fetch(site, sent.announced(site, reply.to_json()), inbox, 60)
        assert list(blobs) == list(update)
        assert {key: blob[:] for key, blob in blobs.items()} == update
        # Its file has no name any more.
        assert list(inbox.iterdir()) == []


def test_a_site_of_any_name_that_a_federation_may_have(store: Store, tmp_path: Path, inbox: Path) -> None:
    """Its number stands for it: `_a` and `münchen` are names of sites, and not of objects in every store."""
    sent = StoredMessages(store)
    reply = answer(store, put(sent, {3: {"dense": b"x"}})[3], tmp_path)
    assert any(name.startswith("replies/000001/3-") for name in store.names())
    assert sent.fetch(3, reply, inbox, 60)["dense"][:] == b"reply"


def test_another_size_or_digest_is_one_line_and_leaves_nothing(
    store: Store, tmp_path: Path, inbox: Path
) -> None:
    sent = StoredMessages(store)
    shard = put(sent, {0: {"dense": b"x"}})[0]
    content = some_bytes(3 * PIECE)
    good = answer(store, shard, tmp_path, content).objects[0]
    for wrong, words in (
        (StoredObject(good.sha256, {"dense": len(content) - 1}), f"{len(content) - 1} were announced"),
        (StoredObject(good.sha256, {"dense": len(content) + 1}), f"{len(content) + 1} were announced"),
        (StoredObject(good.sha256, {"dense": 1, "expert": len(content)}), f"{PAGE + len(content)} were announced"),
        (StoredObject(sha256(b"else"), good.sizes), "other bytes than announced"),
    ):  # fmt: skip
        with pytest.raises(StoreError) as caught:
            sent.fetch(0, StoredReply([wrong]), inbox, 60)
        in_one_line(caught.value, "replies/000001/0-", words)
        assert list(inbox.iterdir()) == []
    # The same bytes cut otherwise are the same object: what is in it, is looked at by who reads it.
    cut = StoredObject(good.sha256, {"dense": len(content)})
    assert sent.fetch(0, StoredReply([cut]), inbox, 60)["dense"][:] == content


def test_a_reply_that_was_altered_or_never_came(store: Store, tmp_path: Path, inbox: Path) -> None:
    sent = StoredMessages(store)
    shard = put(sent, {0: {"dense": b"x"}})[0]
    reply = answer(store, shard, tmp_path, b"right")
    send(shard.replies[0], b"wrong", store.shared, QUICK)
    with pytest.raises(StoreError) as caught:
        sent.fetch(0, reply, inbox, 60)
    in_one_line(caught.value, "other bytes than announced")
    store.delete([name for name in store.names() if name.startswith("replies")])
    with pytest.raises(StoreError) as caught:
        sent.fetch(0, reply, inbox, 60)
    in_one_line(caught.value, "no such object")


def test_what_is_larger_than_announced_is_refused_before_its_bytes_come(
    bucket: Store, tmp_path: Path, inbox: Path, line: Line
) -> None:
    sent = StoredMessages(bucket)
    shard = put(sent, {0: {"dense": b"x"}})[0]
    reply = answer(bucket, shard, tmp_path, some_bytes(PIECE))
    send(shard.replies[0], some_bytes(500 * PIECE), None, QUICK)
    before = line.downloaded
    with pytest.raises(StoreError) as caught:
        sent.fetch(0, reply, inbox, 60)
    in_one_line(caught.value, f"{500 * PIECE} bytes, {PIECE} were announced")
    assert line.downloaded - before < 100 * PIECE
    # And more than its reply can need may not even be announced.
    large = StoredReply([StoredObject(sha256(b""), {"dense": MOST + 1})]).to_json()
    before = line.downloaded
    with pytest.raises(WireError, match=f"at most {MOST} are expected"):
        sent.announced(0, large)
    assert line.downloaded == before


def test_no_room_for_a_reply_is_one_line(
    store: Store, tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = StoredMessages(store)
    reply = answer(store, put(sent, {0: {"dense": b"x"}})[0], tmp_path)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StoreError) as caught:
        sent.fetch(0, reply, inbox, 60)
    in_one_line(caught.value, "No space left on device")
    assert list(inbox.iterdir()) == []


def test_objects_of_older_messages_go_and_at_the_end_all(store: Store, tmp_path: Path) -> None:
    other = Store(store._url.rpartition("/")[0], "of-another-run", QUICK)
    foreign = other.put(b"foreign")
    with StoredMessages(store) as sent:
        first = put(sent, {0: {"dense": b"common", "expert": b"old"}})
        reply = answer(store, first[0], tmp_path)
        assert len(store.names()) == 3
        put(sent, {0: {"dense": b"common", "expert": b"new"}}, 2)
        assert set(store.names()) == {sha256(b"common"), sha256(b"new")}
        third = put(sent, {0: {"expert": b"new"}}, 3)
        assert set(store.names()) == {sha256(b"new")}
        with pytest.raises(StoreError):
            sent.fetch(0, reply, tmp_path, 60)
        answer(store, third[0], tmp_path)
        assert len(store.names()) == 2
    assert store.names() == {}
    if store.shared is not None:
        assert [path.name for path in store.shared.iterdir()] == ["of-another-run"]
    assert set(other.names()) == {foreign}
    other.sweep(())


def test_nothing_is_left_after_a_run_that_failed(store: Store, tmp_path: Path) -> None:
    def interrupted(sent: StoredMessages) -> None:
        answer(store, put(sent, {0: {"dense": b"common"}})[0], tmp_path)
        assert len(store.names()) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), StoredMessages(store) as sent:
        interrupted(sent)
    assert store.names() == {}


def test_a_server_that_was_killed_goes_on_in_the_same_round(
    store: Store, tmp_path: Path, inbox: Path
) -> None:
    """What it left is deleted, and the sites can write all the same: in a folder, an old reply's folder is the new
    one's.
    """
    before = put(StoredMessages(store), {0: {"dense": b"common"}, 1: {"dense": b"common"}})
    for shard in before.values():
        answer(store, shard, tmp_path, b"before")
    sent = StoredMessages(store)
    after = put(sent, {0: {"dense": b"common"}, 1: {"dense": b"common"}})
    assert set(store.names()) == {sha256(b"common")}
    for site, shard in after.items():
        reply = answer(store, shard, tmp_path, b"after")
        assert sent.fetch(site, reply, inbox, 60)["dense"][:] == b"after"


def test_a_store_that_is_down_is_one_line_and_is_not_waited_for_longer_than_it_must(
    bucket: Store,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At the start a minute, and at the end of a run half of one, whatever the patience is in between."""
    monkeypatch.setattr(at_server, "START_S", 0.3)
    monkeypatch.setattr(at_server, "SWEEP_S", 0.2)
    monkeypatch.setattr(logging.getLogger("fomoe"), "propagate", True)
    patient = Store(bucket._url.rpartition("/")[0], "run", Patience(seconds=3600, stall=0.1, first_wait=0.01))
    line.go_down()
    began = time.monotonic()
    with pytest.raises(StoreError) as caught, StoredMessages(patient):
        pass
    in_one_line(caught.value, "s3://bucket/some/where/run", "given up after 0.", "the store does not answer")
    line.faults.clear()
    with StoredMessages(patient) as sent:
        put(sent, {0: {"dense": b"common"}})
        line.go_down()
    assert "cannot delete old objects: s3://bucket/some/where/run: given up after 0." in caplog.text
    assert "Signature" not in caplog.text
    # Not the hour that the store is given.
    assert time.monotonic() - began < 60
    line.faults.clear()
    # Of a round that could not delete, the next one does.
    assert set(patient.names()) == {sha256(b"common")}
    put(sent, {0: {"dense": b"other"}})
    assert set(patient.names()) == {sha256(b"other")}
    patient.sweep(())


@pytest.mark.parametrize("why", ["Ctrl-C", "one is refused"])
def test_a_store_that_is_down_does_not_keep_a_run_from_ending(
    bucket: Store, line: Line, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    patient = Store(bucket._url.rpartition("/")[0], "run", Patience(seconds=3600, stall=0.1, first_wait=0.01))
    bundles = {site: {"dense": some_bytes(10, site)} for site in range(8)}
    line.go_down()
    if why == "Ctrl-C":
        timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
    else:
        real = Store.put

        def refusing_one(self: Store, source: bytes, **options: Any) -> str:
            if source == bundles[2]["dense"]:
                raise StoreError("no permission")
            return real(self, source, **options)

        monkeypatch.setattr(Store, "put", refusing_one)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt if why == "Ctrl-C" else StoreError):
        put(StoredMessages(patient), bundles)
    assert time.monotonic() - began < 60


def test_a_reply_that_came_late_still_has_some_time(store: Store, tmp_path: Path, inbox: Path) -> None:
    sent = StoredMessages(store)
    reply = answer(store, put(sent, {0: {"dense": b"x"}})[0], tmp_path)
    assert sent.fetch(0, reply, inbox, -100.0)["dense"][:] == b"reply"


def test_a_shared_disk_that_goes_away(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), "run", QUICK)
    with StoredMessages(store) as sent:
        shard = put(sent, {0: {"dense": b"x"}})[0]
        shutil.rmtree(tmp_path / "store")
        with pytest.raises(StoreError) as caught:
            answer(store, shard, tmp_path)
        in_one_line(caught.value, "is the shared disk mounted")
        # In place of the disk lies something else.
        (tmp_path / "store").write_text("")
        with pytest.raises(StoreError) as caught:
            put(sent, {0: {"dense": b"y"}})
        in_one_line(caught.value, str(tmp_path / "store"))
