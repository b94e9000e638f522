"""A site's documents as an endless stream of sequences, and the fixed sequences of a validation.

Notable: where a site stands is one integer, the sequences it has consumed, and a batch is a pure function of
it. So a checkpoint keeps that integer and nothing else of the data.

Shapes: B sequences in a batch, T = seq_len + 1 tokens (inputs and targets overlap in all but one).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fomoe_flwr.data.shards import TokenCorpus
from fomoe_flwr.errors import DataError

log = logging.getLogger("fomoe.site")

BLOCK = 10_000  # sequences of a mixture among which each domain has its share exactly


class Stream:
    """A site's documents as sequences, of which there is no end. By default the position says all of where it is."""

    corpus: TokenCorpus

    def batch(self, position: int, batch_size: int) -> torch.Tensor:
        """The sequences after the first `position`: tokens_BT, int64, [batch_size, seq_len + 1]."""
        raise NotImplementedError

    def passes(self, position: int) -> float:
        """How often all of the text was read when so many sequences are consumed; of a mixture the part most read."""
        raise NotImplementedError

    def passes_by_domain(self, position: int) -> dict[str, float]:
        """The same of each part of a mixture; empty: it is none."""
        return {}

    def state(self) -> dict[str, Any]:
        """JSON values that spare another process reading all that is before the position; empty: it need not."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take such a state. Batches are the same without it."""


class _Concatenation(NamedTuple):
    """Documents laid end to end, without copying a token. D documents."""

    starts: NDArray[np.int64]  # [D], where each begins in the concatenation
    shifts: NDArray[np.int64]  # [D], from there to where it begins in the corpus
    num_tokens: int


class TokenStream(Stream):
    """The documents of one site, concatenated in a random order and cut into windows of seq_len + 1 tokens.

    Windows begin every `seq_len` tokens; what is left at the end is shorter than one and not used. Each epoch
    goes once through all windows, in an order of its own.

    Raises:
        DataError: the documents do not fill one window.
    """

    def __init__(self, corpus: TokenCorpus, documents: NDArray[np.int64], seq_len: int, seed: int) -> None:
        # The sorted documents, so that the stream does not depend on the order in which they were listed.
        order = np.random.default_rng([seed, 0, 0]).permutation(np.sort(documents))
        self.corpus = corpus
        self.seq_len = seq_len
        self.seed = seed
        self._concatenation = _concatenate(corpus, order)
        self.num_windows = _count_windows(self._concatenation, seq_len)
        self._drawn = -1  # the epoch whose order is kept
        self._order = np.empty(0, dtype=np.int64)
        if self.num_windows == 0:
            raise DataError(
                f"train.seq_len={seq_len}: a site's {len(documents)} documents have only "
                f"{self._concatenation.num_tokens} tokens, less than one sequence of {seq_len + 1}"
            )

    def batch(self, position: int, batch_size: int) -> torch.Tensor:
        """The sequences after the first `position`: tokens_BT, int64, [batch_size, seq_len + 1]."""
        epoch_B, place_B = np.divmod(np.arange(position, position + batch_size), self.num_windows)
        window_B = np.empty(batch_size, dtype=np.int64)
        for epoch in range(int(epoch_B[0]), int(epoch_B[-1]) + 1):
            here = epoch_B == epoch
            window_B[here] = self._draw(epoch)[place_B[here]]
        return _read_windows(self.corpus, self._concatenation, window_B, self.seq_len)

    def passes(self, position: int) -> float:
        """How often all of the text was read when so many sequences are consumed."""
        return position / self.num_windows

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        """The order of the windows in this epoch. Only the latest is kept: epochs are passed one by one."""
        if epoch != self._drawn:
            self._order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_windows)
            self._drawn = epoch
        return self._order


class MixedStream(Stream):
    """The documents of one site, drawn by the weights of their domains: a `TokenStream` of each.

    Of each `BLOCK` sequences every domain has its share, rounded to whole sequences and at least one, in an order that
    is another for each block. So from the position follow the domain of a sequence and its place in the stream of that
    domain. Domains of which the site has less than one sequence are left out, and the others drawn the more.

    Args:
        mix: weights by domain.

    Raises:
        DataError: none of the domains has one sequence here.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        documents: NDArray[np.int64],
        seq_len: int,
        seed: int,
        mix: Mapping[str, float],
    ) -> None:
        self.corpus, self.seed = corpus, seed
        self.streams: dict[str, TokenStream] = {}
        places = {name: index for index, name in enumerate(corpus.domains)}
        short = []
        for domain in sorted(mix.keys() & places.keys()):
            own = documents[corpus.doc_domain[documents] == places[domain]]
            if corpus.doc_lengths[own].sum() > seq_len:
                self.streams[domain] = TokenStream(corpus, own, seq_len, seed)
            elif len(own):
                short.append(domain)
        if not self.streams:
            raise DataError(
                f"data.mix: a site has not one sequence of train.seq_len={seq_len} of any of its "
                f"{len(mix)} domains"
            )
        if short:
            log.warning(
                "data.mix: %d domains are left out, for a site has less than one sequence of each", len(short)
            )
        self.quota_D = _quotas(np.array([mix[domain] for domain in self.streams]))
        self._drawn = -1  # the block whose order is kept
        self._domain = self._rank = np.empty(0, dtype=np.int64)

    def batch(self, position: int, batch_size: int) -> torch.Tensor:
        """As `Stream`."""
        place_B = np.arange(position, position + batch_size)
        domain_B, rank_B = np.empty_like(place_B), np.empty_like(place_B)
        block_B, offset_B = np.divmod(place_B, BLOCK)
        for block in np.unique(block_B):
            here = block_B == block
            self._draw(int(block))
            domain_B[here] = self._domain[offset_B[here]]
            rank_B[here] = self._rank[offset_B[here]] + block * self.quota_D[domain_B[here]]
        tokens = None
        for domain, stream in enumerate(self.streams.values()):
            here = domain_B == domain
            if here.any():
                # Those of one domain follow each other in its own stream.
                own = stream.batch(int(rank_B[here][0]), int(here.sum()))
                tokens = own.new_empty(batch_size, own.shape[1]) if tokens is None else tokens
                tokens[torch.from_numpy(here)] = own
        assert tokens is not None
        return tokens

    def passes(self, position: int) -> float:
        """As `Stream`."""
        return max(self.passes_by_domain(position).values())

    def passes_by_domain(self, position: int) -> dict[str, float]:
        """As `Stream`."""
        block, offset = divmod(position, BLOCK)
        self._draw(block)
        drawn_D = block * self.quota_D + np.bincount(self._domain[:offset], minlength=len(self.quota_D))
        return {
            domain: stream.passes(int(drawn))
            for (domain, stream), drawn in zip(self.streams.items(), drawn_D, strict=True)
        }

    def _draw(self, block: int) -> None:
        """Of each sequence of this block its domain, and how many of that domain are before it in the block."""
        if block != self._drawn:
            ordered = np.repeat(np.arange(len(self.quota_D)), self.quota_D)
            self._domain = np.random.default_rng([self.seed, 2, block]).permutation(ordered)
            self._rank = np.empty_like(self._domain)
            self._rank[np.argsort(self._domain, kind="stable")] = np.concatenate(
                [np.arange(quota) for quota in self.quota_D]
            )
            self._drawn = block


def _quotas(weight_D: NDArray[np.float64]) -> NDArray[np.int64]:
    """Of `BLOCK` sequences those of each domain, at least one."""
    exact_D = weight_D / weight_D.sum() * BLOCK
    quota_D: NDArray[np.int64] = exact_D.astype(np.int64)
    left = BLOCK - int(quota_D.sum())
    quota_D[np.argsort(quota_D - exact_D, kind="stable")[:left]] += 1
    for domain in np.flatnonzero(quota_D == 0):
        quota_D[quota_D.argmax()] -= 1
        quota_D[domain] = 1
    return quota_D


def validation_batches(
    corpus: TokenCorpus, documents: NDArray[np.int64] | None, seq_len: int, batch_size: int, num_batches: int
) -> Iterator[torch.Tensor]:
    """Yield `num_batches` of tokens_BT, the same at every call, spread evenly over the validation split.

    `documents` are those to use, None for all that are kept for validation. If they hold fewer windows, there
    are fewer batches, all of one size so that their losses weigh the same: `batch_size`, or, below one whole
    batch, a single batch of all windows.

    Raises:
        DataError: the documents do not fill one window.
    """
    chosen = corpus.val_documents if documents is None else documents
    concatenation = _concatenate(corpus, chosen)
    num_windows = _count_windows(concatenation, seq_len)
    if num_windows == 0:
        raise DataError(
            f"train.seq_len={seq_len}: the {len(chosen)} validation documents have only "
            f"{concatenation.num_tokens} tokens, less than one sequence of {seq_len + 1}; "
            f"raise data.val_fraction"
        )
    size = min(batch_size, num_windows)
    num_batches = min(num_batches, num_windows // size)
    window_NB = _spread(num_batches * size, num_windows).reshape(-1, size)
    return (_read_windows(corpus, concatenation, window_B, seq_len) for window_B in window_NB)


def bytes_per_target(corpus: TokenCorpus, batches: Iterable[torch.Tensor]) -> float:
    """UTF-8 bytes of text for one predicted token (all but the first of a sequence) of these batches of tokens_BT."""
    targets = [tokens_BT[:, 1:].flatten().numpy() for tokens_BT in batches]
    num_tokens = sum(map(len, targets))
    return sum(int(corpus.token_bytes[each].sum()) for each in targets) / max(num_tokens, 1)


class LabelledBatch(NamedTuple):
    """Sequences, and of each token the domain of its document."""

    tokens_BT: torch.Tensor
    domain_BT: torch.Tensor  # index into the corpus's domains


def labelled_batches(
    corpus: TokenCorpus, documents: NDArray[np.int64], seq_len: int, batch_size: int, num_batches: int | None
) -> Iterator[LabelledBatch]:
    """Yield the documents in batches, the same at every call.

    With more windows than `num_batches` batches hold, those of `validation_batches`. Else, and with None, the
    documents whole: every token but the first is predicted once, the last batches being smaller or shorter.
    """
    concatenation = _concatenate(corpus, documents)
    num_windows = _count_windows(concatenation, seq_len)
    whole = num_batches is None or num_windows <= num_batches * batch_size
    window_N = np.arange(num_windows) if whole else _spread((num_batches or 0) * batch_size, num_windows)
    for first in range(0, len(window_N), batch_size):
        position_BT = _positions(window_N[first : first + batch_size], seq_len)
        yield _read_labelled(corpus, documents, concatenation, position_BT)
    rest = np.arange(num_windows * seq_len, concatenation.num_tokens)
    if whole and len(rest) > 1:
        yield _read_labelled(corpus, documents, concatenation, rest[None])


def _concatenate(corpus: TokenCorpus, documents: NDArray[np.int64]) -> _Concatenation:
    lengths = corpus.doc_lengths[documents]
    if not lengths.all():
        raise ValueError("documents that are not tokenised here")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    return _Concatenation(starts, corpus.doc_starts[documents] - starts, int(lengths.sum()))


def _count_windows(concatenation: _Concatenation, seq_len: int) -> int:
    return max(concatenation.num_tokens - 1, 0) // seq_len


def _spread(number: int, num_windows: int) -> NDArray[np.int64]:
    """So many windows, evenly spread over all."""
    return np.arange(number) * num_windows // max(number, 1)


def _positions(window_B: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    return window_B[:, None] * seq_len + np.arange(seq_len + 1)


def _document_at(concatenation: _Concatenation, position_BT: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of the concatenated documents a position lies in."""
    return np.searchsorted(concatenation.starts, position_BT, side="right") - 1


def _read_windows(
    corpus: TokenCorpus, concatenation: _Concatenation, window_B: NDArray[np.int64], seq_len: int
) -> torch.Tensor:
    position_BT = _positions(window_B, seq_len)
    document_BT = _document_at(concatenation, position_BT)
    return torch.from_numpy(corpus.take(position_BT + concatenation.shifts[document_BT]))


def _read_labelled(
    corpus: TokenCorpus,
    documents: NDArray[np.int64],
    concatenation: _Concatenation,
    position_BT: NDArray[np.int64],
) -> LabelledBatch:
    document_BT = _document_at(concatenation, position_BT)
    tokens_BT = corpus.take(position_BT + concatenation.shifts[document_BT])
    domain_BT = corpus.doc_domain[documents[document_BT]].astype(np.int64)
    return LabelledBatch(torch.from_numpy(tokens_BT), torch.from_numpy(domain_BT))
