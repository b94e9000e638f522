"""What Flower's messages say of bundles that lie in an object store: JSON texts, a few hundred bytes an object."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fomoe_flwr.bundle_file import padded
from fomoe_flwr.errors import WireError
from fomoe_flwr.untrusted import parse_json

STORED = "stored"  # the key in a message's ConfigRecord, both ways
LARGEST = 2**32  # bytes of an object of a reply: S3 and Azure take no more than 5 GB by one link
_LONGEST = 2**24  # characters of a text
_LONGEST_KEY = 100
# Bytes of two bundles that follow each other, or they would be one (`wire.MAX_BUNDLE_BYTES`), so that a stranger cannot
# have the server map thousands of little ones: each takes a file descriptor.
_TWO_BUNDLES = 2**29

_DIGEST = re.compile(r"[0-9a-f]{64}")


def in_objects(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The keys of bundles in order, cut so that no file of them is larger than LARGEST (unless one bundle is)."""
    some: list[str] = []
    total = 0
    for key, size in sizes.items():
        if some and total + padded(size) > LARGEST:
            yield some
            some, total = [], 0
        some.append(key)
        total += padded(size)
    if some:
        yield some


def most_objects(nbytes: int) -> int:
    """Objects that a reply of so many bytes is cut into, at most: two that follow each other have more than LARGEST."""
    return 1 + 2 * nbytes // LARGEST


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
    replies: list[str]  # links to write the objects of its reply by
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
            # They become names of files.
            if not all(_DIGEST.fullmatch(bundle.sha256) for bundle in bundles.values()):
                raise ValueError("no SHA-256")
            if not all(type(bundle.nbytes) is int and bundle.nbytes >= 0 for bundle in bundles.values()):
                raise ValueError("no size")
            shard = cls(bundles, **values)
            links = [*shard.replies, *(bundle.link for bundle in bundles.values())]
            if not isinstance(shard.replies, list) or not all(isinstance(link, str) for link in links):
                raise ValueError("no link")
            if not shard.replies:
                raise ValueError("no link to answer by")
            return shard
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WireError(f"{STORED}: server and site differ in version ({type(error).__name__})") from None


@dataclass(frozen=True)
class StoredObject:
    """An object that a site has written: bundles in a row, each from a multiple of PAGE on."""

    sha256: str  # hex, of the object
    sizes: dict[str, int]  # of each bundle, by key, in their order

    @property
    def nbytes(self) -> int:
        """Of the object."""
        *before, last = self.sizes.values()
        return sum(padded(size) for size in before) + last


@dataclass(frozen=True)
class StoredReply:
    """The objects of a reply: one, but for very large ones."""

    objects: list[StoredObject]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.objects)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, most: int) -> StoredReply:
        """The inverse of `to_json`, for a text that may come from anybody.

        Args:
            most: bytes that the objects may have together.

        Raises:
            WireError: no such text, or more objects or bundles than so many bytes need, or larger ones.
        """
        try:
            values = parse_json(text, _LONGEST)
            if set(values) != {"objects"} or not isinstance(values["objects"], list):
                raise ValueError("other keys")
            reply = cls([_stored_object(item) for item in values["objects"]])
            if not 0 < len(reply.objects) <= most_objects(most):
                raise ValueError(f"{len(reply.objects)} objects, at most {most_objects(most)} are expected")
            keys = [key for item in reply.objects for key in item.sizes]
            # The last one of the dense part, and of the experts, may be small.
            if len(keys) > (allowed := 2 + 2 * most // _TWO_BUNDLES) or len(set(keys)) < len(keys):
                raise ValueError(f"{len(keys)} bundles, at most {allowed} of different names are expected")
        except (TypeError, ValueError) as error:
            raise WireError(f"{STORED}: does not say what the reply's object is ({error!s:.200})") from None
        if reply.nbytes > most:
            raise WireError(f"{STORED}: an object of {reply.nbytes} bytes, at most {most} are expected")
        return reply


def _stored_object(values: Any) -> StoredObject:
    if set(values) != {"sha256", "sizes"}:
        raise ValueError("other keys")
    digest, sizes = values["sha256"], values["sizes"]
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("no SHA-256")
    if not isinstance(sizes, dict) or not sizes or not _fits(sizes):
        raise ValueError("sizes of bundles must be whole numbers above 0 with short names")
    return StoredObject(digest, sizes)


def _fits(sizes: dict[str, Any]) -> bool:
    return all(len(key) <= _LONGEST_KEY and type(size) is int and size > 0 for key, size in sizes.items())
