"""How much text there is, before anybody trains on it: by domain and side, and by site."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.config import DataConfig, SiteConfig
from fomoe_flwr.data.corpus import name_some
from fomoe_flwr.data.partition import share_out
from fomoe_flwr.data.shards import TokenCorpus
from fomoe_flwr.messages import deals

log = logging.getLogger("fomoe.site")

# Up to four passes over the same text are nearly as good as new text; what more passes teach falls off quickly
# (Muennighoff et al. 2023, arXiv 2305.16264).
FREE_PASSES = 4
DOMAINS = 100  # the largest, by bytes; the rest is added up

Figures = dict[str, int]


def domain_statistics(corpus: TokenCorpus) -> list[dict[str, Any]]:
    """Documents, bytes of text and tokens of the whole corpus and of each domain, for training and validation.

    The whole has the domain null. The largest domains are first. Tokens of documents that are not tokenised here are an
    estimate by those that are.
    """
    sides = {"train": ~corpus.is_val, "validation": corpus.is_val}
    whole = {"domain": None} | {side: _count(corpus, np.flatnonzero(here)) for side, here in sides.items()}
    number = len(corpus.domains)
    counted = {
        side: [
            np.bincount(corpus.doc_domain[here], weights, number).astype(np.int64)
            for weights in (None, corpus.doc_bytes[here], corpus.doc_tokens[here])
        ]
        for side, here in sides.items()
    }
    order = np.argsort(-sum(columns[1] for columns in counted.values()), kind="stable")

    def row(name: str, places: NDArray[np.int64]) -> dict[str, Any]:
        return {"domain": name} | {
            side: _figures(*(int(column[places].sum()) for column in columns))
            for side, columns in counted.items()
        }

    rows = [row(corpus.domains[place], order[rank : rank + 1]) for rank, place in enumerate(order[:DOMAINS])]
    if number > DOMAINS:
        rows.append(row(f"({number - DOMAINS} more)", order[DOMAINS:]))
    return [whole, *rows]


def site_statistics(
    corpus: TokenCorpus, sites: Sequence[SiteConfig], data: DataConfig, seed: int
) -> dict[str, Figures]:
    """Documents, bytes and tokens of each site that shares the common corpus; of other sites' text nothing is known.

    Raises:
        ConfigError: a site asks for a domain that the corpus does not have.
    """
    places = {
        deal.place: site
        for deal, site in zip(deals(data, sites), sites, strict=True)
        if site.data_path is None and data.partition != "own"
    }
    sharing = [places[place] for place in range(len(places))]
    if not sharing:
        return {}
    shares = share_out(corpus, sharing, data, seed)
    return {site.name: _count(corpus, share) for site, share in zip(sharing, shares, strict=True)}


def repetition(passes: Mapping[str, float], verb: str) -> str:
    """The warning about sites that go over their text too often."""
    named = name_some((f"{site} ({number:.3g} times)" for site, number in passes.items()), 8)
    return (
        f"{len(passes)} sites {verb} their text more than {FREE_PASSES} times, which teaches less and less, and weigh "
        f"as much as others: {named}"
    )


@lru_cache(maxsize=1024)
def warn_of_own_text(run: str, site: str, passes: float) -> None:
    """Say that a site will read its own text too often, of which the server knows nothing; once in a process."""
    if passes > FREE_PASSES:
        log.warning(
            "site %s will read its own text %.3g times in this run; more than %d times teaches less and less",
            site,
            passes,
            FREE_PASSES,
        )


def _count(corpus: TokenCorpus, documents: NDArray[np.int64]) -> Figures:
    return _figures(
        len(documents), int(corpus.doc_bytes[documents].sum()), int(corpus.doc_tokens[documents].sum())
    )


def _figures(documents: int, num_bytes: int, tokens: int) -> Figures:
    return {"documents": documents, "bytes": num_bytes, "tokens": tokens}
