"""Only what somebody needs of a corpus is tokenised; all else is the same whoever asks."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data import (
    TokenCorpus,
    Tokenizer,
    TokenStream,
    deal_documents,
    prepare,
    shards,
    validation_documents,
)
from fomoe_flwr.data.shards import Choose
from fomoe_flwr.data.tokenizer import load_tokenizer
from fomoe_flwr.errors import DataError
from tests.data.helpers import lines_of
from tests.data.test_tokenizer import train_bpe

FACTS = ("doc_bytes", "doc_domain", "is_val", "token_bytes", "domains", "digest", "split", "tokenizer")


@pytest.fixture
def config(tmp_path: Path, write_jsonl: Callable[..., Path]) -> DataConfig:
    rng = random.Random(0)
    rows = [
        {
            "text": f"{i} " + " ".join(rng.choice(("alder", "birch", "cedar")) for _ in range(i % 37)),
            "lang": "abc"[i % 3],
        }
        for i in range(300)
    ]
    write_jsonl(tmp_path / "source" / "x.jsonl", rows)
    return DataConfig(
        source="jsonl",
        path=str(tmp_path / "source"),
        domain_key="lang",
        val_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each text that was given to a tokenizer."""
    sizes: list[int] = []

    def spied(spec: str) -> Tokenizer:
        tokenizer = load_tokenizer(spec)

        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            sizes.extend(len(text.encode()) for text in texts)
            return tokenizer.encode_batch(texts)

        return replace(tokenizer, encode_batch=encode_batch)

    monkeypatch.setattr(shards, "load_tokenizer", spied)
    return sizes


def share_of(config: DataConfig, place: int, sites: int) -> Choose:
    """What a site of so many is dealt."""
    named = [SiteConfig(name=str(index)) for index in range(sites)]
    return lambda corpus: deal_documents(corpus, named, config, seed=0)[place]


def check_equal(part: TokenCorpus, whole: TokenCorpus, held: np.ndarray) -> None:
    for name in FACTS:
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name), err_msg=name)
    assert np.flatnonzero(part.doc_lengths).tolist() == sorted(held.tolist())
    for document in held:
        np.testing.assert_array_equal(
            *(corpus.read(*corpus.doc_starts[document : document + 2].tolist()) for corpus in (part, whole))
        )


@pytest.mark.parametrize("partition", ["iid", "domain", "dirichlet"])
def test_each_tokenises_its_own_and_nothing_is_tokenised_twice(
    config: DataConfig, tmp_path: Path, tokenised: list[int], partition: str
) -> None:
    config = replace(config, partition=partition, dirichlet_alpha=5.0)
    whole = prepare(replace(config, cache_dir=str(tmp_path / "whole")))
    everything = sum(tokenised)
    assert everything == whole.doc_bytes.sum()
    total = 0
    for choose in (*(share_of(config, place, 3) for place in range(3)), validation_documents):
        tokenised.clear()
        part = prepare(config, choose)
        held = choose(whole)
        assert sum(tokenised) == whole.doc_bytes[held].sum()
        check_equal(part, whole, held)
        np.testing.assert_array_equal(choose(part), held)
        total += sum(tokenised)
        # Bytes are what such tokens are of, so that the estimate is exact.
        np.testing.assert_array_equal(part.doc_tokens, whole.doc_lengths)
        tokenised.clear()
        prepare(config, choose)
        assert tokenised == []
        if choose is not validation_documents:
            batches = [
                TokenStream(corpus, choose(corpus), 16, seed=3).batch(7, 5).tolist()
                for corpus in (part, whole)
            ]
            assert batches[0] == batches[1]
    assert total == everything
    with pytest.raises(ValueError, match="not tokenised here"):
        TokenStream(part, whole.train_documents, 16, seed=3)


def test_what_is_whole_already_is_used(config: DataConfig, tokenised: list[int]) -> None:
    whole = prepare(config)
    tokenised.clear()
    assert prepare(config, validation_documents).doc_starts[-1] == whole.doc_starts[-1]
    assert tokenised == []
    assert len(list(Path(str(config.cache_dir)).iterdir())) == 1


def test_an_edit_and_another_share_are_other_caches(config: DataConfig) -> None:
    first = prepare(config, share_of(config, 0, 3))
    second = prepare(config, share_of(config, 0, 2))
    assert second.doc_starts[-1] > first.doc_starts[-1]
    file = Path(str(config.path)) / "x.jsonl"
    file.write_text(file.read_text().replace("alder", "elder", 1))
    edited = prepare(config, share_of(config, 0, 3))
    assert edited.digest != first.digest
    # Two lists of documents and three shares.
    assert len(list(Path(str(config.cache_dir)).iterdir())) == 5


def test_a_damaged_share_is_built_anew(config: DataConfig) -> None:
    choose = share_of(config, 1, 3)
    tokens = prepare(config, choose).read(0, 100).tolist()
    for file in Path(str(config.cache_dir)).rglob("*.bin"):
        os.truncate(file, 10)
    assert prepare(config, choose).read(0, 100).tolist() == tokens


def test_text_that_changes_between_listing_and_tokenising(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(str(config.path)) / "x.jsonl"

    def choose(corpus: TokenCorpus) -> np.ndarray:
        file.write_text(file.read_text().replace("alder", "elder", 1))
        return corpus.train_documents

    with pytest.raises(DataError, match=r"data\.source=jsonl: the text was changed while it was read"):
        prepare(config, choose)


def test_tokens_of_what_is_not_tokenised_are_estimated(config: DataConfig, tmp_path: Path) -> None:
    train_bpe(tmp_path / "t.json")
    config = replace(config, tokenizer=str(tmp_path / "t.json"))
    part = prepare(config, validation_documents)
    whole = prepare(config)
    here = part.is_val
    np.testing.assert_array_equal(part.doc_tokens[here], whole.doc_lengths[here])
    assert part.doc_tokens.sum() == pytest.approx(whole.doc_lengths.sum(), rel=0.05)
    assert part.digest == whole.digest


def test_shares_by_bytes_are_fair_in_tokens(config: DataConfig, tmp_path: Path) -> None:
    """Of one kind of text."""
    train_bpe(tmp_path / "t.json")
    whole = prepare(replace(config, tokenizer=str(tmp_path / "t.json")))
    tokens = [whole.doc_lengths[share_of(config, place, 3)(whole)].sum() for place in range(3)]
    assert max(tokens) / min(tokens) < 1.05


# --- killed and resumed

READER = """
import json, sys
from fomoe_flwr.config import DataConfig, SiteConfig, from_dict
from fomoe_flwr.data import TokenStream, deal_documents, prepare
config = from_dict(DataConfig, json.loads(sys.argv[1]))
sites = [SiteConfig(name=str(i)) for i in range(3)]
choose = lambda corpus: deal_documents(corpus, sites, config, 0)[1]
corpus = prepare(config, choose)
stream = TokenStream(corpus, choose(corpus), 16, seed=3)
position = int(sys.argv[2])
while position < 600:
    print(json.dumps([position, stream.batch(position, 4).tolist()]), flush=True)
    position += 4
"""


def test_a_stream_that_is_killed_goes_on_with_the_same_tokens(config: DataConfig) -> None:
    """By the position alone, in a process that has nothing else of the one before."""

    def read(position: int, kill_after: int | None = None) -> list[list[object]]:
        return lines_of(READER, json.dumps(asdict(config)), str(position), kill_after=kill_after)

    killed = read(0, 41)
    assert len(killed) == 41
    resumed = read(killed[-1][0] + 4)  # type: ignore[operator]
    assert killed + resumed == read(0)
    assert len(killed + resumed) == 150


# --- large

MEGABYTES = int(os.environ.get("FOMOE_TEST_CORPUS_MB", "200"))


@pytest.mark.slow
def test_a_tenth_of_a_large_corpus_costs_a_tenth_of_the_tokenising(
    tmp_path: Path, tokenised: list[int]
) -> None:
    """Counted in bytes. `FOMOE_TEST_CORPUS_MB=10000` makes it 10 GB."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 11)))) for _ in range(50_000)]
    size = 0
    (tmp_path / "source").mkdir()
    while size < MEGABYTES * 10**6:
        with (tmp_path / "source" / f"{size}.jsonl").open("w") as file:
            for _ in range(5000):
                chosen = rng.integers(0, len(words), int(rng.lognormal(5.5, 1.0)) + 1)
                text = " ".join(map(words.__getitem__, chosen.tolist()))
                size += file.write(f'{{"text": "{text}"}}\n')
    config = DataConfig(
        source="jsonl", path=str(tmp_path / "source"), cache_dir=str(tmp_path / "cache"), val_fraction=0.01
    )
    choose = share_of(config, 4, 10)
    began = time.monotonic()
    corpus = prepare(config, choose)
    print(f"{size / 1e9:.2f} GB, {time.monotonic() - began:.0f} s")
    training = corpus.doc_bytes[corpus.train_documents].sum()
    assert sum(tokenised) == corpus.doc_bytes[choose(corpus)].sum() == pytest.approx(training / 10, rel=0.01)
    tokenised.clear()
    prepare(config, validation_documents)
    assert sum(tokenised) == corpus.doc_bytes[corpus.is_val].sum() == pytest.approx(0.01 * training, rel=0.2)
