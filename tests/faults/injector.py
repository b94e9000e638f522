"""Faults at a site, a round and a phase, said in a sentence, and the same every time.

    Faults().at("site-1", round=2).fail().at("site-2", round=3).corrupt("nan")

`save` and `load` keep them in a file, so that what once went wrong can be played again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fomoe_flwr.messages import Task
from strategies.local_grid import LocalGrid
from tests.faults.corruption import CORRUPTIONS, corrupt


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    action: str
    round: int
    site: str
    phase: str = "train"  # or evaluate
    what: str = ""  # which corruption
    seconds: float = 0.0


@dataclass
class Faults:
    """A list of faults, built by `at(…)` and one of the actions."""

    faults: list[Fault] = field(default_factory=list)

    def at(self, site: str, *, round: int, phase: str = "train") -> Place:
        return Place(self, site, round, phase)

    def of(self, site: str, round_: int, phase: str) -> Fault | None:
        return next(
            (f for f in self.faults if (f.site, f.round, f.phase) == (site, round_, phase)),
            None,
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps([asdict(fault) for fault in self.faults], indent=1))

    @classmethod
    def load(cls, path: Path) -> Faults:
        return cls([Fault(**entry) for entry in json.loads(path.read_text())])

    @classmethod
    def lost(cls, replies: Sequence[tuple[str, int]]) -> Faults:
        """Exactly these (site, round) missing."""
        return cls([Fault("fail", round_, site) for site, round_ in replies])


@dataclass(frozen=True)
class Place:
    """Where and when; each method says what happens there and gives the list back."""

    faults: Faults
    site: str
    round: int
    phase: str

    def _add(self, action: str, what: str = "", seconds: float = 0.0) -> Faults:
        self.faults.faults.append(Fault(action, self.round, self.site, self.phase, what, seconds))
        return self.faults

    def fail(self) -> Faults:
        """The site raises before it has done anything."""
        return self._add("fail")

    def lose(self) -> Faults:
        """The site does its work and keeps its state, but the reply never becomes one."""
        return self._add("lose")

    def hang(self) -> Faults:
        """Nothing comes back, ever."""
        return self._add("hang")

    def delay(self, seconds: float) -> Faults:
        """The answer is right, and late."""
        return self._add("delay", seconds=seconds)

    def repeat(self) -> Faults:
        """The same answer comes twice."""
        return self._add("repeat")

    def corrupt(self, what: str) -> Faults:
        """The answer is wrong in one of the ways of `corruption.CORRUPTIONS`."""
        assert what in CORRUPTIONS, what
        return self._add("corrupt", what)


def random_faults(seed: int, sites: Sequence[str], rounds: int, number: int) -> Faults:
    """`number` faults at different places; no hanging, which takes a deadline each."""
    rng = random.Random(seed)
    places = rng.sample([(site, round_) for site in sites for round_ in range(1, rounds + 1)], number)
    faults = Faults()
    for site, round_ in places:
        action = rng.choice(("fail", "lose", "corrupt"))
        what = rng.choice(sorted(CORRUPTIONS)) if action == "corrupt" else ""
        faults.faults.append(Fault(action, round_, site, what=what))
    return faults


def grid_with(faults: Faults) -> type[LocalGrid]:
    """A LocalGrid on which these faults happen."""

    class FaultyGrid(LocalGrid):
        def __init__(self, client_app: ClientApp, num_nodes: int, workers: int = 1) -> None:
            super().__init__(client_app, num_nodes, workers)
            self.earlier: dict[str, Message] = {}  # the last good reply of each site, for stale answers
            self._twice: set[str] = set()

        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            return [
                again
                for reply in replies
                for again in [reply] * (1 + (reply.metadata.reply_to_message_id in self._twice))
            ]

        def _serve(self, message: Message, expires: float) -> None:
            fault = self._fault(message)
            if fault is not None and fault.action == "hang":
                return
            if fault is not None and fault.action == "delay":
                time.sleep(fault.seconds)
            super()._serve(message, expires)

        def _answer(self, message: Message, context: Context) -> Message:
            fault = self._fault(message)
            if fault is not None and fault.action == "fail":
                return Message(Error(code=2, reason="injected"), reply_to=message)
            other = self.earlier.get("anybody")
            reply = super()._answer(message, context)
            if "task" not in message.content.config_records["config"]:
                return reply
            task = Task.from_json(str(message.content.config_records["config"]["task"]))
            earlier = self.earlier.get(task.name)
            if not reply.has_error():
                self.earlier[task.name] = self.earlier["anybody"] = reply
            if fault is None:
                return reply
            if fault.action == "lose":
                return Message(Error(code=2, reason="injected: lost"), reply_to=message)
            if fault.action == "repeat":
                self._twice.add(message.metadata.message_id)
            if fault.action == "corrupt":
                return corrupt(fault.what, message, reply, earlier or other, task)
            return reply

        @staticmethod
        def _fault(message: Message) -> Fault | None:
            text = message.content.config_records["config"].get("task")
            if text is None:
                return None
            task = Task.from_json(str(text))
            return faults.of(task.name, task.round, message.metadata.message_type)

    return FaultyGrid
