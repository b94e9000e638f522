"""The token cache: what is in it, when it is found again, and that no crash or race leaves a wrong one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data import Document, Tokenizer, TokenStream, prepare, read_documents, shards
from fomoe_flwr.data.shards import TokenCorpus, _tokenise
from fomoe_flwr.data.tokenizer import load_tokenizer
from fomoe_flwr.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path, write_jsonl: Callable[..., Path]) -> DataConfig:
    """300 documents of 0 to 200 bytes in three domains."""
    rows = [{"text": f"{i}é " * (i % 37 + 1), "lang": "abc"[i % 3]} for i in range(300)]
    write_jsonl(tmp_path / "source" / "x.jsonl", rows)
    return DataConfig(
        source="jsonl",
        path=str(tmp_path / "source"),
        domain_key="lang",
        val_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def cache_of(config: DataConfig) -> list[Path]:
    return sorted(Path(str(config.cache_dir)).iterdir())


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After the call, a cache that is not found is an error."""

    def build(*_: object) -> None:
        raise AssertionError("the cache was built again")

    return lambda: monkeypatch.setattr(shards, "_build", build)


def all_tokens(corpus: TokenCorpus) -> np.ndarray:
    return corpus.read(0, int(corpus.doc_starts[-1]))


# --- content


def test_every_document_is_its_bytes_and_the_end_token(config: DataConfig) -> None:
    corpus = prepare(config)
    documents = list(read_documents(config))
    assert len(documents) == len(corpus.doc_bytes) == 300
    for index, document in enumerate(documents):
        tokens = corpus.read(int(corpus.doc_starts[index]), int(corpus.doc_starts[index + 1]))
        assert tokens.dtype == np.int64
        assert tokens.tolist() == [*document.text.encode(), 256]
        assert corpus.doc_bytes[index] == len(document.text.encode())
        assert corpus.domains[corpus.doc_domain[index]] == document.domain
    assert (corpus.vocab_size, corpus.eos_id, corpus.domains) == (257, 256, ["a", "b", "c"])
    assert not corpus.shards[0].flags.writeable


@pytest.mark.parametrize("shard_tokens", [499, 5000])
def test_shards_of_any_size_hold_the_same_corpus(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int
) -> None:
    whole = prepare(config)
    monkeypatch.setattr(shards, "SHARD_TOKENS", shard_tokens)
    corpus = prepare(replace(config, cache_dir=str(tmp_path / "other")))
    assert len(corpus.shards) == -(-corpus.doc_starts[-1] // shard_tokens) > 1
    assert {len(shard) for shard in corpus.shards[:-1]} == {shard_tokens}
    np.testing.assert_array_equal(all_tokens(corpus), all_tokens(whole))
    positions = np.random.default_rng(0).integers(0, corpus.doc_starts[-1], size=(5, 50))
    np.testing.assert_array_equal(corpus.take(positions), whole.take(positions))
    assert corpus.digest == whole.digest


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_536, 2), (65_537, 4)])
def test_ids_use_two_bytes_where_they_fit(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, vocab_size: int, itemsize: int
) -> None:
    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        return [np.array([0, vocab_size - 2]) for _ in texts]

    def count_bytes() -> np.ndarray:
        return np.full(vocab_size, 1000, dtype=np.int32)

    tokenizer = Tokenizer("fake", vocab_size, vocab_size - 1, "f", encode_batch, count_bytes)
    monkeypatch.setattr(shards, "load_tokenizer", lambda _: tokenizer)
    corpus = prepare(config)
    assert corpus.shards[0].dtype.itemsize == itemsize
    assert all_tokens(corpus).tolist() == [0, vocab_size - 2, vocab_size - 1] * 300


def test_a_large_corpus_is_never_in_memory_whole(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 500)
    blocks = list(_tokenise(config, shards._Index(load_tokenizer("bytes")), np.dtype("<u2"), print))
    assert len(blocks) > 30
    assert max(map(len, blocks)) < 2 * (500 + 200)  # a batch and one document, in bytes


# --- found again


def test_the_cache_is_found_after_a_move(config: DataConfig, no_build: Callable[[], None]) -> None:
    first = prepare(config)
    moved = Path(str(config.path)).rename(Path(str(config.path)).with_name("moved"))
    no_build()
    again = prepare(replace(config, path=str(moved)))
    assert again.digest == first.digest
    for name in ("doc_starts", "doc_bytes", "doc_domain", "is_val"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    np.testing.assert_array_equal(all_tokens(again), all_tokens(first))


@pytest.mark.parametrize(
    "change", [{"val_fraction": 0.5}, {"domain_key": None}, {"text_key": "lang"}, {"max_documents": 50}]
)
def test_what_changes_the_corpus_changes_the_cache(config: DataConfig, change: dict[str, object]) -> None:
    first, changed = prepare(config), prepare(replace(config, **change))
    assert (first.digest, first.split) != (changed.digest, changed.split)
    # Which documents are kept for validation is said apart from the text.
    assert (first.digest == changed.digest) == ("val_fraction" in change)
    assert len(cache_of(config)) == 2


def test_an_edit_of_the_source_is_seen(config: DataConfig) -> None:
    first = prepare(config)
    file = Path(str(config.path)) / "x.jsonl"
    file.write_text(file.read_text().replace("7", "8", 1))
    assert prepare(config).digest != first.digest


def test_the_default_place(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FOMOE_CACHE", raising=False)
    prepare(replace(config, cache_dir=None))
    assert len(list((tmp_path / "home/.cache/fomoe-flwr").iterdir())) == 1
    monkeypatch.setenv("FOMOE_CACHE", str(tmp_path / "elsewhere"))
    prepare(replace(config, cache_dir=None))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_stdlib(tmp_path: Path, no_build: Callable[[], None]) -> None:
    config = DataConfig(cache_dir=str(tmp_path))
    corpus = prepare(config)
    no_build()
    assert prepare(config).digest == corpus.digest
    assert corpus.doc_bytes.sum() + len(corpus.doc_bytes) == corpus.doc_starts[-1]
    assert min(len(corpus.train_documents), len(corpus.val_documents)) > 5
    assert corpus.doc_bytes[corpus.is_val].sum() / corpus.doc_bytes.sum() == pytest.approx(0.05, abs=0.02)
    # Code-page tables, of which some differ in a few lines.
    tables: tuple[list[set[str]], list[set[str]]] = ([], [])
    for document, is_val in zip(read_documents(config), corpus.is_val, strict=True):
        if document.text.startswith('""" Python Character Mapping Codec'):
            tables[int(is_val)].append(set(document.text.splitlines()))
    training, validation = tables
    assert min(len(training), len(validation)) > 1
    assert max(len(one & other) / len(one | other) for one in training for other in validation) < 0.7
    assert (all_tokens(corpus)[corpus.doc_starts[1:] - 1] == 256).all()


# --- damage


FILES = [
    "meta.json",
    "tokens-00000.bin",
    "doc_starts.npy",
    "doc_bytes.npy",
    "doc_domain.npy",
    "is_val.npy",
    "token_bytes.npy",
]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def garble(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, truncate], ids=["missing", "truncated"])
def test_a_damaged_cache_is_rebuilt(config: DataConfig, name: str, damage: Callable[[Path], None]) -> None:
    digest = prepare(config).digest
    (folder,) = cache_of(config)
    damage(folder / name)
    corpus = prepare(config)
    assert corpus.digest == digest
    assert all_tokens(corpus).tolist().count(256) == 300
    assert cache_of(config) == [folder]  # and nothing left beside it


@pytest.mark.parametrize("name", ["meta.json", "doc_starts.npy"])
def test_a_cache_with_a_garbled_header_is_rebuilt(config: DataConfig, name: str) -> None:
    digest = prepare(config).digest
    garble(cache_of(config)[0] / name)
    assert prepare(config).digest == digest


@pytest.mark.parametrize("content", ["{}", "[]", '{"files": {}}'])
def test_a_cache_with_a_foreign_meta_is_rebuilt(config: DataConfig, content: str) -> None:
    digest = prepare(config).digest
    (cache_of(config)[0] / "meta.json").write_text(content)
    assert prepare(config).digest == digest


def test_a_cache_with_a_flipped_bit_anywhere_is_built_anew_and_never_used(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same size, so that only the digests tell. A process reads a cache whole the first time it opens it."""

    def opened() -> list[object]:
        """A cache as a new process would find it."""
        monkeypatch.setattr(shards, "_whole", set())
        corpus = prepare(config)
        index = [getattr(corpus, name).tolist() for name in shards.INDEX]
        return [
            *index,
            all_tokens(corpus).tolist(),
            corpus.domains,
            corpus.digest,
            corpus.split,
            corpus.tokenizer,
        ]

    expected = opened()
    for file in sorted(cache_of(config)[0].iterdir()):
        whole = file.read_bytes()
        for position in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            caplog.clear()
            with caplog.at_level("WARNING"):
                assert opened() == expected
            if file.suffix == ".bin":
                assert "is damaged" in caplog.text
                assert file.read_bytes() == whole


def test_a_cache_is_read_whole_once_in_a_process(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config)
    monkeypatch.setattr(shards, "_digest_of_file", lambda *_: pytest.fail("read again"))
    assert shards._open(cache_of(config)[0], config) is not None


def test_an_interrupted_build_is_not_a_cache(config: DataConfig) -> None:
    digest = prepare(config).digest
    (folder,) = cache_of(config)
    stale = folder.with_name(f".{folder.name}.0123")
    folder.rename(stale)  # as a writer killed just before its rename leaves it
    (stale / "tokens-00000.bin").unlink()
    assert prepare(config).digest == digest
    assert cache_of(config) == [stale, folder]


def test_a_failed_build_leaves_nothing(config: DataConfig) -> None:
    file = Path(str(config.path)) / "x.jsonl"
    file.write_text(file.read_text() + "{bad\n")
    with pytest.raises(DataError, match="line 301 is not JSON"):
        prepare(config)
    assert cache_of(config) == []


def test_a_cache_that_cannot_be_written_is_one_line(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=rf"data\.cache_dir={tmp_path}/file/x: cannot write the token cache: "
    ):
        prepare(replace(config, cache_dir=str(tmp_path / "file" / "x")))


def test_a_cache_is_not_put_among_its_own_source(config: DataConfig) -> None:
    inside = f"{config.path}/tokens"
    with pytest.raises(DataError, match=rf"data\.cache_dir={inside}: lies inside data\.path={config.path}, "):
        prepare(replace(config, cache_dir=inside))
    hidden = replace(config, cache_dir=f"{config.path}/.tokens")  # which readers pass over
    assert prepare(hidden).digest == prepare(hidden).digest
    assert len(cache_of(hidden)) == 1


def test_an_opened_corpus_outlives_its_files(config: DataConfig) -> None:
    corpus = prepare(config)
    shutil.rmtree(cache_of(config)[0])  # another process replaces a damaged cache that we have open
    assert (all_tokens(corpus) == 256).sum() == 300


# --- races


def test_the_second_writer_uses_the_first_ones_cache(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole other build takes place between our writing and our renaming."""
    write = shards._write
    inodes = []

    def write_then_lose(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        monkeypatch.setattr(shards, "_write", write)
        prepare(config)
        inodes.append((Path(str(config.cache_dir)) / args[0].name[1:65]).stat().st_ino)  # type: ignore[attr-defined]

    monkeypatch.setattr(shards, "_write", write_then_lose)
    prepare(config)
    (folder,) = cache_of(config)
    assert [folder.stat().st_ino] == inodes


RACER = """
import sys, time
from pathlib import Path
import numpy as np
from fomoe_flwr.config import DataConfig, SiteConfig, from_dict
from fomoe_flwr.data import TokenStream, deal_documents, prepare, shards
import json

here, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = from_dict(DataConfig, json.loads(sys.argv[4]))
write = shards._write

def write_together(*args):
    write(*args)
    (here / me).touch()  # both have written; now both publish
    deadline = time.time() + 60
    while not (here / other).exists():
        assert time.time() < deadline, "the other process did not build"
        time.sleep(0.001)

shards._write = write_together
corpus = prepare(config)
sites = [SiteConfig(name=f"s{i}") for i in range(3)]
shares = deal_documents(corpus, sites, config, seed=5)
tokens = TokenStream(corpus, shares[1], 16, seed=5).batch(0, 4).tolist()
print(json.dumps([corpus.digest, [share.tolist() for share in shares], tokens]))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_race_for_one_cache(config: DataConfig, tmp_path: Path, damaged: bool) -> None:
    """Both build at once; both end with the same corpus, the same deal and the same batch."""
    if damaged:
        prepare(config)
        truncate(cache_of(config)[0] / "tokens-00000.bin")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), me, other, json.dumps(asdict(config))],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": me[-1]},
        )
        for me, other in (("racer-1", "racer-2"), ("racer-2", "racer-1"))
    ]
    outputs = [racer.communicate(timeout=100)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    (folder,) = cache_of(config)
    corpus = prepare(config)
    assert json.loads(outputs[0])[0] == corpus.digest
    assert folder.name[0] != "."
    assert TokenStream(corpus, corpus.train_documents, 16, seed=0).num_windows > 100


def test_blocks_follow_the_documents(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(*_: object) -> Iterator[Document]:
        yield from (Document("ab", "x"), Document("c", "y"))

    monkeypatch.setattr(shards, "read_documents", two)
    (block,) = _tokenise(config, shards._Index(load_tokenizer("bytes")), np.dtype("<u2"), print)
    assert block.tolist() == [97, 98, 256, 99, 256]
