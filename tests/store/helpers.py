"""What the tests of the store share."""

from __future__ import annotations

import hashlib
import random
import re
import tempfile
from pathlib import Path

from fomoe_flwr.store.links import Patience, Progress
from fomoe_flwr.store.objects import Store
from fomoe_flwr.store.transfer import fetch_file, send
from tests.store.servers import SECRET

PIECE, BLOCK = 4096, 1000
QUICK = Patience(seconds=30, stall=0.5, first_wait=0.01, parallel=4)


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(f"{size} {seed}").randbytes(size)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def in_one_line(error: BaseException, *words: str) -> None:
    """That an error is one line with these words in it, and without a secret."""
    text = str(error)
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert not re.search(r"Signature=|X-Amz-(Credential|Date|Expires)", text), text
    assert SECRET not in text


def fetched(
    link: str,
    digest: str,
    nbytes: int,
    shared: Path | None = None,
    patience: Patience = QUICK,
    progress: Progress | None = None,
) -> bytes:
    """What a site gets by a link."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "object"
        fetch_file(link, digest, nbytes, target, shared, patience, progress)
        return target.read_bytes()


def content_of(store: Store, name: str, digest: str, nbytes: int) -> bytes:
    """What the server gets by a name."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "object"
        store.get_file(name, digest, nbytes, target)
        return target.read_bytes()


def put_reply(store: Store, content: bytes, site: str = "0") -> str:
    """Write a reply as a site does; returns its name."""
    name, link = store.reply_link(1, site, 60)
    send(link, content, store.shared, QUICK)
    return name
