"""The process of one more device of a site: `python -m fomoe_flwr.engine.rank`. The first starts it (`engine.team`)."""

from __future__ import annotations

import gc
import logging
import os
import traceback

from fomoe_flwr.engine.several import Member
from fomoe_flwr.engine.team import Team, end_with_the_first, join


def follow(team: Team) -> None:
    """Do what the first device wants, for ever."""
    engine: Member | None = None
    while True:
        verb, *arguments = team.told()
        if verb == "build":
            # The old one first: two at a time may be more than the device holds.
            engine = None
            gc.collect()
            engine = Member(*arguments, team=team)
        else:
            getattr(engine, verb)(*arguments)


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    end_with_the_first()
    environment = os.environ
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    team = join(rank, size, environment["FOMOE_DEVICE"], environment["FOMOE_RANKS"])
    try:
        follow(team)
    except Exception as error:  # noqa: BLE001 - the first is told
        traceback.print_exc()
        # If the first is gone, so is what it would read.
        team.store.set(f"failed/{rank}", f"{type(error).__name__}: {error}"[:2000])
        os._exit(1)


if __name__ == "__main__":
    main()
