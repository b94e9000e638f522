"""Objects of a run in a folder and on a real S3 server, over lines of every kind."""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import itertools
import json
import logging
import os
import random
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomoe_flwr.errors import ConfigError, StoreError
from fomoe_flwr.store import links
from fomoe_flwr.store.links import Again, Clock, Patience, Tries, refusal
from fomoe_flwr.store.objects import Store
from fomoe_flwr.store.transfer import WrongBytesError, fetch, fetch_file, send
from tests.store.helpers import BLOCK, PIECE, QUICK, in_one_line, sha256, some_bytes
from tests.store.servers import BUCKET, Line

SIZES = [0, 1, BLOCK, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7]

pytestmark = pytest.mark.usefixtures("line")

_runs = itertools.count(10**6)


def put_reply(store: Store, content: bytes, site: str = "0") -> str:
    name, link = store.reply_link(1, site, 60)
    send(link, content, store.shared, QUICK)
    return name


# What holds for every kind of store


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.one_of(st.sampled_from(SIZES), st.integers(0, 5 * PIECE)), seed=st.integers(0, 3))
def test_what_was_put_comes_back(store: Store, tmp_path: Path, size: int, seed: int) -> None:
    content = some_bytes(size, seed)
    assert store.put(content) == sha256(content)
    link = store.bundle_link(sha256(content), 60)
    assert fetch(link, sha256(content), size, store.shared, QUICK) == content
    fetch_file(link, sha256(content), size, tmp_path / "object", store.shared, QUICK)
    assert (tmp_path / "object").read_bytes() == content
    assert [path.name for path in tmp_path.glob("object*")] == ["object"]


def test_files_and_views_are_put_as_they_are(store: Store, tmp_path: Path) -> None:
    content = some_bytes(2 * PIECE + 1)
    (tmp_path / "bundle").write_bytes(content)
    key = store.put(tmp_path / "bundle")
    assert key == sha256(content) == store.put(memoryview(content))
    store.get_file(key, key, len(content), tmp_path / "deeper" / "copy")
    assert (tmp_path / "deeper" / "copy").read_bytes() == store.get(key, key, len(content)) == content


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


def test_other_bytes_are_refused_and_nothing_is_left(store: Store, tmp_path: Path) -> None:
    content = some_bytes(2 * PIECE + 5)
    name = put_reply(store, content)
    for get in (store.get, lambda *asked: store.get_file(*asked, tmp_path / "object")):
        with pytest.raises(WrongBytesError) as caught:
            get(name, sha256(b"else"), len(content))
        in_one_line(caught.value, name, "other bytes than announced")
    for size in (0, 1, len(content) - 1, len(content) + 1, len(content) + PIECE):
        with pytest.raises(StoreError) as caught:
            store.get(name, sha256(content), size)
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


# A folder


def test_a_site_touches_only_the_folder_that_it_shares(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), "run", QUICK)
    key = store.put(b"bundle")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "store" / "way out").symlink_to(tmp_path)
    for link in (f"file:{tmp_path}/secret", "file:run/../../secret", "file:../secret", "file:way out/secret"):
        with pytest.raises(StoreError, match="outside of"):
            fetch(link, sha256(b"secret"), 6, store.shared, QUICK)
        with pytest.raises(StoreError, match="outside of"):
            send(link, b"x", store.shared, QUICK)
    with pytest.raises(StoreError, match="this site was told of none"):
        fetch(store.bundle_link(key, 60), key, 6, None, QUICK)
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_shared_disk_that_is_not_mounted(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), "run", QUICK)
    key = store.put(b"bundle")
    _, link = store.reply_link(0, "0", 60)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreError, match="is the shared disk mounted"):
        send(link, b"reply", store.shared, QUICK)
    with pytest.raises(StoreError, match="not mounted"):
        fetch(store.bundle_link(key, 60), key, 6, store.shared, QUICK)
    assert not (tmp_path / "store").exists()


def test_a_full_disk_is_known_before_anything_travels(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = store.put(some_bytes(PIECE))

    def full(*_: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    seen: list[int] = []
    with pytest.raises(StoreError) as caught:
        store.get_file(key, key, PIECE, tmp_path / "object", seen.append)
    in_one_line(caught.value, key, "No space left on device")
    assert seen == []
    assert list(tmp_path.glob("object*")) == []


# Links


def test_where_links_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With credentials that are none, as nobody is asked when a link is made."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "private_key": key.decode(),
        "private_key_id": "1",
        "client_email": "a@b.c",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    # That of another account does not count.
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "other")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"key").decode())
    for url, place, signature in (
        (
            "s3://bucket/some/where",
            "https://s3.us-east-1.amazonaws.com/bucket/some/where",
            "X-Amz-Signature=",
        ),
        ("gs://bucket/some/where", "https://storage.googleapis.com/bucket/some/where", "X-Goog-Signature="),
        ("az://account/container/x", "https://account.blob.core.windows.net/container/x", "sig="),
        ("az://account/container", "https://account.blob.core.windows.net/container", "sig="),
    ):
        name, link = Store(url, "run", QUICK).reply_link(1, "0", 60)
        assert links.name_of(link) == f"{place}/run/{name}"
        assert signature in link
        begin, end = links._times(dict(parse_qsl(urlsplit(link).query)))
        assert 60 <= (end - begin).total_seconds() <= 61


def altered(link: str, old: str, new: str) -> str:
    assert old in link
    return link.replace(old, new)


def test_a_link_is_good_for_one_object_and_one_method(bucket: Store) -> None:
    theirs = put_reply(bucket, b"theirs")
    mine, link = bucket.reply_link(1, "1", 60)
    send(link, b"mine", None, QUICK)
    key = bucket.put(b"bundle")
    reading = bucket.bundle_link(key, 60)
    attempts: list[Callable[[], object]] = [
        # Another's reply, by my link to write: neither overwritten nor read.
        lambda: send(altered(link, mine, theirs), b"x", None, QUICK),
        lambda: fetch(altered(link, mine, theirs), sha256(b"theirs"), 6, None, QUICK),
        # Another's reply, by my link to read.
        lambda: fetch(altered(reading, key, theirs), sha256(b"theirs"), 6, None, QUICK),
        lambda: send(altered(reading, key, theirs), b"x", None, QUICK),
        # Links used for what they are not, or for longer.
        lambda: send(reading, b"x", None, QUICK),
        lambda: fetch(link, sha256(b"mine"), 4, None, QUICK),
        lambda: fetch(altered(reading, "Expires=60", "Expires=600"), key, 6, None, QUICK),
        # More than a server takes before it answers.
        lambda: send(reading, bytes(2**23), None, QUICK),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(StoreError) as caught:
            attempt()
        in_one_line(caught.value, f"/{BUCKET}/some/where/run-", "the signature is not good for this")
    assert bucket.get(theirs, sha256(b"theirs"), 6) == b"theirs"
    assert bucket.get(key, key, 6) == b"bundle"


def test_an_expired_link_says_so(bucket: Store) -> None:
    key = bucket.put(b"bundle")
    reading, (name, writing) = bucket.bundle_link(key, 1), bucket.reply_link(1, "0", 1)
    time.sleep(1.1)
    for attempt, what in (
        (lambda: fetch(reading, key, 6, None, QUICK), key),
        (lambda: send(writing, b"reply", None, QUICK), name),
        (lambda: send(writing, bytes(2**23), None, QUICK), name),
    ):
        with pytest.raises(StoreError) as caught:
            attempt()
        in_one_line(caught.value, what, "expired")


class _Answer:
    """A response of a store with another clock."""

    def __init__(self, now: datetime, status: int = 403) -> None:
        self.status, self._now = status, now

    def getheader(self, name: str, default: str) -> str:
        return f"{self._now:%a, %d %b %Y %H:%M:%S GMT}" if name == "Date" else default


AMZ = "X-Amz-Date=20260102T030405Z&X-Amz-Expires=3600&X-Amz-Signature=s"
SIGNED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    "query",
    [AMZ, AMZ.replace("Amz", "Goog"), "st=2026-01-02T03:04:05Z&se=2026-01-02T04:04:05Z&sig=s"],
    ids=["s3", "gs", "az"],
)
@pytest.mark.parametrize(
    ("hours", "words"),
    [(2, "expired at 04:04:05 UTC, 1 h 00 min ago"), (-2, "2 h 00 min: the server's clock is fast"), (0.5, None)],
)  # fmt: skip
def test_a_clock_that_is_wrong_is_told(query: str, hours: float, words: str | None) -> None:
    source = links.HttpObject(f"https://store.example/b/o?{query}", Clock(QUICK))
    answer = _Answer(SIGNED + timedelta(hours=hours))
    if words is None:
        source._check_times(answer)  # type: ignore[arg-type]
        return
    with pytest.raises(StoreError) as caught:
        source._check_times(answer)  # type: ignore[arg-type]
    in_one_line(caught.value, "https://store.example/b/o: ", words)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "RequestTimeTooSkewed", "a clock is wrong"),
        (404, "NoSuchBucket", "there is no such bucket"),
        (404, "ContainerNotFound", "there is no such bucket"),
        (404, "", "there is no such object"),
        (403, "AccessDenied", "no permission"),
        (403, "", "no permission"),
        (403, "InvalidAccessKeyId", "the signature is not good"),
        (400, "ExpiredToken", "have expired"),
        (507, "XMinioStorageFull", "no space left"),
        (413, "RequestBodyTooLarge", "larger than the store takes"),
        (301, "PermanentRedirect", "somewhere else"),
        (418, "", "it was refused"),
        (503, "SlowDown", None),
        (500, "InternalError", None),
        (400, "BadDigest", None),
        (429, "", None),
    ],
)
def test_what_a_store_answers(status: int, code: str, words: str | None) -> None:
    text = f"<Error><Code>{code}</Code><StringToSign>Signature=abc</StringToSign></Error>" if code else ""
    with pytest.raises(Again if words is None else StoreError) as caught:
        refusal("s3://bucket/object", status, text)
    in_one_line(caught.value, *([words, "s3://bucket/object: "] if words else []), str(status), code)


def test_a_bucket_that_is_missing_or_closed(s3: tuple[str, Line], monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Store("s3://missing/x", "run", QUICK)
    for attempt in (missing.names, lambda: missing.put(b"x")):
        with pytest.raises(StoreError) as caught:
            attempt()
        in_one_line(caught.value, "//", "missing/x", "there is no such bucket")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    closed = Store(s3[0], "run", QUICK)
    with pytest.raises(StoreError) as caught:
        closed.names()
    in_one_line(caught.value, "s3://bucket/some/where/run", "server's credentials are wrong")
    with pytest.raises(StoreError) as caught:
        closed.put(b"x")
    in_one_line(caught.value, "s3://bucket/some/where/run/", "no permission")


# Lines


def test_a_cut_transfer_goes_on_where_it_was(bucket: Store, line: Line) -> None:
    content = some_bytes(8 * PIECE)
    key = bucket.put(content)
    # The link first: it asks nobody.
    link = bucket.bundle_link(key, 60)
    line.faults += [("cut", 3000)] * 6
    seen: list[int] = []
    assert fetch(link, key, len(content), None, QUICK, seen.append) == content
    assert line.faults == []
    # No byte came twice.
    assert seen == sorted(set(seen))
    assert seen[-1] == len(content)


def test_a_killed_transfer_goes_on_in_the_next_process(store: Store, tmp_path: Path) -> None:
    content = some_bytes(8 * PIECE + 3)
    key = store.put(content)
    target = tmp_path / "object"

    class Killed(BaseException):
        pass

    def kill(so_far: int) -> None:
        if so_far > 5 * PIECE:
            raise Killed

    with pytest.raises(Killed):
        store.get_file(key, key, len(content), target, kill)
    assert not target.exists()
    seen: list[int] = []
    store.get_file(key, key, len(content), target, seen.append)
    assert target.read_bytes() == content
    # Of what had come, at most the pieces under way were thrown away.
    assert seen[0] >= (5 - QUICK.parallel) * PIECE
    assert seen[0] > PIECE
    assert seen[-1] == len(content)


def test_what_lay_there_is_verified_too(store: Store, tmp_path: Path) -> None:
    content = some_bytes(3 * PIECE)
    key = store.put(content)
    target = tmp_path / "object"
    part = tmp_path / f"object.part-{key[:16]}"
    # As after a power failure: marked as complete, and other bytes.
    for rest in (some_bytes(3 * PIECE, 1) + b"\1\1\1", b"\1" * 7, b""):
        part.write_bytes(rest)
        store.get_file(key, key, len(content), target)
        assert target.read_bytes() == content
        assert not part.exists()
        target.unlink()


def test_two_processes_do_not_write_one_file(store: Store, tmp_path: Path) -> None:
    content = some_bytes(2 * PIECE)
    key = store.put(content)
    refused: list[str] = []

    def again(_: int) -> None:
        if not refused:
            with pytest.raises(StoreError) as caught:
                store.get_file(key, key, len(content), tmp_path / "object")
            refused.append(str(caught.value))

    store.get_file(key, key, len(content), tmp_path / "object", again)
    assert "another process is fetching it" in refused[0]
    assert (tmp_path / "object").read_bytes() == content


@pytest.mark.parametrize("what", Line.KINDS)
@pytest.mark.parametrize("after", [0, 300, 20_000])
def test_one_fault_of_a_line_is_survived(bucket: Store, line: Line, what: str, after: int) -> None:
    content = some_bytes(8 * PIECE)
    name, link = bucket.reply_link(1, "0", 60)
    # A request that was damaged may have become another one, which the link is not good for.
    allowed = (
        contextlib.suppress(StoreError) if what == "damage" and after < 1000 else contextlib.nullcontext()
    )
    for attempt in (
        lambda: send(link, content, None, QUICK),
        lambda: bucket.get(name, sha256(content), len(content)),
    ):
        line.faults.append((what, after))
        with allowed:
            attempt()
        attempt()
    assert bucket.get(name, sha256(content), len(content)) == content


def test_a_line_that_stays_dead_ends_in_one_line_in_time(
    bucket: Store, line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    short = Patience(seconds=0.3, stall=0.1, first_wait=0.01)
    key = bucket.put(b"bundle")
    link, (name, writing) = bucket.bundle_link(key, 60), bucket.reply_link(1, "0", 60)
    logging.getLogger("fomoe").propagate = True
    for what, reason in (("hang", "no byte in 0.1 s"), ("cut", "")):
        for attempt, shown in (
            (lambda: fetch(link, key, 6, None, short), key),
            (lambda: send(writing, b"reply", None, short), name),
            (lambda: Store(bucket._url.rpartition("/")[0], "run", short).names(), "/some/where/run"),
        ):
            line.faults[:] = [(what, 0)] * 1000
            begin = time.monotonic()
            with pytest.raises(StoreError) as caught:
                attempt()
            assert time.monotonic() - begin < short.seconds + short.stall + 0.5
            in_one_line(
                caught.value, shown, "given up after 0.", reason if shown != "/some/where/run" else ""
            )
    # The server of this test runs in this process too, and has a log of its own.
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fomoe")]
    assert any("trying on" in line for line in said)
    assert not any("Signature" in line for line in said)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_on_a_bad_line_all_ends_in_time_with_right_bytes_or_one_error(
    s3: tuple[str, Line], tmp_path: Path, seed: int
) -> None:
    """Also with other bytes than the store's: they are never taken for right ones."""
    rng = random.Random(seed)
    patience = Patience(seconds=0.8, stall=0.1, first_wait=0.01, parallel=4, seed=seed)
    store = Store(s3[0], f"run-{next(_runs)}", patience)
    content = some_bytes(rng.choice([0, 5, 3 * PIECE, 200_000]), seed)
    s3[1].spoil(seed, rng.choice([0.2, 0.5, 0.9]))
    outcomes: list[object] = []

    def attempt(action: Callable[[], object]) -> None:
        begin = time.monotonic()
        try:
            outcomes.append(action())
        except StoreError as error:
            in_one_line(error)
            outcomes.append(None)
        assert time.monotonic() - begin < patience.seconds + patience.stall + 1

    key, target = sha256(content), tmp_path / f"object-{next(_runs)}"
    attempt(lambda: store.put(content))
    attempt(lambda: store.get(key, key, len(content)))
    assert outcomes[0] in (key, None)
    assert outcomes[1] in (content, None)
    attempt(lambda: store.get_file(key, key, len(content), target))
    assert not target.exists() or target.read_bytes() == content
    attempt(lambda: store.sweep({key}))
    s3[1].spoil(0, 0)
    # The line is good again, and everything is as it should be; a put that failed is put again.
    store = Store(s3[0], store._url.rpartition("/")[2], QUICK)
    assert store.put(content) == key
    store.get_file(key, key, len(content), target)
    assert target.read_bytes() == content


def test_waits_grow_with_jitter_from_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(seed: int) -> list[float]:
        taken: list[float] = []
        monkeypatch.setattr(Clock, "sleep", lambda self, seconds: taken.append(seconds) or True)
        tries = Tries("object", Clock(Patience(first_wait=1, seed=seed)))
        for _ in range(8):
            tries.wait(Again("no"))
        tries.wait(Again("no"), moved=True)
        return taken

    assert waits(1) == waits(1) != waits(2)
    *growing, last = waits(1)
    for power, seconds in enumerate(growing):
        longest = min(links.LONGEST_WAIT, 2.0**power)
        assert longest / 2 <= seconds <= longest
    assert last <= 1


def test_connections_are_used_again(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    content = some_bytes(8 * PIECE)
    key = bucket.put(content)
    link = bucket.bundle_link(key, 60)
    opened = []
    connect = http.client.HTTPConnection.connect
    monkeypatch.setattr(
        http.client.HTTPConnection,
        "connect",
        lambda self: (opened.append(urlsplit(link).port), connect(self)),
    )
    assert fetch(link, key, len(content), None, QUICK) == content
    assert len(opened) <= QUICK.parallel


def test_a_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    certificate = write_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = f"https://127.0.0.1:{listener.getsockname()[1]}/bucket/object?X-Amz-Signature=s"

        def serve() -> None:
            for _ in range(2):
                with (
                    contextlib.suppress(OSError),
                    context.wrap_socket(listener.accept()[0], server_side=True) as client,
                ):
                    client.recv(4096)
                    client.sendall(
                        b"HTTP/1.1 206 \r\nContent-Range: bytes 0-3/4\r\nContent-Length: 4\r\n\r\nsafe"
                    )

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(StoreError) as caught:
            fetch(link, sha256(b"safe"), 4, None, QUICK)
        in_one_line(caught.value, "/bucket/object: its certificate is not trusted")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(link, sha256(b"safe"), 4, None, QUICK) == b"safe"
        server.join()


def write_certificate(folder: Path) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


def test_a_proxy_is_asked_for_a_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("https_proxy", f"http://me:word@127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "")
        asked: list[bytes] = []

        def serve() -> None:
            with listener.accept()[0] as client:
                asked.append(client.recv(4096))
                client.sendall(b"HTTP/1.1 407 Who are you\r\n\r\n")

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(StoreError) as caught:
            fetch("https://store.example/o?sig=s", sha256(b""), 0, None, Patience(seconds=0.3, first_wait=1))
        in_one_line(caught.value, "https://store.example/o: given up", "407 Who are you")
        server.join()
    assert asked[0].startswith(b"CONNECT store.example:443 ")
    assert b"Proxy-Authorization: Basic bWU6d29yZA==" in asked[0]


def test_a_link_is_no_way_into_other_schemes() -> None:
    for link in ("ftp://host/x", "data:,x", "http:///x", "x"):
        with pytest.raises(StoreError, match="a link begins with"):
            fetch(link, sha256(b""), 0, None, QUICK)
