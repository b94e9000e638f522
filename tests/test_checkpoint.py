"""Checkpoints: what was saved comes back, a crash leaves the one before, and all damage is named."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fomoe_flwr import checkpoint
from fomoe_flwr.checkpoint import (
    Checkpoint,
    checkpoint_path,
    compose_run,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_manifest,
    resume_from,
    resumed_overrides,
    save_checkpoint,
)
from fomoe_flwr.errors import CheckpointError, ConfigError
from fomoe_flwr.overrides import quoted, texts

FACTS = {"tokens": 1234, "overrides": ["model=tiny"], "rng": [1, 2.5, None], "run": "é"}


def parameters_of(round_: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(round_)
    return {
        "model.norm.weight": torch.randn(7, generator=generator),
        "a/b": torch.randn(2, 3, generator=generator),
    }


def outer_of(round_: int) -> dict[str, Tensor]:
    return {"momentum_buffer/a/b": torch.full((2, 3), float(round_)), "step/a/b": torch.tensor(float(round_))}


def save(run_dir: Path, round_: int, keep: int = 10) -> Path:
    return save_checkpoint(run_dir, round_, parameters_of(round_), outer_of(round_), FACTS, keep)


def assert_is_round(loaded: Checkpoint, round_: int) -> None:
    assert loaded.round == round_
    for tensors, wanted in ((loaded.parameters, parameters_of(round_)), (loaded.outer, outer_of(round_))):
        assert tensors.keys() == wanted.keys()
        assert all(tensors[name].equal(wanted[name]) for name in wanted)


# -- round trip ----------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    loaded = read_checkpoint(path)
    assert path == loaded.path == tmp_path / "checkpoints" / "round_00003"
    assert_is_round(loaded, 3)
    assert {key: loaded.manifest[key] for key in FACTS} == FACTS
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "outer.safetensors",
        "parameters.safetensors",
    ]


def test_an_outer_optimizer_without_state_is_saved_too(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, parameters_of(1), {}, FACTS, keep=1)
    assert read_checkpoint(path).outer == {}


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    views = {"row": base[1], "transposed": base.T, "rest": base[2]}
    loaded = read_checkpoint(save_checkpoint(tmp_path, 1, views, {}, {}, keep=1)).parameters
    assert all(loaded[name].equal(value) for name, value in views.items())


def test_the_manifest_can_be_read_without_the_tensors(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (path / "parameters.safetensors").unlink()
    assert read_manifest(path)["tokens"] == 1234


def test_a_round_passed_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save_checkpoint(tmp_path, 1, parameters_of(9), {}, FACTS, keep=3)
    assert read_checkpoint(path).parameters["a/b"].equal(parameters_of(9)["a/b"])
    assert list_checkpoints(tmp_path) == [path]


def test_a_folder_with_the_name_of_another_round_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(checkpoint_path(tmp_path, 9))
    with pytest.raises(CheckpointError, match=r"round_00009: is of round 2"):
        read_checkpoint(checkpoint_path(tmp_path, 9))
    assert find_checkpoint(str(tmp_path), "")[1].round == 1


@pytest.mark.parametrize(
    "facts",
    [
        {"memory": {"norms": [1]}},
        {"memory": {"usual": {"a/b": "x"}}},
        {"memory": {"counted": {"a": -1}}},
        {"metrics": {"best": 7}},
    ],
)
def test_what_a_manifest_remembers_has_its_types(tmp_path: Path, facts: dict[str, Any]) -> None:
    path = save_checkpoint(tmp_path, 1, {}, {}, facts, keep=1)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged \((memory|metrics)\."):
        read_checkpoint(path)


# -- how many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [(1, [12]), (2, [9, 12]), (5, [1, 2, 9, 12])])
def test_the_newest_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    for round_ in (1, 2, 9, 12):
        save(tmp_path, round_, keep)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, round_) for round_ in left]


def test_later_checkpoints_go_when_an_earlier_round_is_saved_again_and_the_best_stays(tmp_path: Path) -> None:
    for round_ in (1, 2, 3, 4):
        save(tmp_path, round_)
    save(tmp_path, 3)
    assert [path.name for path in list_checkpoints(tmp_path)][-1] == "round_00003"
    for round_ in (4, 5, 6):
        save_checkpoint(tmp_path, round_, parameters_of(round_), {}, FACTS, keep=1, best=4)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_00004", "round_00006"]


def test_a_checkpoint_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    """It is rotated out like any, and what it points to is its owner's."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for round_ in (1, 3):
        save(tmp_path, round_).rename(moved / str(round_))
        checkpoint_path(tmp_path, round_).symlink_to(moved / str(round_))
    for round_ in (2, 3, 4):
        save(tmp_path, round_, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_00003", "round_00004"]
    assert sorted(path.name for path in moved.iterdir()) == ["1", "3"]


def test_rounds_sort_as_numbers(tmp_path: Path) -> None:
    for round_ in (99_999, 100_000):
        save(tmp_path, round_)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_99999", "round_100000"]


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".partial-round_00004", "round_00004.bak", "notes"):
        (folder / name).mkdir(parents=True)
    (folder / "round_00007").write_text("a file")
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "nowhere") == []


# -- crashes -------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process dies here."""


def crash(*_args: Any, **_kwargs: Any) -> None:
    raise Crash


@pytest.mark.parametrize("step", ["write_tensors", "_manifest_digest", "flush", "rename"])
def test_a_crash_before_the_end_leaves_the_checkpoint_before(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, step) if step == "rename" else (checkpoint, step)), crash)
        with pytest.raises(Crash):
            save(tmp_path, 2, keep=1)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 1)]  # what is half written does not count
    assert_is_round(resume_from(str(tmp_path))[1], 1)

    save(tmp_path, 2, keep=1)  # and is no obstacle
    assert_is_round(resume_from(str(tmp_path))[1], 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round_00002"]


def test_what_is_renamed_has_been_flushed_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename alone may reach the disk before the contents do."""
    flushed: list[str] = []
    monkeypatch.setattr(checkpoint, "flush", lambda path: flushed.append(path.name))
    save(tmp_path, 1)
    assert flushed == [
        "parameters.safetensors",
        "outer.safetensors",
        "manifest.json",
        ".partial-round_00001",
        "checkpoints",  # after the rename
    ]


# -- damage --------------------------------------------------------------------------------------------------


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=1))

    return apply


def signed(**changes: Any) -> Callable[[Path], None]:
    """Changed by a program that renews the digest."""

    def apply(file: Path) -> None:
        manifest = json.loads(file.read_text()) | changes
        manifest["sha256"]["manifest.json"] = checkpoint._manifest_digest(manifest)
        file.write_text(json.dumps(manifest))

    return apply


def write(content: bytes) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_bytes(content)

    return apply


DAMAGE = [
    pytest.param(name, damage, f"{name} is {said}", id=f"{name} {damage.__name__}")
    for name in ("parameters.safetensors", "outer.safetensors")
    for damage, said in ((remove, "missing"), (truncate, "damaged"), (flip, "damaged"), (empty, "damaged"))
] + [
    pytest.param("manifest.json", damage, said, id=f"manifest.json {identity}")
    for identity, damage, said in [
        ("removed", remove, "manifest.json is missing"),
        ("truncated", truncate, "manifest.json is damaged"),
        ("empty", empty, "manifest.json is damaged"),
        ("not UTF-8", write(b"\xff\xfe\xfd"), "manifest.json is damaged"),
        ("not a table", write(b"[1, 2]"), "manifest.json is damaged"),
        ("nested without end", write(b"[" * 100_000), "manifest.json is damaged"),
        ("another number", edit(tokens=1235), "manifest.json is damaged"),
        ("another round", edit(round=7), "manifest.json is damaged"),
        ("without digests", edit(sha256={}), "manifest.json is damaged"),
        ("with a list of digests", edit(sha256=[]), "manifest.json is damaged"),
        ("of another format", edit(format=99), "format 99, this version reads 2"),
        ("of wrong types", signed(overrides=5), "overrides is 5, must be a list"),
        ("with inputs of wrong types", signed(inputs={"corpus": 5}), "inputs.corpus is 5, must be a string"),
        ("of a round that is none", signed(round=-1), "round is -1, must be a whole number from 0"),
    ]
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    name: str, damage: Callable[[Path], None], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path / name)

    # Named directly: nothing else will do.
    with pytest.raises(CheckpointError, match=said) as error:
        resume_from(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)

    # A run directory: the one before, and the log says so.
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        run_dir, loaded = resume_from(str(tmp_path))
    assert run_dir == tmp_path
    assert_is_round(loaded, 1)
    (record,) = caplog.records
    assert said in record.getMessage()
    assert "trying the one before it" in record.getMessage()


@pytest.mark.parametrize("name", ["manifest.json", "parameters.safetensors", "outer.safetensors"])
@pytest.mark.parametrize(
    "problem", [PermissionError(13, "Permission denied"), IsADirectoryError(21, "Is a directory")]
)
def test_a_file_that_may_not_be_read_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    problem: OSError,
) -> None:
    save(tmp_path, 1)
    closed, opened = save(tmp_path, 2) / name, Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == closed:
            raise problem
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert_is_round(resume_from(str(tmp_path))[1], 1)
    (record,) = caplog.records
    assert name in record.getMessage()
    assert problem.strerror in record.getMessage()


@pytest.mark.parametrize("where", ["x" * 300, "{run}/" + "x" * 300])
def test_a_path_that_cannot_be_looked_at_is_one_line(tmp_path: Path, where: str) -> None:
    with pytest.raises(CheckpointError, match="File name too long") as error:
        resume_from(where.format(run=tmp_path))
    assert len(str(error.value)) < 500


def test_a_run_that_ended_before_its_first_checkpoint_can_be_begun_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* begun again, also in the same directory, without"
    ):
        resume_from(str(tmp_path))


def something_else(file: Path, _: Any, seen: Callable[[bytes], object]) -> None:
    file.write_bytes(b"something else")
    seen(b"something else")


def test_a_file_that_its_digest_calls_whole_but_holds_no_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", something_else)
        path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"parameters\.safetensors holds no tensors"):
        read_checkpoint(path)


def test_every_flipped_byte_of_a_checkpoint_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.") + " is damaged"):
                read_checkpoint(path)
        file.write_bytes(whole)
    assert_is_round(read_checkpoint(path), 2)


# -- resume --------------------------------------------------------------------------------------------------


def test_a_run_directory_resumes_from_its_newest(tmp_path: Path) -> None:
    for round_ in (1, 2, 10):
        save(tmp_path, round_)
    run_dir, loaded = resume_from(str(tmp_path))
    assert run_dir == tmp_path
    assert_is_round(loaded, 10)


def test_a_checkpoint_named_directly_is_used_though_there_are_newer_ones(tmp_path: Path) -> None:
    for round_ in (1, 2):
        save(tmp_path, round_)
    run_dir, loaded = resume_from(str(checkpoint_path(tmp_path, 1)))
    assert run_dir == tmp_path
    assert_is_round(loaded, 1)


def test_the_folder_of_the_checkpoints_may_be_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    run_dir, loaded = resume_from(str(tmp_path / "checkpoints"))
    assert run_dir == tmp_path
    assert_is_round(loaded, 1)
    save(tmp_path / "checkpoints", 2)  # a run directory of that name
    assert_is_round(resume_from(str(tmp_path / "checkpoints"))[1], 2)


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", 1)
    monkeypatch.chdir(tmp_path)
    run_dir, _ = resume_from("run")
    assert run_dir == tmp_path / "run"


def test_a_run_that_was_moved_resumes_where_it_is(tmp_path: Path) -> None:
    save(tmp_path / "before", 1)
    shutil.move(tmp_path / "before", tmp_path / "after")
    run_dir, loaded = resume_from(str(tmp_path / "after"))
    assert run_dir == tmp_path / "after"
    assert_is_round(loaded, 1)


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        resume_from(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give a run directory"):
        resume_from(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        resume_from(str(tmp_path))
    for round_ in (1, 2):
        flip(save(tmp_path, round_) / "outer.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole; newest: .*round_00002.*outer\.safetensors"
    ):
        resume_from(str(tmp_path))


@pytest.mark.parametrize(
    "evil",
    [
        "hydra.launcher._target_=os.system", "hydra/sweeper=other", "+x.y=1", "data.path=${oc.env:HOME}",
        "seed=1,2", "model=../x", "~seed", "[[[", 7, "data._target_=x",
    ],
)  # fmt: skip
def test_an_override_of_a_checkpoint_is_a_plain_value_or_refused(evil: Any, tmp_path: Path) -> None:
    """The checkpoint may be somebody else's, and Hydra runs code for some keys."""
    facts = FACTS | {"overrides": ["model=tiny", evil], "config": {}}
    path = save_checkpoint(tmp_path, 1, parameters_of(1), {}, facts, keep=1)
    with patch("fomoe_flwr.compose.hydra_compose") as hydra, pytest.raises(CheckpointError) as error:
        compose_run([f"resume={tmp_path}"])
    assert not hydra.called
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"checkpoint {path}: its override ")
    assert str(evil) in line


def test_what_the_user_gives_takes_the_place_of_what_is_refused(tmp_path: Path) -> None:
    facts = FACTS | {"overrides": ["model=tiny", "++seed=1"], "config": {}}
    save_checkpoint(tmp_path, 1, parameters_of(1), {}, facts, keep=1)
    found = texts(resumed_overrides([f"resume={tmp_path}", "seed=2"]))
    assert found == ["model=tiny", f"resume={tmp_path}", "seed=2", f'hydra.run.dir="{tmp_path}"']


def test_what_a_preset_of_another_version_gave_a_run_stays(tmp_path: Path) -> None:
    """Not what the command asks for, and nothing that the presets of this version give as well."""
    strategy = {"placement": "random", "overlap": 2, "clip": 7.0, "gone": 1, "outer_lr": {"a": 1}}
    config = {
        "strategy": strategy,
        "train": {"lr": 0.01, "rounds": 5},
        "model": {"d_model": 64, "path": "/x"},
    }
    save_checkpoint(tmp_path, 1, {}, {}, FACTS | {"overrides": ["train.rounds=5"], "config": config}, keep=1)
    resume = f"resume={tmp_path}"
    kept = ["model.d_model=64", 'strategy.placement="random"', "strategy.clip=7.0", "train.lr=0.01"]
    assert texts(resumed_overrides([resume]))[:-2] == [*kept, "train.rounds=5"]
    assert texts(resumed_overrides([resume, "train.lr=1"]))[:-3] == [*kept[:-1], "train.rounds=5"]
    # A preset that is asked for counts as a whole.
    assert texts(resumed_overrides([resume, "strategy=fomoe"]))[:-3] == [kept[0], kept[-1], "train.rounds=5"]


@pytest.mark.parametrize("saved", [{}, {"standins": 0}], ids=["of before they were there", "without"])
def test_a_run_without_stand_ins_goes_on_without(tmp_path: Path, saved: dict[str, Any]) -> None:
    """model=hf has some; what else it says of the model follows from model.hf."""
    model = {"hf": {"model_type": "olmoe"}, "d_model": 64} | saved
    facts = FACTS | {"overrides": ["model=hf", "model.path=/x"], "config": {"model": model}}
    save_checkpoint(tmp_path, 1, {}, {}, facts, keep=1)
    found = texts(resumed_overrides([f"resume={tmp_path}"]))
    assert [text for text in found if not text.startswith(("hydra.", "resume", "++model.hf"))] == [
        "model.standins=0", "model=hf", "model.path=/x",
    ]  # fmt: skip


def test_a_run_in_a_directory_of_any_name_is_resumed_there(tmp_path: Path) -> None:
    run_dir = tmp_path / "a=b, (c)#~ü '$' \"q\""
    save_checkpoint(run_dir, 1, parameters_of(1), {}, FACTS | {"config": {}}, keep=1)
    composed = compose_run([f"resume={quoted(str(run_dir))}"])
    assert (composed.config.resume, composed.run_dir) == (str(run_dir), run_dir)
    with pytest.raises(ConfigError, match=r"^resume=.*: Hydra cannot read the value; .*quote"):
        compose_run([f"resume={run_dir}"])
    # Two of one key: the last, as everywhere.
    assert compose_run(["resume=/nowhere", f"resume={quoted(str(run_dir))}"]).run_dir == run_dir
