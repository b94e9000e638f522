"""A run around its rounds: what is checked before the first one, and the line of metrics of each."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
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
from fomoe_flwr.messages import Reply
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.policies import POLICIES
from fomoe_flwr.server.rounds import Round, Server
from fomoe_flwr.server.run import (
    alone_in,
    check_inputs,
    check_resumable,
    check_unused,
    inputs_of_run,
    metrics_line,
    open_run,
    open_validation,
    warn_of_memory,
)
from tests.conftest import SMALL_MODEL, SMALL_TRAIN, Compose
from tests.data.test_tokenizer import train_bpe
from tests.model.stock_models import stock
from tests.server.federation import config_of
from tests.strategies.helpers import run


def round_of(config: RunConfig, *replies: Reply) -> Round:
    names = [site.name for site in config.federation.sites]
    current = Round(3, *POLICIES["fixed"](config).intended(3), names)
    current.replies = {names.index(reply.site): reply for reply in replies}
    return current


def test_means_are_weighted_by_tokens_and_every_metric_is_there() -> None:
    """A metric that nobody here knows too; the figures that the server counted are its own."""
    config = config_of()
    current = round_of(
        config,
        Reply("run", 3, "site-2", 300, {"train_loss": 2.0, "seconds": 3.0, "a_new_figure": 7}),
        Reply("run", 3, "site-0", 100, {"train_loss": 4.0, "tokens": 1e9, "site": 5.0, "bytes_up": 1.0}),
    )
    current.evaluations[2] = Reply("run", 3, "site-2", 10, {"val_loss": 9.0})
    current.down.count(2, [{"dense": 10, "expert": 20, "other": 3}], 7)
    current.up.count(2, [{"dense": 1, "expert": 2, "other": 3}], 4)
    current.fail(1, "lost")
    line = json.loads(json.dumps(metrics_line(current, 1000, 1.5, 3.0, {"round": 5.0})))
    assert (line["round"], line["tokens"], line["val_loss"]) == (3, 1000, 1.5)
    assert line["train_loss"] == (300 * 2 + 100 * 4) / 400
    assert line["val_bpb"] == pytest.approx(1.5 / math.log(2) / 3)
    assert (line["bytes_down"], line["bytes_up"]) == (40, 10)
    assert line["bytes_by_class"] == {"dense": 11, "expert": 22, "other": 17}
    assert line["failures"] == {"site-1": "lost"}
    first, second = line["sites"]
    assert (first["site"], first["tokens"], first["bytes_up"], first["tokens_per_second"]) == (
        "site-0",
        100,
        0,
        0,
    )
    assert second == {
        "site": "site-2", "tokens": 300, "bytes_down": 40, "bytes_up": 10, "tokens_per_second": 100.0,
        "train_loss": 2.0, "seconds": 3.0, "a_new_figure": 7, "val_loss": 9.0,
    }  # fmt: skip


def test_a_round_of_which_nothing_is_known_has_no_means() -> None:
    line = metrics_line(round_of(config_of("federation.num_sites=2")), 0, None, None, {})
    assert line["train_loss"] is line["val_loss"] is line["val_bpb"] is None
    assert line["sites"] == []


def test_a_run_does_not_begin_where_another_one_lives(small: Compose) -> None:
    composed = small()
    check_unused(composed)
    checkpoint_path(composed.run_dir, 1).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=.*resume="):
        check_unused(composed)


def test_one_process_at_a_time_works_in_a_run_directory(tmp_path: Path) -> None:
    """Also before the first checkpoint, and whether it is begun or resumed."""
    with alone_in(tmp_path / "run"):
        with (
            pytest.raises(ConfigError, match=r"hydra\.run\.dir=.*another process"),
            alone_in(tmp_path / "run"),
        ):
            pass
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "run"):
        pass


def test_a_run_that_ended_before_its_first_checkpoint_may_be_begun_again(small: Compose) -> None:
    """It cannot be resumed. What it wrote is kept aside."""
    composed = small()
    (composed.run_dir / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "placements.jsonl"):
        (composed.run_dir / name).write_text("old\n")
    with open_run(composed):
        pass
    assert (composed.run_dir / "metrics.jsonl").read_text() == ""
    assert not (composed.run_dir / "placements.jsonl").exists()
    assert (composed.run_dir / "placements.jsonl.before").read_text() == "old\n"


def test_a_site_that_is_given_more_than_it_has_is_named(
    small: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(
        "federation.sites=[{name:large,memory_gib:1},{name:small,memory_gib:0.0005}]",
        "federation.num_sites=2",
    ).config
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        warn_of_memory(make_plan(config), config)
    (line,) = caplog.messages
    assert "small" in line
    assert "memory_gib=0.0005" in line


def test_groups_of_experts_that_the_routing_drops_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    hf = stock("deepseek_v3").hf
    (tmp_path / "config.json").write_text(json.dumps(hf))
    composed = compose(
        [
            "model=hf", f"model.path={tmp_path}", "model.init=random", "federation.num_sites=2", "strategy.overlap=1",
            "train.eval_batches=0", "wandb.mode=disabled", f"hydra.run.dir={tmp_path / 'run'}",
        ]
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="fomoe"), open_run(composed):
        pass
    (line,) = (line for line in caplog.messages if "n_group" in line)
    assert line.endswith("strategy.routing=skip keeps them")


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
