"""`fomoe eval` on runs of every strategy, on texts of any kind, and on what is not a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint, save_checkpoint
from fomoe_flwr.cli import main
from fomoe_flwr.compose import compose
from fomoe_flwr.data import load_tokenizer
from fomoe_flwr.errors import CheckpointError, ConfigError
from fomoe_flwr.eval_command import check_tokenizer, choose_text, load
from fomoe_flwr.report.tables import show_evaluation
from tests.conftest import SMALL_MODEL, SMALL_TRAIN, WORDS, Compose
from tests.data.test_tokenizer import train_bpe
from tests.strategies.helpers import run


def train(folder: Path, corpus_dir: Path, cache_dir: Path, *overrides: str) -> Path:
    data = ("data=text", f"data.path={corpus_dir}", f"data.cache_dir={cache_dir}")
    place = ("runtime=local", "wandb.mode=disabled", f"hydra.run.dir={folder / 'run'}")
    return run(compose([*SMALL_MODEL, *SMALL_TRAIN, *data, *place, *overrides]))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """A small run of two rounds. Not to be changed."""
    return train(tmp_path_factory.mktemp("trained"), corpus_dir, cache_dir)


@pytest.fixture(scope="session")
def replicas(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """A run in which every site holds everything. Not to be changed."""
    return train(tmp_path_factory.mktemp("replicas"), corpus_dir, cache_dir, "strategy=ddp")


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with 300 tokens."""
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(file)
    return file


@pytest.fixture(scope="session")
def subword(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path, bpe: Path) -> Path:
    """A run with that tokenizer. Not to be changed."""
    overrides = ("train.rounds=1", "model.vocab_size=300", f"data.tokenizer={bpe}")
    return train(tmp_path_factory.mktemp("subword"), corpus_dir, cache_dir, *overrides)


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be."""
    return shutil.copytree(trained, tmp_path / "mine")


@pytest.fixture
def unseen(tmp_path: Path) -> Path:
    """A text of no corpus, of 3000 bytes or so."""
    file = tmp_path / "unseen.txt"
    file.write_text(" ".join(random.Random(1).choices(WORDS, k=500)))
    return file


Evaluate = Callable[..., dict[str, Any]]

LARGE = "train.batch_size=64"  # fewer and larger batches are faster, and give the same figures


def on(place: Path, source: str = "text") -> tuple[str, str, str]:
    return f"data={source}", f"data.path={place}", LARGE


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """`evaluate(CHECKPOINT, …)` is what the command prints with --json, which is a line and nothing else."""

    def call(*arguments: object, warning: str = "") -> dict[str, Any]:
        capsys.readouterr()
        main(["eval", *map(str, arguments), "--json"])
        printed = capsys.readouterr()
        assert warning in printed.err if warning else printed.err == ""
        (line,) = printed.out.splitlines()
        content = json.loads(line)
        assert isinstance(content, dict)
        return content

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, int]]:
    """The one line with which the command refuses, and its exit code."""

    def call(*arguments: object) -> tuple[str, int]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["eval", *map(str, arguments)])
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: "), int(str(stop.value.code))

    return call


# ----- strategies and the end of a run


def check_final(run_dir: Path, evaluate: Evaluate) -> dict[str, Any]:
    """What the run left is what the command finds in its checkpoint."""
    found = evaluate(run_dir, "--batches=1", "--draws=1")
    assert json.loads((run_dir / "evaluation.json").read_text()) == found
    assert found["text"]["part"] == "validation"
    assert set(found["residents"]) == {"site-0", "site-1", "site-2", "site-3"}
    assert isinstance(found["routing"]["necessity"], float)
    assert len(found["routing"]["necessity_by_layer"]) == 2
    return found


def test_a_run_leaves_what_eval_finds_in_its_checkpoint(
    trained: Path, replicas: Path, unseen: Path, evaluate: Evaluate
) -> None:
    found = check_final(trained, evaluate)
    assert all(site != found["all_experts"] for site in found["residents"].values())
    found = check_final(replicas, evaluate)
    assert all(site == found["all_experts"] for site in found["residents"].values())

    whole = evaluate(trained, *on(unseen))
    size = unseen.stat().st_size
    assert {key: whole["text"][key] for key in ("part", "documents", "tokens")} == {
        "part": "whole", "documents": 1, "tokens": size,
    }  # fmt: skip
    assert whole["all_experts"]["tokens"] == size  # with the end token, without the first
    assert 1 < whole["all_experts"]["loss"] < 6


def test_moments_in_the_checkpoint_are_not_of_the_model(small: Compose, evaluate: Evaluate) -> None:
    overrides = ("strategy.overlap=2", "strategy.routing=partitioned", "strategy.placement=random")
    check_final(run(small("strategy=local_adamw", *overrides)), evaluate)


def test_the_loss_is_the_one_of_the_last_round(trained: Path, evaluate: Evaluate) -> None:
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    found = evaluate(trained, "--batches=2")["all_experts"]
    assert found["loss"] == pytest.approx(line["val_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(line["val_bpb"], rel=1e-6)


def test_the_figures_at_the_end_can_be_switched_off(small: Compose, tmp_path: Path) -> None:
    for name, switch in (("off", "train.final_eval_batches=0"), ("no-eval", "train.eval_batches=0")):
        run_dir = run(small("train.rounds=1", switch, run_dir=tmp_path / name))
        assert not (run_dir / "evaluation.json").exists()
    assert not (run(small("train.rounds=0")) / "evaluation.json").exists()


# ----- which checkpoint, which text


def test_a_run_its_folder_and_a_checkpoint_may_be_named(trained: Path, evaluate: Evaluate) -> None:
    newest = evaluate(trained, "--batches", 1)
    assert newest["checkpoint"] == str(checkpoint_path(trained, 2))
    assert evaluate(trained / "checkpoints", "--batches", 1) == newest
    assert evaluate(checkpoint_path(trained, 2), "--batches", 1) == newest
    first = evaluate(checkpoint_path(trained, 1), "--batches", 1)
    assert first["round"] == 1
    assert first["all_experts"]["loss"] != newest["all_experts"]["loss"]


def test_a_checkpoint_needs_nothing_of_the_run_but_itself(
    trained: Path, tmp_path: Path, unseen: Path, evaluate: Evaluate
) -> None:
    moved = tmp_path / "elsewhere" / "under_another_name"
    shutil.copytree(checkpoint_path(trained, 2), moved)
    text = on(unseen)
    ours, theirs = evaluate(moved, *text), evaluate(trained, *text)
    assert ours["all_experts"] == theirs["all_experts"]


def test_the_figures_are_the_same_every_time(trained: Path, unseen: Path, evaluate: Evaluate) -> None:
    arguments = (trained, *on(unseen), "--draws=2")
    assert evaluate(*arguments) == evaluate(*arguments)


def test_the_runs_own_corpus_gives_its_validation_part_wherever_it_lies(
    trained: Path, corpus_dir: Path, tmp_path: Path, evaluate: Evaluate
) -> None:
    own = evaluate(trained, LARGE)
    assert own["text"]["part"] == "validation"
    assert own["all_experts"]["tokens"] == own["text"]["tokens"]  # all of it
    shutil.copytree(corpus_dir, tmp_path / "copy")
    copy = evaluate(trained, *on(tmp_path / "copy"))
    assert copy["all_experts"] == own["all_experts"]
    assert copy["routing"] == own["routing"]


def test_part_of_another_text(trained: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    for index in range(20):
        (tmp_path / "other" / f"topic{index % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / f"topic{index % 2}" / f"{index}.txt").write_text(f"{index} " * 60)
    text = on(tmp_path / "other")
    whole, half = evaluate(trained, *text), evaluate(trained, *text, "data.val_fraction=0.5")
    assert (whole["text"]["part"], whole["text"]["documents"]) == ("whole", 20)
    assert half["text"]["part"] == "validation"
    assert 0 < half["text"]["documents"] < 20
    domains = whole["all_experts"]["by_domain"]
    assert set(domains) == {"topic0", "topic1"}
    assert sum(domain["tokens"] for domain in domains.values()) == whole["all_experts"]["tokens"]


def test_a_larger_part_of_the_runs_own_corpus_is_refused(trained: Path, refused) -> None:
    line, code = refused(trained, "data.val_fraction=0.5")
    assert line.startswith("data.val_fraction=0.5: the run kept 0.05 of this corpus from training")
    assert code == 2


def test_the_runs_own_corpus_is_known_by_its_tokens_where_the_run_cannot_read_it(
    trained: Path, mine: Path, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a copy on another machine would be judged whole, with the text on which the run was trained."""
    shutil.copytree(corpus_dir, tmp_path / "copy")
    saved = load(str(trained), "here")
    elsewhere = dataclasses.replace(saved, data=dataclasses.replace(saved.data, path="/of/another/machine"))
    copy = dataclasses.replace(saved.data, path=str(tmp_path / "copy"))
    assert choose_text(elsewhere, copy, share_given=False)[1] == "validation"
    with pytest.raises(ConfigError, match=r"data\.val_fraction=0\.9: the run kept 0\.05"):
        choose_text(elsewhere, dataclasses.replace(copy, val_fraction=0.9), share_given=True)
    (tmp_path / "copy" / "dance" / "0.txt").write_text("another text\n")
    assert choose_text(elsewhere, copy, share_given=False)[1] == "whole"
    capsys.readouterr()
    # Where the run's own text lay, there is another now.
    moved = dataclasses.replace(saved, data=copy)
    assert choose_text(moved, copy, share_given=False)[1] == "validation"
    assert re.fullmatch(r"warning: data: the text is .*, before .*\n", capsys.readouterr().err)


def test_a_tokenizer_that_has_changed_is_refused_and_one_that_was_asked_for_is_named(
    subword: Path, bpe: Path, tmp_path: Path, refused, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load(str(subword), "here")
    check_tokenizer(saved, load_tokenizer(str(bpe)), asked=False)
    other = tmp_path / "tokenizer.json"
    other.write_text(bpe.read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"data\.tokenizer: .* before .*name the right one"):
        check_tokenizer(saved, load_tokenizer(str(other)), asked=False)
    check_tokenizer(saved, load_tokenizer(str(other)), asked=True)
    assert "warning: checkpoint" in capsys.readouterr().err


def test_a_very_short_text_and_json_lines(trained: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    (tmp_path / "short.txt").write_text("ab")
    short = evaluate(trained, *on(tmp_path / "short.txt"))
    assert short["all_experts"]["tokens"] == 2
    rows = [{"body": f"a line of {word}", "kind": word} for word in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ("data.text_key=body", "data.domain_key=kind")
    found = evaluate(trained, *on(tmp_path / "rows.jsonl", "jsonl"), *keys)
    assert set(found["all_experts"]["by_domain"]) == set(WORDS)


def test_another_tokenizer_and_other_settings_of_the_computation(
    subword: Path, unseen: Path, evaluate: Evaluate
) -> None:
    text = (*on(unseen), "--draws=1")
    whole = evaluate(subword, *text)["all_experts"]
    assert (
        evaluate(subword, *text, "data.tokenizer=bytes", warning="data.tokenizer: ")["all_experts"]["tokens"]
        > whole["tokens"]
    )
    loop = evaluate(subword, *text[:2], "model.experts_impl=loop", "train.batch_size=50", "train.threads=1")
    assert loop["all_experts"]["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert evaluate(subword, *text, "train.seq_len=8")["all_experts"] != whole
    rough = evaluate(subword, *text, "train.dtype=bf16")["all_experts"]["loss"]
    assert rough == pytest.approx(whole["loss"], rel=0.02)


def test_necessity_as_a_share_of_a_reference(
    trained: Path, replicas: Path, unseen: Path, evaluate: Evaluate
) -> None:
    text = on(unseen)
    found = evaluate(trained, *text, "--reference", replicas)
    alone, routing = evaluate(replicas, *text)["routing"]["necessity"], found["routing"]
    assert found["reference"] == str(checkpoint_path(replicas, 2))
    assert routing["reference_necessity"] == alone
    assert routing["necessity_share"] == (pytest.approx(routing["necessity"] / alone) if alone > 0 else None)
    assert len(routing["reference_necessity_by_layer"]) == 2


def test_the_tables_have_a_row_for_each_site_and_layer(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((trained / "evaluation.json").read_text())
    content["routing"] |= {"reference_necessity": 1.0, "reference_necessity_by_layer": [1.0]}
    show_evaluation(content, Console())
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("site-0", "site-3", "layer 0", "layer 1", " %"))


def test_many_domains_are_not_all_shown(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"loss": 1.0, "perplexity": None, "bits_per_byte": None, "tokens": 10}
    domains = {f"topic{index}": figures | {"tokens": index + 1} for index in range(20)}
    content = {
        "checkpoint": "run", "text": {"name": "text", "part": "whole", "documents": 1, "tokens": 20},
        "all_experts": figures | {"by_domain": domains}, "residents": {"a": figures, "b": None},
        "routing": {"necessity": 0.1, "necessity_by_layer": [0.1], "necessity_by_draw": [0.1], "tokens": 10},
    }  # fmt: skip
    show_evaluation(content, Console())
    printed = capsys.readouterr().out
    assert "topic19" in printed
    assert "topic8" in printed
    assert "topic7" not in printed
    assert "10 of 20 tokens" in printed


# ----- what cannot be


@pytest.mark.parametrize(
    ("arguments", "named", "code"),
    [
        ([], "which checkpoint?", 2),
        (["data=text"], "which checkpoint?", 2),
        (["/no/run"], "/no/run", 1),
        (["RUN", "--nope"], "--nope", 2),
        (["RUN", "--batches"], "--batches", 2),
        (["RUN", "--draws=0"], "--draws", 2),
        (["RUN", "--reference="], "--reference", 2),
        (["RUN", "--reference=/no/run"], "--reference /no/run", 1),
        (["RUN", "strategy.overlap=1"], "strategy.overlap=1", 2),
        (["RUN", "another"], "another", 2),
        (["RUN", "data=txt"], "data=txt", 2),
        (["RUN", "data.pth=x"], "did you mean data.path?", 2),
        (["RUN", "data=text"], "data.path=null", 2),
        (["RUN", "data=text", "data.path=/no/text"], "data.path=/no/text", 1),
        (["RUN", "data.tokenizer=/no/file"], "data.tokenizer=/no/file", 1),
        (["RUN", "data.tokenizer=BPE"], "model.vocab_size=264", 2),
        (["RUN", "train.batch_size=0"], "train.batch_size=0", 2),
        (["", "RUN"], "'' is empty", 2),
        (["RUN", ""], "'' is empty", 2),
        (["RUN", "--reference= "], "--reference", 2),
        (["RUN", "train.seq_len=100000000"], "train.seq_len=100000000: the text has", 2),
        (["RUN", f"--batches={'9' * 5000}"], "needs a whole number from 1 to", 2),
        (["x" * 5000], "File name too long", 2),
        (["RUN", "data=text", "data.path=EMPTY"], "empty.txt", 1),
        (["RUN", "data=text", "data.path=BINARY"], "binary", 1),
        (["RUN", "--reference=SUBWORD"], "nats a token", 1),
        (["EMPTY"], "is a file", 1),
        (["FOLDER"], "no checkpoint in", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(
    arguments: list[str],
    named: str,
    code: int,
    trained: Path,
    subword: Path,
    bpe: Path,
    tmp_path: Path,
    refused,
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\0\xff")
    places = {
        "RUN": trained, "SUBWORD": subword, "BPE": bpe, "FOLDER": tmp_path,
        "EMPTY": tmp_path / "empty.txt", "BINARY": tmp_path / "binary",
    }  # fmt: skip
    for word, place in places.items():
        arguments = [item.replace(word, str(place)) for item in arguments]
    line, found = refused(*arguments)
    assert named in line
    assert found == code


def test_help_says_which_options_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--json", "--reference", "--batches", "--draws", "data=text"))


def _flip(folder: Path) -> None:
    content = bytearray((folder / "parameters.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "parameters.safetensors").write_bytes(content)


def _truncate(folder: Path) -> None:
    content = (folder / "parameters.safetensors").read_bytes()
    (folder / "parameters.safetensors").write_bytes(content[:-100])


def _garble(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _of_another_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))


def _of_another_program(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text("{}")


def _saved_again(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Callable[[Path], None]:
    """Whole by all digests, but with other contents."""

    def apply(folder: Path) -> None:
        checkpoint = read_checkpoint(folder)
        facts = {
            key: value
            for key, value in checkpoint.manifest.items()
            if key not in ("format", "round", "sha256")
        }
        parameters = dict(checkpoint.parameters)
        change(facts, parameters)
        save_checkpoint(folder.parent.parent, checkpoint.round, parameters, checkpoint.outer, facts, keep=9)

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (_flip, "parameters.safetensors"),
    "truncated tensors": (_truncate, "parameters.safetensors"),
    "a garbled manifest": (_garble, "manifest.json"),
    "another format": (_of_another_format, "format 1"),
    "another program": (_of_another_program, "manifest.json"),
    "no configuration": (
        _saved_again(lambda facts, _: facts.pop("config")),
        "manifest.json",
    ),
    "a key of another version": (
        _saved_again(lambda facts, _: facts["config"]["model"].update(unheard_of=1)),
        "unheard_of",
    ),
    "a tensor missing": (
        _saved_again(lambda _, parameters: parameters.pop("model.norm.weight")),
        "model.norm.weight",
    ),
    "another shape": (
        _saved_again(lambda _, parameters: parameters.update({"model.norm.weight": torch.ones(7)})),
        "model.norm.weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_or_foreign_is_one_clear_line(name: str, mine: Path, refused) -> None:
    damage, said = DAMAGE[name]
    folder = checkpoint_path(mine, 2)
    damage(folder)
    line, code = refused(folder)
    assert said in line
    assert str(folder) in line
    assert code == 1


def test_the_checkpoint_before_a_damaged_one_is_used_and_said(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _flip(checkpoint_path(mine, 2))
    capsys.readouterr()
    main(["eval", str(mine), "--json", "--batches=1"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["round"] == 1
    assert "trying the one before it" in printed.err
