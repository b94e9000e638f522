"""Documents from five sources of text, each in an order that never changes.

Notable: reading is lazy everywhere, so a corpus may be larger than memory; and `source_digest` names what
would be read by its content, so that the token cache is found again after a move and missed after an edit.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fomoe_flwr.config import DataConfig
from fomoe_flwr.errors import DataError
from fomoe_flwr.files import expanded

log = logging.getLogger("fomoe")

SUFFIXES = {
    "text": ("",),
    "jsonl": (".jsonl", ".jsonl.gz", ".json"),
    "parquet": (".parquet",),
    "tokens": (".npy", ".bin"),
}
STDLIB_SKIPPED = {"__phello__", "idlelib", "test", "tests"}  # __phello__ tests frozen modules
PIECE = 16_384  # characters; length at which a corpus kept in one text file is cut into documents
ROWS = 1024  # rows in memory at a time
STREAMED_BYTES = 4_000_000  # of validation text that is taken from a stream


@dataclass(frozen=True)
class Document:
    """One text and the domain it belongs to."""

    text: str
    domain: str


Warn = Callable[[str], None]


def read_documents(config: DataConfig, warn: Warn = log.warning) -> Iterator[Document]:
    """Yield at most `max_documents` documents; those without text (empty, blank or null) are passed over.

    Of a stream they are those for validation, and not all of them (`STREAMED_BYTES`).

    Args:
        warn: is told what could not be read and was passed over, in one line.

    Raises:
        DataError: the source cannot be read, lacks a key, or holds no text at all.
    """
    passed_over: list[Path] = []
    match config.source:
        case "stdlib":
            documents = _stdlib_documents()
        case "text":
            documents = _text_documents(config, warn, passed_over)
        case "jsonl":
            documents = _jsonl_documents(config, warn)
        case "parquet":
            documents = _parquet_documents(config, warn)
        case _:
            documents = _validation_of_stream(config) if config.stream else _huggingface_documents(config)
    with_text = (document for document in documents if document.text and not document.text.isspace())
    empty = True
    for document in itertools.islice(with_text, config.max_documents):
        empty = False
        yield document
    not_text = ""
    if passed_over:
        first = name_some(passed_over, 1)
        not_text = f"; {len(passed_over)} files that are not UTF-8 text or cannot be opened: {first}"
    if empty:
        place = config.path or config.name or sysconfig.get_path("stdlib")
        raise DataError(f"data.source={config.source}: no document with text in {place}{not_text}")
    if not_text:
        warn(f"data.path={config.path}: passed over{not_text.removeprefix(';')}")


def source_digest(config: DataConfig) -> str:
    """SHA-256 (hex) of everything the source holds: names and contents of local files.

    A Hugging Face data set is named by its own fingerprint instead, which saves reading it; a stream by its name.

    Raises:
        DataError: the source cannot be read.
    """
    digest = hashlib.sha256()
    if config.stream:
        names = (config.name, config.config_name, config.path, config.split)
        digest.update(f"stream\0{names}".encode())
        return digest.hexdigest()
    if config.source == "huggingface":
        digest.update(f"{config.name or ''}\0{_load_huggingface(config)._fingerprint}".encode())
        return digest.hexdigest()
    root, files = _stdlib_files() if config.source == "stdlib" else local_files(config, lambda _: None)
    digest.update(b"file" if root.is_file() else b"folder")  # a lone text file is cut into pieces
    closed = (PermissionError,) if config.source == "text" and root.is_dir() else ()  # as in reading
    for file in files:
        content = b""
        with readable(file), suppress(*closed), file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(f"{relative(file, root)}\0".encode() + content)
    return digest.hexdigest()


def is_hidden(path: Path) -> bool:
    """Whether the path below a source folder is passed over: it or a folder on it begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def name_some(names: Iterable[object], limit: int = 12) -> str:
    """The first `limit` names for an error message, and how many more there are."""
    # A file's name need not be UTF-8.
    listed = [str(name).encode("utf-8", "backslashreplace").decode()[:300] for name in names]
    more = f", … ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    # Only folders that can be imported: this leaves out site-packages, lib-dynload and config-3.x-….
    packages = [folder for folder in root.iterdir() if folder.is_dir() and folder.name.isidentifier()]
    found = itertools.chain(root.glob("*.py"), *(folder.rglob("*.py") for folder in packages))
    kept = (file for file in found if not STDLIB_SKIPPED.intersection(file.relative_to(root).parts))
    return root, sorted(kept, key=lambda file: relative(file, root))


def local_files(config: DataConfig, warn: Warn) -> tuple[Path, list[Path]]:
    """`data.path`, and the files of the source in it in an order that never changes.

    Raises:
        DataError: there is none.
    """
    root = expanded(str(config.path))
    if root.is_file():
        return root, [root]
    if not root.is_dir():
        raise DataError(f"data.path={config.path}: no such file or folder")
    suffixes = SUFFIXES[config.source]
    if _is_saved_dataset(root):
        raise DataError(
            f"data.path={config.path}: a data set of save_to_disk; read it by data=huggingface data.path={config.path}"
        )
    unreadable: list[object] = []
    # Not rglob, which passes over a folder that it may not open without a word.
    found = (
        Path(folder, name)
        for folder, _, names in os.walk(root, onerror=lambda error: unreadable.append(error.filename))
        for name in names
    )
    files = [
        file
        for file in found
        if file.name.endswith(suffixes) and file.is_file() and not is_hidden(file.relative_to(root))
    ]
    unreadable = [folder for folder in unreadable if not is_hidden(Path(str(folder)).relative_to(root))]
    if not files:
        wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
        closed = f" that can be opened (not {name_some(unreadable, 1)})" if unreadable else ""
        raise DataError(f"data.path={config.path}: no file {wanted} in this folder{closed}")
    if unreadable:
        warn(
            f"data.path={config.path}: {len(unreadable)} folders cannot be opened: {name_some(unreadable, 1)}"
        )
    for file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"data.path: the name {os.fsencode(file)!r} is not UTF-8; rename it") from error
    return root, sorted(files, key=lambda file: relative(file, root))


def relative(file: Path, root: Path) -> str:
    """A file's name below the root; of a lone file its own."""
    return file.name if file == root else file.relative_to(root).as_posix()


def domain_of(file: Path, root: Path) -> str:
    """The first folder below the root, or the file's own name without suffix."""
    parts = Path(relative(file, root)).parts
    return parts[0] if len(parts) > 1 else Path(file.name.removesuffix(".gz")).stem


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn what goes wrong while reading `file` into one line that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"data.path: {file} is not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data.path: {file} cannot be read: {error}") from error


def _stdlib_documents() -> Iterator[Document]:
    root, files = _stdlib_files()
    for file in files:
        with readable(file):
            content = file.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:  # a source file in an encoding of its own
            continue
        package = file.relative_to(root).parts[0]
        yield Document(text, "modules" if file.parent == root else package)


def _text_documents(config: DataConfig, warn: Warn, passed_over: list[Path]) -> Iterator[Document]:
    """One document a file; files of a folder that are no text, or may not be opened, are passed over.

    A lone file is cut instead, for one document could be neither split nor dealt.
    """
    root, files = local_files(config, warn)
    if root.is_file():
        with readable(root), root.open(encoding="utf-8", newline="") as lines:
            for text in _pieces(lines):
                if "\0" in text:
                    raise DataError(f"data.path: {root} is binary, not text (it holds a zero byte)")
                yield Document(text, domain_of(root, root))
        return
    for file in files:
        # Not text, whatever comes of reading it.
        text = "\0"
        with readable(file), suppress(PermissionError, UnicodeDecodeError):
            text = file.read_bytes().decode()
        if "\0" in text:
            passed_over.append(file)
        else:
            yield Document(text, domain_of(file, root))


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """Cut at the first blank line after `PIECE` characters, or at any line end after twice as many."""
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PIECE and (line.isspace() or size >= 2 * PIECE):
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def _jsonl_documents(config: DataConfig, warn: Warn) -> Iterator[Document]:
    root, files = local_files(config, warn)
    for file in files:
        domain = domain_of(file, root)
        with readable(file), gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    where = f"{file}, line {number}"
                    yield _document(_parse_line(line, where), config, domain, where)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.path: {where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"data.path: {where} is a JSON {type(row).__name__}, not an object with keys")
    return row


def _parquet_documents(config: DataConfig, warn: Warn) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError("data.source=parquet: needs pyarrow; pip install 'fomoe-flwr[data]'") from error
    root, files = local_files(config, warn)
    for file in files:
        domain = domain_of(file, root)
        try:
            with readable(file), pq.ParquetFile(file) as table:
                columns = _columns(config, table.schema_arrow.names, str(file))
                for batch in table.iter_batches(ROWS, columns=columns):
                    for row in batch.to_pylist():
                        yield _document(row, config, domain, str(file))
        except pa.ArrowException as error:
            raise DataError(f"data.path: {file} is not a readable parquet file: {error}") from error


def _huggingface_documents(config: DataConfig) -> Iterator[Document]:
    dataset = _load_huggingface(config)
    name = str(config.name or config.path)
    columns = _columns(config, dataset.column_names, name)
    for batch in dataset.select_columns(columns).iter(ROWS):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield _document(dict(zip(columns, values, strict=True)), config, Path(name).name, name)


def load_streamed(config: DataConfig, place: int = 0, sites: int = 1) -> Any:
    """The `datasets.IterableDataset`, or the part of it that one of so many sites has.

    Where the files can be shared out evenly a site reads its own, else each reads all and takes its rows.

    Raises:
        DataError: it cannot be read.
    """
    dataset = _load_huggingface(config)
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(dataset, place, sites)


def streamed_documents(config: DataConfig, dataset: Any) -> Iterator[Document]:
    """The documents of an opened stream, from where it is; those without text are passed over.

    Raises:
        DataError: it cannot be read, or lacks the column of the text.
    """
    import datasets

    name = str(config.name or config.path)
    rows = iter(dataset)
    while True:
        try:
            row = next(rows, None)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise DataError(f"data.name={name}: the stream cannot be read: {reason}") from error
        if row is None:
            return
        document = _document(row, config, Path(name).name, name)
        if document.text and not document.text.isspace():
            yield document


def is_validation(document: Document, val_fraction: float) -> bool:
    """Whether a document of a stream is kept out of training; equal ones share a side."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8]) < val_fraction * 2**64


def _validation_of_stream(config: DataConfig) -> Iterator[Document]:
    """The first documents of the whole stream that are kept for validation."""
    size = 0
    for document in streamed_documents(config, load_streamed(config)):
        if size < STREAMED_BYTES and is_validation(document, config.val_fraction):
            size += len(document.text.encode())
            yield document
        if size >= STREAMED_BYTES:
            return


def _is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _load_huggingface(config: DataConfig) -> Any:
    """The `datasets.Dataset`; with `data.stream` an `IterableDataset`, which is read as it comes.

    `data.name` is one on the hub, a local folder, or a loader of `data.path`. Without a name `data.path` is a folder
    that `save_to_disk` wrote; a name may be one, too.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.source=huggingface: needs datasets; pip install 'fomoe-flwr[data]'") from error
    folder = str(expanded(config.path)) if config.path else None
    saved = expanded(str(config.name or folder))
    if config.name is None and not _is_saved_dataset(saved):
        raise DataError(
            f"data.path={config.path}: not a folder that save_to_disk wrote; give the data set by data.name=NAME"
        )
    try:
        if _is_saved_dataset(saved):
            loaded = datasets.load_from_disk(str(saved))
            if not isinstance(loaded, datasets.Dataset):
                if config.split not in loaded:
                    raise ValueError(f"it has {name_some(loaded)}")
                loaded = loaded[config.split]
            return loaded.to_iterable_dataset() if config.stream else loaded
        return datasets.load_dataset(
            str(config.name), config.config_name, data_dir=folder, split=config.split, streaming=config.stream
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())  # "while generating the dataset" says little
        key = "path" if config.name is None else "name"
        raise DataError(
            f"data.{key}={config.name or config.path} (data.split={config.split}): {reason}"
        ) from error


def _columns(config: DataConfig, available: Iterable[str], where: str) -> list[str]:
    """The columns to read: text, then domain if it has one.

    Raises:
        DataError: one is missing.
    """
    present = list(available)
    wanted = {"text_key": config.text_key}
    if config.domain_key is not None:
        wanted["domain_key"] = config.domain_key
    for option, key in wanted.items():
        if key not in present:
            raise DataError(
                f"data.{option}={key}: not in {where}, which has {name_some(present) or 'nothing'}"
            )
    return list(wanted.values())


def _document(row: dict[str, Any], config: DataConfig, domain: str, where: str) -> Document:
    _columns(config, row, where)
    text = row[config.text_key]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"data.text_key={config.text_key}: a {type(text).__name__} in {where}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f"data.text_key={config.text_key}: not valid Unicode in {where}: {error}") from error
    named = None if config.domain_key is None else row[config.domain_key]
    # A row without a domain has that of its file, as all have without domain_key.
    return Document(text, domain if named is None else str(named))
