"""A resumed run goes on as if nothing had happened: model, outer optimizer, sites' moments and place in the data."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clients.app import app as real_client_app
from fomoe_flwr import checkpoint
from fomoe_flwr.checkpoint import (
    checkpoint_path,
    compose_run,
    list_checkpoints,
    read_checkpoint,
    resume_from,
)
from fomoe_flwr.errors import CheckpointError, ConfigError, FomoeError, RunError
from fomoe_flwr.overrides import merge_overrides, texts
from fomoe_flwr.plan.command import plan
from fomoe_flwr.report.load import load_run
from fomoe_flwr.server.run import RunRecorder
from strategies.local_grid import LocalGrid
from tests.conftest import Compose
from tests.strategies.helpers import composed_anew, copy_of, finished, metrics, new_dir, run, without_times

ROUNDS = "train.rounds=4"
SETTINGS = [
    (),
    (
        "strategy.placement=random",
        "strategy.routing=partitioned",
        "strategy.outer=local_adamw",
        "strategy.up=fp32",
        "strategy.down=fp32",
    ),
    ("strategy=ddp", "train.local_steps=2"),
    # What was not sent yet is kept at the sites, and goes with an expert that leaves.
    ("strategy.up=topk", "strategy.placement=random"),
    ("strategy.fraction_train=0.5", "strategy.placement=random", "strategy.reshuffle_every=3"),
    ("strategy.down=int4", "strategy.up=topk", "strategy.placement=random", "strategy.reshuffle_every=3"),
    ("strategy.delay=1",),
    ("strategy.delay=1", "strategy.down=int4", "strategy.up=topk"),
]


def assert_same_run(resumed: Path, uninterrupted: Path, rounds: int) -> None:
    assert without_times(metrics(resumed)) == without_times(metrics(uninterrupted))
    a, b = (json.loads((folder / "evaluation.json").read_text()) for folder in (resumed, uninterrupted))
    assert a | {"checkpoint": ""} == b | {"checkpoint": ""}
    ours, theirs = (read_checkpoint(checkpoint_path(folder, rounds)) for folder in (resumed, uninterrupted))
    for kind in ("parameters", "outer", "public"):
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
    whole = finished(small, tmp_path, ROUNDS, *overrides)
    half = run(composed_anew(small, tmp_path, "train.rounds=2", *overrides))
    resumed = run(compose_run([f"resume={half}", ROUNDS]))
    assert resumed == half
    assert_same_run(resumed, whole, 4)


TURNS = [
    ("strategy.fragments=2",),
    ("strategy.fragments=2", "strategy.delay=1"),
    # Experts move after round 3.
    (
        "strategy.fragments=2",
        "strategy.down=int4",
        "strategy.up=topk",
        "strategy.placement=random",
        "strategy.reshuffle_every=3",
    ),
    (
        "strategy.fragments=2",
        "strategy.sole_every=2",
        "strategy.delay=1",
        "strategy.down=int8",
        "strategy.up=int4",
        "strategy.overlap=1",
    ),
]


@pytest.mark.parametrize("overrides", TURNS, ids=" ".join)
def test_with_parts_in_turn_a_run_that_was_killed_goes_on_bit_for_bit(
    small: Compose, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """One that has ended and is prolonged does not: in what was its last round everything was due."""
    keys = ("train.rounds=5", "checkpoint.every=2", *overrides)
    whole = run(composed_anew(small, tmp_path, *keys))
    composed = composed_anew(small, tmp_path, *keys)
    with pytest.raises(Killed):
        run(composed, real_client_app, grid_that_dies(4))
    assert_same_run(run(compose_run([f"resume={composed.run_dir}"])), whole, 5)


def test_a_site_that_has_lost_its_disk_says_so_once_and_is_sent_everything_again(
    small: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a round that is discarded for it, too: with both sites needed."""
    keys = ("strategy.down=int8", "federation.num_sites=2", "strategy.overlap=1", "strategy.quorum=1.0")
    half = run(composed_anew(small, tmp_path, "train.rounds=2", *keys))
    shutil.rmtree(half / "sites/site-1")
    lines = metrics(run(compose_run([f"resume={half}", ROUNDS])))
    assert list(lines[3]["failures"]) == ["site-1"]
    assert (
        "cannot go on from what it was sent in round 2, which is lost here" in lines[3]["failures"]["site-1"]
    )
    assert [line["committed"] for line in lines[1:]] == [True, True, False, True]
    sent = [{site["site"]: site["bytes_down"] for site in line["sites"]} for line in lines]
    assert sent[4]["site-1"] > sent[4]["site-0"] * 1.5
    assert sent[4]["site-1"] == pytest.approx(sent[1]["site-1"], rel=0.01)
    assert sent[4]["site-0"] == pytest.approx(sent[2]["site-0"], rel=0.01)


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


def test_killed_in_the_middle_of_a_round_it_resumes_from_a_checkpoint_that_is_some_rounds_old(
    small: Compose, tmp_path: Path
) -> None:
    """Its sites have states of rounds that the server knows nothing of, and its last line is half written."""
    overrides = ("train.rounds=5", "checkpoint.every=3", "checkpoint.keep=2", "strategy.placement=random")
    whole = run(composed_anew(small, tmp_path, *overrides))
    composed = composed_anew(small, tmp_path, *overrides)
    with pytest.raises(Killed):
        run(composed, real_client_app, grid_that_dies(5))
    with (composed.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "half a li')
    assert_same_run(run(compose_run([f"resume={composed.run_dir}"])), whole, 5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    small: Compose, tmp_path: Path, caplog
) -> None:
    whole = finished(small, tmp_path, ROUNDS)
    copy = copy_of(whole)
    damaged = checkpoint_path(copy, 4) / "parameters.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert_same_run(run(compose_run([f"resume={copy}"])), whole, 4)
    assert "round_00004: parameters.safetensors is damaged" in caplog.text


def test_a_checkpoint_itself_may_be_named_and_what_came_after_it_is_forgotten(
    small: Compose, tmp_path: Path
) -> None:
    """Not before the first round that takes its place is on the disk: until then nothing of the run is lost."""
    whole = finished(small, tmp_path, ROUNDS)
    copy = copy_of(whole)
    before, lines = list_checkpoints(copy), (copy / "metrics.jsonl").read_text()
    with pytest.raises(Killed):
        run(compose_run([f"resume={checkpoint_path(copy, 2)}"]), real_client_app, grid_that_dies(3))
    assert list_checkpoints(copy) == before
    assert (copy / "metrics.jsonl").read_text() == lines
    with pytest.raises(Killed):
        run(compose_run([f"resume={checkpoint_path(copy, 2)}"]), real_client_app, grid_that_dies(4))
    assert [path.name for path in list_checkpoints(copy)] == ["round_00002", "round_00003"]
    assert_same_run(run(compose_run([f"resume={copy}"])), whole, 4)


def test_fewer_rounds_than_are_done_are_refused(small: Compose, tmp_path: Path) -> None:
    whole = finished(small, tmp_path, ROUNDS)
    with pytest.raises(CheckpointError, match=r"train\.rounds=3, but 4 are done"):
        run(compose_run([f"resume={whole}", "train.rounds=3"]))


def test_a_run_that_goes_on_elsewhere_is_whole_there(small: Compose, tmp_path: Path) -> None:
    whole = finished(small, tmp_path, ROUNDS)
    before = sorted(path.name for path in list_checkpoints(whole))
    other = new_dir(tmp_path)
    run(compose_run([f"resume={checkpoint_path(whole, 2)}", f"hydra.run.dir={other}"]))
    assert_same_run(other, whole, 4)
    assert len(load_run(other).rounds) == 5
    assert (other / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert (other / "placements.jsonl").read_bytes().startswith((whole / "placements.jsonl").read_bytes())
    assert sorted(path.name for path in list_checkpoints(whole)) == before
    # Another run is not written over.
    with pytest.raises(ConfigError, match="holds a run already; go on with it by resume="):
        run(compose_run([f"resume={whole}", f"hydra.run.dir={other}"]))


def test_a_plan_refuses_what_the_run_would(small: Compose, tmp_path: Path) -> None:
    whole = finished(small, tmp_path, ROUNDS)
    with pytest.raises(CheckpointError, match=r"model.d_model=64, but the checkpoint was made with 32"):
        plan([f"resume={whole}", "model.d_model=64"])


def test_a_new_choice_of_a_group_replaces_what_was_saved_within_it() -> None:
    saved = ["federation=file", "federation.path=a.yaml", "train.rounds=3", "strategy.overlap=2"]
    merged = merge_overrides(saved, ["federation=uniform", "train.rounds=5"])
    assert texts(merged) == ["strategy.overlap=2", "federation=uniform", "train.rounds=5"]


def test_a_checkpoint_of_another_model_is_refused(small: Compose, tmp_path: Path) -> None:
    whole = finished(small, tmp_path, ROUNDS)
    with pytest.raises(CheckpointError, match=r"model.d_model=64, but the checkpoint was made with 32"):
        run(compose_run([f"resume={whole}", "model.d_model=64"]))


def test_nothing_to_resume_from_is_one_clear_line(small: Compose, tmp_path: Path) -> None:
    with pytest.raises(FomoeError, match="no such directory"):
        compose_run([f"resume={tmp_path / 'nowhere'}"])
    copy = copy_of(finished(small, tmp_path, ROUNDS))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(FomoeError, match="no checkpoint in"):
        compose_run([f"resume={copy}"])


def test_keys_that_are_gone_do_not_keep_an_old_run_from_going_on(small: Compose, tmp_path: Path) -> None:
    """Neither those of its overrides nor those of its config.yaml, which the report reads."""
    run_dir = copy_of(finished(small, tmp_path, ROUNDS))
    file = run_dir / "config.yaml"
    text = file.read_text().replace("strategy:\n", "strategy:\n  moves: full\n  move_ratio: 50.0\n")
    text = text.replace("placement: fixed", "placement: planned").replace(
        "plan:\n", "plan:\n  policy: affine\n"
    )
    file.write_text(text)
    assert load_run(run_dir).config.strategy.placement == "affine"
    file.write_text("plan: null\nstrategy: [1]\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_run(run_dir)
    for given in ("strategy.moves=full", "+strategy.moves=full"):
        with pytest.raises(ConfigError, match=r"strategy\.moves: unknown key, removed"):
            small(given)
    with pytest.raises(ConfigError, match=r"plan\.policy: unknown key, removed .*use strategy\.placement"):
        small("plan.policy=memory")


@pytest.mark.parametrize("spelled", ["strategy.placement=planned", "++strategy.placement='planned'"])
def test_the_kind_of_plan_of_an_earlier_version_is_kept(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    """What counts is the configuration that the run had, however its overrides spelled it."""
    where, whole = resume_from(str(finished(small, tmp_path, ROUNDS)))
    config = whole.manifest["config"]
    config["strategy"]["placement"], config["plan"]["policy"] = "planned", "memory"
    overrides = [*whole.manifest["overrides"], spelled, "++plan.policy=memory"]
    whole.manifest["overrides"] = overrides
    monkeypatch.setattr(checkpoint, "resume_from", lambda *_, **__: (where, whole))
    assert compose_run(["resume=RUN"]).config.strategy.placement == "memory"
    assert compose_run(["resume=RUN", "strategy.placement=equal"]).config.strategy.placement == "equal"


def test_the_dtype_that_an_earlier_version_had_for_both_ways_is_kept(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, whole = resume_from(str(finished(small, tmp_path, ROUNDS)))
    strategy = whole.manifest["config"]["strategy"]
    del strategy["up"], strategy["down"]
    strategy["wire_dtype"] = "fp32"
    kept = [item for item in whole.manifest["overrides"] if ".up=" not in item and ".down=" not in item]
    whole.manifest["overrides"] = [*kept, "strategy.wire_dtype=fp32"]
    monkeypatch.setattr(checkpoint, "resume_from", lambda *_, **__: (where, whole))
    settings = compose_run(["resume=RUN"]).config.strategy
    assert (settings.up, settings.down) == ("fp32", "fp32")
    assert compose_run(["resume=RUN", "strategy.up=int4"]).config.strategy.up == "int4"


def test_a_resume_that_is_refused_deletes_nothing(small: Compose, tmp_path: Path) -> None:
    copy = copy_of(finished(small, tmp_path, ROUNDS))
    (copy / "placements.jsonl").unlink()
    (copy / "placements.jsonl").mkdir()
    before = sorted((copy / "checkpoints").iterdir())
    with pytest.raises(RunError, match=r"placements\.jsonl: cannot be read"):
        run(compose_run([f"resume={before[0]}"]))
    assert sorted((copy / "checkpoints").iterdir()) == before


@pytest.mark.parametrize("ruined", [math.nan, 12.0])
def test_a_ruined_model_is_not_saved_and_the_best_is_kept(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ruined: float
) -> None:
    losses = {0: 5.0, 1: 4.0, 2: 3.0, 3: 3.5, 4: ruined, 5: 3.2}
    monkeypatch.setattr(RunRecorder, "_evaluate", lambda self, current, state: losses[current.number])
    overrides = ("train.rounds=5", "checkpoint.keep=1", "train.final_eval_batches=0")
    composed = small(*overrides, run_dir=tmp_path / "ruined")
    with pytest.raises(RunError, match=r"round 4: .*not saved"):
        run(composed)
    assert metrics(composed.run_dir)[-1]["round"] == 4
    kept = [path.name for path in list_checkpoints(composed.run_dir)]
    assert kept == ["round_00002", "round_00003"]
    losses[4] = 3.4
    run(compose_run([f"resume={composed.run_dir}"]))
    assert [path.name for path in list_checkpoints(composed.run_dir)] == ["round_00002", "round_00005"]
    assert metrics(composed.run_dir)[-1]["best"] == {"round": 2, "val_loss": 3.0}


def test_what_sites_say_of_their_loss_does_not_end_a_run(
    small: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has no text of its own here."""
    monkeypatch.setattr(RunRecorder, "_evaluate", lambda *_: 9999.0)
    composed = small("train.rounds=1", "train.eval_batches=0", run_dir=tmp_path / "claimed")
    assert metrics(run(composed))[-1]["val_loss"] == 9999.0
    assert [path.name for path in list_checkpoints(composed.run_dir)] == ["round_00001"]
