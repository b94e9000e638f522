"""The deal: every training document to exactly one site, balanced by tokens or by domain as asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data import TokenCorpus, deal_documents
from fomoe_flwr.errors import ConfigError, DataError

CorpusOf = Callable[..., TokenCorpus]


def sites_of(*domains: str | None) -> list[SiteConfig]:
    return [SiteConfig(name=f"site-{index}", domain=domain) for index, domain in enumerate(domains)]


def tokens_of(corpus: TokenCorpus, shares: list[np.ndarray]) -> np.ndarray:
    return np.array([corpus.doc_lengths[share].sum() for share in shares])


def domains_of(corpus: TokenCorpus, share: np.ndarray) -> set[str]:
    return {corpus.domains[index] for index in corpus.doc_domain[share]}


def long_tailed(corpus_of: CorpusOf, num_documents: int, num_domains: int, seed: int = 0) -> TokenCorpus:
    """Lengths as in the standard library: median 8 KB, up to 500 KB; domains of very different size."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(9, 1.3, num_documents), 300, 500_000).astype(int)
    domain = np.minimum(rng.geometric(0.15, num_documents) - 1, num_domains - 1)
    domain[:num_domains] = np.arange(num_domains)
    return corpus_of(lengths, domain, rng.random(num_documents) < 0.1, shard_tokens=10**9)


# --- every partition


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 500), min_size=12, max_size=60),
    partition=st.sampled_from(["iid", "domain", "dirichlet"]),
    num_sites=st.integers(1, 4),
    seed=st.integers(0, 2**63),
    data=st.data(),
)
def test_each_training_document_goes_to_one_site(
    corpus_of: CorpusOf,
    lengths: list[int],
    partition: str,
    num_sites: int,
    seed: int,
    data: st.DataObject,
) -> None:
    size = len(lengths)
    domain = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    is_val = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    corpus = corpus_of(lengths, domain, is_val)
    wishes = st.sampled_from([None, *sorted(domains_of(corpus, corpus.train_documents))])
    sites = sites_of(*(data.draw(wishes) for _ in range(num_sites)))
    config = DataConfig(partition=partition)
    try:
        shares = deal_documents(corpus, sites, config, seed)
    except DataError:  # a site went empty, of which other tests say when
        return
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), corpus.train_documents)
    assert all((np.diff(share) > 0).all() and share.dtype == np.int64 for share in shares)
    for share, again in zip(shares, deal_documents(corpus, sites, config, seed), strict=True):
        np.testing.assert_array_equal(share, again)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_another_seed_deals_otherwise(corpus_of: CorpusOf, partition: str) -> None:
    corpus = long_tailed(corpus_of, 200, 5)
    config = DataConfig(partition=partition, dirichlet_alpha=10)
    first, second = (deal_documents(corpus, sites_of(None, None), config, seed)[0] for seed in (1, 2))
    assert set(first) != set(second)


@pytest.mark.parametrize("partition", ["iid", "domain", "dirichlet"])
def test_a_site_without_a_sequence_is_named(corpus_of: CorpusOf, partition: str) -> None:
    corpus = corpus_of([10, 10, 10])
    config = DataConfig(partition=partition)
    with pytest.raises(
        DataError, match=rf"data\.partition={partition}: site 'site-\d' gets 0 documents with at most 0 tok"
    ):
        deal_documents(corpus, sites_of(*[None] * 4), config, seed=0)
    deal_documents(corpus, sites_of(None), config, seed=0, seq_len=29)
    with pytest.raises(
        DataError, match=r"'site-0' gets 3 documents with at most 30 tokens, less than one sequence of 31"
    ):
        deal_documents(corpus, sites_of(None), config, seed=0, seq_len=30)


# --- iid


@pytest.mark.parametrize("num_sites", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_iid_balances_tokens(corpus_of: CorpusOf, num_sites: int, seed: int) -> None:
    corpus = long_tailed(corpus_of, 600, 20, seed)
    shares = deal_documents(corpus, sites_of(*[None] * num_sites), DataConfig(), seed)
    tokens = tokens_of(corpus, shares)
    assert tokens.max() / tokens.min() < 1.01
    counts = np.array([len(share) for share in shares])
    assert counts.max() / counts.min() < 1.5  # and no site gets only long or only short documents


def test_iid_mixes_domains(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([50] * 900, [i // 300 for i in range(900)])  # sorted by domain, as files are
    for share in deal_documents(corpus, sites_of(None, None, None), DataConfig(), seed=0):
        assert np.bincount(corpus.doc_domain[share]).min() > 70  # of 100 expected


def test_one_huge_document_has_a_site_almost_to_itself(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([10] * 100 + [1000] + [10] * 100)
    shares = deal_documents(corpus, sites_of(None, None, None), DataConfig(), seed=0)
    assert sorted(tokens_of(corpus, shares)) == [1000, 1000, 1000]
    assert min(len(share) for share in shares) == 1


# --- domain


def test_sites_get_the_domain_they_name(corpus_of: CorpusOf) -> None:
    corpus = long_tailed(corpus_of, 600, 6)
    sites = sites_of("d1", None, "d0", "d1")
    shares = deal_documents(corpus, sites, DataConfig(partition="domain"), seed=0)
    assert [domains_of(corpus, share) for share in shares] == [
        {"d1"},
        {"d2", "d3", "d4", "d5"},
        {"d0"},
        {"d1"},
    ]
    shared = tokens_of(corpus, [shares[0], shares[3]])
    assert shared.max() / shared.min() < 1.05


def test_unclaimed_domains_go_whole_to_the_emptiest(corpus_of: CorpusOf) -> None:
    # Tokens by domain: d0 30, d1 70, d2 60, d3 50, d4 100. Largest first to two sites:
    # 100 | 70, then 60 to the 70, 50 to the 100, 30 to the 130.
    corpus = corpus_of([30, 70, 50, 60, 50, 50], [0, 1, 4, 2, 3, 4])
    shares = deal_documents(corpus, sites_of(None, None), DataConfig(partition="domain"), seed=0)
    assert [domains_of(corpus, share) for share in shares] == [{"d4", "d3"}, {"d1", "d2", "d0"}]


def test_with_every_site_claiming_the_rest_evens_out(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([100, 40, 30, 20], [0, 1, 2, 3])
    shares = deal_documents(corpus, sites_of("d0", "d1"), DataConfig(partition="domain"), seed=0)
    assert [domains_of(corpus, share) for share in shares] == [{"d0"}, {"d1", "d2", "d3"}]


def test_an_unknown_domain_is_told_the_known_ones(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([10] * 4, [0, 1, 2, 3], [False, False, False, True])
    with pytest.raises(ConfigError) as caught:
        deal_documents(corpus, sites_of("dx"), DataConfig(partition="domain"), seed=0)
    assert str(caught.value) == (
        "federation.sites: domain=dx of site 'site-0' is not in the corpus; allowed are d0, d1, d2"
    )  # d3 is only validated on
    many = corpus_of([10] * 200, range(200))
    with pytest.raises(ConfigError, match=r"allowed are d0, d1, d10, .*, … \(188 more\)$"):
        deal_documents(many, sites_of("dx"), DataConfig(partition="domain"), seed=0)


# --- dirichlet


def shares_by_domain(corpus: TokenCorpus, shares: list[np.ndarray]) -> np.ndarray:
    """Fraction of each domain's tokens at each site: [sites, domains]."""
    tokens = np.array([np.bincount(corpus.doc_domain[s], corpus.doc_lengths[s], 10) for s in shares])
    return tokens / tokens.sum(axis=0)


def test_dirichlet_alpha_goes_from_even_to_skewed(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([20] * 4000, [i % 10 for i in range(4000)])
    even, skewed = (
        shares_by_domain(
            corpus,
            deal_documents(
                corpus,
                sites_of(*[None] * 4),
                DataConfig(partition="dirichlet", dirichlet_alpha=alpha),
                seed=1,
            ),
        )
        for alpha in (10_000.0, 0.1)
    )
    assert np.abs(even - 0.25).max() < 0.02
    assert skewed.max(axis=0).mean() > 0.75


def test_dirichlet_shares_tokens_and_not_documents(corpus_of: CorpusOf) -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 3000)
    corpus = corpus_of(lengths, shard_tokens=10**9)
    config = DataConfig(partition="dirichlet", dirichlet_alpha=2.0)
    shares = deal_documents(corpus, sites_of(None, None, None), config, seed=3)
    drawn = np.random.default_rng(3).dirichlet([2.0] * 3)
    np.testing.assert_allclose(tokens_of(corpus, shares) / lengths.sum(), drawn, atol=0.001)


@pytest.mark.parametrize("alpha", [0.0, float("inf"), float("nan")])
def test_dirichlet_alpha_must_be_positive(corpus_of: CorpusOf, alpha: float) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.dirichlet_alpha={alpha}: must be above 0"):
        deal_documents(
            corpus_of([9]), sites_of(None), DataConfig(partition="dirichlet", dirichlet_alpha=alpha), seed=0
        )
