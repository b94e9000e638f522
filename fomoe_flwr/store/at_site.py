"""A site's half: it fetches its shard by links, and writes its reply by the one link that it got for that."""

from __future__ import annotations

import glob
import hashlib
import logging
import mmap
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from fomoe_flwr.bundle_file import write_blobs
from fomoe_flwr.errors import StoreError
from fomoe_flwr.store.links import Patience, Progress, blocks, name_of
from fomoe_flwr.store.messages import StoredObject, StoredReply, StoredShard, in_objects
from fomoe_flwr.store.transfer import fetch_file, send
from fomoe_flwr.units import duration, in_bits, in_bytes

INCOMING = "incoming-"  # in the site's state folder, one for each message: its bundles, by their SHA-256
TELL_EVERY_S = 10.0  # of a long transfer
QUICK_S = 1.0  # a transfer that takes no longer is not told

log = logging.getLogger("fomoe.site")


def fetch_shard(
    shard: StoredShard,
    folder: Path,
    shared: Path | None,
    patience: Patience,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, bytes]:
    """The bundles of a message, by key, mapped: they are read from the disk when they are used.

    What has come stays there until the message is answered or the next one comes, so a worker that takes over from a
    dead one fetches only what is missing.

    Args:
        folder: this site's for this run, `…/run/site`. What is there of other messages is removed, and so is what is
            there of other runs: of one that was given up it would stay for ever, and it is as large as the model.
        shared: the folder of a `file://` store, as it is called here.
        patience: its seconds are for all bundles together.
        beat: is called while bytes come; what it raises ends the transfer.

    Raises:
        StoreError: one of them could not be fetched.
    """
    own = _incoming(shard, folder)
    own.mkdir(parents=True, exist_ok=True)
    _forget_others(own, {bundle.sha256 for bundle in shard.bundles.values()})
    total, began = sum(bundle.nbytes for bundle in shard.bundles.values()), time.monotonic()
    blobs, before = {}, 0
    for key, bundle in shard.bundles.items():
        target = own / bundle.sha256
        if not (target.exists() and target.stat().st_size == bundle.nbytes):
            rest = _rest(patience, began)
            progress = told("fetched", total, beat, before)
            fetch_file(bundle.link, bundle.sha256, bundle.nbytes, target, shared, rest, progress)
        before += bundle.nbytes
        with target.open("rb") as file:
            blobs[key] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _tell("fetched", total, began)
    # A map is read like bytes.
    return blobs  # type: ignore[return-value]


def send_reply(
    blobs: dict[str, bytes],
    shard: StoredShard,
    folder: Path,
    shared: Path | None,
    patience: Patience,
    beat: Callable[[], None] = lambda: None,
) -> StoredReply:
    """Write the bundles of a reply as one object, or a few if it is very large, by the links that came with the shard.

    Args:
        blobs: emptied: they wait on the disk.
        folder, shared, patience, beat: as in `fetch_shard`.

    Raises:
        StoreError: it could not be written, or is larger than the server has links for.
        WorkerError: there is no room for it in the folder.
    """
    groups, total = list(in_objects({key: len(blob) for key, blob in blobs.items()})), 0
    if len(groups) > len(shard.replies):
        raise StoreError(
            f"the reply needs {len(groups)} objects, the server has links for {len(shard.replies)}"
        )
    nbytes = sum(len(blob) for blob in blobs.values())
    objects: list[StoredObject] = []
    began = time.monotonic()
    for keys, link in zip(groups, shard.replies, strict=False):
        file, sizes = write_blobs(((key, blobs.pop(key)) for key in keys), _incoming(shard, folder))
        with file:
            # The map goes with the last view of it.
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        sha256 = hashlib.sha256()
        for block in blocks(whole):
            sha256.update(block)
        send(link, whole, shared, _rest(patience, began), told("sent", nbytes, beat, total))
        objects.append(StoredObject(sha256.hexdigest(), sizes))
        total += sum(sizes.values())
    reply = StoredReply(objects)
    _tell("sent", reply.nbytes, began)
    return reply


def forget(shard: StoredShard, folder: Path) -> None:
    """The message is answered; nobody asks for its bundles again.

    Those of the next one may be on their way already.
    """
    shutil.rmtree(_incoming(shard, folder), ignore_errors=True)


def _incoming(shard: StoredShard, folder: Path) -> Path:
    """A folder for what comes with this message: each has other links to answer by."""
    return folder / (INCOMING + hashlib.sha256(name_of(shard.replies[0]).encode()).hexdigest()[:16])


def _forget_others(own: Path, wanted: Collection[str]) -> None:
    """Remove what came with other messages of this site, but for bundles that have come again: the round before may
    have been discarded.
    """
    folder = own.parent
    for other in folder.parents[1].glob(f"*/{glob.escape(folder.name)}/{INCOMING}*"):
        if other == own:
            continue
        for name in wanted:
            with suppress(FileNotFoundError):
                (other / name).rename(own / name)
        shutil.rmtree(other, ignore_errors=True)
        if other.parent != folder:
            for parent in other.parents[:2]:
                # One that has a state in it stays.
                with suppress(OSError):
                    parent.rmdir()


def told(what: str, total: int, beat: Callable[[], None] = lambda: None, before: int = 0) -> Progress:
    """A Progress that says in the log how far a long transfer is.

    Args:
        before: bytes of the `total` that had come before this object.
    """
    next_word = time.monotonic() + TELL_EVERY_S

    def progress(so_far: int) -> None:
        nonlocal next_word
        beat()
        if (now := time.monotonic()) >= next_word:
            next_word = now + TELL_EVERY_S
            log.info("%s %s of %s", what, in_bytes(before + so_far), in_bytes(total))

    return progress


def _tell(what: str, nbytes: int, began: float) -> None:
    if (seconds := time.monotonic() - began) > QUICK_S:
        log.info("%s %s in %s (%s)", what, in_bytes(nbytes), duration(seconds), in_bits(nbytes / seconds))


def _rest(patience: Patience, began: float) -> Patience:
    left = patience.seconds - (time.monotonic() - began)
    if left <= 0:
        raise StoreError("the round's time is over")
    return Patience(left, patience.stall, patience.first_wait, patience.parallel, patience.seed)
