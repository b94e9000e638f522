"""Objects of a run in a folder and on a real S3 server."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomoe_flwr.errors import ConfigError, StoreError
from fomoe_flwr.store.objects import Store
from fomoe_flwr.store.transfer import WrongBytesError, fetch_file, send
from tests.store.helpers import (
    BLOCK,
    PIECE,
    QUICK,
    content_of,
    fetched,
    in_one_line,
    put_reply,
    sha256,
    some_bytes,
)
from tests.store.servers import Line

SIZES = [0, 1, BLOCK, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7]

pytestmark = pytest.mark.usefixtures("line")


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.one_of(st.sampled_from(SIZES), st.integers(0, 5 * PIECE)), seed=st.integers(0, 3))
def test_what_was_put_comes_back(store: Store, tmp_path: Path, size: int, seed: int) -> None:
    content = some_bytes(size, seed)
    assert store.put(content) == sha256(content)
    link = store.bundle_link(sha256(content), 60)
    assert fetched(link, sha256(content), size, store.shared, QUICK) == content
    fetch_file(link, sha256(content), size, tmp_path / "object", store.shared, QUICK)
    assert (tmp_path / "object").read_bytes() == content
    assert [path.name for path in tmp_path.glob("object*")] == ["object"]


def test_files_and_views_are_put_as_they_are(store: Store, tmp_path: Path) -> None:
    content = some_bytes(2 * PIECE + 1)
    (tmp_path / "bundle").write_bytes(content)
    key = store.put(tmp_path / "bundle")
    assert key == sha256(content) == store.put(memoryview(content))
    store.get_file(key, key, len(content), tmp_path / "deeper" / "copy")
    assert (tmp_path / "deeper" / "copy").read_bytes() == content_of(store, key, key, len(content)) == content


def test_a_source_that_cannot_be_read_is_an_error_of_the_machine(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put(tmp_path / "none")


def test_progress_counts_bytes_and_ends_with_all(store: Store, tmp_path: Path) -> None:
    content = some_bytes(3 * PIECE)
    put: list[int] = []
    got: list[int] = []
    key = store.put(content, put.append)
    store.get_file(key, key, len(content), tmp_path / "object", got.append)
    for seen in (put, got):
        assert seen == sorted(seen)
        assert seen[-1] == len(content)


def test_the_same_object_is_sent_once(store: Store) -> None:
    content = some_bytes(2 * PIECE)
    sent: list[int] = []
    key = store.put(content, sent.append)
    first = len(sent)
    assert store.put(content, sent.append) == key
    assert len(sent) == first
    assert store.names() == {key: len(content)}
    store.delete([key])
    store.put(content, sent.append)
    assert len(sent) == 2 * first
    store.put(content, sent.append, afresh=True)
    assert len(sent) == 3 * first


def test_other_bytes_are_refused_and_nothing_is_left(store: Store, tmp_path: Path) -> None:
    content = some_bytes(2 * PIECE + 5)
    name = put_reply(store, content)
    with pytest.raises(WrongBytesError) as caught:
        store.get_file(name, sha256(b"else"), len(content), tmp_path / "object")
    in_one_line(caught.value, name, "other bytes than announced")
    for size in (0, 1, len(content) - 1, len(content) + 1, len(content) + PIECE):
        with pytest.raises(StoreError) as caught:
            content_of(store, name, sha256(content), size)
        in_one_line(caught.value, name, f"{len(content)} bytes, {size} were announced")
    assert list(tmp_path.glob("object*")) == []


def test_an_object_that_is_not_there(store: Store, tmp_path: Path) -> None:
    for size in (0, 10):
        with pytest.raises(StoreError) as caught:
            store.get_file("replies/000001/0-ff", sha256(b""), size, tmp_path / "object")
        in_one_line(caught.value, "replies/000001/0-ff", "no such object")


def test_sweep_keeps_what_it_must(store: Store, s3: tuple[str, Line]) -> None:
    # Of another run whose name begins alike.
    other = Store(store._url.rpartition("/")[0], store._url.rpartition("/")[2] + "0", QUICK)
    foreign = other.put(b"foreign")
    keep = {store.put(some_bytes(10)), put_reply(store, b"reply", "0")}
    store.put(some_bytes(20))
    put_reply(store, b"late", "1")
    assert store.sweep(keep) == 24
    assert set(store.names()) == keep
    assert store.sweep(keep) == 0
    assert store.sweep(()) == 15
    assert store.names() == {}
    assert set(other.names()) == {foreign}
    store.delete(["never", "there"])
    other.sweep(())


def test_names_that_are_none(store: Store) -> None:
    for site in ("", "..", "a/b", "a b", "x" * 300):
        with pytest.raises(StoreError) as caught:
            store.reply_link(0, site, 60)
        in_one_line(caught.value, "the name of a site")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://key:secret@bucket", "store=s3:…: needs"),
        ("s3://bucket?secret=1", "store=s3:…: needs"),
        ("http://bucket", "store=http:…: needs"),
        ("bucket", "store=bucket: needs"),
        ("file://folder/x", "absolute path"),
        ("file:///", "absolute path"),
        ("file:folder", "absolute path"),
        ("file:///a%00b", "absolute path"),
        ("s3://[bucket/x", "no URL"),
        ("az://account", "store=az://account: names no container"),
    ],
)
def test_urls_that_are_none(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        Store(url, "run")
    assert "secret" not in str(caught.value)


def test_runs_that_are_none(tmp_path: Path) -> None:
    for run in ("", "..", "a/b"):
        with pytest.raises(ConfigError, match="the name of a run"):
            Store(tmp_path.as_uri(), run)


def test_a_site_touches_only_the_folder_that_it_shares(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), "run", QUICK)
    key = store.put(b"bundle")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "store" / "way out").symlink_to(tmp_path)
    for link in (f"file:{tmp_path}/secret", "file:run/../../secret", "file:../secret", "file:way out/secret"):
        with pytest.raises(StoreError, match="outside of"):
            fetched(link, sha256(b"secret"), 6, store.shared, QUICK)
        with pytest.raises(StoreError, match="outside of"):
            send(link, b"x", store.shared, QUICK)
    with pytest.raises(StoreError, match="this site was told of none"):
        fetched(store.bundle_link(key, 60), key, 6, None, QUICK)
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_shared_disk_that_is_not_mounted(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), "run", QUICK)
    key = store.put(b"bundle")
    _, link = store.reply_link(0, "0", 60)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreError, match="is the shared disk mounted"):
        send(link, b"reply", store.shared, QUICK)
    with pytest.raises(StoreError, match="not mounted"):
        fetched(store.bundle_link(key, 60), key, 6, store.shared, QUICK)
    assert not (tmp_path / "store").exists()
