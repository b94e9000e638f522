"""What a site's process remembers from message to message, so that it need not be read, opened or built again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fomoe_flwr.codecs import CodecState
from fomoe_flwr.data import Stream
from fomoe_flwr.engine import Engine, EngineState, Report, engine_on
from fomoe_flwr.engine.device import Devices
from fomoe_flwr.messages import Task
from fomoe_flwr.site.state import SiteState

log = logging.getLogger("fomoe.site")

# Of a Task: does not change what the local steps come to.
NO_MATTER = ("inputs", "asked", "holders", "checkpoint_every", "keep")


@dataclass
class Trained:
    """The local steps of a round, done, and nothing of them saved."""

    state: SiteState  # what they went on from, without what they changed in place
    start: bytes  # digests of what they began from; empty with strategy.delay=1
    report: Report
    blobs: dict[str, bytes]
    engine: EngineState
    encoder: CodecState
    position: int  # in the site's data
    stream: dict[str, Any]  # and how that is found again
    # As in `SiteState`.
    local: dict[str, Tensor]
    pending: dict[str, Tensor]


@dataclass
class Memory:
    """What need not be read, opened or built again when the next message of the same run comes.

    A round gives the same bits with an empty memory. Moments and parameters are changed in place, so everything is
    forgotten when a round fails.
    """

    run: str = ""
    _folder: Path | None = None
    _state: SiteState | None = None  # that of the newest file in the folder
    _engine: Engine | None = None
    _engine_is_for: Any = None
    _stream: Stream | None = None
    _stream_is_for: Any = None
    # The task of a round that was begun before its message came, and what it came to; None: it is in work.
    begun: tuple[Task, Trained | None] | None = None

    def empty(self) -> None:
        """Forget everything."""
        self.run, self._folder, self._state = "", None, None
        self._engine = self._engine_is_for = self._stream = self._stream_is_for = self.begun = None

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

    def has_begun(self, task: Task) -> bool:
        """Whether this is the round that was begun before its message came: its numbers are then those of this task."""
        if self.begun is None:
            return False
        begun = self.begun[0]
        # What the site looks at itself, or needs when the round is over, does not matter to the steps.
        return begun == replace(task, **{key: getattr(begun, key) for key in NO_MATTER})

    def take_begun(self, task: Task) -> Trained | None:
        """What was begun of this round. Of another one it is dropped."""
        begun, fits = self.begun, self.has_begun(task)
        self.begun = None
        return begun[1] if begun is not None and fits else None

    def keep_state(self, folder: Path, state: SiteState) -> None:
        """The state as it was just written to the folder."""
        self._folder, self._state = folder, state

    def engine(self, task: Task, devices: Devices) -> Engine:
        """The site's engine; built anew only for another shape or devices, for torch.compile's work takes long.

        Raises:
            ConfigError, WorkerError: as `engine_on`.
        """
        wanted = (task.model, task.strategy.routing, task.residents, devices)
        if self._engine is None or self._engine_is_for != wanted or not self._engine.usable:
            # The old one first: two at a time may be more than the device holds.
            self._engine = None
            log.info("site %s builds its model", task.name)
            self._engine = engine_on(devices, task.model, task.residents, task.strategy.routing)
            self._engine_is_for = wanted
        return self._engine

    def stream(self, wanted: object, open_stream: Callable[[], Stream]) -> Stream:
        """The site's data; opened anew for other data."""
        if self._stream is None or self._stream_is_for != wanted:
            self._stream, self._stream_is_for = open_stream(), wanted
        return self._stream
