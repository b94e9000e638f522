"""What lies behind a link: for whom it is good, what a store answers, and how it is reached."""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from fomoe_flwr.errors import StoreError
from fomoe_flwr.store import links
from fomoe_flwr.store.links import Again, Clock, Patience, Tries, refusal
from fomoe_flwr.store.objects import Store
from fomoe_flwr.store.transfer import send
from tests.store.helpers import (
    PIECE,
    QUICK,
    content_of,
    fetched,
    in_one_line,
    put_reply,
    sha256,
    some_bytes,
)
from tests.store.servers import BUCKET, Line

pytestmark = pytest.mark.usefixtures("line")


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
        lambda: fetched(altered(link, mine, theirs), sha256(b"theirs"), 6, None, QUICK),
        # Another's reply, by my link to read.
        lambda: fetched(altered(reading, key, theirs), sha256(b"theirs"), 6, None, QUICK),
        lambda: send(altered(reading, key, theirs), b"x", None, QUICK),
        # Links used for what they are not, or for longer.
        lambda: send(reading, b"x", None, QUICK),
        lambda: fetched(link, sha256(b"mine"), 4, None, QUICK),
        lambda: fetched(altered(reading, "Expires=60", "Expires=600"), key, 6, None, QUICK),
        # More than a server takes before it answers.
        lambda: send(reading, bytes(2**23), None, QUICK),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(StoreError) as caught:
            attempt()
        in_one_line(caught.value, f"/{BUCKET}/some/where/run-", "the signature is not good for this")
    assert content_of(bucket, theirs, sha256(b"theirs"), 6) == b"theirs"
    assert content_of(bucket, key, key, 6) == b"bundle"


def test_an_expired_link_says_so(bucket: Store) -> None:
    key = bucket.put(b"bundle")
    reading, (name, writing) = bucket.bundle_link(key, 1), bucket.reply_link(1, "0", 1)
    time.sleep(1.1)
    for attempt, what in (
        (lambda: fetched(reading, key, 6, None, QUICK), key),
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
    assert fetched(link, key, len(content), None, QUICK) == content
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
            fetched(link, sha256(b"safe"), 4, None, QUICK)
        in_one_line(caught.value, "/bucket/object: its certificate is not trusted")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetched(link, sha256(b"safe"), 4, None, QUICK) == b"safe"
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
            fetched(
                "https://store.example/o?sig=s", sha256(b""), 0, None, Patience(seconds=0.3, first_wait=1)
            )
        in_one_line(caught.value, "https://store.example/o: given up", "407 Who are you")
        server.join()
    assert asked[0].startswith(b"CONNECT store.example:443 ")
    assert b"Proxy-Authorization: Basic bWU6d29yZA==" in asked[0]


def test_a_link_is_no_way_into_other_schemes() -> None:
    for link in ("ftp://host/x", "data:,x", "http:///x", "x"):
        with pytest.raises(StoreError, match="a link begins with"):
            fetched(link, sha256(b""), 0, None, QUICK)
    for link in ("http://host:99999/o", "http://host:abc/o", "http://[host/o"):
        with pytest.raises(StoreError, match="a link that cannot be read"):
            fetched(link, sha256(b""), 0, None, QUICK)
