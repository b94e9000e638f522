"""What the server knows of one round while it runs, and its figures afterwards."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr import wire
from fomoe_flwr.placement import Placement
from strategies.packing import MoveFigures

log = logging.getLogger("fomoe")


@dataclass(frozen=True)
class SiteResult:
    """What one site reported."""

    site: str
    tokens: int
    train_loss: float
    tokens_per_second: float
    resident_share: float
    seconds: float
    memory_bytes: float  # the most that its state took; 0: not said
    load_LE: NDArray[np.int64] = field(compare=False)  # the router's choices, ghosts too
    first_loss: float | None = None  # of its first few local steps; None: not said
    last_loss: float | None = None  # of its last few


@dataclass
class Round:
    """A round while it runs, and its figures afterwards. Sites are indices into the federation's list."""

    number: int
    placement: Placement
    began: float = field(default_factory=time.perf_counter)
    deadline_s: float = 0.0
    asked: list[int] = field(default_factory=list)  # in folding order
    down: wire.Ledger = field(default_factory=wire.Ledger)
    up: wire.Ledger = field(default_factory=wire.Ledger)
    results: dict[int, SiteResult] = field(default_factory=dict)  # of the replies that are part of the model
    norms: dict[int, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # site's name -> reason
    refused: dict[str, str] = field(default_factory=dict)  # site's name -> kind of bad reply
    committed: bool = True  # False: below the quorum, discarded whole
    held_back: int = 0  # experts whose holders were below their quorum
    evaluations: dict[str, float] = field(default_factory=dict)  # site's name -> loss with its residents only
    moves: MoveFigures = field(default_factory=MoveFigures)
    wire_s: float = 0.0  # encoding, pushing, checking
    aggregate_s: float = 0.0  # folding and the outer step

    def fail(self, site: str, reason: str, kind: str | None = None) -> None:
        """A site's reply is not part of the model; `kind` if it was a bad one that was refused."""
        self.failures[site] = reason
        if kind is not None:
            self.refused[site] = kind
        log.warning("round %d: site %s: %s", self.number, site, reason)
