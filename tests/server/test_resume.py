"""What a resumed run may ask for differently, and what it takes along."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fomoe_flwr.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from fomoe_flwr.compose import Composed, compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import CheckpointError, ConfigError
from fomoe_flwr.server.resume import check_inputs, check_resumable
from fomoe_flwr.server.rounds import Server
from fomoe_flwr.server.run import inputs_of_run, open_run, open_validation
from tests.conftest import SMALL_MODEL, SMALL_TRAIN
from tests.data.test_tokenizer import train_bpe
from tests.server.federation import config_of
from tests.strategies.helpers import run


def saved(config: RunConfig, folder: Path) -> Checkpoint:
    facts: dict[str, Any] = {"config": dataclasses.asdict(config)}
    save_checkpoint(folder, 1, {}, {}, facts, 1)
    return read_checkpoint(checkpoint_path(folder, 1))


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ("model.top_k=3", r"model\.top_k=3.*2"),
        ("model.router=grap", r"model\.router=grap.*linear"),
        ("strategy.outer=average", r"strategy\.outer=average.*nesterov"),
        ("strategy.inner=gradient", r"strategy\.inner=gradient.*adamw"),
        ("strategy.routing=partitioned", r"strategy\.routing=partitioned.*skip"),
        ("strategy.placement=random", r"strategy\.placement=random.*fixed"),
        ("federation.num_sites=2", "sites"),
        ("seed=7", "seed"),
    ],
)
def test_a_checkpoint_is_not_continued_with_what_it_cannot_be(tmp_path: Path, changed: str, key: str) -> None:
    """A key that is newer than the checkpoint had what is now its default; what may change is not asked for."""
    checkpoint = saved(config_of(), tmp_path)
    del checkpoint.manifest["config"]["model"]["router"]
    check_resumable(checkpoint, config_of("train.lr=0.5", "model.load_balance=0.5"))
    with pytest.raises(CheckpointError, match=key) as error:
        check_resumable(checkpoint, config_of(changed))
    assert "\n" not in str(error.value)


# -- the inputs of a resumed run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a tokenizer and a finished run on them. Not to be changed."""
    folder = tmp_path_factory.mktemp("inputs")
    for index in range(24):
        (folder / "text" / f"d{index % 2}").mkdir(parents=True, exist_ok=True)
        (folder / "text" / f"d{index % 2}" / f"{index}.txt").write_text(f"{index} of them " * 60)
    train_bpe(folder / "tokenizer.json")
    run(on_text(folder))
    return folder


@pytest.fixture
def again(two_rounds: Path, tmp_path: Path) -> Path:
    """A copy that may be changed. Its run names the paths of the copy."""
    shutil.copytree(two_rounds, tmp_path, dirs_exist_ok=True)
    return tmp_path


def on_text(folder: Path, *overrides: str, resume: Path | None = None) -> Composed:
    return compose(
        [
            *SMALL_MODEL,
            *SMALL_TRAIN,
            "model.vocab_size=300",
            "train.rounds=1",
            "federation.num_sites=null",
            "federation.sites=[{name:a,domain:d0},{name:b}]",
            "strategy.overlap=1",
            "data=text",
            f"data.path={folder / 'text'}",
            f"data.cache_dir={folder / 'cache'}",
            f"data.tokenizer={folder / 'tokenizer.json'}",
            "runtime=local",
            "wandb.mode=disabled",
            f"hydra.run.dir={folder / 'run'}",
            *([f"resume={resume}", "train.rounds=2"] if resume else []),
            *overrides,
        ]
    )


def resumed(two_rounds: Path, folder: Path, *overrides: str) -> RunConfig:
    """As far as the first round, from the run as it was made (it names paths in `two_rounds`)."""
    composed = on_text(two_rounds, f"hydra.run.dir={folder / 'run'}", *overrides, resume=folder / "run")
    with open_run(composed):
        return composed.config


def swap_corpus(folder: Path) -> None:
    file = folder / "text" / "d0" / "0.txt"
    file.write_text(file.read_text().replace("of", "to", 1))


def swap_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize(
    ("swap", "key"),
    [(swap_corpus, r"data: the text is"), (swap_tokenizer, r"data\.tokenizer: .*tokenizer is")],
)
def test_a_resume_knows_that_its_text_or_tokenizer_has_changed(
    again: Path, swap: Callable[[Path], None], key: str
) -> None:
    """Under the same name. Put back, all is well."""
    run_again = partial(on_text, again, resume=again / "run")
    manifest = read_checkpoint(checkpoint_path(again / "run", 1)).manifest
    saved_inputs = manifest["inputs"]
    assert all(saved_inputs.values())
    # The copy's paths are what it was made with: only the content decides.
    checkpoint = Checkpoint(again, manifest | {"config": dataclasses.asdict(run_again().config)}, {}, {})
    composed = run_again()
    corpus = open_validation(composed.config)
    assert not check_inputs(checkpoint, composed.config, inputs_of_run(composed.config, corpus))
    swap(again)
    corpus = open_validation(composed.config)
    with pytest.raises(CheckpointError, match=rf"resume=.*{key}.*before.*under the same name") as error:
        check_inputs(checkpoint, composed.config, inputs_of_run(composed.config, corpus))
    assert "\n" not in str(error.value)
    # Named anew it is taken as it is.
    asked = {"data.path"} if swap is swap_corpus else {"data.tokenizer"}
    assert check_inputs(checkpoint, composed.config, inputs_of_run(composed.config, corpus), asked)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.val_fraction=0.3", r"data\.val_fraction: .* 0\.3, before 0\.05"),
        ("train.seq_len=16", r"train\.seq_len: .* 16 tokens, before 32"),
        ("data.partition=domain", r"data\.partition: .*domain .*before iid"),
        ("data.tokenizer=bytes", r"data\.tokenizer: the tokenizer is"),
        ("data.max_documents=20", r"data: the text is"),
    ],
)
def test_what_a_resume_asks_for_is_taken_with_a_warning(
    again: Path, two_rounds: Path, caplog: pytest.LogCaptureFixture, override: str, key: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        resumed(two_rounds, again, override)
    told = [line for line in caplog.messages if "as was asked" in line]
    assert len(told) == 1
    assert re.search(key, told[0])


def test_a_manifest_of_another_make_is_one_line(again: Path, two_rounds: Path) -> None:
    composed = on_text(two_rounds, resume=again / "run")
    manifest = read_checkpoint(checkpoint_path(again / "run", 1)).manifest
    other = Checkpoint(again, manifest | {"config": {"seed": 1}, "inputs": {"city": "a"}}, {}, {})
    with pytest.raises(CheckpointError, match=r"checkpoint .*: config: model is missing"):
        check_resumable(other, composed.config)
    other.manifest["config"] = manifest["config"]
    with pytest.raises(CheckpointError, match=r"checkpoint .*: inputs 'city': 'a'"):
        check_inputs(other, composed.config, inputs_of_run(composed.config, None))


def test_a_checkpoint_that_does_not_know_its_inputs_says_so(
    again: Path, two_rounds: Path, caplog: pytest.LogCaptureFixture
) -> None:
    composed = on_text(two_rounds, resume=again / "run")
    manifest = read_checkpoint(checkpoint_path(again / "run", 1)).manifest
    del manifest["inputs"]
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        assert check_inputs(
            Checkpoint(again, manifest, {}, {}), composed.config, inputs_of_run(composed.config, None)
        )
    (line,) = caplog.messages
    assert "of an earlier version" in line


def test_a_learning_rate_that_goes_on_otherwise_is_named(
    again: Path, two_rounds: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run with a decay to its last step that is prolonged too; not where nothing changes."""
    for overrides, named in (
        ((), None),
        (("train.rounds=7",), None),
        (("train.lr=0.001",), "round 2 is 0.001, where the run before would have had 0.003"),
        (("train.schedule=cosine", "train.decay_until=4"), "round 2 is 0.0003, where"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fomoe"):
            resumed(two_rounds, again, "train.warmup_steps=0", *overrides)
        told = [line for line in caplog.messages if "learning rate of round" in line]
        assert len(told) == (named is not None)
        assert named is None or named in told[0]


def test_sites_are_matched_by_name(again: Path, two_rounds: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In another order each keeps its place, and so its text; a site of another name is nobody's successor."""
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        config = resumed(two_rounds, again, "federation.sites=[{name:b,speed:2},{name:a,domain:d0}]")
    assert [(site.name, site.speed) for site in config.federation.sites] == [("a", 1.0), ("b", 2.0)]
    assert not [line for line in caplog.messages if "as was asked" in line]
    with pytest.raises(CheckpointError, match=r"resume=.*sites.*only there: b; only here: c"):
        resumed(two_rounds, again, "federation.sites=[{name:a,domain:d0},{name:c}]")


def test_a_run_that_goes_on_elsewhere_has_the_checkpoint_it_speaks_of(again: Path, two_rounds: Path) -> None:
    """So it can be resumed there, also before its first round is over, or if none is left."""
    composed = on_text(two_rounds, f"hydra.run.dir={again / 'other'}", resume=again / "run")
    with open_run(composed) as opened:
        assert opened.checkpoint is not None
    there = read_checkpoint(checkpoint_path(again / "other", 1))
    assert there.manifest == opened.checkpoint.manifest
    assert list_checkpoints(again / "run") == [opened.checkpoint.path]


def test_a_site_that_is_given_other_text_of_its_own_may_have_it(
    again: Path, two_rounds: Path, caplog: pytest.LogCaptureFixture
) -> None:
    composed = on_text(two_rounds, f"hydra.run.dir={again / 'run'}", resume=again / "run")
    with open_run(composed) as opened:
        assert opened.checkpoint is not None
        sites = opened.checkpoint.manifest["config"]["federation"]["sites"]
        sites[1]["data_path"] = "/other"
        opened.checkpoint.manifest["memory"]["own_corpora"] = {"a": "1", "b": "2"}
        server = Server(composed.config, "run", "", again / "inbox", opened.plan)
        opened.load_into(server, composed.config)
    assert server.state.own_corpora == {"a": "1"}
    assert [line for line in caplog.messages if "data_path of b is another, as was asked" in line]


def test_a_run_does_not_go_on_within_what_its_sites_keep(again: Path, two_rounds: Path) -> None:
    composed = on_text(two_rounds, f"hydra.run.dir={again / 'run' / 'sites' / 'a'}", resume=again / "run")
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=.*lies in what the sites"), open_run(composed):
        pass


@pytest.mark.parametrize("change", [{"plan": ...}, {"placement": [[[99]], [[0]]]}, {"experts": {}}])
def test_a_memory_of_another_make_is_one_line(change: dict[str, Any], again: Path, two_rounds: Path) -> None:
    composed = on_text(two_rounds, f"hydra.run.dir={again / 'run'}", resume=again / "run")
    with open_run(composed) as opened:
        assert opened.checkpoint is not None
        memory = opened.checkpoint.manifest["memory"] | change
        opened.checkpoint.manifest["memory"] = {
            key: value for key, value in memory.items() if value is not ...
        }
        server = Server(composed.config, "run", "", again / "inbox", opened.plan)
        with pytest.raises(CheckpointError, match=r"checkpoint .*not that of a run of this version"):
            opened.load_into(server, composed.config)


def test_on_other_text_the_best_checkpoint_of_before_is_none(again: Path, two_rounds: Path) -> None:
    for override, kept in (("train.lr=0.001", True), ("data.val_fraction=0.3", False)):
        composed = on_text(two_rounds, f"hydra.run.dir={again / 'run'}", override, resume=again / "run")
        with open_run(composed) as opened:
            assert (opened.recorder._best is not None) == kept
            assert opened.inputs_changed != kept
