"""How a router's choices are shared out over the experts, averaged over rounds: of a site, and of the federation.

With model.balance=global a site balances the federation's load. It knows that of the rounds before, as it knows its
own, and adds the difference to what its batch does now. The federation's load alone would stand still for a round: as
nothing that a router does within the round would take the pressure off it, it overshoots, and the load swings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_NEWEST = 0.5  # weight of the newest round; the ones before it share the rest in the same way

Shares = list[list[float]]  # of each layer's assignments, by expert; JSON keeps them to the last bit


def averaged(before: Shares | None, load_LE: Sequence[Sequence[int]] | NDArray[np.int64]) -> Shares | None:
    """The average with one more round, each round counting by its shares; None as long as nothing is known.

    A round of which nobody said where its tokens went does not count.
    """
    total_L1 = np.sum(load_LE, axis=1, keepdims=True)
    if not total_L1.all():
        return before
    newest_LE = np.asarray(load_LE) / total_L1
    if before is not None:
        newest_LE = (1 - _NEWEST) * np.array(before) + _NEWEST * newest_LE
    shares: Shares = newest_LE.tolist()
    return shares


def difference(federation: Shares | None, own: Shares | None) -> Shares | None:
    """What to add to a site's own shares to have the federation's; None where one of them is not known."""
    if federation is None or own is None:
        return None
    offset: Shares = np.subtract(federation, own).tolist()
    return offset
