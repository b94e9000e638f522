"""A site's half: it reads and writes what it has links for, and nothing of it stays on its disk."""

from __future__ import annotations

import contextlib
import http.client
import mmap
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from fomoe_flwr.bundle_file import PAGE
from fomoe_flwr.errors import StoreError, WorkerError
from fomoe_flwr.store import at_site, messages
from fomoe_flwr.store.at_server import StoredMessages
from fomoe_flwr.store.at_site import INCOMING, fetch_shard, forget, send_reply
from fomoe_flwr.store.links import Patience
from fomoe_flwr.store.messages import StoredBundle, StoredShard
from fomoe_flwr.store.objects import Store
from fomoe_flwr.store.transfer import WrongBytesError
from tests.store.helpers import PIECE, QUICK, content_of, in_one_line, sha256, some_bytes
from tests.store.servers import Line

MOST = 10**6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "run" / "site"


def shards(store: Store, *bundles: dict[str, bytes], seconds: float = 60.0) -> dict[int, StoredShard]:
    """A message to each of some sites."""
    by_site = dict(enumerate(bundles))
    return StoredMessages(store).put(by_site, dict.fromkeys(by_site, MOST), 1, seconds)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def read(blobs: dict[str, bytes]) -> dict[str, bytes]:
    return {key: blob[:] for key, blob in blobs.items()}


def test_a_shard_comes_and_a_reply_goes(store: Store, folder: Path) -> None:
    bundles = {"dense": some_bytes(3 * PIECE + 7), "expert-1": some_bytes(100), "again": some_bytes(100)}
    shard = shards(store, bundles)[0]
    seen = [0]
    blobs = fetch_shard(shard, folder, store.shared, QUICK, lambda: seen.append(0))
    assert read(blobs) == bundles
    assert list(blobs) == list(bundles)
    assert len(seen) > 4
    # Where they lie: not in memory.
    assert all(isinstance(blob, mmap.mmap) for blob in blobs.values())
    update = {"dense": some_bytes(PAGE + 1), "expert": some_bytes(5)}
    beats = len(seen)
    reply = send_reply(dict(update), shard, folder, store.shared, QUICK, lambda: seen.append(0))
    assert len(seen) > beats
    assert [list(item.sizes.items()) for item in reply.objects] == [[("dense", PAGE + 1), ("expert", 5)]]
    assert sorted(path.name for path in files(folder)) == sorted({sha256(blob) for blob in bundles.values()})
    forget(shard, folder)
    assert list(folder.iterdir()) == []
    # They stay as long as they are used.
    assert read(blobs) == bundles
    forget(shard, folder)


def test_the_reply_lies_on_the_disk_while_it_is_sent(store: Store, folder: Path) -> None:
    blobs = {"dense": some_bytes(10), "expert": some_bytes(20)}
    send_reply(blobs, shards(store, {})[0], folder, store.shared, QUICK)
    assert blobs == {}


def test_a_large_reply_is_cut_into_objects(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a store takes no more than 5 GB by one link."""
    monkeypatch.setattr(messages, "LARGEST", 2 * PAGE)
    monkeypatch.setattr(messages, "_TWO_BUNDLES", 2 * PAGE)
    update = {"dense": some_bytes(PAGE), "dense.1": some_bytes(3 * PAGE), "expert": b"x", "expert.1": b"y"}
    most = sum(len(blob) for blob in update.values()) + 4 * PAGE
    sent = StoredMessages(store)
    shard = sent.put({0: {}}, {0: most}, 1, 60)[0]
    assert len(set(shard.replies)) == 1 + most // PAGE
    reply = send_reply(dict(update), shard, folder, store.shared, QUICK)
    assert [list(item.sizes) for item in reply.objects] == [["dense"], ["dense.1"], ["expert", "expert.1"]]
    assert read(sent.fetch(0, sent.announced(0, reply.to_json()), folder, 60)) == update
    with pytest.raises(StoreError) as caught:
        send_reply(dict(update), StoredShard({}, shard.replies[:2]), folder, store.shared, QUICK)
    in_one_line(caught.value, "the reply needs 3 objects, the server has links for 2")


def test_what_came_before_does_not_come_again_and_all_else_of_it_goes(store: Store, folder: Path) -> None:
    """As when the round before was discarded."""
    first = {"dense": some_bytes(PIECE), "expert": some_bytes(PIECE, 1)}
    before = shards(store, first)[0]
    blobs = fetch_shard(before, folder, store.shared, QUICK)
    half = files(folder)[0].with_name(f"{sha256(b'half')}.part-{sha256(b'half')[:16]}")
    half.write_bytes(b"half of it")
    second = {"dense": first["dense"], "expert": some_bytes(PIECE, 2)}
    shard = shards(store, second)[0]
    store.delete([sha256(first["dense"])])
    assert read(fetch_shard(shard, folder, store.shared, QUICK)) == second
    assert {path.name for path in files(folder)} == {sha256(blob) for blob in second.values()}
    # The first message may still be in work, and answered: the second has its bundles all the same.
    assert read(blobs) == first
    if store.shared is None:
        send_reply({"dense": b"late"}, before, folder, store.shared, QUICK)
    forget(before, folder)
    assert {path.name for path in files(folder)} == {sha256(blob) for blob in second.values()}
    forget(shard, folder)
    assert list(folder.iterdir()) == []


def test_the_next_message_may_come_while_one_is_answered(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a site that is late, or begins before its message is there."""
    sent = StoredMessages(store)
    first = sent.put({0: {"dense": some_bytes(5 * PIECE)}}, {0: MOST}, 1, 60)[0]
    fetch_shard(first, folder, store.shared, QUICK)
    bundles = {"dense": some_bytes(5 * PIECE, 1), "expert": some_bytes(PIECE)}
    second = sent.put({0: bundles}, {0: MOST}, 2, 60)[0]
    answered: list[bool] = []

    def beat() -> None:
        if not answered:
            answered.append(True)
            forget(first, folder)

    assert read(fetch_shard(second, folder, store.shared, QUICK, beat)) == bundles
    assert answered
    reply = send_reply({"dense": b"reply"}, second, folder, store.shared, QUICK)
    assert read(sent.fetch(0, reply, folder, 60)) == {"dense": b"reply"}


def test_another_size_under_its_name_is_fetched_anew(store: Store, folder: Path) -> None:
    bundles = {"dense": some_bytes(PIECE)}
    shard = shards(store, bundles)[0]
    fetch_shard(shard, folder, store.shared, QUICK)
    files(folder)[0].write_bytes(b"short")
    assert read(fetch_shard(shard, folder, store.shared, QUICK)) == bundles


def test_a_run_that_was_given_up_leaves_no_model_behind(store: Store, folder: Path) -> None:
    state = folder.parents[1]
    for run, site, name in (
        ("given-up", "site", f"{INCOMING}1/bundle"),
        ("given-up-later", "site", f"{INCOMING}1/bundle"),
        ("given-up-later", "site", "round_00001.safetensors"),
        ("given-up-later", "other site", f"{INCOMING}1/bundle"),
    ):
        path = state / run / site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    fetch_shard(shards(store, {"dense": some_bytes(10)})[0], folder, store.shared, QUICK)
    left = {str(path.relative_to(state)) for path in files(state)}
    (bundle,) = files(folder)
    assert left == {
        f"given-up-later/other site/{INCOMING}1/bundle",
        "given-up-later/site/round_00001.safetensors",
        str(bundle.relative_to(state)),
    }
    assert not (state / "given-up").exists()


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_second_worker_fetches_only_what_is_missing(bucket: Store, folder: Path, line: Line) -> None:
    bundles = {"dense": some_bytes(40 * PIECE), "expert": some_bytes(20 * PIECE, 1)}
    total = sum(len(blob) for blob in bundles.values())
    shard = shards(bucket, bundles)[0]
    left = [150]  # blocks, until the first one is killed

    def beat() -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    def travelled() -> int:
        """Bytes of bundles, and what HTTP says about them."""
        before = line.downloaded
        with contextlib.suppress(Killed):
            fetch_shard(shard, folder, None, QUICK, beat)
        return line.downloaded - before

    first, second = travelled(), travelled()
    assert 20 * PIECE < first < 50 * PIECE
    # Beside the pieces that were under way nothing comes twice.
    headers = 400 * (total // PIECE)
    assert total < first + second < total + QUICK.parallel * PIECE + headers
    assert travelled() == 0
    assert read(fetch_shard(shard, folder, None, QUICK)) == bundles


def test_a_damaged_or_missing_bundle_is_one_line(store: Store, folder: Path) -> None:
    blob = some_bytes(PIECE)
    shard = shards(store, {"dense": blob})[0]
    bundle = shard.bundles["dense"]
    for wrong, words in (
        (StoredBundle(bundle.link, sha256(b"x"), bundle.nbytes), "other bytes than announced"),
        (StoredBundle(bundle.link, bundle.sha256, bundle.nbytes + 1), f"{bundle.nbytes + 1} were announced"),
    ):
        with pytest.raises(StoreError) as caught:
            fetch_shard(StoredShard({"dense": wrong}, shard.replies), folder, store.shared, QUICK)
        in_one_line(caught.value, sha256(blob), words)
    store.delete([sha256(blob)])
    with pytest.raises(StoreError) as caught:
        fetch_shard(shard, folder, store.shared, QUICK)
    in_one_line(caught.value, sha256(blob), "no such object")


def test_the_time_is_for_all_bundles_together(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shards(store, {"a": some_bytes(10), "b": some_bytes(20)})[0]
    now = [0.0]
    monkeypatch.setattr(at_site, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def beat() -> None:
        now[0] += 100

    with pytest.raises(StoreError, match="the round's time is over"):
        fetch_shard(shard, folder, store.shared, Patience(seconds=99), beat)
    # What has come stays.
    assert [path.name for path in files(folder)] == [shard.bundles["a"].sha256]


def test_a_disk_without_room_for_the_reply(store: Store) -> None:
    with pytest.raises(WorkerError, match="cannot write a message into /proc/nowhere"):
        send_reply({"a": b"x"}, shards(store, {})[0], Path("/proc/nowhere"), store.shared, QUICK)


# Links, as a stranger may use them: by plain HTTP


def asked(method: str, link: str, body: bytes | None = None) -> tuple[int, bytes]:
    parts = urlsplit(link)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        headers = {"Content-Type": "application/octet-stream"}
        connection.request(method, f"{parts.path}?{parts.query}", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_site_can_read_its_bundles_and_write_its_reply_and_nothing_else(bucket: Store) -> None:
    common, own = some_bytes(100), [some_bytes(50, site) for site in range(2)]
    sent = StoredMessages(bucket)
    mine, theirs = sent.put(
        {site: {"dense": common, "expert": own[site]} for site in range(2)}, {0: MOST, 1: MOST}, 1, 60
    ).values()
    reading, writing = mine.bundles["expert"].link, mine.replies[0]
    assert asked("GET", reading) == (200, own[0])
    assert asked("PUT", writing, b"mine")[0] == 200
    assert asked("PUT", theirs.replies[0], b"theirs")[0] == 200
    names = bucket.names()
    (their_reply,) = [name for name in names if name in theirs.replies[0]]
    (my_reply,) = [name for name in names if name in writing]

    def to(link: str, name: str) -> str:
        parts = urlsplit(link)
        own = next(known for known in names if parts.path.endswith(known))
        return link.replace(own, name)

    their_bundle = theirs.bundles["expert"].sha256
    before = {their_reply: b"theirs", my_reply: b"mine", their_bundle: own[1], sha256(common): common}
    attempts = [
        (method, link, body)
        for method, body in (("GET", None), ("PUT", b"evil"), ("DELETE", None), ("HEAD", None), ("POST", b"evil"))
        for link in (
            *(to(start, name) for start in (reading, writing)
              for name in (their_reply, their_bundle, "replies/000001/new", "0" * 64)),
            reading.partition("?")[0], writing.partition("?")[0],
            writing.replace("X-Amz-Expires=", "X-Amz-Expires=9"), reading.replace("X-Amz-Expires=", "X-Amz-Expires=9"),
        )
    ]  # fmt: skip
    attempts += [(method, writing, None) for method in ("GET", "HEAD", "DELETE")]
    attempts += [(method, reading, b"evil") for method in ("PUT", "DELETE", "POST")]
    # All names: there is no link for that.
    attempts += [
        ("GET", urlsplit(link)._replace(path="/bucket").geturl(), None) for link in (reading, writing)
    ]
    for method, link, body in attempts:
        status, text = asked(method, link, body)
        assert 400 <= status < 500, (method, link, status)
        assert all(content not in text for content in (b"theirs", own[1]))
    assert bucket.names() == names
    for name, content in before.items():
        assert content_of(bucket, name, sha256(content), len(content)) == content


def test_links_are_good_until_a_little_after_the_deadline(bucket: Store) -> None:
    shard = shards(bucket, {"dense": b"x"}, seconds=100)[0]
    for link in (shard.bundles["dense"].link, *shard.replies):
        assert "X-Amz-Expires=160" in link


def test_an_expired_link_reads_and_writes_nothing(
    bucket: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fomoe_flwr.store.at_server.MARGIN_S", 0.0)
    shard = shards(bucket, {"dense": b"bundle"}, seconds=1.0)[0]
    time.sleep(1.1)
    names = bucket.names()
    assert asked("GET", shard.bundles["dense"].link)[0] == 403
    assert asked("PUT", shard.replies[0], b"late")[0] == 403
    assert bucket.names() == names
    for attempt in (
        lambda: fetch_shard(shard, folder, None, QUICK),
        lambda: send_reply({"a": b"late"}, shard, folder, None, QUICK),
    ):
        with pytest.raises(StoreError) as caught:
            attempt()
        in_one_line(caught.value, "expired")


# A folder


def test_a_site_that_was_told_of_no_folder_says_what_to_give(tmp_path: Path, folder: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), "run", QUICK)
    shard = shards(store, {"dense": b"bundle"})[0]
    assert shard.folder == str(tmp_path / "store")
    for attempt in (
        lambda: fetch_shard(shard, folder, None, QUICK),
        lambda: send_reply({"a": b"reply"}, shard, folder, None, QUICK),
    ):
        with pytest.raises(StoreError) as caught:
            attempt()
        in_one_line(caught.value, "a path on a shared disk", "fomoe site --store-dir")


def test_the_folder_may_have_another_name_here(tmp_path: Path, folder: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), "run", QUICK)
    sent = StoredMessages(store)
    shard = sent.put({0: {"dense": b"bundle"}}, {0: MOST}, 1, 60)[0]
    (tmp_path / "mounted").symlink_to(tmp_path / "store")
    assert read(fetch_shard(shard, folder, tmp_path / "mounted", QUICK)) == {"dense": b"bundle"}
    reply = send_reply({"a": b"reply"}, shard, folder, tmp_path / "mounted", QUICK)
    assert read(sent.fetch(0, reply, tmp_path, 60)) == {"a": b"reply"}


def test_wrong_bytes_are_not_kept(bucket: Store, folder: Path) -> None:
    shard = shards(bucket, {"dense": some_bytes(PIECE)})[0]
    wrong = StoredBundle(shard.bundles["dense"].link, sha256(b"x"), PIECE)
    with pytest.raises(WrongBytesError):
        fetch_shard(StoredShard({"dense": wrong}, shard.replies), folder, None, QUICK)
    assert files(folder) == []
