"""Nothing bad gets in: every kind of bad reply is refused with its reason, and it is as if it had never come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from tests.conftest import Compose
from tests.faults.corruption import CORRUPTIONS
from tests.faults.injector import Faults, grid_with, random_faults
from tests.strategies.helpers import composed_anew, metrics, run

ROUNDS = 3
SETTINGS = (f"train.rounds={ROUNDS}", "federation.num_sites=4", "strategy.overlap=2")

_PLAYED: dict[tuple[object, ...], Path] = {}


def play(small: Compose, tmp_path: Path, faults: Faults, *overrides: str) -> Path:
    """A run with these faults; returns its directory."""
    return run(composed_anew(small, tmp_path, *SETTINGS, *overrides), grid_type=grid_with(faults))


def without(
    small: Compose, tmp_path: Path, lost: Sequence[tuple[str, int]] = (), overrides: Sequence[str] = ()
) -> Path:
    """A run in which exactly these replies (site, round) are missing; trained once for all tests."""
    key = (*lost, *overrides)
    if key not in _PLAYED:
        _PLAYED[key] = play(small, tmp_path, Faults.lost(lost), *overrides)
    return _PLAYED[key]


def assert_same_model(ours: Path, theirs: Path, rounds: int = ROUNDS) -> None:
    a, b = (read_checkpoint(checkpoint_path(folder, rounds)) for folder in (ours, theirs))
    for kind in ("parameters", "outer"):
        mine, yours = getattr(a, kind), getattr(b, kind)
        assert mine.keys() == yours.keys()
        assert all(torch.equal(value, yours[name]) for name, value in mine.items())


@pytest.mark.parametrize(
    ("outer", "bad"),
    [("nesterov", sorted(CORRUPTIONS)), ("local_adamw", ["another start", "huge norm", "metric nan", "nan"])],
    ids=["nesterov", "local_adamw"],
)
def test_bad_replies_are_refused_and_the_model_is_that_without_them(
    small: Compose, tmp_path: Path, outer: str, bad: list[str]
) -> None:
    """Two bad sites in each round from the second on."""
    places = [(site, round_) for round_ in range(2, 2 + len(bad) // 2) for site in ("site-1", "site-2")]
    overrides = (f"strategy.outer={outer}", f"train.rounds={1 + len(bad) // 2}")
    faults, expected = Faults(), {}
    for (site, round_), what in zip(places, bad, strict=True):
        faults.at(site, round=round_).corrupt(what)
        expected.setdefault(round_, {})[site] = CORRUPTIONS[what]
    done = play(small, tmp_path, faults, *overrides)
    for line in metrics(done)[2:]:
        assert line["refused"] == expected[line["round"]]
        assert line["failures"].keys() == {"site-1", "site-2"}
        assert line["committed"]
        assert [site["site"] for site in line["sites"]] == ["site-0", "site-3"]
    assert_same_model(done, without(small, tmp_path, places, overrides), 1 + len(bad) // 2)


def test_the_second_of_two_answers_is_refused(small: Compose, tmp_path: Path) -> None:
    twice = play(small, tmp_path, Faults().at("site-1", round=2).repeat())
    assert metrics(twice)[2]["refused"] == {"site-1": "duplicate"}
    assert_same_model(twice, without(small, tmp_path))


def test_a_bad_evaluation_is_refused_too(small: Compose, tmp_path: Path) -> None:
    bad = {
        "site-0": "another site",
        "site-1": "another run",
        "site-2": "another start",
        "site-3": "metric nan",
    }
    faults = Faults()
    for number, (site, what) in enumerate(bad.items()):
        faults.at(site, round=2 + number // 2, phase="evaluate").corrupt(what)
    lines = metrics(play(small, tmp_path, faults, "strategy.fraction_evaluate=1.0"))
    for line, refused in ((lines[2], ("site-0", "site-1")), (lines[3], ("site-2", "site-3"))):
        assert line["refused"] == {site: CORRUPTIONS[bad[site]] for site in refused}
        assert {site["site"] for site in line["sites"] if "val_loss" not in site} == set(refused)
        assert len(line["sites"]) == 4


@pytest.mark.parametrize("seed", range(2))
def test_random_faults_equal_the_same_replies_missing(small: Compose, tmp_path: Path, seed: int) -> None:
    sites = [f"site-{index}" for index in range(4)]
    faults = random_faults(seed, sites, ROUNDS, number=5)
    faults.save(tmp_path / "faults.json")
    faulty = play(small, tmp_path, Faults.load(tmp_path / "faults.json"), "strategy.max_discarded=9")
    lines = metrics(faulty)[1:]
    lost = [
        (site, line["round"])
        for line in lines
        for site in sites
        if not line["committed"] or site not in {entry["site"] for entry in line["sites"]}
    ]
    assert {(fault.site, fault.round) for fault in faults.faults} <= set(lost)
    assert_same_model(faulty, without(small, tmp_path, lost, ["strategy.max_discarded=9"]))
