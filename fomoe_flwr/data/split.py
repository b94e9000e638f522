"""Which documents are kept for validation.

Notable: near-duplicates share a side, for a model that has seen one of two tables that differ in a few lines has seen
the other. A document is remembered by a sketch of 64 bytes, whatever its length, made while the text streams by, and
compared with its neighbours in 16 sorted orders and not with all others: N log N steps, and about 200 bytes of memory
a document.

Letters: N documents.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.errors import DataError

SKETCH = 64  # bytes
# About five words. Shorter ones are shared by any two texts of one language.
SHINGLE = 32  # bytes
# Of all shingles of two documents, as their sketches tell: from here on they are near-duplicates.
ALIKE = 0.6
# Share of its domain from which on a group is long. In front it would be more than a usual share for validation.
LONG = 0.1
PIECE = 2**20  # bytes whose shingles are in memory at a time
_BAND = 4  # bytes of a sketch that two documents must share to be compared
_ODD, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def sketch(content: bytes) -> bytes:
    """Two documents have as many of these 64 bytes in common as they have of their shingles (Jaccard's index).

    MinHash with one permutation (Li, Owen and Zhang 2012): the least hash in each of 64 equal ranges. A range without
    any, as in a short document, takes that of the next (Shrivastava and Li 2014). Documents shorter than a shingle
    are alike only if equal.
    """
    if len(content) < SHINGLE:
        return hashlib.sha512(content).digest()
    empty = np.uint64(2**64 - 1)
    least = np.full(SKETCH, empty)
    for start in range(0, len(content) - SHINGLE + 1, PIECE):
        hashes = _shingles(content[start : start + PIECE + SHINGLE - 1])
        np.minimum.at(least, (hashes >> np.uint64(58)).astype(np.intp), hashes)
    filled = np.flatnonzero(least != empty)
    least = least[filled[np.searchsorted(filled, np.arange(SKETCH)) % len(filled)]]
    return (least & np.uint64(255)).astype(np.uint8).tobytes()


def _shingles(content: bytes) -> NDArray[np.uint64]:
    """A hash of each run of `SHINGLE` bytes: of pairs, of pairs of pairs, and so on."""
    hashes = (np.frombuffer(content, np.uint8).astype(np.uint64) + np.uint64(1)) * _ODD
    width = 1
    while width < SHINGLE:
        hashes = (hashes[:-width] * _MIX) ^ _scrambled(hashes[width:] * _ODD)
        width *= 2
    return _scrambled(_scrambled(hashes) * _MIX)


def _scrambled(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The high bits also in the low ones."""
    return hashes ^ (hashes >> np.uint64(31))


def alike(sketches: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Which documents are near-duplicates, also by way of others: of each, the first of its group, [N].

    Args:
        sketches: [N, SKETCH].
    """
    first_N = np.arange(len(sketches))
    bands = np.ascontiguousarray(sketches).view(f"<u{_BAND}").T
    for band_N, next_N in zip(bands, np.roll(bands, -1, axis=0), strict=True):
        # By the next band among equals, so that those who share more are neighbours.
        order_N = np.argsort(band_N.astype(np.uint64) << np.uint64(8 * _BAND) | next_N, kind="stable")
        here = np.flatnonzero(band_N[order_N[:-1]] == band_N[order_N[1:]])
        one, other = order_N[here], order_N[here + 1]
        same = (sketches[one] == sketches[other]).mean(axis=1) >= ALIKE
        first_N = _joined(first_N, one[same], other[same])
    return first_N


def _joined(
    first_N: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The groups after these pairs were made members of one."""
    while (first_N[one] != first_N[other]).any():
        low, high = np.minimum(first_N[one], first_N[other]), np.maximum(first_N[one], first_N[other])
        np.minimum.at(first_N, high, low)
        while (first_N[first_N] != first_N).any():
            first_N = first_N[first_N]
    return first_N


def keep_for_validation(
    first_N: NDArray[np.int64],
    hash_N: NDArray[np.uint64],
    bytes_N: NDArray[np.int64],
    domain_N: NDArray[np.int32],
    val_fraction: float,
) -> NDArray[np.bool_]:
    """Which documents are kept: `val_fraction` of the bytes of each domain, as near as whole groups come to it.

    The groups of near-duplicates of a domain are laid end to end in the order of their hashes, long ones last, and
    those whose middle lies below the share are kept. So a document mostly keeps its side as the corpus grows, and what
    a smaller share keeps, a larger one keeps, too. Domains of long groups only are laid out together. A side left
    empty gets the group nearest to it; with `val_fraction` 1, for a text that nobody trains on, all are kept.

    Args:
        first_N: the first document of each one's group.
        hash_N: of their contents.
        bytes_N: their lengths.

    Raises:
        DataError: there is one group, so that one side must stay empty.
    """
    if val_fraction >= 1:
        return np.ones(len(first_N), dtype=np.bool_)
    firsts, group_N = np.unique(first_N, return_inverse=True)
    if len(firsts) < 2:
        raise DataError(
            f"data.val_fraction={val_fraction}: the corpus is too small to split; it needs two different "
            f"documents and has {len(first_N)} of one text"
        )
    sizes = np.bincount(group_N, bytes_N).astype(np.float64)
    hashes = np.full(len(firsts), 2**64 - 1, dtype=np.uint64)
    np.minimum.at(hashes, group_N, hash_N)
    domains = domain_N[firsts].astype(np.int64) + 1
    small = ~np.isin(domains, domains[~_is_long(sizes, domains)])
    domains[small] = 0
    order = np.lexsort((hashes, _is_long(sizes, domains), domains))
    ends = np.cumsum(sizes[order])
    starts = ends - sizes[order]
    whole = np.bincount(domains, sizes)[domains[order]]
    # Of the domain, 0 to 1.
    middle = np.empty(len(firsts))
    middle[order] = ((starts + ends) / 2 - _before(domains[order], starts)) / whole
    kept = middle < val_fraction
    if not kept.any():
        kept[middle.argmin()] = True
    if kept.all():
        kept[middle.argmax()] = False
    return kept[group_N]


def _is_long(sizes: NDArray[np.float64], domains: NDArray[np.int64]) -> NDArray[np.bool_]:
    return sizes > LONG * np.bincount(domains, sizes)[domains]


def _before(domains: NDArray[np.int64], starts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the domain of each begins; domains are ascending."""
    _, first, inverse = np.unique(domains, return_index=True, return_inverse=True)
    return starts[first][inverse]
