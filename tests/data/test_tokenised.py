"""Corpora that were tokenised elsewhere: the same documents as by ours, read where they lie, and damage in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data import TokenCorpus, TokenStream, deal_documents, prepare, tokenised
from fomoe_flwr.errors import DataError

EOS = 256  # of data.tokenizer=bytes
Docs = list[np.ndarray]


def documents(number: int, seed: int = 0) -> Docs:
    """Documents of 1 to 60 tokens, the end token included."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, 256, rng.integers(0, 60)), EOS) for _ in range(number)]


def write_raw(file: Path, docs: Docs, dtype: str = "<u2") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(np.concatenate(docs).astype(dtype).tobytes())


def write_npy(file: Path, docs: Docs, dtype: str = "<u2") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, np.concatenate(docs).astype(dtype))


def write_megatron(file: Path, docs: Docs, dtype: str = "<u2", sequences_each: int = 1) -> None:
    """As Megatron's `IndexedDatasetBuilder` does; a document may be of several sequences, such as sentences."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = [np.array_split(doc, sequences_each) for doc in docs]
    sizes = np.array([len(part) for several in parts for part in several], dtype="<i4")
    ends = np.cumsum(sizes.astype(np.int64))
    bounds = np.arange(len(docs) + 1, dtype="<i8") * sequences_each
    code = {"<u2": 8, "<i4": 4}[dtype]
    file.write_bytes(np.concatenate(docs).astype(dtype).tobytes())
    file.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sizes), len(bounds))
        + sizes.tobytes()
        + ((ends - sizes) * np.dtype(dtype).itemsize).astype("<i8").tobytes()
        + bounds.tobytes()
    )


WRITERS: dict[str, Callable[[Path, Docs], None]] = {
    "raw16.npy": write_raw,
    "raw32.npy": lambda file, docs: write_raw(file, docs, "<u4"),
    "numpy16.npy": write_npy,
    "numpy64.npy": lambda file, docs: write_npy(file, docs, "<i8"),
    "numpy_big.npy": lambda file, docs: write_npy(file, docs, ">u2"),
    "mega16.bin": write_megatron,
    "mega32.bin": lambda file, docs: write_megatron(file, docs, "<i4", sequences_each=3),
}


def config_for(path: Path, cache: Path, **more: object) -> DataConfig:
    return DataConfig(source="tokens", path=str(path), cache_dir=str(cache), val_fraction=0.2, **more)  # type: ignore[arg-type]


def texts_of(corpus: TokenCorpus, chosen: Sequence[int] | None = None) -> list[list[int]]:
    places = range(len(corpus.doc_bytes)) if chosen is None else chosen
    return [
        corpus.read(int(corpus.doc_starts[place]), int(corpus.doc_starts[place + 1])).tolist()
        for place in places
    ]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_documents_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    docs = documents(200)
    WRITERS[kind](tmp_path / "text" / kind, docs)
    corpus = prepare(config_for(tmp_path / "text", tmp_path / "cache"))
    assert texts_of(corpus) == [doc.tolist() for doc in docs]
    assert (corpus.domains, corpus.eos_id, corpus.vocab_size) == ([kind[:-4]], EOS, 257)
    assert 20 <= corpus.is_val.sum() <= 60
    # Of the tokens there is no copy.
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*")) < 40_000
    assert isinstance(corpus.shards[0].base, np.memmap)
    # A lone file, too.
    alone = prepare(config_for(tmp_path / "text" / kind, tmp_path / "cache"))
    assert (alone.digest, texts_of(alone)) == (corpus.digest, texts_of(corpus))


def test_a_folder_of_many_files_has_the_domains_of_its_folders(tmp_path: Path) -> None:
    docs = [documents(20, seed) for seed in range(4)]
    write_raw(tmp_path / "text" / "code" / "0.npy", docs[0])
    write_megatron(tmp_path / "text" / "code" / "1.bin", docs[1], "<i4")
    write_npy(tmp_path / "text" / "web" / "deep" / "0.npy", docs[2])
    write_raw(tmp_path / "text" / "loose.npy", docs[3], "<u4")
    corpus = prepare(config_for(tmp_path / "text", tmp_path / "cache"))
    assert texts_of(corpus) == [doc.tolist() for index in (0, 1, 3, 2) for doc in docs[index]]
    assert [corpus.domains[index] for index in corpus.doc_domain[::20]] == ["code", "code", "loose", "web"]
    first = prepare(config_for(tmp_path / "text", tmp_path / "cache", max_documents=50))
    assert texts_of(first) == texts_of(corpus)[:50]
    # Who gets what, and the batches of it, are as of any other corpus.
    shares = deal_documents(corpus, [SiteConfig(name="a"), SiteConfig(name="b")], DataConfig(), 0, 8)
    tokens = [int(corpus.doc_lengths[share].sum()) for share in shares]
    assert abs(tokens[0] - tokens[1]) <= 60
    assert TokenStream(corpus, shares[0], 8, seed=0).batch(5, 3).shape == (3, 9)


def test_it_is_found_again_and_an_edit_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(100)
    for index in range(2):
        write_raw(tmp_path / "text" / "a" / f"{index}.npy", docs)
    config = config_for(tmp_path / "text", tmp_path / "cache")
    first = prepare(config)
    with monkeypatch.context() as patch:
        patch.setattr(tokenised, "_ends", lambda *_: pytest.fail("looked through again"))
        assert prepare(config).digest == first.digest
    # The same on another machine, whose files are of another day.
    copy = tmp_path / "copy"
    for index in range(2):
        write_raw(copy / "a" / f"{index}.npy", docs)
    again = prepare(config_for(copy, tmp_path / "cache"))
    assert (again.digest, again.split) == (first.digest, first.split)
    edited = [*docs[:50], np.array([1, EOS]), *docs[51:]]
    write_raw(tmp_path / "text" / "a" / "1.npy", edited)
    assert prepare(config).digest != first.digest
    assert texts_of(prepare(config), [150]) == [[1, EOS]]


def test_the_digest_reads_samples_and_not_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenised, "SAMPLE", 16)
    write_megatron(tmp_path / "text" / "x.bin", documents(2000))
    config = config_for(tmp_path / "text", tmp_path / "cache")
    size = (tmp_path / "text" / "x.bin").stat().st_size
    read = sum(map(len, tokenised._samples(tmp_path / "text" / "x.bin")))
    assert read == 64 * 16 < size / 50
    first = prepare(config)
    content = bytearray((tmp_path / "text" / "x.bin").read_bytes())
    # The last bytes are always among the samples.
    content[-4] ^= 1
    (tmp_path / "text" / "x.bin").write_bytes(content)
    assert prepare(config).digest != first.digest


# --- what is refused


def error_of(config: DataConfig) -> str:
    with pytest.raises(DataError) as error:
        prepare(config)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert not list(Path(str(config.cache_dir)).glob("*"))
    return text


def test_tokens_of_another_tokenizer(tmp_path: Path) -> None:
    file, config = tmp_path / "x.npy", config_for(tmp_path / "x.npy", tmp_path / "cache")
    write_npy(file, [*documents(3), np.array([300, EOS])])
    assert "holds the token 300, and data.tokenizer=bytes has ids from 0 to 256" in error_of(config)
    write_raw(file, [*documents(3), np.array([300, EOS])])
    assert "does not hold uint16 or uint32 ids below 257" in error_of(config)
    write_npy(file, [np.array([3, -1, EOS])], "<i8")
    assert "holds the token -1" in error_of(config)
    write_raw(file, [np.arange(200)])
    assert "does not end with 256, the end token of data.tokenizer=bytes" in error_of(config)
    write_megatron(tmp_path / "y.bin", [np.arange(9), np.arange(9)])
    assert "the document before token 9 does not end" in error_of(
        replace(config, path=str(tmp_path / "y.bin"))
    )


def test_a_wrong_token_between_the_samples_is_found_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenised, "SAMPLE", 16)
    docs = documents(2000)
    docs[1000] = np.array([9999, EOS])
    write_npy(tmp_path / "x.npy", docs)
    corpus = prepare(config_for(tmp_path / "x.npy", tmp_path / "cache"))
    with pytest.raises(DataError, match=r"holds tokens from .* to 9999, and data\.tokenizer has ids"):
        texts_of(corpus)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes"),
        (b"\x01", "1 bytes"),
        (b"\x93NUMPY rubbish", "not a readable .npy file"),
    ],
)
def test_damaged_npy(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    text = error_of(config_for(tmp_path / "x.npy", tmp_path / "cache"))
    assert said in text
    assert str(tmp_path / "x.npy") in text


def test_a_table_of_floats_is_no_text(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    assert "holds float64 of shape (3, 4), not a row" in error_of(config_for(tmp_path, tmp_path / ".cache"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda idx: idx.unlink(), "needs x.idx beside it"),
        (lambda idx: idx.write_bytes(b""), "not an index"),
        (lambda idx: idx.write_bytes(b"MMIDIDX\x00\x00"), "not an index"),
        (lambda idx: idx.write_bytes(b"x" + idx.read_bytes()[1:]), "not an index of Megatron"),
        (lambda idx: idx.write_bytes(idx.read_bytes()[:9] + b"\2" + idx.read_bytes()[10:]), "version 2"),
        (lambda idx: idx.write_bytes(idx.read_bytes()[:17] + b"\7" + idx.read_bytes()[18:]), "type 7"),
        (lambda idx: idx.write_bytes(idx.read_bytes()[:-1]), "is cut off"),
        (lambda idx: idx.write_bytes(idx.read_bytes()[:34] + b"\1" + idx.read_bytes()[35:]), "is damaged"),
        (lambda idx: idx.with_suffix(".bin").write_bytes(b"\0\0"), "its .idx tells of"),
    ],
)
def test_damaged_megatron(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    write_megatron(tmp_path / "x.bin", documents(30))
    damage(tmp_path / "x.idx")
    assert said in error_of(config_for(tmp_path, tmp_path / ".cache"))


def test_a_folder_without_such_files(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    assert error_of(config_for(tmp_path, tmp_path / ".cache")).endswith(
        "no file *.npy or *.bin in this folder"
    )
