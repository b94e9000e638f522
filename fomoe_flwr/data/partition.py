"""Which site trains on which documents.

Notable: sites are balanced by bytes of text and not by documents, for documents differ in length by a factor of 500;
and not by tokens, so that a site need not tokenise what it is not dealt. The deal depends on the corpus, the sites and
the seed alone, so every process works it out for itself and all agree.
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
    """Deal every training document to one site, as `data.partition` says; `own`: all of them to each.

    With `data.mix` a site keeps of its documents those of the domains that are named.

    `seq_len` is the length of a sequence in tokens, of which each site must be able to form one. The result
    has one array of document indices a site, ascending; without `data.mix` together they are
    `corpus.train_documents`.

    Raises:
        ConfigError: a site or `data.mix` asks for a domain the corpus does not have, or `dirichlet_alpha` is not
            positive.
        DataError: a site must end up with less than one sequence.
    """
    shares = share_out(corpus, sites, config, seed)
    for site, share in zip(sites, shares, strict=True):
        # A token stands for a byte at least; how many there are the site finds out.
        most = _size(corpus, share)
        if most < seq_len + 1:
            raise DataError(
                f"data.partition={config.partition}: site {site.name!r} gets {len(share)} documents with at most "
                f"{most} tokens, less than one sequence of {seq_len + 1}; use fewer sites, "
                f"a larger corpus or another partition"
            )
    return shares


def share_out(
    corpus: TokenCorpus, sites: Sequence[SiteConfig], config: DataConfig, seed: int
) -> list[Documents]:
    """The deal, also if it leaves a site with nothing to train on.

    Raises:
        ConfigError: as `deal_documents`.
    """
    shares = _share_out_all(corpus, sites, config, seed)
    if not config.mix:
        return shares
    # A site's own text need not have all of them.
    if config.partition != "own" and (missing := sorted(set(config.mix) - set(corpus.domains))):
        raise ConfigError(
            f"data.mix: {missing[0]:.80} is not a domain of the corpus; allowed are {name_some(sorted(corpus.domains))}"
        )
    named = [index for index, domain in enumerate(corpus.domains) if domain in config.mix]
    return [share[np.isin(corpus.doc_domain[share], named)] for share in shares]


def _share_out_all(
    corpus: TokenCorpus, sites: Sequence[SiteConfig], config: DataConfig, seed: int
) -> list[Documents]:
    rng = np.random.default_rng(seed)
    match config.partition:
        case "iid":
            return _deal_balanced(corpus, corpus.train_documents, len(sites), rng)
        case "domain":
            return _deal_by_domain(corpus, sites, rng)
        case "own":
            return [corpus.train_documents for _ in sites]
        case _:
            return _deal_dirichlet(corpus, len(sites), config.dirichlet_alpha, rng)


def _deal_balanced(
    corpus: TokenCorpus, documents: Documents, num_sites: int, rng: np.random.Generator
) -> list[Documents]:
    """Each document in random order to the site with the fewest bytes so far, long ones first.

    Long means by power of two: within one size the order stays random, and the short documents at the end
    even out what the long ones left.
    """
    order = rng.permutation(documents)
    size = np.log2(corpus.doc_sizes[order]).astype(np.int64)
    order = order[np.argsort(-size, kind="stable")]
    site = np.array(_emptiest(corpus.doc_sizes[order].tolist(), [0] * num_sites), dtype=np.int64)
    return [np.sort(order[site == index]) for index in range(num_sites)]


def _emptiest(weights: Iterable[int], filled: Sequence[int]) -> list[int]:
    """For each weight in turn the site that is emptiest by then; `filled` is what the sites hold already."""
    heap = [(held, site) for site, held in enumerate(filled)]
    heapq.heapify(heap)
    chosen = []
    for weight in weights:
        held, site = heap[0]
        heapq.heapreplace(heap, (held + weight, site))
        chosen.append(site)
    return chosen


def _size(corpus: TokenCorpus, documents: Documents) -> int:
    return int(corpus.doc_sizes[documents].sum())


def _join(*parts: Documents) -> Documents:
    return np.sort(np.concatenate(parts))


def _by_domain(corpus: TokenCorpus) -> dict[str, Documents]:
    """The training documents of each domain that has any."""
    documents = corpus.train_documents
    domain = corpus.doc_domain[documents]
    order = np.argsort(domain, kind="stable")
    present, firsts = np.unique(domain[order], return_index=True)
    members = np.split(documents[order], firsts[1:])
    return {corpus.domains[index]: group for index, group in zip(present, members, strict=True)}


def _deal_by_domain(
    corpus: TokenCorpus, sites: Sequence[SiteConfig], rng: np.random.Generator
) -> list[Documents]:
    """Claimed domains to the sites that name them; the others whole, largest first, to the sites without."""
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
    shares: list[Documents] = [np.empty(0, dtype=np.int64) for _ in sites]
    for domain, claimants in claims.items():
        dealt = _deal_balanced(corpus, members[domain], len(claimants), rng)
        for index, share in zip(claimants, dealt, strict=True):
            shares[index] = share
    takers = [index for index, site in enumerate(sites) if site.domain is None] or list(range(len(sites)))
    unclaimed = [documents for name, documents in members.items() if name not in claims]
    unclaimed.sort(key=lambda documents: -_size(corpus, documents))
    chosen = _emptiest(
        (_size(corpus, documents) for documents in unclaimed),
        [_size(corpus, shares[index]) for index in takers],
    )
    for taker, documents in zip(chosen, unclaimed, strict=True):
        shares[takers[taker]] = _join(shares[takers[taker]], documents)
    return shares


def _deal_dirichlet(
    corpus: TokenCorpus, num_sites: int, alpha: float, rng: np.random.Generator
) -> list[Documents]:
    """Each domain in random shares drawn from a Dirichlet distribution: the smaller `alpha`, the more uneven.

    Not by flwr-datasets' DirichletPartitioner: that one shares out numbers of documents where we share out
    bytes, wants the corpus as a `datasets.Dataset`, and draws anew when a site is left with too little.
    """
    if not 0 < alpha < np.inf:
        raise ConfigError(f"data.dirichlet_alpha={alpha}: must be above 0")
    parts: list[list[Documents]] = [[] for _ in range(num_sites)]
    for documents in _by_domain(corpus).values():
        bounds = np.cumsum(rng.dirichlet(np.full(num_sites, alpha)))[:-1]
        order = rng.permutation(documents)
        lengths = corpus.doc_sizes[order]
        middle = (np.cumsum(lengths) - lengths / 2) / lengths.sum()  # of each document in its domain, 0 to 1
        for part, dealt in zip(parts, np.split(order, np.searchsorted(middle, bounds)), strict=True):
            part.append(dealt)
    return [_join(*part) for part in parts]
