"""The server's half: a round's bundles go into the store once each, and replies are fetched from it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from fomoe_flwr.bundle_file import mapped_blobs
from fomoe_flwr.errors import StoreError
from fomoe_flwr.store.links import PATIENCE, Patience
from fomoe_flwr.store.messages import StoredBundle, StoredReply, StoredShard
from fomoe_flwr.store.objects import Store
from fomoe_flwr.units import in_bytes

MARGIN_S = 60.0  # for which links are good after the deadline: clocks differ, and a late reply may be refused in peace
LEAST_S = 10.0  # in which a reply may be fetched, however late it came
AT_ONCE = 4  # bundles

log = logging.getLogger("fomoe")


class StoredMessages:
    """What the messages that are out say of a run's objects.

    Objects of messages before the last ones are deleted: nobody needs them. A checkpoint does not either, for it has
    the model itself.

    Args:
        patience: for each operation. The deadline of a round bounds it too.
    """

    def __init__(self, store: Store, patience: Patience = PATIENCE) -> None:
        self._store, self._patience = store, patience
        self._replies: dict[int, str] = {}  # by site, the name of the object it may write
        self.nbytes = 0  # that the last messages put into the store

    def __enter__(self) -> StoredMessages:
        """Raises StoreError if the store cannot be reached."""
        self._store.names()
        return self

    def __exit__(self, *_: object) -> None:
        """The run is over, or will be resumed by its checkpoint: nothing of it stays in the store."""
        self._replies = {}
        self._sweep(set())

    def put(
        self,
        bundles: Mapping[int, Mapping[str, bytes]],
        site_names: Sequence[str],
        round_: int,
        seconds: float,
    ) -> dict[int, StoredShard]:
        """Store each bundle once, and give each site the links to its own; delete what older messages named.

        Args:
            bundles: by site and key; sites that get the same bundle have the same object.
            seconds: the round's deadline.

        Raises:
            StoreError: they could not be stored, whatever was tried.
        """
        unique = {id(blob): blob for own in bundles.values() for blob in own.values()}
        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="put") as pool:
            digests = dict(zip(unique, pool.map(self._store.put, unique.values()), strict=True))
        self.nbytes = sum(len(blob) for blob in unique.values())
        log.debug("stored %s in %.2f s", in_bytes(self.nbytes), time.monotonic() - began)
        good = seconds + MARGIN_S
        links = {digest: self._store.bundle_link(digest, good) for digest in set(digests.values())}
        shards, self._replies = {}, {}
        for site, own in bundles.items():
            name, link = self._store.reply_link(round_, site_names[site], good)
            self._replies[site] = name
            shards[site] = StoredShard(
                {
                    key: StoredBundle(links[digests[id(blob)]], digests[id(blob)], len(blob))
                    for key, blob in own.items()
                },
                link,
                None if self._store.shared is None else str(self._store.shared),
            )
        self._sweep({*digests.values(), *self._replies.values()})
        return shards

    def fetch(self, site: int, text: str, most: int, folder: Path, seconds: float) -> dict[str, bytes]:
        """The bundles of a site's reply, mapped from a file that has no name any more.

        Args:
            text: what the site says that it has written.
            most: bytes that it may have.
            folder: with room for it.
            seconds: until the round's deadline.

        Raises:
            WireError: the text is none, or names too large an object.
            StoreError: it is not there, or is not what the text says.
        """
        reply = StoredReply.from_json(text, most)
        target = folder / f"{site}.object"
        store = self._store.with_patience(replace(self._patience, seconds=max(seconds, LEAST_S)))
        try:
            store.get_file(self._replies[site], reply.sha256, reply.nbytes, target)
            with target.open("rb") as file:
                return mapped_blobs(file, reply.sizes)
        finally:
            target.unlink(missing_ok=True)

    def _sweep(self, keep: set[str]) -> None:
        try:
            freed = self._store.sweep(keep)
        except StoreError as error:
            # Room in the store is not worth a round; the next one tries again.
            log.warning("cannot delete old objects: %s", error)
        else:
            log.debug("deleted %s of old objects", in_bytes(freed))
