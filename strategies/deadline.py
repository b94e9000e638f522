"""How long a round may take, learnt from how long rounds have taken.

A fixed time-out is wrong twice: too short when the links are slow, and hours too long when a site has died.
"""

from __future__ import annotations

import statistics
from collections import deque

from fomoe_flwr.config import StrategyConfig

ROUNDS = 10  # the rounds that count
FEWEST = 2  # before that the ceiling holds: the first round also prepares data and compiles
SPREADS = 4.0
MAD_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution to its standard deviation


class Deadline:
    """Seconds to wait for a round's replies: a multiple of the median round, and its spread, within bounds.

    A round's time is that of its last good reply. A site that is cut off does not lengthen the deadline: if it
    is dead it would do so for ever.
    """

    def __init__(self, settings: StrategyConfig, ceiling: float) -> None:
        self._floor, self._ceiling = min(settings.timeout_floor_s, ceiling), ceiling
        self._factor = settings.timeout_factor
        self._rounds: deque[float] = deque(maxlen=ROUNDS)

    def took(self, seconds: float) -> None:
        """A round's last good reply came after so many seconds."""
        self._rounds.append(seconds)

    def seconds(self) -> float:
        """What the next round gets."""
        if len(self._rounds) < FEWEST:
            return self._ceiling
        median = statistics.median(self._rounds)
        spread = MAD_TO_SIGMA * statistics.median(abs(took - median) for took in self._rounds)
        return min(max(self._factor * median + SPREADS * spread, self._floor), self._ceiling)
