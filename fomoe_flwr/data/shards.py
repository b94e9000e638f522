"""The token cache: a corpus tokenised once, kept as memory-mapped shards, found again by content.

Notable: every shard but the last holds exactly `shard_tokens` tokens, so a position in the corpus is a shard
and an offset by division, and documents may straddle shards. A cache is written beside its place and renamed
into it: a reader sees a whole cache or none, however many processes write at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data.corpus import Document, is_hidden, read_documents, source_digest
from fomoe_flwr.data.tokenizer import Tokenizer, load_tokenizer
from fomoe_flwr.errors import DataError
from fomoe_flwr.files import flush

FORMAT = 2  # raise it when the same source would give other tokens, another split or other files
SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1_000_000  # text handed to the tokenizer at a time
ATTEMPTS = 3  # another process may take away a cache between our writing and our opening it
INDEX = ("doc_starts", "doc_bytes", "doc_domain", "is_val")


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """A tokenised corpus of D documents. All arrays are read-only and mapped, none is loaded whole."""

    domains: list[str]  # in order of first appearance
    doc_starts: NDArray[np.int64]  # [D+1], position of a document's first token; the last entry is the total
    doc_bytes: NDArray[np.int64]  # [D], UTF-8 bytes of its text
    doc_domain: NDArray[np.int32]  # [D], index into `domains`
    is_val: NDArray[np.bool_]  # [D], kept for validation
    vocab_size: int
    eos_id: int  # the last token of every document
    tokenizer: str  # fingerprint of the tokenizer that made it
    digest: str  # SHA-256 (hex) of tokens and documents; equal on every machine that has the same corpus
    split: str  # SHA-256 (hex) of `is_val`
    shards: tuple[NDArray[Any], ...] = field(repr=False)
    shard_tokens: int

    @cached_property
    def doc_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, its end token included: [D]."""
        return np.diff(self.doc_starts)

    @cached_property
    def train_documents(self) -> NDArray[np.int64]:
        """Indices of the documents to train on, ascending."""
        return np.flatnonzero(~self.is_val)

    @cached_property
    def val_documents(self) -> NDArray[np.int64]:
        """Indices of the documents kept for validation, ascending."""
        return np.flatnonzero(self.is_val)

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at `positions`, in the same shape."""
        if len(self.shards) == 1:
            return self.shards[0][positions].astype(np.int64)
        shard, offset = np.divmod(positions, self.shard_tokens)
        tokens = np.empty(positions.shape, dtype=np.int64)
        for index in np.unique(shard):
            here = shard == index
            tokens[here] = self.shards[index][offset[here]]
        return tokens

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens in [start, stop): [stop - start]."""
        return self.take(np.arange(start, stop))

    def bytes_per_token(self, val: bool) -> float:
        """UTF-8 bytes of text for one token (end tokens counted) in the validation or the training split."""
        documents = self.is_val if val else ~self.is_val
        return float(self.doc_bytes[documents].sum() / self.doc_lengths[documents].sum())


def prepare(config: DataConfig) -> TokenCorpus:
    """Open the token cache of this corpus, building it first if it is missing or damaged.

    Raises:
        DataError: the source or the tokenizer cannot be read, the corpus is too small to split, or the cache
            cannot be written.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    root = _cache_root(config)
    folder = root / _key(config, tokenizer)
    for _ in range(ATTEMPTS):
        corpus = _open(folder)
        if corpus is not None:
            return corpus
        try:
            _build(folder, config, tokenizer)
        except OSError as error:  # those of the source are DataErrors already
            raise DataError(f"data.cache_dir={root}: cannot write the token cache: {error}") from error
    raise DataError(f"data.cache_dir={root}: the token cache was written but cannot be read back")


def _cache_root(config: DataConfig) -> Path:
    default = os.environ.get("FOMOE_CACHE") or "~/.cache/fomoe-flwr"
    root = Path(config.cache_dir or default).expanduser().resolve()
    source = Path(config.path or os.devnull).expanduser().resolve()
    if root.is_relative_to(source) and not is_hidden(root.relative_to(source)):
        raise DataError(
            f"data.cache_dir={root}: lies inside data.path={config.path}, where it would be read as text"
        )
    return root


def _key(config: DataConfig, tokenizer: Tokenizer) -> str:
    recipe = {
        "format": FORMAT,
        "source": config.source,
        "content": source_digest(config),
        "tokenizer": tokenizer.fingerprint,
        "val_fraction": config.val_fraction,
        "text_key": config.text_key,
        "domain_key": config.domain_key,
        "max_documents": config.max_documents,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _open(folder: Path) -> TokenCorpus | None:
    """The corpus in `folder`, or None if there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if any((folder / name).stat().st_size != size for name, size in meta["files"].items()):
            return None
        index = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in INDEX
        }
        shards = tuple(
            np.asarray(np.memmap(folder / name, dtype=meta["dtype"], mode="r")) for name in meta["shards"]
        )
        return TokenCorpus(
            domains=meta["domains"],
            vocab_size=meta["vocab_size"],
            eos_id=meta["eos_id"],
            tokenizer=meta["tokenizer"],
            digest=meta["digest"],
            split=meta["split"],
            shards=shards,
            shard_tokens=meta["shard_tokens"],
            **index,
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _build(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Write the cache beside `folder`, then put it in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        _write(unfinished, config, tokenizer)
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        _publish(unfinished, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already if it was published


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename into place; a whole cache that another process put there first stays."""
    if folder.exists() and _open(folder) is None:
        damaged = unfinished.with_name(f"{unfinished.name}.damaged")
        with suppress(FileNotFoundError):  # another process has just moved it away
            folder.rename(damaged)
            shutil.rmtree(damaged)
    try:
        unfinished.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


class _Index:
    """What is noted of each document while its tokens stream to disk: a few bytes, whatever its length."""

    def __init__(self) -> None:
        self.starts = array("q", [0])
        self.bytes = array("q")
        self.domain = array("i")
        self.hashes = array("Q")  # of the text
        self.domains: dict[str, int] = {}

    def add(self, document: Document, num_tokens: int) -> None:
        content = document.text.encode()
        self.starts.append(self.starts[-1] + num_tokens)
        self.bytes.append(len(content))
        self.domain.append(self.domains.setdefault(document.domain, len(self.domains)))
        self.hashes.append(int.from_bytes(hashlib.sha256(content).digest()[:8]))


def _write(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> None:
    index = _Index()
    digest = hashlib.sha256()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
    shards = _write_shards(folder, _tokenise(config, tokenizer, index, dtype), digest)
    is_val = _split(np.array(index.hashes, dtype=np.uint64), config.val_fraction)
    arrays: tuple[NDArray[Any], ...] = (
        np.array(index.starts, dtype=np.int64),
        np.array(index.bytes, dtype=np.int64),
        np.array(index.domain, dtype=np.int32),
        is_val,
    )
    for name, values in zip(INDEX, arrays, strict=True):
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
        if name != "is_val":
            digest.update(values.tobytes())
    domains = list(index.domains)
    digest.update(json.dumps([domains, tokenizer.vocab_size, tokenizer.eos_id]).encode())
    meta = {
        "format": FORMAT,
        "domains": domains,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype.str,
        "shard_tokens": SHARD_TOKENS,
        "shards": shards,
        "num_documents": len(is_val),
        "num_tokens": index.starts[-1],
        "num_bytes": sum(index.bytes),
        "digest": digest.hexdigest(),
        "split": hashlib.sha256(is_val.tobytes()).hexdigest(),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _tokenise(
    config: DataConfig, tokenizer: Tokenizer, index: _Index, dtype: np.dtype[Any]
) -> Iterator[NDArray[Any]]:
    """Yield the token stream in blocks of many documents, noting each document in `index`."""
    end = np.array([tokenizer.eos_id], dtype=dtype)
    for documents in _batches(read_documents(config)):
        parts = []
        for document, tokens in zip(
            documents, tokenizer.encode_batch([document.text for document in documents]), strict=True
        ):
            index.add(document, len(tokens) + 1)
            parts += [tokens.astype(dtype), end]
        yield np.concatenate(parts)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_shards(folder: Path, blocks: Iterable[NDArray[Any]], digest: hashlib._Hash) -> list[str]:
    """Write the token stream into files of `SHARD_TOKENS` and return their names."""
    names: list[str] = []
    position = 0
    for block in blocks:
        digest.update(block.tobytes())
        rest = block
        while len(rest):
            number, offset = divmod(position, SHARD_TOKENS)
            if number == len(names):
                names.append(f"tokens-{number:05d}.bin")
            part, rest = np.split(rest, [SHARD_TOKENS - offset])
            with (folder / names[number]).open("ab") as file:
                file.write(part.tobytes())
            position += len(part)
    return names


def _split(hashes: NDArray[np.uint64], val_fraction: float) -> NDArray[np.bool_]:
    """Which documents are kept for validation: those whose hash, as a fraction of its range, is low.

    By content, so equal texts are never on both sides, and a document stays on its side as the corpus grows.
    A side left empty gets the document nearest to it; with `val_fraction` 1, for a text that nobody trains on, all
    are kept.

    Raises:
        DataError: all texts are equal, so that one side must stay empty.
    """
    if val_fraction >= 1:
        return np.ones(len(hashes), dtype=np.bool_)
    is_val = hashes / 2.0**64 < val_fraction
    if not is_val.any():
        is_val = hashes == hashes.min()
    if is_val.all():
        is_val = hashes != hashes.max()
    if not is_val.any():
        raise DataError(
            f"data.val_fraction={val_fraction}: the corpus is too small to split; it needs two different "
            f"documents and has {len(hashes)} of one text"
        )
    return is_val
