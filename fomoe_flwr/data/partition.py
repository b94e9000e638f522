"""Which site trains on which documents.

Notable: sites are balanced by tokens and not by documents, for documents differ in length by a factor of 500. The
deal depends on the corpus, the sites and the seed alone, so every process works it out for itself and agrees.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data.corpus import name_some
from fomoe_flwr.data.shards import TokenCorpus
from fomoe_flwr.errors import ConfigError, DataError

Documents = NDArray[np.int64]  # indices of documents


def deal_documents(
    corpus: TokenCorpus, sites: Sequence[SiteConfig], config: DataConfig, seed: int, seq_len: int = 1
) -> list[Documents]:
    """Deal every training document to one site, as `data.partition` says.

    `seq_len` is the length of a sequence in tokens, of which each site must be able to form one. The result has one
    array a site, ascending.

    Raises:
        ConfigError: a site asks for a domain the corpus does not have, or `dirichlet_alpha` is not positive.
        DataError: a site ends up with less than one sequence.
    """
    rng = np.random.default_rng(seed)
    match config.partition:
        case "iid":
            shares = _deal_balanced(corpus, corpus.train_documents, len(sites), rng)
        case "domain":
            shares = _deal_by_domain(corpus, sites, rng)
        case _:
            shares = _deal_dirichlet(corpus, len(sites), config.dirichlet_alpha, rng)
    for site, share in zip(sites, shares, strict=True):
        num_tokens = int(corpus.doc_lengths[share].sum())
        if num_tokens < seq_len + 1:
            raise DataError(
                f"data.partition={config.partition}: site {site.name!r} gets {len(share)} documents with {num_tokens} "
                f"tokens, less than one sequence of {seq_len + 1}; use fewer sites or a larger corpus"
            )
    return shares


def _deal_balanced(
    corpus: TokenCorpus, documents: Documents, num_sites: int, rng: np.random.Generator
) -> list[Documents]:
    """Each document in random order to the site with the fewest tokens so far, long ones first.

    Long means by power of two: within one size the order stays random, and the short documents at the end even out
    what the long ones left.
    """
    order = rng.permutation(documents)
    size = np.log2(corpus.doc_lengths[order]).astype(np.int64)
    order = order[np.argsort(-size, kind="stable")]
    return _deal_to_emptiest([order[i : i + 1] for i in range(len(order))], corpus, [0] * num_sites)


def _deal_to_emptiest(
    groups: Iterable[Documents], corpus: TokenCorpus, filled: Sequence[int]
) -> list[Documents]:
    """Each group whole, in turn, to the site with the fewest tokens; `filled` is what sites hold already."""
    emptiest = [(num_tokens, site) for site, num_tokens in enumerate(filled)]
    heapq.heapify(emptiest)
    shares: list[list[Documents]] = [[] for _ in filled]
    for group in groups:
        num_tokens, site = emptiest[0]
        shares[site].append(group)
        heapq.heapreplace(emptiest, (num_tokens + int(corpus.doc_lengths[group].sum()), site))
    return [_join(share) for share in shares]


def _join(parts: Sequence[Documents]) -> Documents:
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def _by_domain(corpus: TokenCorpus) -> dict[str, Documents]:
    """The training documents of each domain that has any."""
    documents = corpus.train_documents
    domain = corpus.doc_domain[documents]
    found = {name: documents[domain == index] for index, name in enumerate(corpus.domains)}
    return {name: members for name, members in found.items() if len(members)}


def _deal_by_domain(
    corpus: TokenCorpus, sites: Sequence[SiteConfig], rng: np.random.Generator
) -> list[Documents]:
    """Claimed domains to the sites that name them; the others whole, largest first, to the remaining sites."""
    members = _by_domain(corpus)
    claims: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        if site.domain is not None:
            if site.domain not in members:
                raise ConfigError(
                    f"federation.sites: domain={site.domain} of site {site.name!r} is not in the corpus; "
                    f"allowed are {name_some(sorted(members))}"
                )
            claims.setdefault(site.domain, []).append(index)
    shares: list[Documents] = [_join([]) for _ in sites]
    for domain, claimants in claims.items():
        dealt = _deal_balanced(corpus, members[domain], len(claimants), rng)
        for site_index, share in zip(claimants, dealt, strict=True):
            shares[site_index] = share
    others = [index for index, site in enumerate(sites) if site.domain is None] or list(range(len(sites)))
    unclaimed = [documents for name, documents in members.items() if name not in claims]
    unclaimed.sort(key=lambda documents: -int(corpus.doc_lengths[documents].sum()))
    filled = [int(corpus.doc_lengths[shares[index]].sum()) for index in others]
    for site_index, share in zip(others, _deal_to_emptiest(unclaimed, corpus, filled), strict=True):
        shares[site_index] = _join([shares[site_index], share])
    return shares


def _deal_dirichlet(
    corpus: TokenCorpus, num_sites: int, alpha: float, rng: np.random.Generator
) -> list[Documents]:
    """Each domain in random shares drawn from a Dirichlet distribution: the smaller `alpha`, the more uneven.

    Not by flwr-datasets' DirichletPartitioner: that one shares out numbers of documents where we share out tokens,
    wants the corpus as a `datasets.Dataset`, and draws again by itself when a site is left with too little.
    """
    if not 0 < alpha < np.inf:
        raise ConfigError(f"data.dirichlet_alpha={alpha}: must be above 0")
    parts: list[list[Documents]] = [[] for _ in range(num_sites)]
    for documents in _by_domain(corpus).values():
        bounds = np.cumsum(rng.dirichlet(np.full(num_sites, alpha)))[:-1]
        order = rng.permutation(documents)
        lengths = corpus.doc_lengths[order]
        middle = (np.cumsum(lengths) - lengths / 2) / lengths.sum()  # of each document in its domain, 0 to 1
        for part, dealt in zip(parts, np.split(order, np.searchsorted(middle, bounds)), strict=True):
            part.append(dealt)
    return [_join(part) for part in parts]
