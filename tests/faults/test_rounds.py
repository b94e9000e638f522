"""Rounds that do not wait for ever, quorums, and sites that come and go."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from fomoe_flwr.errors import RunError
from fomoe_flwr.model.spec import expert_of
from fomoe_flwr.policies import POLICIES
from tests.conftest import Compose
from tests.faults.injector import Faults, grid_with
from tests.faults.test_replies import SETTINGS, assert_same_model, play, without
from tests.strategies.helpers import LeavingGrid, metrics, run


def test_the_deadline_leaves_behind_who_hangs_and_who_is_late(small: Compose, tmp_path: Path) -> None:
    faults = Faults().at("site-1", round=2).hang().at("site-2", round=2).delay(3.0)
    began = time.monotonic()
    done = play(small, tmp_path, faults, "strategy.timeout_s=2")
    assert time.monotonic() - began < 30
    lines = metrics(done)
    assert lines[2]["failures"].keys() == {"site-1", "site-2"}
    assert all("no reply within" in reason for reason in lines[2]["failures"].values())
    # The late one is still at round 2 when round 3 begins, so it may miss that one as well; the other is back.
    assert lines[3]["failures"].keys() <= {"site-2"}
    lost = [(site, line["round"]) for line in lines[1:] for site in line["failures"]]
    assert_same_model(done, without(small, tmp_path, lost))


@pytest.mark.parametrize(
    "overrides",
    [(), ("strategy.delay=1",), ("strategy.fragments=2", "train.rounds=5")],
    ids=["", "delay", "fragments"],
)
def test_work_that_was_lost_is_as_if_it_had_never_been_done(
    small: Compose, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """The site has moments and a place in its data that belong to the lost reply: they must not count."""
    lost = play(small, tmp_path, Faults().at("site-1", round=2).lose(), *overrides)
    assert_same_model(lost, without(small, tmp_path, [("site-1", 2)], overrides))


@pytest.mark.parametrize("overrides", [(), ("strategy.delay=1",)], ids=["", "delay"])
def test_a_round_below_the_quorum_is_discarded_whole(
    small: Compose, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    faults = Faults()
    for site in ("site-0", "site-1", "site-2"):
        faults.at(site, round=2).fail()
    done = play(small, tmp_path, faults, *overrides)
    lines = metrics(done)
    assert [line["committed"] for line in lines] == [True, True, False, True]
    assert lines[2]["tokens"] == lines[1]["tokens"]
    first, second = (read_checkpoint(checkpoint_path(done, round_)) for round_ in (1, 2))
    assert all(torch.equal(value, second.parameters[name]) for name, value in first.parameters.items())
    assert all(torch.equal(value, second.outer[name]) for name, value in first.outer.items())
    # The one that answered goes on as if it had not been asked.
    assert_same_model(done, without(small, tmp_path, [(f"site-{site}", 2) for site in range(4)], overrides))


def test_too_many_discarded_rounds_end_the_run(small: Compose, tmp_path: Path) -> None:
    faults = Faults.lost([(f"site-{site}", round_) for site in range(4) for round_ in (2, 3)])
    composed = small(*SETTINGS, "strategy.max_discarded=2", "train.rounds=9")
    with pytest.raises(
        RunError,
        match=r"round 3: nothing was committed in the last 2 rounds.*0 of 4 sites.*2 needed.*injected",
    ):
        run(composed, grid_type=grid_with(faults))
    assert len(metrics(composed.run_dir)) == 4  # nothing of what happened is lost


def test_an_expert_waits_for_enough_of_its_holders(small: Compose, tmp_path: Path) -> None:
    composed = small(*SETTINGS, "train.rounds=2", "strategy.expert_quorum=1.0")
    run(composed, grid_type=grid_with(Faults().at("site-1", round=2).fail()))
    placement = POLICIES[composed.config.strategy.placement](composed.config).intended(2).placement
    first, second = (
        read_checkpoint(checkpoint_path(composed.run_dir, round_)).parameters for round_ in (1, 2)
    )
    held_back = 0
    for name, value in second.items():
        expert = expert_of(name)
        held = expert is not None and 1 in placement.holders(*expert)
        assert torch.equal(value, first[name]) == held, name
        held_back += held and "up_proj" in name
    assert metrics(composed.run_dir)[2]["experts_held_back"] == held_back > 0


def test_the_deadline_follows_what_rounds_take(small: Compose, tmp_path: Path) -> None:
    done = play(
        small,
        tmp_path,
        Faults(),
        "train.rounds=4",
        "strategy.timeout_s=500",
        "strategy.timeout_floor_s=0.01",
    )
    deadlines = [line["deadline_s"] for line in metrics(done)[1:]]
    assert deadlines[:2] == [500, 500]
    assert all(0.01 < deadline < 100 for deadline in deadlines[2:])


def test_the_ledger_of_experts(small: Compose, tmp_path: Path) -> None:
    faults = Faults.lost([("site-0", 2), ("site-0", 3), ("site-1", 3)])
    done = play(small, tmp_path, faults, "strategy.overlap=1", "strategy.quorum=0.25")
    lines = metrics(done)
    assert [line["experts"]["rounds_since_update_max"] for line in lines[1:]] == [0, 1, 2]
    assert lines[3]["experts"]["num_orphaned"] == 0  # they are connected, they only fail
    assert lines[3]["experts"]["tokens_max"] > lines[3]["experts"]["tokens_min"] > 0


def test_orphans_are_adopted_where_placement_is_random_and_reported_where_it_is_fixed(
    small: Compose, tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO", logger="fomoe")
    for placement in ("fixed", "random"):
        caplog.clear()
        overrides = (*SETTINGS, "strategy.overlap=1", f"strategy.placement={placement}")
        composed = small(*overrides, run_dir=tmp_path / placement)
        lines = metrics(run(composed, grid_type=LeavingGrid))
        assert [len(line["sites"]) for line in lines] == [0, 4, 3, 3]
        assert lines[3]["failures"] == {}
        experts = lines[3]["experts"]
        assert experts["num_orphaned"] == 4  # two experts of each of two layers
        assert "no site with 4 experts is connected" in caplog.text
        adopted = placement == "random"
        assert (experts["rounds_since_update_max"] == 0) == adopted
        assert ("are given to other sites" in caplog.text) == adopted


def test_a_run_of_which_nothing_was_committed_is_no_success(small: Compose, tmp_path: Path) -> None:
    faults = Faults.lost([(f"site-{site}", 1) for site in range(4)])
    with pytest.raises(RunError, match="round 1: nothing was committed in the last 1 rounds"):
        play(small, tmp_path, faults, "train.rounds=1")
