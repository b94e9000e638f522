"""Nothing bad gets in: every kind of bad reply is refused with its reason, and it is as if it had never come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from tests.conftest import Compose
from tests.faults.corruption import CORRUPTIONS
from tests.faults.injector import Faults, grid_with, random_faults
from tests.strategies.helpers import metrics, run

ROUNDS = 3
SETTINGS = (f"train.rounds={ROUNDS}", "federation.num_sites=4", "strategy.overlap=2")


def play(small: Compose, run_dir: Path, faults: Faults, *overrides: str) -> Path:
    return run(small(*SETTINGS, *overrides, run_dir=run_dir), grid_type=grid_with(faults))


def assert_same_model(ours: Path, theirs: Path, rounds: int = ROUNDS) -> None:
    a, b = (read_checkpoint(checkpoint_path(folder, rounds)) for folder in (ours, theirs))
    for kind in ("parameters", "outer"):
        mine, yours = getattr(a, kind), getattr(b, kind)
        assert mine.keys() == yours.keys()
        assert all(torch.equal(value, yours[name]) for name, value in mine.items())


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Runs without a reply of site-1 in round 2, by settings; made once."""
    return {}


@pytest.mark.parametrize(
    ("what", "outer"),
    [(what, "nesterov") for what in sorted(CORRUPTIONS)]
    + [(what, "local_adamw") for what in ("nan", "huge norm", "another start")],
)
def test_a_bad_reply_is_refused_and_the_model_is_that_without_it(
    small: Compose, tmp_path: Path, tmp_path_factory, without, what: str, outer: str
) -> None:
    overrides = (f"strategy.outer={outer}",)
    if overrides not in without:
        lost = Faults().at("site-1", round=2).fail()
        without[overrides] = play(small, tmp_path_factory.mktemp("without") / "run", lost, *overrides)
    bad = play(small, tmp_path / "run", Faults().at("site-1", round=2).corrupt(what), *overrides)
    line = metrics(bad)[2]
    assert line["refused"] == {"site-1": CORRUPTIONS[what]}
    assert line["failures"].keys() == {"site-1"}
    assert line["committed"]
    assert [site["site"] for site in line["sites"]] == ["site-0", "site-2", "site-3"]
    assert_same_model(bad, without[overrides])


def test_the_second_of_two_answers_is_refused(small: Compose, tmp_path: Path) -> None:
    twice = play(small, tmp_path / "a", Faults().at("site-1", round=2).repeat())
    assert metrics(twice)[2]["refused"] == {"site-1": "duplicate"}
    assert_same_model(twice, play(small, tmp_path / "b", Faults()))


@pytest.mark.parametrize("what", ["another site", "another run", "another start", "metric nan"])
def test_a_bad_evaluation_is_refused_too(small: Compose, tmp_path: Path, what: str) -> None:
    faults = Faults().at("site-1", round=2, phase="evaluate").corrupt(what)
    done = play(small, tmp_path / "a", faults, "strategy.fraction_evaluate=1.0")
    line = metrics(done)[2]
    assert line["refused"] == {"site-1": CORRUPTIONS[what]}
    assert {site["site"] for site in line["sites"] if "val_loss" in site} == {"site-0", "site-2", "site-3"}


@pytest.mark.parametrize("seed", range(4))
def test_random_faults_equal_the_same_replies_missing(small: Compose, tmp_path: Path, seed: int) -> None:
    sites = [f"site-{index}" for index in range(4)]
    faults = random_faults(seed, sites, ROUNDS, number=5)
    faults.save(tmp_path / "faults.json")
    faulty = play(small, tmp_path / "a", Faults.load(tmp_path / "faults.json"), "strategy.max_discarded=9")
    lines = metrics(faulty)[1:]
    lost = [
        (site, line["round"])
        for line in lines
        for site in sites
        if not line["committed"] or site not in {entry["site"] for entry in line["sites"]}
    ]
    assert {(fault.site, fault.round) for fault in faults.faults} <= set(lost)
    assert_same_model(faulty, play(small, tmp_path / "b", Faults.lost(lost), "strategy.max_discarded=9"))
