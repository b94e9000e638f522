"""Reports show the placement that a run had, also after experts were adopted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fomoe_flwr.checkpoint import checkpoint_path, compose_run, read_checkpoint
from fomoe_flwr.placement import Placement, from_residents
from fomoe_flwr.records import NAME, append_placement, cut_placements, read_placements
from fomoe_flwr.report import picture
from fomoe_flwr.report.load import Run, load_run
from tests.conftest import Compose
from tests.strategies.helpers import LeavingGrid, run

FIRST = {"a": [[0, 1], [2]], "b": [[2], [0, 1]]}
SECOND = {"a": [[0, 1, 2], [0, 1, 2]]}


def test_a_round_has_the_nearest_placement_before_it(tmp_path: Path) -> None:
    append_placement(tmp_path, 1, FIRST)
    append_placement(tmp_path, 4, SECOND)
    with (tmp_path / NAME).open("a") as file:
        file.write('{"round": 5, "resid')  # a crash

    placements = read_placements(tmp_path, ["a", "b"], 3)

    assert sorted(placements) == [1, 4]
    assert placements[1].residents(1) == FIRST["b"]
    assert placements[4].residents(0) == SECOND["a"]
    assert placements[4].residents(1) == [[], []]  # it is not named: it holds nothing


def test_a_resumed_run_forgets_what_it_plays_again(tmp_path: Path) -> None:
    cut_placements(tmp_path, 3)  # nothing recorded: nothing to forget
    append_placement(tmp_path, 1, FIRST)
    append_placement(tmp_path, 4, SECOND)
    cut_placements(tmp_path, 3)
    assert sorted(read_placements(tmp_path, ["a"], 3)) == [1]
    assert read_placements(tmp_path / "elsewhere", ["a"], 3) == {}


@pytest.mark.parametrize(
    "bad",
    [
        "not json",
        "null",
        "[" * 100_000,
        '{"round": 1}',
        '{"round": Infinity, "residents": {"a": [[1]]}}',
        '{"round": 1, "residents": {"a": 5}}',
        '{"round": 1, "residents": {"a": [[0.5]]}}',
        '{"round": 1, "residents": {"a": [[7]]}}',
        '{"round": 1, "residents": {"a": [[-1]]}}',
        '{"round": 1, "residents": {"a": [[1]], "b": [[1], [2]]}}',
        '{"round": 1, "residents": {}}',
    ],
    ids=lambda bad: bad[:40],
)
def test_a_damaged_line_is_named_and_the_others_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    (tmp_path / NAME).write_text(bad + '\n{"round": 2, "residents": {"a": [[1]]}}\n')
    assert sorted(read_placements(tmp_path, ["a"], 3)) == [2]
    (record,) = caplog.records
    assert re.search(r"placements\.jsonl: left out 1 of 2 lines.*; line 1: ", record.getMessage())
    cut_placements(tmp_path, 2)  # by a resume, which does not know the model's size
    assert sorted(read_placements(tmp_path, ["a"], 3)) == [2]


def drawn(run_of: Run, monkeypatch: pytest.MonkeyPatch) -> Placement:
    """The placement that the expert map shows."""
    seen: list[Placement] = []
    monkeypatch.setattr(picture, "_grids", lambda axes, placement, names, layers: seen.append(placement))
    monkeypatch.setattr(picture, "dress", lambda *_: None)
    picture.expert_map(None, run_of)  # type: ignore[arg-type]
    return seen[0]


def test_pictures_show_what_the_sites_held(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (
        "strategy.placement=random",
        "strategy.overlap=1",
        "train.rounds=3",
        "federation.num_sites=4",
    )
    folder = run(small(*overrides), grid_type=LeavingGrid)
    manifest = read_checkpoint(checkpoint_path(folder, 3)).manifest["placement"]
    held = from_residents([manifest[f"site-{site}"] for site in range(4)], 8)
    loaded = load_run(folder)

    shown = drawn(loaded, monkeypatch)

    assert (shown.holds_LEM == held.holds_LEM).all()
    assert loaded.held_share == pytest.approx(held.holds_LEM.mean())
    assert loaded.residents(3) == [float(n) for n in held.holds_LEM.sum(axis=(0, 1)) / 2]

    # A run that is prolonged adds to the record. Without a record no placement is drawn.
    run(compose_run([f"resume={folder}", "train.rounds=4"]))
    rounds = [json.loads(line)["round"] for line in (folder / NAME).read_text().splitlines()]
    assert rounds == [1, 2, 3, 4]
    (folder / NAME).unlink()
    assert load_run(folder).placement(3) is None
