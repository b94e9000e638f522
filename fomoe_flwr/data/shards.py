"""The token cache: a corpus tokenised once, kept as memory-mapped shards, found again by content.

Notable: documents may straddle shards. A corpus that was tokenised elsewhere has its files for shards, and only an
index of them in the cache (`tokenised.py`). A cache is written beside its place and renamed
into it: a reader sees a whole cache or none, however many processes write at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data.corpus import Document, is_hidden, name_some, read_documents, source_digest
from fomoe_flwr.data.split import alike, keep_for_validation, sketch
from fomoe_flwr.data.tokenised import map_parts, mean_bytes, read_contents, sampled_digest
from fomoe_flwr.data.tokenizer import Tokenizer, load_tokenizer
from fomoe_flwr.errors import DataError
from fomoe_flwr.files import expanded, flush

log = logging.getLogger("fomoe")

FORMAT = 4  # raise it when the same source would give other tokens, another split or other files
SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1_000_000  # text handed to the tokenizer at a time
ATTEMPTS = 3  # another process may take away a cache between our writing and our opening it
INDEX = ("doc_starts", "doc_bytes", "doc_domain", "is_val", "token_bytes")
SENSIBLE = 0.1  # of the text's bytes that a tokenizer must stand for, at least

log = logging.getLogger("fomoe")

# Caches that this process has read whole and found to be what was written.
_whole: set[tuple[Path, str]] = set()


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """A tokenised corpus of D documents. All arrays are read-only and mapped, none is loaded whole."""

    domains: list[str]  # in order of first appearance
    doc_starts: NDArray[np.int64]  # [D+1], position of a document's first token; the last entry is the total
    doc_bytes: NDArray[np.int64]  # [D], UTF-8 bytes of its text
    doc_domain: NDArray[np.int32]  # [D], index into `domains`
    is_val: NDArray[np.bool_]  # [D], kept for validation
    token_bytes: NDArray[np.int32]  # [V], bytes of text that a token stands for; none if unknown or an end
    vocab_size: int
    eos_id: int  # the last token of every document
    tokenizer: str  # fingerprint of the tokenizer that made it
    digest: str  # SHA-256 (hex) of tokens and documents; equal on every machine that has the same corpus
    split: str  # SHA-256 (hex) of `is_val`
    shards: tuple[NDArray[Any], ...] = field(repr=False)
    warnings: tuple[str, ...] = ()  # what was found when the cache was built

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

    @cached_property
    def _shard_starts(self) -> NDArray[np.int64]:
        """Position of each shard's first token; the last entry is the total: [S+1]."""
        return np.cumsum([0, *map(len, self.shards)])

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at `positions`, in the same shape.

        Raises:
            DataError: one is no id of the tokenizer, as may be in a corpus that was tokenised elsewhere.
        """
        shard = np.searchsorted(self._shard_starts, positions, side="right") - 1
        offset = positions - self._shard_starts[shard]
        tokens = np.empty(positions.shape, dtype=np.int64)
        for index in np.unique(shard):
            here = shard == index
            tokens[here] = self.shards[index][offset[here]]
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise DataError(
                f"data.path: the text holds tokens from {tokens.min()} to {tokens.max()}, and data.tokenizer has ids "
                f"from 0 to {self.vocab_size - 1}: another tokenizer made it, or a file is damaged"
            )
        return tokens

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens in [start, stop): [stop - start]."""
        return self.take(np.arange(start, stop))


def prepare(config: DataConfig) -> TokenCorpus:
    """Open the token cache of this corpus, building it first if it is missing or damaged.

    What is not as it should be, but does not keep anybody from training, is logged once in a process.

    Raises:
        DataError: the source or the tokenizer cannot be read, the tokenizer drops nearly all of the text, the corpus
            is too small to split, or the cache cannot be written.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    root = _cache_root(config)
    folder = root / _key(config, tokenizer)
    for _ in range(ATTEMPTS):
        corpus = _open(folder, config)
        if corpus is not None:
            for warning in corpus.warnings:
                _warn_once(warning)
            return corpus
        if folder.exists():
            log.warning("the token cache %s is damaged: it is not used, and built anew", folder)
        try:
            _build(folder, config, tokenizer)
        except OSError as error:  # those of the source are DataErrors already
            raise DataError(f"data.cache_dir={root}: cannot write the token cache: {error}") from error
    raise DataError(f"data.cache_dir={root}: the token cache was written but cannot be read back")


@cache
def _warn_once(warning: str) -> None:
    log.warning("%s", warning)


def _cache_root(config: DataConfig) -> Path:
    default = os.environ.get("FOMOE_CACHE") or "~/.cache/fomoe-flwr"
    root = expanded(config.cache_dir or default).resolve()
    source = expanded(config.path or os.devnull).resolve()
    if root.is_relative_to(source) and not is_hidden(root.relative_to(source)):
        raise DataError(
            f"data.cache_dir={root}: lies inside data.path={config.path}, where it would be read as text"
        )
    return root


def _key(config: DataConfig, tokenizer: Tokenizer) -> str:
    recipe = {
        "format": FORMAT,
        "source": config.source,
        "content": sampled_digest(config) if config.source == "tokens" else source_digest(config),
        "tokenizer": tokenizer.fingerprint,
        "val_fraction": config.val_fraction,
        "text_key": config.text_key,
        "domain_key": config.domain_key,
        "max_documents": config.max_documents,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, config: DataConfig) -> TokenCorpus | None:
    """The corpus in `folder`, or None if there is none or it is damaged.

    The first time in a process all of it is read and held against its digests. That takes about as long as
    `source_digest` takes to find the cache, once more: about a second for each GB.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta.pop("sha256") != _digest_of_facts(meta):
            return None
        if any((folder / name).stat().st_size != size for name, (size, _) in meta["files"].items()):
            return None
        if (folder, meta["digest"]) not in _whole:
            if any(_digest_of_file(folder / name) != digest for name, (_, digest) in meta["files"].items()):
                return None
            _whole.add((folder, meta["digest"]))
        index = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in INDEX
        }
        if config.source == "tokens":
            shards = map_parts(config, meta["parts"])
        else:
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
            warnings=tuple(meta["warnings"]),
            **index,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _build(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Write the cache beside `folder`, then put it in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        if config.source == "tokens":
            _write_index(unfinished, config, tokenizer)
        else:
            _write(unfinished, config, tokenizer)
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        _publish(unfinished, folder, config)
        flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already if it was published


def _publish(unfinished: Path, folder: Path, config: DataConfig) -> None:
    """Rename into place; a whole cache that another process put there first stays."""
    if folder.exists() and _open(folder, config) is None:
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
    """What is noted of each document while its tokens stream to disk: about 100 bytes, whatever its length."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.token_bytes = tokenizer.count_bytes()
        self.starts = array("q", [0])
        self.bytes = array("q")
        self.domain = array("i")
        self.hashes = array("Q")  # of the text
        self.sketches = bytearray()
        self.domains: dict[str, int] = {}
        self.lost = 0  # bytes of text that no token stands for
        self.example = ""

    def add(self, document: Document, tokens: NDArray[np.integer]) -> None:
        content = document.text.encode()
        self.starts.append(self.starts[-1] + len(tokens) + 1)
        self.bytes.append(len(content))
        self.domain.append(self.domains.setdefault(document.domain, len(self.domains)))
        self.hashes.append(int.from_bytes(hashlib.sha256(content).digest()[:8]))
        self.sketches += sketch(content)
        lost = len(content) - int(self.token_bytes[tokens].sum())
        if lost > 0:
            self.lost += lost
            self.example = self.example or self._first_lost(document.text)

    def _first_lost(self, text: str) -> str:
        """Some characters that come to nothing alone; if there is none, how the text begins."""
        characters = list(dict.fromkeys(text))
        encoded = self.tokenizer.encode_batch(characters)
        lost = [
            one for one, tokens in zip(characters, encoded, strict=True) if not self.token_bytes[tokens].sum()
        ]
        return "".join(lost[:8]) or text[:20]

    def split(self, val_fraction: float, warnings: list[str]) -> NDArray[np.bool_]:
        """Which documents are kept for validation; near-duplicates share a side."""
        hash_N = np.array(self.hashes, dtype=np.uint64)
        first_N = alike(np.frombuffer(self.sketches, dtype=np.uint8).reshape(len(hash_N), -1))
        if not first_N.any() and val_fraction < 1:
            _, firsts, equal_N = np.unique(hash_N, return_index=True, return_inverse=True)
            first_N = firsts[equal_N]
            if first_N.any():
                warnings.append(
                    "all documents of the corpus are near-duplicates of each other, so the validation loss is about "
                    "text that was trained on"
                )
        domain_N = np.array(self.domain, dtype=np.int32)
        is_val = keep_for_validation(
            first_N, hash_N, np.array(self.bytes, dtype=np.int64), domain_N, val_fraction
        )
        kept = set(domain_N[is_val].tolist())
        # A domain of one document, as a file in a flat folder, has none to spare.
        documents = np.bincount(domain_N, minlength=len(self.domains))
        without = [name for name, index in self.domains.items() if index not in kept and documents[index] > 1]
        if without:
            warnings.append(
                f"data.val_fraction={val_fraction}: no validation text of {len(without)} of {len(self.domains)} "
                f"domains, whose documents are too few or too long: {name_some((f'{name:.40}' for name in without), 8)}"
            )
        return is_val

    def check_lost(self, warnings: list[str]) -> None:
        """Note text that the tokenizer dropped, or gave the token for unknown text.

        Raises:
            DataError: nearly all of it.
        """
        share = self.lost / max(sum(self.bytes), 1)
        said = (
            f"data.tokenizer={self.tokenizer.name}: {share:.2%} of the text's bytes ({self.lost:,}) are dropped or "
            f"unknown to it, such as {self.example!a:.100}"
        )
        if share > 1 - SENSIBLE:
            raise DataError(f"{said}; use a tokenizer with byte fallback, or data.tokenizer=bytes")
        if self.lost:
            warnings.append(f"{said}; they are not learned, and bits per byte are of the rest")


def _write(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Write the tokens of the text, and where its documents are."""
    index = _Index(tokenizer)
    digest = hashlib.sha256()
    warnings: list[str] = []
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
    shards = _write_shards(folder, _tokenise(config, index, dtype, warnings.append), digest)
    index.check_lost(warnings)
    is_val = index.split(config.val_fraction, warnings)
    arrays: tuple[NDArray[Any], ...] = (
        np.array(index.starts, dtype=np.int64),
        np.array(index.bytes, dtype=np.int64),
        np.array(index.domain, dtype=np.int32),
        is_val,
        index.token_bytes,
    )
    for name, values in zip(INDEX, arrays, strict=True):
        # Bytes of tokens follow from the tokenizer, which has a fingerprint of its own.
        if name not in ("is_val", "token_bytes"):
            digest.update(values.tobytes())
    domains = list(index.domains)
    digest.update(json.dumps([domains, tokenizer.vocab_size, tokenizer.eos_id]).encode())
    facts = {"dtype": dtype.str, "shards": shards, "domains": domains, "digest": digest.hexdigest()}
    _write_meta(folder, tokenizer, arrays, facts, warnings)


def _write_index(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Write where the documents of a corpus are that was tokenised elsewhere.

    Which are kept for validation goes by files and places in them: nobody looks for near-duplicates in it.
    """
    contents = read_contents(config, tokenizer)
    lengths = np.diff(contents.doc_starts)
    token_bytes = tokenizer.count_bytes()
    # By the samples: to know it, all of the corpus would be read.
    num_bytes = np.rint(lengths * mean_bytes(config, contents.parts, token_bytes)).astype(np.int64)
    is_val = keep_for_validation(
        np.arange(len(lengths)), contents.hashes, lengths, contents.doc_domain, config.val_fraction
    )
    arrays = (contents.doc_starts, num_bytes, contents.doc_domain, is_val, token_bytes)
    facts = {
        "parts": [asdict(part) for part in contents.parts],
        "domains": contents.domains,
        "digest": contents.digest,
    }
    _write_meta(folder, tokenizer, arrays, facts, [])


def _write_meta(
    folder: Path,
    tokenizer: Tokenizer,
    arrays: Sequence[NDArray[Any]],
    facts: dict[str, Any],
    warnings: list[str],
) -> None:
    """Write the arrays of `INDEX`, and what else is known of the corpus."""
    for name, values in zip(INDEX, arrays, strict=True):
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
    doc_starts, doc_bytes, _, is_val, _ = arrays
    meta = {
        "format": FORMAT,
        **facts,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "num_documents": len(doc_bytes),
        "num_tokens": int(doc_starts[-1]),
        "num_bytes": int(doc_bytes.sum()),
        "warnings": warnings,
        "split": hashlib.sha256(is_val.tobytes()).hexdigest(),
        "files": {
            file.name: [file.stat().st_size, _digest_of_file(file)] for file in sorted(folder.iterdir())
        },
    }
    meta["sha256"] = _digest_of_facts(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _digest_of_facts(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenise(
    config: DataConfig, index: _Index, dtype: np.dtype[Any], warn: Callable[[str], None]
) -> Iterator[NDArray[Any]]:
    """Yield the token stream in blocks of many documents, noting each document in `index`."""
    end = np.array([index.tokenizer.eos_id], dtype=dtype)
    for documents in _batches(read_documents(config, warn)):
        parts = []
        encoded = index.tokenizer.encode_batch([document.text for document in documents])
        for document, tokens in zip(documents, encoded, strict=True):
            index.add(document, tokens)
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
