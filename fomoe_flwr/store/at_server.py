"""The server's half: a round's bundles go into the store once each, and replies are fetched from it."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from fomoe_flwr.bundle_file import mapped_blobs
from fomoe_flwr.errors import StoreError
from fomoe_flwr.store.links import Clock
from fomoe_flwr.store.messages import StoredBundle, StoredReply, StoredShard, most_objects
from fomoe_flwr.store.objects import Store
from fomoe_flwr.units import in_bytes

MARGIN_S = 60.0  # for which links are good after the deadline: clocks differ, and a late reply may be refused in peace
LEAST_S = 10.0  # in which a reply may be fetched, however late it came
START_S = 60.0  # in which a store must answer before a run begins
SWEEP_S = 30.0  # in which old objects must be deleted; the round, or the end of the run, waits for it
AT_ONCE = 4  # bundles

log = logging.getLogger("fomoe")


class StoredMessages:
    """What the messages that are out say of a run's objects.

    Objects of messages before the last ones are deleted: nobody needs them. A checkpoint does not either, for it has
    the model itself.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # By site: the names of the objects that it may write, and the bytes that they may have together.
        self._replies: dict[int, tuple[list[str], int]] = {}

    def __enter__(self) -> StoredMessages:
        """Raises StoreError if the store cannot be reached, or written."""
        store = self._store.within(START_S)
        store.names()
        store.delete([store.put(b"may be deleted")])
        return self

    def __exit__(self, *_: object) -> None:
        """The run is over, or will be resumed by its checkpoint: nothing of it stays in the store."""
        self._replies = {}
        self._sweep(())

    def put(
        self,
        bundles: Mapping[int, Mapping[str, bytes]],
        longest: Mapping[int, int],
        round_: int,
        seconds: float,
        afresh: bool = False,
    ) -> dict[int, StoredShard]:
        """Store each bundle once, and give each site the links to its own; delete what older messages named.

        A store that does not answer is waited for as long as the store's own patience lasts: the round has not begun.

        Args:
            bundles: by site and key; sites that get the same bundle have the same object.
            longest: bytes of each site's reply at the most (`Expected.longest_reply`).
            seconds: the round's deadline.
            afresh: trust no object that is there: the last round came to nothing.

        Raises:
            StoreError: they could not be stored, whatever was tried.
        """
        unique = list(dict.fromkeys(blob for own in bundles.values() for blob in own.values()))
        began = time.monotonic()
        stopped = threading.Event()

        def store(blob: bytes) -> str:
            return self._store.put(blob, clock=Clock(self._store.patience, stopped), afresh=afresh)

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="put") as pool:
            try:
                stored = {blob: pool.submit(store, blob) for blob in unique}
                for future in as_completed(stored.values()):
                    future.result()
            except BaseException:
                # Leaving waits for the threads; neither Ctrl-C nor a refusal must wait for a store that is down.
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        digests = {blob: future.result() for blob, future in stored.items()}
        nbytes = sum(len(blob) for blob in unique)
        log.debug("stored %s in %.2f s", in_bytes(nbytes), time.monotonic() - began)
        # Before there are links to write by: in a folder these make the folders that an empty one is removed with.
        self._sweep(digests.values())
        good = seconds + MARGIN_S
        links = {digest: self._store.bundle_link(digest, good) for digest in set(digests.values())}
        shards, self._replies = {}, {}
        for site, own in bundles.items():
            # By its number: a store takes fewer names than a federation does.
            replies = [
                self._store.reply_link(round_, str(site), good) for _ in range(most_objects(longest[site]))
            ]
            self._replies[site] = [name for name, _ in replies], longest[site]
            shards[site] = StoredShard(
                {
                    key: StoredBundle(links[digests[blob]], digests[blob], len(blob))
                    for key, blob in own.items()
                },
                [link for _, link in replies],
                None if self._store.shared is None else str(self._store.shared),
            )
        return shards

    def announced(self, site: int, text: str) -> StoredReply:
        """What a site says that it has written.

        Raises:
            WireError: the text says no such thing, or names larger objects than its reply can need.
        """
        return StoredReply.from_json(text, self._replies[site][1])

    def fetch(self, site: int, reply: StoredReply, folder: Path, seconds: float) -> dict[str, bytes]:
        """The bundles of a site's reply, mapped from files that have no name any more.

        Args:
            folder: with room for them.
            seconds: until the round's deadline.

        Raises:
            StoreError: it is not there, or is not what the site said.
        """
        deadline, blobs = time.monotonic() + max(seconds, LEAST_S), dict[str, bytes]()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{site}.", dir=folder) as own:
            target = Path(own) / "object"
            for name, item in zip(self._replies[site][0], reply.objects, strict=False):
                store = self._store.within(deadline - time.monotonic())
                store.get_file(name, item.sha256, item.nbytes, target)
                with target.open("rb") as file:
                    blobs |= mapped_blobs(file, item.sizes)
        return blobs

    def _sweep(self, keep: Collection[str]) -> None:
        try:
            freed = self._store.within(SWEEP_S).sweep(keep)
        except StoreError as error:
            # Room in the store is not worth a round; the next one tries again.
            log.warning("cannot delete old objects: %s", error)
        else:
            log.debug("deleted %s of old objects", in_bytes(freed))
