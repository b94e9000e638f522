"""The death of the server, in any phase of a round."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from fomoe_flwr import checkpoint
from fomoe_flwr.compose import Composed
from fomoe_flwr.server import outer as outer_room
from fomoe_flwr.server import rounds as rounds_room
from fomoe_flwr.server import run as run_room
from fomoe_flwr.server.replies import Inbox
from strategies.fomoe import FoMoE
from tests.faults.injector import Faults, grid_with
from tests.strategies.helpers import run

PHASES = (
    "before push",
    "first reply",
    "in inbox",
    "last reply",
    "in commit",
    "after commit",
    "in checkpoint",
    "after checkpoint",
)


class Killed(BaseException):
    """Stands for SIGKILL: not an Exception, so nobody catches it, and what follows it is never reached."""


@contextlib.contextmanager
def dies(phase: str, round_: int) -> Iterator[None]:
    """Within it, a server dies in this phase of this round."""
    with pytest.MonkeyPatch.context() as patch:
        seen = {"round": 0, "replies": 0, "chunks": 0}

        def here(wanted: str) -> bool:
            return wanted == phase and seen["round"] == round_

        messages, put = FoMoE._messages, Inbox.put
        commit, save = rounds_room.commit, run_room.save_checkpoint
        write_tensors = checkpoint.write_tensors

        def counting_messages(self, *arguments):
            made = messages(self, *arguments)
            seen.update(round=self.round.number, replies=0, chunks=0)
            if here("before push"):
                raise Killed
            return made

        def counting_put(self, site, *arguments):
            seen["replies"] += 1
            if here("in inbox") and seen["replies"] == 2:
                partial = self._folder / f"{site}.partial"
                partial.mkdir()
                (partial / "bundle-0").write_bytes(b"half of it")
                raise Killed
            put(self, site, *arguments)
            if here("first reply") or (here("last reply") and seen["replies"] == 4):
                raise Killed

        def half_a_commit(round_, outer, *arguments):
            step = outer.step

            def step_and_die(*values):
                step(*values)
                if here("in commit"):
                    raise Killed

            patch.setattr(outer, "step", step_and_die)
            factors = commit(round_, outer, *arguments)
            patch.setattr(outer, "step", step)
            if here("after commit"):
                raise Killed
            return factors

        def half_a_file(path, tensors, **options):
            write_tensors(path, tensors, **options)
            if here("in checkpoint"):
                path.write_bytes(path.read_bytes()[:100])
                raise Killed

        def save_and_die(*arguments):
            result = save(*arguments)
            if here("after checkpoint"):
                raise Killed
            return result

        patch.setattr(FoMoE, "_messages", counting_messages)
        patch.setattr(Inbox, "put", counting_put)
        patch.setattr(rounds_room, "commit", half_a_commit)
        patch.setattr(outer_room, "CHUNK_BYTES", 4096)  # so that a commit has a middle
        patch.setattr(checkpoint, "write_tensors", half_a_file)
        patch.setattr(run_room, "save_checkpoint", save_and_die)
        yield


def run_until_killed(composed: Composed, faults: Faults, phase: str, round_: int) -> None:
    """A run whose server dies as said."""
    with dies(phase, round_), pytest.raises(Killed):
        run(composed, grid_type=grid_with(faults))
