"""The token cache: a corpus tokenised once, or what somebody needs of it, kept as memory-mapped shards, found again by
content.

Notable: who gets which document, and which are kept for validation, goes by the text and not by its tokens. So a site
looks through all of the text once, and tokenises its own documents. Documents may straddle shards. A corpus that was
tokenised elsewhere has its files for shards, and only an index of them in the cache (`tokenised.py`). A cache is
written beside its place and renamed into it: a reader sees a whole cache or none, however many processes write at
once.
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

FORMAT = 5  # raise it when the same source would give other tokens, another split or other files
SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1_000_000  # text handed to the tokenizer at a time
ATTEMPTS = 3  # another process may take away a cache between our writing and our opening it
INDEX = ("doc_starts", "doc_bytes", "doc_domain", "is_val", "token_bytes")
SENSIBLE = 0.1  # of the text's bytes that a tokenizer must stand for, at least

# Caches that this process has read whole and found to be what was written.
_whole: set[tuple[Path, str]] = set()


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """A corpus of D documents, all or some of them tokenised. All arrays are read-only and mapped.

    Apart from tokens and their number all is the same whichever documents are tokenised.
    """

    domains: list[str]  # in order of first appearance
    # [D+1], position of a document's first token, or where it would be; the last entry is the total.
    doc_starts: NDArray[np.int64]
    doc_bytes: NDArray[np.int64]  # [D], UTF-8 bytes of its text
    doc_domain: NDArray[np.int32]  # [D], index into `domains`
    is_val: NDArray[np.bool_]  # [D], kept for validation
    token_bytes: NDArray[np.int32]  # [V], bytes of text that a token stands for; none if unknown or an end
    vocab_size: int
    eos_id: int  # the last token of every document
    tokenizer: str  # fingerprint of the tokenizer that made it
    digest: str  # text: or tokens: and the SHA-256 (hex) of the documents; equal on every machine that has the corpus
    split: str  # SHA-256 (hex) of `is_val`
    shards: tuple[NDArray[Any], ...] = field(repr=False)
    warnings: tuple[str, ...] = ()  # what was found when the cache was built

    @cached_property
    def doc_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, its end token included; 0: it is not tokenised here. [D]."""
        return np.diff(self.doc_starts)

    @cached_property
    def doc_sizes(self) -> NDArray[np.int64]:
        """What the documents are dealt by, known without tokenising: their bytes, and one for the end token. [D]."""
        return self.doc_bytes + 1

    @cached_property
    def doc_tokens(self) -> NDArray[np.int64]:
        """`doc_lengths`; of documents that are not tokenised here, by how many bytes a token of the others has. [D]."""
        here = self.doc_lengths > 0
        if here.all():
            return self.doc_lengths
        num_bytes, tokens = int(self.doc_bytes[here].sum()), int((self.doc_lengths[here] - 1).sum())
        density = tokens / num_bytes if num_bytes else 1.0
        return np.where(here, self.doc_lengths, np.rint(self.doc_bytes * density).astype(np.int64) + 1)

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


# From a corpus, of which only what is known without tokens is looked at, documents of it: [N].
Choose = Callable[[TokenCorpus], NDArray[np.int64]]


def prepare(config: DataConfig, choose: Choose | None = None) -> TokenCorpus:
    """Open the token cache of this corpus, building it first if it is missing or damaged.

    What is not as it should be, but does not keep anybody from training, is logged once in a process.

    Args:
        choose: from the corpus without tokens the documents that must be tokenised, [N]; more may be, where they are
            already. None: all.

    Raises:
        DataError: the source or the tokenizer cannot be read, the tokenizer drops nearly all of the text, the corpus
            is too small to split, or the cache cannot be written.
        And what `choose` raises.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    recipe = _recipe(config, tokenizer)
    if config.source == "tokens":
        return _cached(config, recipe, lambda folder: _write_index(folder, config, tokenizer))
    # Of a stream there is no more than what it keeps for validation.
    if choose is None or config.stream or (_cache_root(config) / _key(recipe)).exists():
        return _cached(config, recipe, lambda folder: _write(folder, config, tokenizer))
    nothing = np.zeros(0, dtype=np.bool_)
    listed = _cached(
        config, recipe | {"tokens": "none"}, lambda folder: _write(folder, config, tokenizer, nothing)
    )
    chosen = np.zeros(len(listed.doc_bytes), dtype=np.bool_)
    chosen[choose(listed)] = True
    return _cached(
        config,
        recipe | {"tokens": hashlib.sha256(chosen.tobytes()).hexdigest()},
        lambda folder: _write(folder, config, tokenizer, chosen, listed),
    )


def _cached(config: DataConfig, recipe: dict[str, Any], write: Callable[[Path], None]) -> TokenCorpus:
    """Open what the cache has by this recipe; `write` puts it into a folder if it is missing or damaged."""
    root = _cache_root(config)
    folder = root / _key(recipe)
    for _ in range(ATTEMPTS):
        corpus = _open(folder, config)
        if corpus is not None:
            for warning in corpus.warnings:
                _warn_once(warning)
            return corpus
        if folder.exists():
            log.warning("the token cache %s is damaged: it is not used, and built anew", folder)
        try:
            _build(folder, config, write)
        except OSError as error:  # those of the source are DataErrors already
            raise DataError(f"data.cache_dir={root}: cannot write the token cache: {error}") from error
    raise DataError(f"data.cache_dir={root}: the token cache was written but cannot be read back")


def validation_documents(corpus: TokenCorpus) -> NDArray[np.int64]:
    """Those that somebody needs who only judges a model."""
    return corpus.val_documents


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


def _recipe(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that the tokens of the whole corpus come from."""
    return {
        "format": FORMAT,
        "source": config.source,
        "content": sampled_digest(config) if config.source == "tokens" else source_digest(config),
        "tokenizer": tokenizer.fingerprint,
        "val_fraction": config.val_fraction,
        "text_key": config.text_key,
        "domain_key": config.domain_key,
        "max_documents": config.max_documents,
    }


def _key(recipe: dict[str, Any]) -> str:
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


def _build(folder: Path, config: DataConfig, write: Callable[[Path], None]) -> None:
    """Write the cache beside `folder`, then put it in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        write(unfinished)
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
    """What is noted of each document while its tokens stream to disk: about 100 bytes, whatever its length.

    Args:
        sketching: whether it shall be known which documents are alike.
    """

    def __init__(self, tokenizer: Tokenizer, sketching: bool = True) -> None:
        self.tokenizer = tokenizer
        self.sketching = sketching
        self.token_bytes = tokenizer.count_bytes()
        self.starts = array("q", [0])
        self.bytes = array("q")
        self.domain = array("i")
        self.hashes = array("Q")  # of the text
        self.sketches = bytearray()
        self.domains: dict[str, int] = {}
        self.contents = hashlib.sha256()  # of the texts' digests
        self.tokenised = 0  # bytes of text
        self.lost = 0  # bytes of text that no token stands for
        self.example = ""

    def add(self, document: Document, tokens: NDArray[np.integer] | None) -> None:
        """Note a document; its tokens are None if it is not tokenised."""
        content = document.text.encode()
        self.starts.append(self.starts[-1] + (0 if tokens is None else len(tokens) + 1))
        self.bytes.append(len(content))
        self.domain.append(self.domains.setdefault(document.domain, len(self.domains)))
        digest = hashlib.sha256(content).digest()
        self.contents.update(digest)
        if self.sketching:
            self.hashes.append(int.from_bytes(digest[:8]))
            self.sketches += sketch(content)
        if tokens is None:
            return
        self.tokenised += len(content)
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

    def digest(self) -> str:
        """Of all documents, their order and their domains, whichever are tokenised."""
        facts = self.contents.copy()
        facts.update(np.array(self.domain, dtype=np.int32).tobytes())
        facts.update(json.dumps(list(self.domains)).encode())
        return f"text:{facts.hexdigest()}"

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
        share = self.lost / max(self.tokenised, 1)
        said = (
            f"data.tokenizer={self.tokenizer.name}: {share:.2%} of the text's bytes ({self.lost:,}) are dropped or "
            f"unknown to it, such as {self.example!a:.100}"
        )
        if share > 1 - SENSIBLE:
            raise DataError(f"{said}; use a tokenizer with byte fallback, or data.tokenizer=bytes")
        if self.lost:
            warnings.append(f"{said}; they are not learned, and bits per byte are of the rest")


def _write(
    folder: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    chosen: NDArray[np.bool_] | None = None,
    listed: TokenCorpus | None = None,
) -> None:
    """Write the tokens of the text, and where its documents are.

    Args:
        chosen: which documents are tokenised, [D]; those behind its end are not. None: all.
        listed: the same corpus without tokens.

    Raises:
        DataError: the text is not what it was when it was listed; and as `prepare`.
    """
    index = _Index(tokenizer, sketching=listed is None)
    warnings: list[str] = []
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
    shards = _write_shards(folder, _tokenise(config, index, dtype, warnings.append, chosen))
    index.check_lost(warnings)
    if listed is None:
        is_val = index.split(1.0 if config.stream else config.val_fraction, warnings)
    elif index.digest() == listed.digest:
        is_val = listed.is_val
    else:
        raise DataError(f"data.source={config.source}: the text was changed while it was read; start again")
    arrays: tuple[NDArray[Any], ...] = (
        np.array(index.starts, dtype=np.int64),
        np.array(index.bytes, dtype=np.int64),
        np.array(index.domain, dtype=np.int32),
        is_val,
        index.token_bytes,
    )
    facts = {"dtype": dtype.str, "shards": shards, "domains": list(index.domains), "digest": index.digest()}
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
    config: DataConfig,
    index: _Index,
    dtype: np.dtype[Any],
    warn: Callable[[str], None],
    chosen: NDArray[np.bool_] | None = None,
) -> Iterator[NDArray[Any]]:
    """Yield the token stream in blocks of many documents, noting each document in `index`."""
    end = np.array([index.tokenizer.eos_id], dtype=dtype)
    number = 0
    for documents in _batches(read_documents(config, warn)):
        here = [True] * len(documents)
        if chosen is not None:
            here = [
                place < len(chosen) and bool(chosen[place]) for place in range(number, number + len(here))
            ]
        number += len(documents)
        texts = [document.text for document, wanted in zip(documents, here, strict=True) if wanted]
        encoded = iter(index.tokenizer.encode_batch(texts) if texts else [])
        parts = []
        for document, wanted in zip(documents, here, strict=True):
            tokens = next(encoded) if wanted else None
            index.add(document, tokens)
            if tokens is not None:
                parts += [tokens.astype(dtype), end]
        if parts:
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


def _write_shards(folder: Path, blocks: Iterable[NDArray[Any]]) -> list[str]:
    """Write the token stream into files of `SHARD_TOKENS` and return their names."""
    names: list[str] = []
    position = 0
    for block in blocks:
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
