"""Will this SuperNode ever answer? What it says and which processes it has tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fomoe_flwr.deploy.processes import Process

STOPPED_S = 15.0  # after which a stopped process is killed
WEDGED_S = 75.0  # Flower itself takes 60 s to notice that the process of a message was killed


@dataclass
class Watch:
    """What one SuperNode said and which processes it had; from it follows whether it will ever answer.

    The time is told to it, in seconds of a clock that never goes back.
    """

    stopped_s: float = STOPPED_S
    node: str | None = None  # its id, once the SuperLink has accepted it
    refused: str | None = None  # Flower's number of the error with which the SuperLink turned it away
    _waiting_since: float | None = None  # it has a message, and nothing works on it
    _had_executor: bool = False
    _stopped: dict[tuple[int, int], float] = field(default_factory=dict)

    def hear(self, line: str, now: float) -> None:
        """Read one line of its output.

        The wait for an answer begins when the message is complete: a large one may take long to arrive.
        """
        if found := re.search(r"SuperNode ID: (\d+)", line):
            self.node = found[1]
        elif found := re.search(r"\[code: (\d+)\]", line):
            self.refused = found[1]
        elif "Received successfully" in line:
            self._waiting_since = now
        elif re.search(r"Sending: \S+ message", line):
            self._waiting_since = None

    def look(
        self, supernode: int, processes: Mapping[Process, str], now: float
    ) -> tuple[list[Process], str | None]:
        """Which of its processes to kill, and why it must be started again (None: it need not).

        `processes` are the living ones that belong to it, each with the name of its program.
        """
        living = {(process.pid, process.started) for process in processes if process.state == "T"}
        self._stopped = {known: self._stopped.get(known, now) for known in living}
        stopped = [
            process
            for process in processes
            if now - self._stopped.get((process.pid, process.started), now) >= self.stopped_s
        ]
        if any(process.pid == supernode for process in stopped):
            return stopped, f"the SuperNode was stopped for {self.stopped_s:g} s"

        programs = set(processes.values())
        if "flower-superexec" in programs:
            self._had_executor = True
        elif processes and (self._had_executor or self.node is not None):
            return stopped, "its flower-superexec is gone, so it can handle no message"
        if self._waiting_since is not None and "flwr-clientapp" in programs:
            self._waiting_since = now
        if self._waiting_since is not None and now - self._waiting_since > WEDGED_S:
            return stopped, f"it has a message, but for {WEDGED_S:g} s no process has worked on it"
        return stopped, None
