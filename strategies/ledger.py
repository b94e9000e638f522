"""The ledger of experts: when each was last updated, how many of its holders are there, how much it has seen."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.placement import Placement

log = logging.getLogger("fomoe")

_NAMED = 8  # experts named in a log line


class ExpertLedger:
    """One entry for every expert of every layer."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.updated_LE: NDArray[np.int64] = np.zeros(
            (num_layers, num_experts), dtype=np.int64
        )  # round; 0: never
        self.tokens_LE: NDArray[np.int64] = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.alive_LE: NDArray[np.int64] = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._orphans: set[tuple[int, int]] = set()
        self._starved: list[tuple[int, int]] = []  # of this round

    def look(self, placement: Placement, alive: Collection[int]) -> list[tuple[int, int]]:
        """Who has lost its last holder; said in the log when it happens and when it is over.

        Args:
            alive: the sites that are connected.
        """
        self.alive_LE = placement.holds_LEM[:, :, sorted(alive)].sum(axis=2, dtype=np.int64)
        orphans = [(int(layer), int(expert)) for layer, expert in np.argwhere(self.alive_LE == 0)]
        if new := sorted(set(orphans) - self._orphans):
            log.warning("no site with %s is connected: %s", _count(new), _names(new))
        if back := sorted(self._orphans - set(orphans)):
            log.info("%s held again: %s", _count(back), _names(back))
        self._orphans, self._starved = set(orphans), []
        return orphans

    def starve(self, round_: int, experts: Iterable[tuple[int, int]], least: int) -> None:
        """These got fewer than the least number of tokens in this round, and are held back."""
        self._starved = sorted(experts)
        if self._starved:
            log.warning(
                "round %d: %s starved, with fewer than %d tokens over all sites, and held back: %s",
                round_,
                _count(self._starved),
                least,
                _names(self._starved),
            )

    def record(self, round_: int, experts: Iterable[tuple[int, int]], tokens_LE: NDArray[np.int64]) -> None:
        """These experts were updated in a round, and so many tokens came to them at a site."""
        for layer, expert in experts:
            self.updated_LE[layer, expert] = round_
        self.tokens_LE += tokens_LE

    def summary(self, round_: int) -> dict[str, Any]:
        """For a line of metrics: the extremes, and who is orphaned."""
        age_LE = round_ - self.updated_LE
        return {
            "orphaned": [list(expert) for expert in sorted(self._orphans)[:_NAMED]],
            "num_orphaned": len(self._orphans),
            "starved": [list(expert) for expert in self._starved[:_NAMED]],
            "num_starved": len(self._starved),
            "fewest_holders": int(self.alive_LE.min()),
            "rounds_since_update_max": int(age_LE.max()),
            "tokens_min": int(self.tokens_LE.min()),
            "tokens_max": int(self.tokens_LE.max()),
        }

    def table(self, round_: int) -> dict[str, Any]:
        """The whole ledger as JSON values, layers x experts."""
        return {
            "round": round_,
            "rounds_since_update": (round_ - self.updated_LE).tolist(),
            "holders_alive": self.alive_LE.tolist(),
            "tokens": self.tokens_LE.tolist(),
        }

    def load(self, table: Mapping[str, Any]) -> None:
        """The inverse of `table`."""
        self.updated_LE = int(table["round"]) - np.array(table["rounds_since_update"], dtype=np.int64)
        self.tokens_LE = np.array(table["tokens"], dtype=np.int64)
        self.alive_LE = np.array(table["holders_alive"], dtype=np.int64)


def _count(experts: list[tuple[int, int]]) -> str:
    return f"{len(experts)} expert{'s' if len(experts) > 1 else ''}"


def _names(experts: list[tuple[int, int]]) -> str:
    names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:_NAMED])
    return names + (", …" if len(experts) > _NAMED else "")
