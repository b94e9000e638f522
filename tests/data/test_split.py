"""The split: near-duplicates share a side, and every domain gives its share."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.config import DataConfig
from fomoe_flwr.data import prepare, split
from fomoe_flwr.data.split import SHINGLE, SKETCH, alike, keep_for_validation, sketch
from fomoe_flwr.errors import DataError


def some_words(rng: random.Random, number: int) -> list[str]:
    return ["".join(rng.choices("abcdefghij", k=rng.randint(3, 8))) for _ in range(number)]


@pytest.fixture
def corpus_in(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., DataConfig]:
    """The configuration of a corpus of these texts by domain."""

    def write(texts: dict[str, list[str]], val_fraction: float = 0.05) -> DataConfig:
        rows = [{"text": text, "lang": domain} for domain, several in texts.items() for text in several]
        path = write_jsonl(tmp_path / "x.jsonl", rows)
        return DataConfig(
            source="jsonl",
            path=str(path),
            domain_key="lang",
            val_fraction=val_fraction,
            cache_dir=str(tmp_path / "cache"),
        )

    return write


# --- near-duplicates


def test_near_duplicates_share_a_side(corpus_in: Callable[..., DataConfig]) -> None:
    """40 texts, each four times with another word in another place, in two domains."""
    rng = random.Random(0)
    texts: dict[str, list[str]] = {"a": [], "b": []}
    for _ in range(40):
        words = some_words(rng, 150)
        for version in range(4):
            words[rng.randrange(150)] = "changed"
            texts["ab"[version % 2]].append(" ".join(words))
    corpus = prepare(corpus_in(texts, 0.2))
    sides = corpus.is_val.reshape(2, 40, 2)
    assert 4 <= sides[0, :, 0].sum() <= 12
    assert (sides == sides[:1, :, :1]).all()


def test_equal_documents_share_a_side(corpus_in: Callable[..., DataConfig]) -> None:
    """Also those that are shorter than a shingle."""
    corpus = prepare(corpus_in({"a": [f"document {i % 50}" for i in range(200)]}, 0.3))
    assert (corpus.is_val.reshape(4, 50) == corpus.is_val[:50]).all()
    assert corpus.is_val[:50].sum() == 15


@pytest.mark.parametrize("shared", [0, 300, 500, 600])
def test_a_sketch_tells_jaccards_index(shared: int) -> None:
    """Of the shingles of two random texts that have a part in common; the mean of 30 pairs."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(30):
        one, other, common = (
            rng.integers(0, 256, n, dtype=np.uint8).tobytes() for n in (600 - shared, 600 - shared, shared)
        )
        pair = [np.frombuffer(sketch(common + rest), np.uint8) for rest in (one, other)]
        found.append((pair[0] == pair[1]).mean())
    number = 600 - SHINGLE + 1
    same = max(shared - SHINGLE + 1, 0)
    index = same / (2 * number - same)
    noise = 4 * np.sqrt(max(index * (1 - index), 1 / 256) / (30 * SKETCH))
    assert np.mean(found) == pytest.approx(index + (1 - index) / 256, abs=noise)


@pytest.mark.parametrize("length", [SHINGLE - 1, SHINGLE, SHINGLE + 1, 500])
def test_a_sketch_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    content = np.random.default_rng(1).integers(0, 256, length, dtype=np.uint8).tobytes()
    whole = sketch(content)
    assert len(whole) == SKETCH
    monkeypatch.setattr(split, "PIECE", 7)
    assert sketch(content) == whole


def test_alike_by_way_of_others_and_only_then() -> None:
    """Document i + 1 has 8 bytes of 64 unlike document i; 20 such chains of 10, shuffled."""
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(20):
        row = rng.integers(0, 256, SKETCH, dtype=np.uint8)
        for _ in range(10):
            row = row.copy()
            row[rng.choice(SKETCH, 8, replace=False)] = rng.integers(0, 256, 8)
            rows.append(row)
    order = rng.permutation(200)
    first_N = alike(np.array(rows)[order])
    chain = order // 10
    expected = [np.flatnonzero(chain == mine)[0] for mine in chain]
    assert first_N.tolist() == expected


def test_a_corpus_of_one_text_in_versions_is_split_and_said(
    corpus_in: Callable[..., DataConfig], caplog: pytest.LogCaptureFixture
) -> None:
    common = " ".join(some_words(random.Random(3), 100))
    config = corpus_in({"a": [f"{common} {index}" for index in range(40)]})
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        corpus = prepare(config)
        prepare(config)
    assert 0 < corpus.is_val.sum() < 40
    (line,) = [line for line in caplog.messages if "near-duplicates of each other" in line]
    assert "validation loss" in line


# --- shares


def test_every_domain_gives_its_share_of_bytes(corpus_in: Callable[..., DataConfig]) -> None:
    """Documents of very different lengths, and one domain of long ones."""
    rng = random.Random(4)
    texts = {
        domain: [" ".join(some_words(rng, rng.choice(lengths))) for _ in range(number)]
        for domain, number, lengths in (("a", 300, (2, 40)), ("b", 100, (5, 9)), ("c", 60, (100, 200)))
    }
    corpus = prepare(corpus_in(texts, 0.1))
    for index in range(3):
        here = corpus.doc_domain == index
        share = corpus.doc_bytes[here & corpus.is_val].sum() / corpus.doc_bytes[here].sum()
        largest = corpus.doc_bytes[here].max() / corpus.doc_bytes[here].sum()
        assert share == pytest.approx(0.1, abs=largest / 2)


def test_a_domain_without_validation_text_is_named(
    corpus_in: Callable[..., DataConfig], caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(5)
    texts = {
        "large": [" ".join(some_words(rng, 50)) for _ in range(100)],
        "lonely": ["one " * 90],
        "pair": ["a " * 99, "b " * 99],
    }
    config = corpus_in(texts)
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        prepare(config)
        # Found in the cache, and said already.
        prepare(config)
    (line,) = [line for line in caplog.messages if "no validation text" in line]
    # A domain of one document has none to spare.
    assert line.startswith("data.val_fraction=0.05: no validation text of 1 of 3 domains")
    assert line.endswith(": pair")


def test_domains_too_small_for_a_share_of_their_own_share_a_pool() -> None:
    """As where each document is a domain: 5 of 100 are kept, not none."""
    documents = np.arange(100)
    hashes = np.random.default_rng(6).integers(0, 2**64 - 1, 100, dtype=np.uint64)
    is_val = keep_for_validation(documents, hashes, np.full(100, 10), documents.astype(np.int32), 0.05)
    assert np.flatnonzero(is_val).tolist() == sorted(np.argsort(hashes)[:5].tolist())


def test_most_documents_keep_their_side_as_the_corpus_grows(corpus_in: Callable[..., DataConfig]) -> None:
    rng = random.Random(7)
    config = corpus_in({"a": [" ".join(some_words(rng, 6)) for _ in range(1000)]}, 0.2)
    few, many = prepare(replace(config, max_documents=500)), prepare(config)
    assert (few.is_val == many.is_val[:500]).mean() > 0.95


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 100), st.integers(0, 3)), min_size=1, max_size=15),
    st.floats(0.001, 0.999),
)
def test_both_sides_have_a_document_whenever_two_groups_differ(
    documents: list[tuple[int, int, int]], val_fraction: float
) -> None:
    group, sizes, domains = (np.array(column) for column in zip(*documents, strict=True))
    first_N = np.array([np.flatnonzero(group == mine)[0] for mine in group])
    arguments = (first_N, group.astype(np.uint64), sizes, domains.astype(np.int32), val_fraction)
    if len(set(group)) == 1:
        with pytest.raises(DataError, match="too small to split"):
            keep_for_validation(*arguments)
        return
    is_val = keep_for_validation(*arguments)
    assert is_val.any()
    assert not is_val.all()
    assert (is_val == is_val[first_N]).all()


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 3)), min_size=2, max_size=20),
    st.floats(0.001, 0.999),
    st.floats(0.001, 0.999),
)
def test_a_smaller_share_keeps_a_part_of_a_larger_one(
    documents: list[tuple[int, int]], one: float, other: float
) -> None:
    """So `fomoe eval` with a smaller share judges no text that was trained on."""
    sizes, domains = (np.array(column) for column in zip(*documents, strict=True))
    number = np.arange(len(sizes))
    hashes = np.random.default_rng(8).permutation(len(sizes)).astype(np.uint64)
    few, many = (
        keep_for_validation(number, hashes, sizes, domains.astype(np.int32), share)
        for share in sorted((one, other))
    )
    assert not (few & ~many).any()


def test_a_text_that_nobody_trains_on_is_kept_whole(corpus_in: Callable[..., DataConfig]) -> None:
    assert prepare(corpus_in({"a": ["alone"]}, 1.0)).is_val.tolist() == [True]


def test_one_document_is_too_few(corpus_in: Callable[..., DataConfig]) -> None:
    config = corpus_in({"a": ["the same"] * 3}, 0.2)
    with pytest.raises(
        DataError, match=r"data\.val_fraction=0\.2: the corpus is too small .* has 3 of one text"
    ):
        prepare(config)
    assert list(Path(str(config.cache_dir)).iterdir()) == []
