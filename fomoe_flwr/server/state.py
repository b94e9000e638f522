"""The server's state as a value: the global model, its outer optimizer, and what is remembered from round to round."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fomoe_flwr.load import Shares
from fomoe_flwr.model.spec import is_moment
from fomoe_flwr.placement import Placement
from fomoe_flwr.server.outer import OuterOptimizer
from fomoe_flwr.server.replies import Norms
from fomoe_flwr.server.shards import Held, Public

log = logging.getLogger("fomoe")

NORMS_KEPT = 32  # of earlier replies, to hold new ones against
_NAMED = 8  # experts named in a log line


@dataclass
class Sizes:
    """Of earlier replies, to hold new ones against."""

    norms: deque[Norms] = field(default_factory=lambda: deque(maxlen=NORMS_KEPT))
    # Size of each tensor of a reply, as a share of the whole (`robust.clip`).
    usual: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "usual": self.usual}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sizes:
        return cls(deque(values["norms"], NORMS_KEPT), dict(values.get("usual", {})))


@dataclass
class ServerState:
    """What a checkpoint keeps."""

    tensors: dict[str, Tensor]  # the global model by name, fp32; for LocalAdamW with its moments
    outer: OuterOptimizer
    experts: ExpertLedger
    round: int = 0  # the last one that is over
    held: Held | None = None  # who has what; None: every message brings everything
    public: Public | None = None  # what the sites were sent, where that is not the global model itself
    # By site, the last round whose reply is in the model.
    counted: dict[str, int] = field(default_factory=dict)
    last_losses: dict[str, float] = field(default_factory=dict)  # of each site's last steps in that round
    corpus: str = ""  # digest of the common corpus, as most sites said it
    own_corpora: dict[str, str] = field(default_factory=dict)  # by site, of text of its own
    global_load: Shares | None = None  # of the routers of all sites together
    # By `turns.turn_name`: rounds that synchronise other tensors have other sizes.
    sizes: defaultdict[str, Sizes] = field(default_factory=lambda: defaultdict(Sizes))
    keys: dict[str, str] = field(
        default_factory=dict
    )  # SHA-256 of each site's key, where keys are registered
    discarded: int = 0  # rounds in a row

    def parameters(self) -> dict[str, Tensor]:
        """The global model without LocalAdamW's moments."""
        return {name: tensor for name, tensor in self.tensors.items() if not is_moment(name)}

    def memory(self) -> dict[str, Any]:
        """What `remember` needs besides the tensors, as JSON values."""
        turns = {turn: sizes.to_dict() for turn, sizes in sorted(self.sizes.items()) if turn}
        resting = [] if self.held is None else sorted(self.held.resting)
        return {
            "counted": self.counted,
            "last_losses": self.last_losses,
            "corpus": self.corpus,
            "own_corpora": self.own_corpora,
            **self.sizes[""].to_dict(),
            "keys": self.keys,
            "experts": self.experts.table(self.round),
            "load": self.global_load,
            "discarded": self.discarded,
            "public": {} if self.held is None else self.held.holders,
            **({"resting": resting} if resting else {}),
            **({"turns": turns} if turns else {}),
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Take over what `memory` gave."""
        self.counted = dict(memory["counted"])
        self.last_losses = dict(memory.get("last_losses", {}))
        self.corpus = str(memory.get("corpus", ""))
        self.own_corpora = dict(memory.get("own_corpora", {}))
        turns = {"": memory, **memory.get("turns", {})}
        self.sizes = defaultdict(Sizes, {turn: Sizes.from_dict(values) for turn, values in turns.items()})
        self.keys = dict(memory.get("keys", {}))
        self.experts.load(memory["experts"])
        self.global_load = memory.get("load")
        self.discarded = int(memory["discarded"])
        if self.held is not None:
            self.held.holders = dict(memory.get("public", {}))
            self.held.resting = frozenset(memory.get("resting", ()))


class ExpertLedger:
    """For every expert of every layer: when it was last updated, how many holders are there, what it has seen."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self._layers = layers  # their numbers, for the log
        shape = (len(layers), num_experts)
        # The round of the last update; 0: never.
        self.updated_LE: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self.tokens_LE: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self.alive_LE: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self._orphans: set[tuple[int, int]] = set()
        self._starved: list[tuple[int, int]] = []  # of this round

    def look(self, placement: Placement, alive: Collection[int]) -> list[tuple[int, int]]:
        """The experts without a connected holder; logged when one loses its last holder and when it has one again.

        Args:
            alive: the sites that are connected.
        """
        self.alive_LE = placement.holds_LEM[:, :, sorted(alive)].sum(axis=2, dtype=np.int64)
        orphans = [(int(layer), int(expert)) for layer, expert in np.argwhere(self.alive_LE == 0)]
        if new := sorted(set(orphans) - self._orphans):
            log.warning("no site with %s is connected: %s", _count(new), _names(new, self._layers))
        if back := sorted(self._orphans - set(orphans)):
            log.info("%s held again: %s", _count(back), _names(back, self._layers))
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
                _names(self._starved, self._layers),
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


def _names(experts: list[tuple[int, int]], layers: Sequence[int]) -> str:
    names = ", ".join(f"layer {layers[layer]} expert {expert}" for layer, expert in experts[:_NAMED])
    return names + (", …" if len(experts) > _NAMED else "")
