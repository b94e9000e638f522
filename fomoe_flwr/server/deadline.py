"""How long the server waits for the replies of a round."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from fomoe_flwr.config import StrategyConfig

ROUNDS = 10  # the rounds that count
FEWEST = 2  # before that the ceiling holds: the first round also prepares data and compiles
SLOWEST = 3.0  # times the median site; a later reply counts as one of then
GROWTH = 2.0  # times the median round; a longer one counts as so long
SPREADS = 4.0
MAD_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution to its standard deviation


class Deadline:
    """Seconds to wait for a round's replies: a multiple of the median round, and its spread, within bounds.

    A fixed time-out is wrong twice: too short when the links are slow, and hours too long when a site has died. A
    round's time is that of its last good reply. A site that is cut off does not lengthen the deadline: if it is dead
    it would do so for ever. Nor does one that always answers just in time: its replies count as those of a site
    SLOWEST times as slow as the median one (of two sites, as the faster), and one round counts at most GROWTH times the
    rounds before it.
    """

    def __init__(self, settings: StrategyConfig, ceiling: float) -> None:
        self._floor, self._ceiling = min(settings.timeout_floor_s, ceiling), ceiling
        self._factor = settings.timeout_factor
        self._rounds: deque[float] = deque(maxlen=ROUNDS)

    def took(self, seconds: Sequence[float]) -> None:
        """The good replies of a round came after so many seconds each."""
        if not seconds:
            return
        longest = min(max(seconds), SLOWEST * statistics.median_low(seconds))
        if len(self._rounds) >= FEWEST:
            longest = min(longest, GROWTH * statistics.median(self._rounds))
        self._rounds.append(longest)

    def seconds(self) -> float:
        """What the next round gets."""
        if len(self._rounds) < FEWEST:
            return self._ceiling
        median = statistics.median(self._rounds)
        spread = MAD_TO_SIGMA * statistics.median(abs(took - median) for took in self._rounds)
        return min(max(self._factor * median + SPREADS * spread, self._floor), self._ceiling)
