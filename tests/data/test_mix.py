"""A mixture: by weight, by position alone, each part gone through as often as it says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data import MixedStream, TokenCorpus, deal_documents, stream
from fomoe_flwr.data.statistics import site_statistics
from fomoe_flwr.errors import ConfigError, DataError

CorpusOf = Callable[..., TokenCorpus]
SEQ_LEN = 5


@pytest.fixture(scope="module")
def corpus(corpus_of: CorpusOf) -> TokenCorpus:
    """Domains d0 to d3 of 300, 60, 30 and 4 tokens."""
    return corpus_of([10] * 30 + [6] * 10 + [3] * 10 + [4], [0] * 30 + [1] * 10 + [2] * 10 + [3])


def mixed(corpus: TokenCorpus, mix: dict[str, float], seed: int = 0) -> MixedStream:
    return MixedStream(corpus, corpus.train_documents, SEQ_LEN, seed, mix)


def domains_of(corpus: TokenCorpus, tokens_BT: torch.Tensor) -> np.ndarray:
    """Of each sequence; the token at position p is p."""
    document_BT = np.searchsorted(corpus.doc_starts, tokens_BT.numpy(), side="right") - 1
    domain_BT = corpus.doc_domain[document_BT]
    assert (domain_BT == domain_BT[:, :1]).all()
    return domain_BT[:, 0]


def test_sequences_come_by_weight(corpus: TokenCorpus) -> None:
    drawn = domains_of(corpus, mixed(corpus, {"d0": 1, "d1": 6, "d2": 3}).batch(0, 20_000))
    # In each block exactly, and in the order of a lottery.
    for block in (drawn[:10_000], drawn[10_000:]):
        assert np.bincount(block).tolist() == [1000, 6000, 3000]
        hundreds = block.reshape(100, 100)
        assert np.abs((hundreds == 1).sum(1) - 60).max() < 25
    assert not (drawn[:10_000] == drawn[10_000:]).all()
    other = domains_of(corpus, mixed(corpus, {"d0": 1, "d1": 6, "d2": 3}, seed=1).batch(0, 100))
    assert not (drawn[:100] == other).all()


@settings(max_examples=40, deadline=None)
@given(
    position=st.integers(0, 25_000),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    weights=st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3),
)
def test_a_batch_follows_from_its_position_alone(
    corpus: TokenCorpus, position: int, sizes: list[int], weights: list[float]
) -> None:
    mix = {f"d{index}": weight for index, weight in enumerate(weights)}
    used, at = mixed(corpus, mix), position
    parts = []
    for size in sizes:
        parts.append(used.batch(at, size))
        at += size
    torch.testing.assert_close(torch.cat(parts), mixed(corpus, mix).batch(position, sum(sizes)))


def test_each_part_is_gone_through_in_whole_passes(
    corpus: TokenCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK", 100)
    both = mixed(corpus, {"d0": 1, "d2": 1})
    windows = {name: part.num_windows for name, part in both.streams.items()}
    assert windows == {"d0": 59, "d2": 5}
    assert both.passes_by_domain(0) == {"d0": 0.0, "d2": 0.0}
    tokens_BT = both.batch(0, 1000)
    drawn = domains_of(corpus, tokens_BT)
    for position in (1, 57, 100, 333, 1000):
        counts = np.bincount(drawn[:position], minlength=3)
        expected = {"d0": counts[0] / 59, "d2": counts[2] / 5}
        assert both.passes_by_domain(position) == pytest.approx(expected)
        assert both.passes(position) == pytest.approx(max(expected.values()))
    # In every pass each of its windows once.
    firsts = tokens_BT[torch.from_numpy(drawn == 2), 0].reshape(100, 5)
    assert all(len(set(one.tolist())) == 5 for one in firsts)


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=1000))
def test_quotas_fill_the_block(weights: list[float]) -> None:
    quota_D = stream._quotas(np.array(weights))
    assert quota_D.sum() == stream.BLOCK
    assert quota_D.min() >= 1


def test_what_a_site_does_not_have_is_left_out(corpus: TokenCorpus, caplog: pytest.LogCaptureFixture) -> None:
    # d3 has 4 tokens, and nobody has d9.
    with caplog.at_level("WARNING"):
        part = mixed(corpus, {"d0": 1, "d1": 1, "d3": 5, "d9": 5})
    assert caplog.messages == [
        "data.mix: 1 domains are left out, for a site has less than one sequence of each"
    ]
    drawn = domains_of(corpus, part.batch(0, 10_000))
    assert np.bincount(drawn).tolist() == [5000, 5000]
    with pytest.raises(DataError, match=r"data\.mix: a site has not one sequence of train\.seq_len=5"):
        mixed(corpus, {"d3": 1})


def test_only_the_named_domains_are_dealt(corpus: TokenCorpus) -> None:
    sites = [SiteConfig(name="a"), SiteConfig(name="b")]
    whole = deal_documents(corpus, sites, DataConfig(), 0)
    data = DataConfig(mix={"d0": 1.0, "d2": 2.0})
    named = deal_documents(corpus, sites, data, 0)
    for all_of_it, kept in zip(whole, named, strict=True):
        assert kept.tolist() == [doc for doc in all_of_it if corpus.doc_domain[doc] in (0, 2)]
    assert site_statistics(corpus, sites, data, 0)["a"]["documents"] == len(named[0])
    with pytest.raises(
        ConfigError, match=r"data\.mix: nowhere is not a domain of the corpus; allowed are d0, d1"
    ):
        deal_documents(corpus, sites, DataConfig(mix={"nowhere": 1.0}), 0)
    # A site's own text may be of other domains.
    own = DataConfig(mix={"nowhere": 1.0, "d1": 1.0}, partition="own")
    assert [len(share) for share in deal_documents(corpus, sites, own, 0)] == [10, 10]
