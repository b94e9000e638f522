"""What the tests of the store share."""

from __future__ import annotations

import hashlib
import random
import re

from fomoe_flwr.store.links import Patience
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
