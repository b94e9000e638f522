"""Streams: in these corpora the token at position p is p, so every token of a batch can be traced."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data import TokenCorpus, TokenStream, deal_documents, labelled_batches, validation_batches
from fomoe_flwr.errors import DataError

CorpusOf = Callable[..., TokenCorpus]

corpora = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 60), min_size=3, max_size=30).filter(lambda x: sum(x) > 60),
        "shard_tokens": st.sampled_from([13, 50, 10**6]),
    }
)
seeds = st.integers(0, 2**40)


def stream_of(corpus: TokenCorpus, seq_len: int, seed: int) -> TokenStream:
    return TokenStream(corpus, np.arange(len(corpus.doc_bytes)), seq_len, seed)


@settings(max_examples=80, deadline=None)
@given(corpora, st.integers(2, 20), seeds)
def test_windows_laid_end_to_end_are_the_documents(
    corpus_of: CorpusOf, shape: dict, seq_len: int, seed: int
) -> None:
    """One epoch holds each window once; chained by the token they share, they are documents in a row."""
    corpus = corpus_of(**shape)
    stream = stream_of(corpus, seq_len, seed)
    total = sum(shape["lengths"])
    assert stream.num_windows == (total - 1) // seq_len
    tokens_BT = stream.batch(0, stream.num_windows)
    by_first = {int(window[0]): window.tolist() for window in tokens_BT}
    assert len(by_first) == stream.num_windows
    (first,) = set(by_first) - {int(window[-1]) for window in tokens_BT}
    laid = [first]
    while laid[-1] in by_first:
        laid += by_first[laid[-1]][1:]
    assert len(laid) == stream.num_windows * seq_len + 1 > total - seq_len
    assert len(set(laid)) == len(laid)
    starts = set(corpus.doc_starts[:-1].tolist())
    for token, following in itertools.pairwise(laid):
        # Only at the end of a document does anything but the next token follow, and then a document's first.
        assert following == token + 1 or (token + 1 in starts | {total} and following in starts)


@settings(max_examples=80, deadline=None)
@given(corpora, st.integers(2, 20), seeds, st.integers(0, 300), st.lists(st.integers(1, 9), max_size=6))
def test_a_stream_resumes_exactly(
    corpus_of: CorpusOf, shape: dict, seq_len: int, seed: int, position: int, sizes: list[int]
) -> None:
    """From any position, in batches of any sizes, a new stream goes on as the old one would have."""
    corpus = corpus_of(**shape)
    reference = stream_of(corpus, seq_len, seed).batch(0, position + sum(sizes) + 1)
    resumed = stream_of(corpus, seq_len, seed)
    for size in sizes:
        assert torch.equal(resumed.batch(position, size), reference[position : position + size])
        position += size
    assert torch.equal(resumed.batch(0, 1), reference[:1])  # and back again


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(2, 20), seeds, st.integers(0, 5))
def test_every_epoch_covers_every_window_once(
    corpus_of: CorpusOf, shape: dict, seq_len: int, seed: int, epoch: int
) -> None:
    stream = stream_of(corpus_of(**shape), seq_len, seed)
    size = stream.num_windows
    first, later = (stream.batch(number * size, size) for number in (0, epoch))
    assert sorted(first[:, 0].tolist()) == sorted(later[:, 0].tolist())


def test_orders_differ_between_epochs_seeds_and_documents(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([30] * 40)
    stream = stream_of(corpus, 10, 1)
    size = stream.num_windows
    epochs = [stream.batch(number * size, size)[:, 0].tolist() for number in range(3)]
    other = stream_of(corpus, 10, 2).batch(0, size)[:, 0].tolist()
    assert len({tuple(order) for order in (*epochs, other)}) == 4
    assert set(epochs[0]) != set(other)  # the documents too lie in another order


def test_a_batch_is_int64_and_may_span_epochs(corpus_of: CorpusOf) -> None:
    stream = stream_of(corpus_of([30] * 3), 10, 0)
    tokens_BT = stream.batch(3, 50)
    assert tokens_BT.dtype == torch.int64
    assert tokens_BT.shape == (50, 11)
    assert torch.equal(tokens_BT[20:25], stream.batch(23, 5))


def test_the_order_in_which_documents_are_listed_does_not_matter(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([30] * 10)
    one, two = (TokenStream(corpus, np.array(d), 10, 0).batch(0, 8) for d in ([1, 5, 7], [7, 1, 5]))
    assert torch.equal(one, two)


def test_document_order_within_a_site_is_shuffled(corpus_of: CorpusOf) -> None:
    tokens_BT = stream_of(corpus_of([11] * 50), 10, 0).batch(0, 54)
    crossings = tokens_BT.diff(dim=1)
    assert (crossings != 1).sum() > 40  # in the corpus' own order all would be 1


@pytest.mark.parametrize("partition", ["iid", "domain", "dirichlet"])
def test_streams_of_sites_share_no_token_and_cover_the_corpus(corpus_of: CorpusOf, partition: str) -> None:
    rng = np.random.default_rng(0)
    corpus = corpus_of(rng.integers(20, 400, 200), rng.integers(0, 9, 200), rng.random(200) < 0.1)
    sites = [SiteConfig(name=f"s{index}") for index in range(4)]
    config = DataConfig(partition=partition)
    seq_len = 16
    seen: list[set[int]] = []
    for share in deal_documents(corpus, sites, config, seed=1, seq_len=seq_len):
        stream = TokenStream(corpus, share, seq_len, seed=1)
        seen.append(set(stream.batch(0, stream.num_windows).flatten().tolist()))
    together = set().union(*seen)
    assert sum(map(len, seen)) == len(together)
    train = set(np.flatnonzero(np.repeat(~corpus.is_val, corpus.doc_lengths)).tolist())
    assert together <= train
    assert len(train - together) < len(sites) * seq_len  # what is left over at each site's end
    validated = set(torch.cat(list(validation_batches(corpus, None, seq_len, 4, 1000))).flatten().tolist())
    assert not validated & train


def test_documents_that_fill_no_window(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([5, 5])
    assert stream_of(corpus, 9, 0).num_windows == 1
    with pytest.raises(
        DataError, match=r"^train\.seq_len=10: a site's 2 documents have only 10 tokens, .* of 11$"
    ):
        stream_of(corpus, 10, 0)


# --- validation


def firsts(batches: list[torch.Tensor]) -> list[int]:
    return torch.cat(batches)[:, 0].tolist()


def test_validation_is_the_same_at_every_call_and_spread_over_the_split(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([100] * 50, is_val=[i % 2 == 1 for i in range(50)])
    batches = list(validation_batches(corpus, None, 10, 4, 5))
    again = list(validation_batches(corpus, None, 10, 4, 5))
    assert [tuple(tokens_BT.shape) for tokens_BT in batches] == [(4, 11)] * 5
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    # 2500 tokens are 249 windows; 20 of them, every 12th or 13th.
    windows = np.searchsorted(np.flatnonzero(np.repeat(corpus.is_val, 100)), firsts(batches)) // 10
    assert set(np.diff(windows)) == {12, 13}
    assert windows[0] == 0
    assert windows[-1] > 230


@pytest.mark.parametrize(
    ("tokens", "batch_size", "num_batches", "shapes"),
    [
        (101, 4, 2, [4, 4]),
        (101, 4, 99, [4, 4]),  # ten windows: two batches of four
        (101, 5, 99, [5, 5]),
        (101, 16, 99, [10]),  # less than one batch
        (11, 4, 3, [1]),
        (101, 4, 0, []),
    ],
)
def test_a_small_split_gives_fewer_batches(
    corpus_of: CorpusOf, tokens: int, batch_size: int, num_batches: int, shapes: list[int]
) -> None:
    corpus = corpus_of([tokens, 500], is_val=[True, False])
    batches = list(validation_batches(corpus, None, 10, batch_size, num_batches))
    assert [len(tokens_BT) for tokens_BT in batches] == shapes
    if batches:
        assert len(set(firsts(batches))) == sum(shapes)


def test_validation_on_chosen_documents(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([100] * 4, is_val=[True] * 4)
    tokens = torch.cat(list(validation_batches(corpus, np.array([1, 3]), 10, 2, 99)))
    assert set((tokens // 100).flatten().tolist()) == {1, 3}


def test_validation_without_a_window_fails_at_once(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([10, 500], is_val=[True, False])
    with pytest.raises(
        DataError, match=r"^train\.seq_len=10: the 1 validation documents have only 10 tokens"
    ):
        validation_batches(corpus, None, 10, 4, 2)


# --- whole texts, and the domain of each token


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(2, 20), st.integers(1, 5))
def test_a_whole_text_is_predicted_once(
    corpus_of: CorpusOf, shape: dict, seq_len: int, batch_size: int
) -> None:
    """But for its first token; also where it is shorter than one sequence."""
    corpus = corpus_of(**shape)
    documents = np.arange(1, len(shape["lengths"]), 2)  # every other one
    tokens = np.flatnonzero(np.repeat(np.arange(len(corpus.doc_lengths)) % 2, corpus.doc_lengths)).tolist()
    predicted = []
    for tokens_BT, domain_BT in labelled_batches(corpus, documents, seq_len, batch_size, None):
        assert tokens_BT.shape == domain_BT.shape
        assert len(tokens_BT) <= batch_size
        assert 1 < tokens_BT.shape[1] <= seq_len + 1
        predicted += tokens_BT[:, 1:].flatten().tolist()
    assert predicted == tokens[1:]


def test_a_sample_is_that_of_a_validation(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([100] * 50, is_val=[i % 2 == 1 for i in range(50)])
    sample = list(labelled_batches(corpus, corpus.val_documents, 10, 4, 5))
    for (tokens_BT, _), wanted_BT in zip(sample, validation_batches(corpus, None, 10, 4, 5), strict=True):
        assert torch.equal(tokens_BT, wanted_BT)
    everything = list(labelled_batches(corpus, corpus.val_documents, 10, 4, None))
    as_many = list(labelled_batches(corpus, corpus.val_documents, 10, 4, 63))  # all 249 windows
    assert [len(batch.tokens_BT) for batch in as_many] == [len(batch.tokens_BT) for batch in everything]


def test_each_token_has_the_domain_of_its_document(corpus_of: CorpusOf) -> None:
    lengths, domain = [7, 30, 12, 9], [2, 0, 1, 2]
    corpus = corpus_of(lengths, domain)
    wanted = np.repeat(domain, lengths)
    for tokens_BT, domain_BT in labelled_batches(corpus, np.array([0, 2, 3]), 5, 2, None):
        assert domain_BT.dtype == torch.int64
        assert np.array_equal(domain_BT, wanted[tokens_BT])
