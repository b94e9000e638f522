"""Corpora that were tokenised elsewhere, read where they lie: OLMo's `.npy`, and Megatron's `.bin` with `.idx`.

Notable: tokens are mapped and never copied. What is kept in the token cache is where each document begins. A `.npy` has
no list of its documents, so it is read once for its end tokens; a `.bin` is not, for its `.idx` says it.

Corpora may be of terabytes, so what is in a file is known by samples: `SAMPLES` pieces of it, evenly spread. That the
tokens are those of `data.tokenizer` is seen from them, and once more from all that is read for training; and the
digest of the corpus is of them, of the files' names and sizes, and of where each document begins. An edit between the
samples that leaves all lengths as they were is not seen in the digest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data.corpus import domain_of, local_files, readable, relative
from fomoe_flwr.data.tokenizer import Tokenizer
from fomoe_flwr.errors import DataError

SAMPLES = 64  # in a file
SAMPLE = 65_536  # bytes of each
SCANNED = 2**24  # tokens in memory at a time, looked through for end tokens
_NUMPY = b"\x93NUMPY"
_MEGATRON = b"MMIDIDX\x00\x00"
# Version, code of the tokens' type, sequences, ends of documents.
_HEADER = struct.Struct("<QBQQ")
_TYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class Part:
    """The tokens of one file."""

    name: str  # below data.path
    dtype: str
    offset: int  # bytes before the first token
    tokens: int


@dataclass(frozen=True)
class Contents:
    """What is known of a tokenised corpus of D documents without its tokens."""

    parts: list[Part]
    domains: list[str]
    doc_starts: NDArray[np.int64]  # [D+1]
    doc_domain: NDArray[np.int32]  # [D]
    hashes: NDArray[np.uint64]  # [D], of where a document is: its file's name and its place in it
    digest: str  # SHA-256 (hex)


def sampled_digest(config: DataConfig, with_times: bool = True) -> str:
    """SHA-256 (hex) of the files' names, sizes and samples; `.idx` are read whole.

    Args:
        with_times: also of when they were last written, by which this machine sees an edit between the samples.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    root, files = local_files(config, lambda _: None)
    for file in files:
        with readable(file):
            facts = file.stat()
            digest.update(f"{relative(file, root)}\0{facts.st_size}\0".encode())
            if with_times:
                digest.update(f"{facts.st_mtime_ns}\0".encode())
            for piece in _samples(file):
                digest.update(piece)
        if file.suffix == ".bin":
            with readable(_index_of(file)), _index_of(file).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def map_parts(config: DataConfig, parts: Sequence[dict[str, Any]]) -> tuple[NDArray[Any], ...]:
    """The tokens of each file, mapped.

    Args:
        parts: each a Part as JSON values.

    Raises:
        DataError: a file is gone or shorter than it was.
    """
    root, _ = local_files(config, lambda _: None)
    mapped = []
    for part in parts:
        file = root if root.is_file() else root / part["name"]
        with readable(file):
            try:
                mapped.append(_map(file, part["dtype"], part["offset"], part["tokens"]))
            except ValueError as error:
                raise DataError(f"data.path: {file} is shorter than it was: {error}") from error
    return tuple(mapped)


def read_contents(config: DataConfig, tokenizer: Tokenizer) -> Contents:
    """Find the documents of the files in `data.path`, at most `max_documents`.

    Raises:
        DataError: a file is damaged, or its tokens are not those of the tokenizer.
    """
    root, files = local_files(config, lambda _: None)
    digest = hashlib.sha256(sampled_digest(config, with_times=False).encode())
    parts: list[Part] = []
    starts, domain, hashes = [np.zeros(1, dtype=np.int64)], [], []
    domains: dict[str, int] = {}
    position, left = 0, config.max_documents
    for file in files:
        with readable(file):
            dtype, offset, ends = _open_bin(file) if file.suffix == ".bin" else _open_npy(file, tokenizer)
            width = np.dtype(dtype).itemsize
            tokens = _map(file, dtype, offset, (file.stat().st_size - offset) // width)
            if ends is None:
                ends = np.concatenate([np.zeros(0, dtype=np.int64), *_ends(tokens, tokenizer.eos_id)])
        _check_tokens(file, tokens, ends, tokenizer)
        ends = ends[:left]
        left = None if left is None else left - len(ends)
        name = relative(file, root)
        parts.append(Part(name, dtype, offset, int(ends[-1])))
        starts.append(position + ends)
        position += int(ends[-1])
        domain.append(np.full(len(ends), domains.setdefault(domain_of(file, root), len(domains)), np.int32))
        first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
        hashes.append(_scrambled(np.uint64(first) + np.arange(len(ends), dtype=np.uint64)))
        if left == 0:
            break
    doc_starts, doc_domain = np.concatenate(starts), np.concatenate(domain)
    for values in (doc_starts, doc_domain):
        digest.update(values.tobytes())
    digest.update(repr(list(domains)).encode())
    return Contents(
        parts, list(domains), doc_starts, doc_domain, np.concatenate(hashes), f"tokens:{digest.hexdigest()}"
    )


def mean_bytes(config: DataConfig, parts: Sequence[Part], token_bytes: NDArray[np.int32]) -> float:
    """UTF-8 bytes of text that a token stands for, in the mean of the samples: to say how much text there is."""
    total = tokens = 0
    for mapped in map_parts(config, [asdict(part) for part in parts]):
        for sample in _sampled(mapped):
            total += int(token_bytes[sample.astype(np.int64)].sum())
            tokens += len(sample)
    return total / max(tokens, 1)


def _open_npy(file: Path, tokenizer: Tokenizer) -> tuple[str, int, NDArray[np.int64] | None]:
    """Type and place of the tokens; None for the documents' ends, which a `.npy` does not list.

    OLMo writes the tokens alone, without the header of NumPy. Then they are the widest of uint32 and uint16 by which
    all samples are ids of the tokenizer: of 16-bit ids read as 32 bits the upper half is an id, and so too large.
    """
    with file.open("rb") as stream:
        begins = stream.read(len(_NUMPY))
    if begins == _NUMPY:
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"data.path: {file} is not a readable .npy file: {error}") from error
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"data.path: {file} holds {array.dtype} of shape {array.shape}, not a row of token ids"
            )
        return array.dtype.str, int(array.offset), None
    size = file.stat().st_size
    for dtype, width in (("<u4", 4), ("<u2", 2)):
        if size and not size % width and tokenizer.vocab_size <= 2 ** (8 * width):
            tokens = _map(file, dtype, 0, size // width)
            if all(sample.max() < tokenizer.vocab_size for sample in _sampled(tokens)):
                return dtype, 0, None
    raise DataError(
        f"data.path: {file} ({size} bytes) does not hold uint16 or uint32 ids below {tokenizer.vocab_size}, the "
        f"number of those of data.tokenizer={tokenizer.name}: another tokenizer made it, or it is no such file"
    )


def _open_bin(file: Path) -> tuple[str, int, NDArray[np.int64]]:
    """Type and place of the tokens, and where each document ends: by the `.idx`."""
    index = _index_of(file)
    header = len(_MEGATRON) + _HEADER.size
    with readable(index):
        content = _map(index, "u1", 0, index.stat().st_size)
    if content[: len(_MEGATRON)].tobytes() != _MEGATRON or len(content) < header:
        raise DataError(f"data.path: {index} is not an index of Megatron (it does not begin with MMIDIDX)")
    version, code, sequences, marks = _HEADER.unpack(content[len(_MEGATRON) : header].tobytes())
    if version != 1 or code not in _TYPES:
        raise DataError(
            f"data.path: {index}: version {version} and type {code} of an index; read are version 1 and the types "
            f"{', '.join(map(str, _TYPES))}"
        )
    if len(content) < header + 12 * sequences + 8 * marks:
        raise DataError(f"data.path: {index} is cut off: {len(content)} bytes for {sequences} sequences")
    sizes = _column(content, header, "<i4", sequences).astype(np.int64)
    pointers = _column(content, header + 4 * sequences, "<i8", sequences)
    bounds = _column(content, header + 12 * sequences, "<i8", marks)
    ends = np.cumsum(sizes)
    dtype = np.dtype(_TYPES[code])
    if (
        (sizes < 0).any()
        or (pointers != (ends - sizes) * dtype.itemsize).any()
        or not len(bounds)
        or (bounds[0], bounds[-1]) != (0, sequences)
        or (np.diff(bounds) < 0).any()
    ):
        raise DataError(f"data.path: {index} is damaged: its sequences or documents do not follow each other")
    total = int(ends[-1]) if sequences else 0
    if (size := file.stat().st_size) != total * dtype.itemsize:
        raise DataError(
            f"data.path: {file} has {size} bytes, its .idx tells of {total} tokens of {dtype.itemsize} bytes"
        )
    # Of documents without a token nothing is left.
    return dtype.str, 0, np.unique(np.concatenate([[0], ends])[bounds])[1:]


def _column(content: NDArray[np.uint8], offset: int, dtype: str, number: int) -> NDArray[Any]:
    return np.frombuffer(content, dtype=dtype, count=number, offset=offset)


def _index_of(file: Path) -> Path:
    index = file.with_suffix(".idx")
    if not index.is_file():
        raise DataError(f"data.path: {file} needs {index.name} beside it, the index that Megatron writes")
    return index


def _map(file: Path, dtype: str, offset: int, number: int) -> NDArray[Any]:
    # Nothing cannot be mapped.
    return np.asarray(np.memmap(file, dtype, "r", offset, (number,))) if number else np.zeros(0, dtype)


def _ends(tokens: NDArray[Any], eos_id: int) -> Iterator[NDArray[np.int64]]:
    """Where documents end, one behind the end token; what follows the last one is a document, too."""
    last = 0
    for start in range(0, len(tokens), SCANNED):
        found = np.flatnonzero(tokens[start : start + SCANNED] == eos_id) + start + 1
        if len(found):
            last = int(found[-1])
            yield found.astype(np.int64)
    if last < len(tokens):
        yield np.array([len(tokens)], dtype=np.int64)


def _check_tokens(file: Path, tokens: NDArray[Any], ends: NDArray[np.int64], tokenizer: Tokenizer) -> None:
    """Hold samples against the tokenizer.

    Raises:
        DataError: no token, one that is no id, or documents that do not end as they must.
    """
    by = f"data.tokenizer={tokenizer.name}"
    if not len(ends):
        raise DataError(f"data.path: {file} holds no tokens")
    for sample in _sampled(tokens):
        for found in (int(sample.min()), int(sample.max())):
            if not 0 <= found < tokenizer.vocab_size:
                raise DataError(
                    f"data.path: {file} holds the token {found}, and {by} has ids from 0 to "
                    f"{tokenizer.vocab_size - 1}: another tokenizer made it"
                )
    # The last one may be cut off.
    looked_at = ends[:-1][np.linspace(0, len(ends) - 2, min(len(ends) - 1, 1000)).astype(np.int64)]
    wrong = looked_at[tokens[looked_at - 1] != tokenizer.eos_id]
    if len(wrong) or (len(ends) == 1 and tokens[-1] != tokenizer.eos_id):
        at = int(wrong[0]) if len(wrong) else len(tokens)
        raise DataError(
            f"data.path: {file}: the document before token {at} does not end with {tokenizer.eos_id}, the end token of "
            f"{by}: another tokenizer made it, or it was written without end tokens"
        )


def _samples(file: Path) -> Iterator[bytes]:
    """Evenly spread, the first and the last bytes among them."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        for start in _spread(size, SAMPLE):
            stream.seek(start)
            yield stream.read(SAMPLE)


def _sampled(tokens: NDArray[Any]) -> Iterator[NDArray[Any]]:
    number = SAMPLE // tokens.dtype.itemsize
    return (tokens[start : start + number] for start in _spread(len(tokens), number))


def _spread(size: int, piece: int) -> list[int]:
    """Where the pieces of a row of `size` begin; a short one is taken whole."""
    if size <= SAMPLES * piece:
        return list(range(0, size, piece))
    return [(size - piece) * index // (SAMPLES - 1) for index in range(SAMPLES)]


def _scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A number that looks random for each (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
