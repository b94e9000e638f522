"""What Flower's messages say of bundles that lie in an object store: JSON texts, a few hundred bytes an object."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from fomoe_flwr.bundle_file import padded
from fomoe_flwr.errors import WireError
from fomoe_flwr.untrusted import parse_json

STORED = "stored"  # the key in a message's ConfigRecord, both ways
_LONGEST = 2**24  # characters of a text
_MOST_BUNDLES, _LONGEST_KEY = 2**16, 100


@dataclass(frozen=True)
class StoredBundle:
    """Where a bundle is. The link is a secret as long as it is good."""

    link: str
    sha256: str  # hex
    nbytes: int


@dataclass(frozen=True)
class StoredShard:
    """What a site is told instead of being sent its bundles."""

    bundles: dict[str, StoredBundle]  # by key
    reply: str  # the link to write its reply by
    # The folder of a `file://` store as the server calls it. Only a simulated site goes by it; a real one is told by
    # its operator what may be read and written.
    folder: str | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> StoredShard:
        """The inverse of `to_json`.

        Raises:
            WireError: server and site differ in version.
        """
        try:
            values = parse_json(text, _LONGEST)
            bundles = {key: StoredBundle(**bundle) for key, bundle in values.pop("bundles").items()}
            return cls(bundles, **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WireError(f"{STORED}: server and site differ in version ({type(error).__name__})") from None


@dataclass(frozen=True)
class StoredReply:
    """The object that a site has written: its bundles in a row, each from a multiple of PAGE on."""

    sha256: str  # hex, of the object
    sizes: dict[str, int]  # of each bundle, by key, in their order

    @property
    def nbytes(self) -> int:
        """Of the object."""
        *before, last = self.sizes.values()
        return sum(padded(size) for size in before) + last

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, most: int) -> StoredReply:
        """The inverse of `to_json`, for a text that may come from anybody.

        Args:
            most: bytes that the object may have.

        Raises:
            WireError: no such text, or a larger object.
        """
        try:
            values = parse_json(text, _LONGEST)
            if set(values) != {"sha256", "sizes"}:
                raise ValueError("other keys")
            digest, sizes = values["sha256"], values["sizes"]
            if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError("no SHA-256")
            if not isinstance(sizes, dict) or not 0 < len(sizes) <= _MOST_BUNDLES or not _fits(sizes):
                raise ValueError("sizes of bundles must be whole numbers above 0 with short names, and few")
        except (TypeError, ValueError) as error:
            raise WireError(f"{STORED}: does not say what the reply's object is ({error!s:.200})") from None
        reply = cls(digest, sizes)
        if reply.nbytes > most:
            raise WireError(f"{STORED}: an object of {reply.nbytes} bytes, at most {most} are expected")
        return reply


def _fits(sizes: dict[str, Any]) -> bool:
    return all(len(key) <= _LONGEST_KEY and type(size) is int and size > 0 for key, size in sizes.items())
