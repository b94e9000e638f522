"""What a worker need not read, open or build again when the next message of the same run comes.

Nothing in here is needed: a round gives the same bits with an empty memory. And nothing in here survives a round
that does not end well, for moments and parameters are changed in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.state import SiteState
from fomoe_flwr.data import TokenStream
from fomoe_flwr.engine import Engine
from fomoe_flwr.messages import Task

log = logging.getLogger("fomoe.site")


@dataclass
class Memory:
    """One site, one run at a time."""

    run: str = ""
    _folder: Path | None = None
    _state: SiteState | None = None  # that of the newest file in the folder
    _engine: Engine | None = None
    _engine_is_for: Any = None
    _stream: TokenStream | None = None
    _stream_is_for: Any = None

    def empty(self) -> None:
        """Forget everything."""
        self.run, self._folder, self._state = "", None, None
        self._engine = self._engine_is_for = self._stream = self._stream_is_for = None

    @contextmanager
    def serving(self, run: str) -> Iterator[None]:
        """Around the work of one message: forgets what is of another run, and everything if the work fails."""
        if run != self.run:
            self.empty()
        self.run = run
        try:
            yield
        except BaseException:
            self.empty()
            raise

    def take_state(self, folder: Path, round_: int) -> SiteState | None:
        """The state after this round, if it is the one in memory. It is handed out, not shared."""
        state, self._state = self._state, None
        return state if state is not None and (self._folder, state.round) == (folder, round_) else None

    def keep_state(self, folder: Path, state: SiteState) -> None:
        """The state as it was just written to the folder."""
        self._folder, self._state = folder, state

    def engine(self, task: Task, device: str) -> Engine:
        """The site's engine. Built anew only for another shape or device, so that what torch.compile made of its model
        lasts.
        """
        wanted = (task.model, task.strategy.routing, task.residents, device)
        if self._engine is None or self._engine_is_for != wanted:
            self._engine = None  # two at a time may be more than the device holds
            log.info("site %s builds its model", task.name)
            self._engine = Engine(task.model, task.residents, task.strategy.routing, device)
            self._engine_is_for = wanted
        return self._engine

    def stream(self, wanted: object, open_stream: Callable[[], TokenStream]) -> TokenStream:
        """The site's data; opened anew for other data."""
        if self._stream is None or self._stream_is_for != wanted:
            self._stream, self._stream_is_for = open_stream(), wanted
        return self._stream
