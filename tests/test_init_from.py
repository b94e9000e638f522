"""A new run begins with the model of an earlier one's checkpoint, bit for bit, and with nothing else of it."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from fomoe_flwr.checkpoint import checkpoint_path, compose_run, read_checkpoint, save_checkpoint
from fomoe_flwr.compose import Composed, compose
from fomoe_flwr.config import ModelConfig, RunConfig
from fomoe_flwr.errors import CheckpointError, ConfigError
from fomoe_flwr.eval_command import load
from fomoe_flwr.export import export
from fomoe_flwr.hf_files import whole_routers
from fomoe_flwr.init_from import take_model
from fomoe_flwr.model.build import initial_state
from fomoe_flwr.model.spec import is_moment
from fomoe_flwr.placement import full_residents
from fomoe_flwr.server.rounds import Server
from fomoe_flwr.server.run import open_run
from tests.conftest import SMALL_TRAIN, Compose
from tests.data.test_tokenizer import train_bpe
from tests.server.federation import config_of
from tests.strategies.helpers import copy_of, finished, metrics, new_dir, run
from tests.strategies.test_resume import assert_same_run


@pytest.fixture
def earlier(small: Compose, tmp_path: Path) -> Path:
    """A run of four sites. Only to be read."""
    return finished(small, tmp_path, "strategy.outer=local_adamw", "model.load_balance=0.02", "model.top_k=3")


@pytest.fixture
def usual(corpus_dir: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    """What a new run says of itself: nothing of the model."""
    return [
        *SMALL_TRAIN, "data=text", f"data.path={corpus_dir}", f"data.cache_dir={cache_dir}",
        "runtime=local", "wandb.mode=disabled", f"hydra.run.dir={new_dir(tmp_path)}",
    ]  # fmt: skip


def server_of(composed: Composed) -> Server:
    """As it is before round 1."""
    with open_run(composed) as opened:
        server = Server(composed.config, "run", "", composed.run_dir / "inbox", opened.plan)
        assert opened.load_into(server, composed.config) == 0
    return server


def test_other_sites_go_on_with_other_text_and_do_not_need_the_earlier_run(
    earlier: Path, usual: list[str], tmp_path: Path, corpus_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither when they are resumed. Placed by demand, as their text is known before round 1."""
    copy = copy_of(earlier)
    (tmp_path / "text").mkdir()
    for file in corpus_dir.glob("dance/*.txt"):
        shutil.copy(file, tmp_path / "text")
    given = [
        *usual, f"init_from={copy}", "federation.num_sites=2", "strategy.overlap=1", "strategy.placement=affine",
        f"data.path={tmp_path / 'text'}", "train.lr=0.001",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, "fomoe"):
        whole = run(compose_run(given))
    assert "2 of 2 sites said which experts their text asks for" in caplog.text
    half = run(compose_run([*given, "train.rounds=1", f"hydra.run.dir={new_dir(tmp_path)}"]))
    shutil.rmtree(copy)
    assert_same_run(run(compose_run([f"resume={half}", "train.rounds=2"])), whole, 2)
    before, after = (read_checkpoint(checkpoint_path(folder, 2)).manifest for folder in (earlier, half))
    assert after["run"] != before["run"]
    assert after["init_from"] == {
        "path": str(copy), "run": before["run"], "round": 2, "sha256": before["sha256"]["parameters.safetensors"],
    }  # fmt: skip
    model = after["config"]["model"]
    assert (model["d_model"], model["num_experts"], model["top_k"], model["load_balance"]) == (32, 8, 3, 0.02)
    export(load(str(half), "the run"), tmp_path / "out", torch.float32)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"| model at step 0 | {copy.name}, round 2 of run {before['run']}, SHA-256 of the parameters" in card
    )


def test_its_first_loss_is_the_one_of_that_checkpoint(earlier: Path, usual: list[str]) -> None:
    """With other sites, on the same text. The damaged newest checkpoint is passed over, as in a resume."""
    copy = copy_of(earlier)
    with (checkpoint_path(copy, 2) / "parameters.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\0\1\2")
    begun = run(compose_run([*usual, f"init_from={copy}", "federation.num_sites=3", "train.rounds=1"]))
    assert metrics(begun)[0]["val_loss"] == metrics(earlier)[1]["val_loss"]
    assert read_checkpoint(checkpoint_path(begun, 1)).manifest["init_from"]["round"] == 1


SIGMA = ("model.d_model=32", "model.num_layers=2", "model.num_experts=8")
OLMOE = ("model=olmoe_tiny", "model.hf.hidden_size=32", "model.hf.num_hidden_layers=2")


@pytest.mark.parametrize(
    ("sizes", "state", "before", "now"),
    [
        (SIGMA, "memory", "skip", "partitioned"),
        (SIGMA, "files", "partitioned", "skip"),
        (OLMOE, "files", "skip", "partitioned"),
        (OLMOE, "memory", "partitioned", None),
    ],
    ids=["σ-MoE to partitioned", "σ-MoE to skip", "olmoe to partitioned", "olmoe as it was"],
)
def test_the_parameters_are_the_checkpoints_bit_for_bit(
    sizes: tuple[str, ...], state: str, before: str, now: str | None, usual: list[str], tmp_path: Path
) -> None:
    """Also where a router's rows lie with the experts now, or lay there; routing is that of before if none is given."""
    if sizes == OLMOE:
        pytest.importorskip("transformers")
    config = compose([*sizes, f"strategy.routing={before}"]).config
    everything = full_residents(config.model.num_layers, config.model.num_experts)
    saved = initial_state(config.model, everything, before, seed=5)
    folder = tmp_path / "copied"
    facts = {"config": dataclasses.asdict(config), "placement": {}}
    shutil.move(save_checkpoint(tmp_path, 7, saved, {}, facts, 1), folder)
    given = [*usual, f"init_from={folder}", f"checkpoint.state={state}", "strategy.outer=local_adamw"]
    composed = compose_run([*given, *([f"strategy.routing={now}"] if now else [])])
    assert dataclasses.asdict(composed.config.model) == facts["config"]["model"]
    assert composed.config.strategy.routing == (now or before)
    server = server_of(composed)
    tensors = server.state.parameters()
    if (now or before) == "partitioned":
        tensors = whole_routers(tensors, config.model)
    expected = whole_routers(saved, config.model) if before == "partitioned" else saved
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert not any(value.any() for name, value in server.state.tensors.items() if is_moment(name))


def taken(where: Path, given: Collection[str] = (), **model: Any) -> RunConfig:
    config = RunConfig(model=ModelConfig(**model), init_from=str(where))
    take_model(config, {*given, *(f"model.{key}" for key in model)})
    return config


@pytest.mark.parametrize(
    ("given", "model", "line"),
    [
        ((), {"num_experts": 16}, r"model\.num_experts=16: the model of init_from=\S+ has 8; leave it out"),
        ((), {"top_k": 2}, r"model\.top_k=2: the model of init_from=\S+ has 3"),
        (("model",), {"name": "tiny"}, r"model\.d_expert=128: the model of init_from=\S+ has 16"),
        (("model",), {"hf": {"model_type": "olmoe"}}, r"model=tiny: the model of init_from=\S+ is a σ-MoE"),
        ((), {"hf": {"num_experts": 8}}, r"model\.hf\.num_experts=8: the model of init_from=\S+ has None"),
        ((), {"path": "/open"}, r"model\.path=/open: not with init_from"),
        (("model",), {"init": "checkpoint"}, r"model\.init=checkpoint: not with init_from"),
    ],
    ids=str,
)
def test_another_model_is_refused_in_one_line(
    earlier: Path, given: tuple[str, ...], model: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        taken(earlier, given, **model)
    assert "\n" not in str(error.value)


def test_of_another_family_the_family_is_named(tmp_path: Path) -> None:
    config = dataclasses.asdict(config_of())
    config["model"]["hf"] = {"vocab_size": 264, "model_type": "olmoe", "rope_theta": 1e4}
    save_checkpoint(tmp_path, 1, {}, {}, {"config": config}, 1)
    other = {"a_key": 1, "vocab_size": 300, "model_type": "qwen3_moe"}
    with pytest.raises(
        ConfigError, match=r"^model\.hf\.model_type=qwen3_moe: the model of \S+ has olmoe; leave"
    ):
        taken(tmp_path, ("model",), hf=other)


def test_what_is_no_part_of_the_model_may_be_given(earlier: Path) -> None:
    model = taken(earlier, load_balance=0.5, balance="global", experts_impl="loop", d_model=32).model
    assert (model.load_balance, model.balance, model.experts_impl) == (0.5, "global", "loop")
    assert (model.d_model, model.top_k) == (32, 3)


def test_nothing_to_begin_with_is_one_line(earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"init_from=/no/run: no such directory"):
        taken(Path("/no/run"))
    with pytest.raises(ConfigError, match=r"init_from: .*resume="):
        compose_run([f"resume={earlier}", f"init_from={earlier}"])
    for config, what in (({"model": {}}, "is missing"), (None, "is null")):
        save_checkpoint(tmp_path, 1, {}, {}, {"config": config} if config else {}, 1)
        with pytest.raises(CheckpointError, match=rf"checkpoint .*: manifest\.json: config: .*{what}"):
            taken(tmp_path)
    wrong = dataclasses.asdict(config_of("model.num_layers=0"))
    save_checkpoint(tmp_path, 1, {}, {}, {"config": wrong}, 1)
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: config: model\.num_layers=0: must be at least 1"
    ):
        taken(tmp_path)


def test_a_tokenizer_that_has_changed_under_its_name_is_refused(
    earlier: Path, usual: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    before = config_of("model.vocab_size=300", f"data.tokenizer={tmp_path / 'tokenizer.json'}")
    state = initial_state(before.model, full_residents(4, 16), "skip", 0)
    facts = {"config": dataclasses.asdict(before), "placement": {}, "inputs": {"tokenizer": "another"}}
    save_checkpoint(tmp_path, 1, state, {}, facts, 1)
    given = [*usual, f"init_from={tmp_path}"]
    with (
        pytest.raises(CheckpointError, match=r"the tokenizer is .*before another"),
        open_run(compose_run(given)),
    ):
        pass
    # Named anew it is taken as it is.
    with open_run(compose_run([*given, f"data.tokenizer={tmp_path / 'tokenizer.json'}"])):
        assert "warning" in capsys.readouterr().err


def test_what_a_manifest_says_of_the_model_is_no_code(tmp_path: Path) -> None:
    """A run that began with another's model is resumed by what its manifest says; nothing is resolved."""
    config = dataclasses.asdict(config_of()) | {"init_from": "/gone"}
    config["data"]["tokenizer"] = "${oc.env:HOME}"
    save_checkpoint(tmp_path, 1, {}, {}, {"config": config, "overrides": []}, 1)
    assert compose_run([f"resume={tmp_path}"]).config.data.tokenizer.endswith("/${oc.env:HOME}")
    config["model"]["locality_target"] = {"a b": {"\n": 1}}
    save_checkpoint(tmp_path, 1, {}, {}, {"config": config, "overrides": []}, 1)
    with pytest.raises(CheckpointError, match=r"checkpoint .*: model\.locality_target: .* is no value"):
        compose_run([f"resume={tmp_path}"])
