"""`placements.jsonl` in a run directory: who held which expert, as it was, for reports to read instead of deriving it.

A line for each round whose placement is not that of the line before:

    {"round": 3, "residents": {"site-0": [[0, 3], [1, 2]], …}}      experts by site, one list a layer
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from fomoe_flwr.files import naming, write_atomically
from fomoe_flwr.placement import Placement, from_residents
from fomoe_flwr.reading import as_type, read_lines

NAME = "placements.jsonl"
FAILURE = "failure.txt"  # why a run ended that could not go on

Residents = Mapping[str, Sequence[Sequence[int]]]  # by site


@contextlib.contextmanager
def noted_failure(run_dir: Path) -> Iterator[None]:
    """Leave in the run directory why a run failed, for the table of a sweep."""
    file = run_dir / FAILURE
    file.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        # The disk may be what failed.
        with contextlib.suppress(OSError):
            file.write_text(str(error) or repr(error), encoding="utf-8")
        raise


def append_placement(run_dir: Path, round_: int, residents: Residents) -> None:
    """Record the placement that holds from a round on."""
    with naming(run_dir / NAME), (run_dir / NAME).open("a") as file:
        file.write(json.dumps({"round": round_, "residents": residents}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_placements(run_dir: Path, last_round: int) -> None:
    """Forget what is recorded of rounds after this one: a resumed run plays them again."""
    path = run_dir / NAME
    if path.exists():
        kept = [line for line in read_lines(path, _taken) if line["round"] <= last_round]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda aside: aside.write_text(text))


def read_placements(run_dir: Path, site_names: Sequence[str], num_experts: int) -> dict[int, Placement]:
    """The recorded placements by the round from which they held, over the federation's sites in their order.

    A site that a line does not name holds nothing. Empty for a run from before the record existed. A damaged line is
    left out with a warning; what the line before it says is then taken for its rounds, too.

    Raises:
        RunError: the record cannot be read.
    """

    def take(value: Any) -> tuple[int, Placement]:
        line = _taken(value)
        residents = line["residents"]
        experts = {expert for layers in residents.values() for layer in layers for expert in layer}
        sizes = {len(layers) for layers in residents.values()}
        if len(sizes) != 1 or not all(expert < num_experts for expert in experts):
            raise ValueError("not a placement of this run's model")
        nothing: list[list[int]] = [[]] * sizes.pop()
        rows = [residents.get(name, nothing) for name in site_names]
        return line["round"], from_residents(rows, num_experts)

    return dict(read_lines(run_dir / NAME, take))


class _Line(TypedDict):
    round: int
    residents: dict[str, list[list[int]]]


def _taken(value: Any) -> _Line:
    line: _Line = as_type(_Line, value)
    return line
