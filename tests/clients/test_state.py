"""What a site keeps between rounds, and which of it it throws away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clients.state import SiteState, load_state, save_state
from fomoe_flwr.errors import CheckpointError
from fomoe_flwr.training import Moments


def state(round_: int) -> SiteState:
    moments = {"a.weight": Moments(torch.full((2, 3), float(round_)), torch.ones(2, 3), step=7, born=2)}
    return SiteState(round_, position=10 * round_, moments=moments)


def rounds(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("round_")) for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    save_state(tmp_path, state(3), checkpoint_every=1, keep=3)
    loaded = load_state(tmp_path, before_round=4)
    assert (loaded.round, loaded.position) == (3, 30)
    moment = loaded.moments["a.weight"]
    assert (moment.step, moment.born) == (7, 2)
    assert torch.equal(moment.exp_avg, torch.full((2, 3), 3.0))


def test_nothing_kept_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_state(tmp_path / "new", before_round=5) == SiteState()


def test_a_later_state_belongs_to_a_future_that_did_not_happen(tmp_path: Path) -> None:
    for round_ in (1, 2, 3):
        save_state(tmp_path, state(round_), checkpoint_every=1, keep=5)
    assert load_state(tmp_path, before_round=2).round == 1
    save_state(tmp_path, state(2), checkpoint_every=1, keep=5)
    assert rounds(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("every", "keep", "expected"), [(1, 3, [7, 8, 9]), (3, 2, [6, 9]), (4, 2, [4, 8, 9]), (0, 3, [9])]
)
def test_kept_are_the_last_and_those_the_server_can_come_back_to(
    tmp_path: Path, every: int, keep: int, expected: list[int]
) -> None:
    for round_ in range(1, 10):
        save_state(tmp_path, state(round_), every, keep)
    assert rounds(tmp_path) == expected


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    save_state(tmp_path, state(1), checkpoint_every=1, keep=3)
    (tmp_path / "round_00001.safetensors").write_bytes(b"\x10garbage")
    with pytest.raises(CheckpointError, match=r"round_00001.safetensors is damaged"):
        load_state(tmp_path, before_round=2)
