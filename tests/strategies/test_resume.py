"""A resumed run goes on as if nothing had happened: model, outer optimizer, sites' moments and place in the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clients.app import app as real_client_app
from fomoe_flwr.checkpoint import checkpoint_path, compose_run, list_checkpoints, read_checkpoint
from fomoe_flwr.compose import merge_overrides
from fomoe_flwr.errors import CheckpointError, ConfigError, FomoeError
from fomoe_flwr.report.load import load_run
from strategies.local_grid import LocalGrid
from tests.conftest import Compose
from tests.strategies.helpers import metrics, run, without_times

# The runs' directories have names of one length: the path travels to the sites and counts among their bytes.

SETTINGS = [
    (),
    ("strategy.placement=random", "strategy.routing=partitioned"),
    ("strategy.outer=local_adamw", "strategy.wire_dtype=fp32"),
    ("strategy=ddp", "train.local_steps=2"),
    ("strategy.fraction_train=0.5", "strategy.placement=random", "strategy.reshuffle_every=2"),
]


def assert_same_run(resumed: Path, uninterrupted: Path, rounds: int) -> None:
    assert without_times(metrics(resumed)) == without_times(metrics(uninterrupted))
    a, b = (json.loads((folder / "evaluation.json").read_text()) for folder in (resumed, uninterrupted))
    assert a | {"checkpoint": ""} == b | {"checkpoint": ""}
    ours, theirs = (read_checkpoint(checkpoint_path(folder, rounds)) for folder in (resumed, uninterrupted))
    for kind in ("parameters", "outer"):
        a, b = getattr(ours, kind), getattr(theirs, kind)
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    states = sorted(path.relative_to(uninterrupted) for path in uninterrupted.glob("sites/*/*.safetensors"))
    assert states == sorted(path.relative_to(resumed) for path in resumed.glob("sites/*/*.safetensors"))
    for state in states:
        a, b = load_file(resumed / state), load_file(uninterrupted / state)
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda overrides: " ".join(overrides) or "default")
def test_resumed_equals_uninterrupted_bit_for_bit(
    small: Compose, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    whole = run(small("train.rounds=5", *overrides, run_dir=tmp_path / "full"))
    half = run(small("train.rounds=2", *overrides, run_dir=tmp_path / "half"))
    resumed = run(compose_run([f"resume={half}", "train.rounds=5"]))
    assert resumed == half
    assert_same_run(resumed, whole, 5)


class Killed(Exception):
    """Stands for the death of the server."""


def grid_that_dies(round_: int) -> type[LocalGrid]:
    class DyingGrid(LocalGrid):
        """The server dies when some of the round's replies are in, and the sites have gone on."""

        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            if any(reply.metadata.group_id == str(round_) for reply in replies):
                self.close()
                raise Killed
            return replies

    return DyingGrid


def test_a_run_killed_in_the_middle_of_a_round_resumes_to_the_same_numbers(
    small: Compose, tmp_path: Path
) -> None:
    """Its sites have states of a round that the server knows nothing of."""
    whole = run(small("train.rounds=5", "strategy.placement=random", run_dir=tmp_path / "full"))
    composed = small("train.rounds=5", "strategy.placement=random", run_dir=tmp_path / "dies")
    with pytest.raises(Killed):
        run(composed, real_client_app, grid_that_dies(4))
    with (composed.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "half a li')
    assert_same_run(run(compose_run([f"resume={composed.run_dir}"])), whole, 5)


def test_checkpoints_may_be_rarer_than_rounds(small: Compose, tmp_path: Path) -> None:
    overrides = ("train.rounds=7", "checkpoint.every=3", "checkpoint.keep=2")
    whole = run(small(*overrides, run_dir=tmp_path / "full"))
    composed = small(*overrides, run_dir=tmp_path / "dies")
    with pytest.raises(Killed):
        run(composed, real_client_app, grid_that_dies(6))
    assert_same_run(run(compose_run([f"resume={composed.run_dir}"])), whole, 7)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    small: Compose, tmp_path: Path, caplog
) -> None:
    whole = run(small("train.rounds=4", run_dir=tmp_path / "full"))
    half = run(small("train.rounds=3", run_dir=tmp_path / "half"))
    damaged = checkpoint_path(half, 3) / "parameters.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    resumed = run(compose_run([f"resume={half}", "train.rounds=4"]))
    assert_same_run(resumed, whole, 4)
    assert "round_00003: parameters.safetensors is damaged" in caplog.text


def test_a_checkpoint_itself_may_be_named(small: Compose, tmp_path: Path) -> None:
    whole = run(small("train.rounds=4", run_dir=tmp_path / "full"))
    half = run(small("train.rounds=3", run_dir=tmp_path / "half"))
    assert_same_run(run(compose_run([f"resume={checkpoint_path(half, 2)}", "train.rounds=4"])), whole, 4)


def test_what_came_after_the_checkpoint_that_is_resumed_is_forgotten(small: Compose, tmp_path: Path) -> None:
    """Else a crash soon after would resume the abandoned future, as the newest there is."""
    half = run(small("train.rounds=3", run_dir=tmp_path / "half"))
    composed = compose_run([f"resume={checkpoint_path(half, 1)}", "train.rounds=3"])
    with pytest.raises(Killed):
        run(composed, real_client_app, grid_that_dies(2))
    assert [path.name for path in list_checkpoints(half)] == ["round_00001"]


def test_a_new_choice_of_a_group_replaces_what_was_saved_within_it() -> None:
    saved = ["federation=file", "federation.path=a.yaml", "train.rounds=3", "strategy.overlap=2"]
    merged = merge_overrides(saved, ["federation=uniform", "train.rounds=5"])
    assert merged == ["strategy.overlap=2", "federation=uniform", "train.rounds=5"]


def test_a_checkpoint_of_another_model_is_refused(small: Compose, tmp_path: Path) -> None:
    half = run(small("train.rounds=1", run_dir=tmp_path / "half"))
    with pytest.raises(CheckpointError, match=r"model.d_model=64, but the checkpoint was made with 32"):
        run(compose_run([f"resume={half}", "model.d_model=64"]))


def test_nothing_to_resume_from_is_one_clear_line(small: Compose, tmp_path: Path) -> None:
    with pytest.raises(FomoeError, match="no such directory"):
        compose_run([f"resume={tmp_path / 'nowhere'}"])
    half = run(small("train.rounds=1", run_dir=tmp_path / "half"))
    shutil.rmtree(half / "checkpoints")
    with pytest.raises(FomoeError, match="no checkpoint in"):
        compose_run([f"resume={half}"])


def test_keys_that_are_gone_do_not_keep_an_old_run_from_going_on(small: Compose, tmp_path: Path) -> None:
    """Neither those of its overrides nor those of its config.yaml, which the report reads."""
    run_dir = run(small("train.rounds=1", run_dir=tmp_path / "old"))
    file = run_dir / "config.yaml"
    text = file.read_text().replace("strategy:\n", "strategy:\n  moves: full\n  move_ratio: 50.0\n")
    text = text.replace("placement: fixed", "placement: planned").replace(
        "plan:\n", "plan:\n  policy: affine\n"
    )
    file.write_text(text)
    assert load_run(run_dir).config.strategy.placement == "affine"
    for given in ("strategy.moves=full", "+strategy.moves=full"):
        with pytest.raises(ConfigError, match=r"strategy\.moves: unknown key"):
            small(given)
