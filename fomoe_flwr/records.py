"""`placements.jsonl` in a run directory: who held which expert, as it was, for reports to read instead of deriving it.

A line for each round whose placement is not that of the line before:

    {"round": 3, "residents": {"site-0": [[0, 3], [1, 2]], …}}      experts by site, one list a layer
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fomoe_flwr.errors import RunError
from fomoe_flwr.files import write_atomically
from fomoe_flwr.placement import Placement, from_residents

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
    with (run_dir / NAME).open("a") as file:
        file.write(json.dumps({"round": round_, "residents": residents}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_placements(run_dir: Path, last_round: int) -> None:
    """Forget what is recorded of rounds after this one: a resumed run plays them again."""
    if (run_dir / NAME).exists():
        kept = [line for line in _lines(run_dir) if line["round"] <= last_round]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(run_dir / NAME, lambda path: path.write_text(text))


def read_placements(run_dir: Path, site_names: Sequence[str], num_experts: int) -> dict[int, Placement]:
    """The recorded placements by the round from which they held, over the federation's sites in their order.

    A site that a line does not name holds nothing. Empty for a run from before the record existed.

    Raises:
        RunError: a line is not a placement of this model.
    """
    placements = {}
    for line in _lines(run_dir):
        residents = line["residents"]
        experts = {expert for layers in residents.values() for layer in layers for expert in layer}
        sizes = {len(layers) for layers in residents.values()}
        if len(sizes) != 1 or not experts <= set(range(num_experts)):
            raise RunError(f"{run_dir / NAME}, round {line['round']}: not a placement of this run's model")
        nothing: list[list[int]] = [[]] * sizes.pop()
        placements[line["round"]] = from_residents(
            [residents.get(name, nothing) for name in site_names], num_experts
        )
    return placements


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines; a half-written last one is what a crash leaves and does not count."""
    path, found = run_dir / NAME, []
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            residents = {
                site: [[operator.index(expert) for expert in layer] for layer in layers]
                for site, layers in line["residents"].items()
            }
            found.append({"round": operator.index(line["round"]), "residents": residents})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(texts):
                break
            raise RunError(f"{path}, line {number}: not a round's placement ({error})") from error
    return found
