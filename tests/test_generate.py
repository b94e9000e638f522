"""`fomoe generate`: the text is the model's, the same through both doors, and nothing of a folder is run."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fomoe_flwr import cli
from fomoe_flwr import generate as generate_module
from fomoe_flwr.checkpoint import save_checkpoint
from fomoe_flwr.compose import compose
from fomoe_flwr.eval_command import Saved
from fomoe_flwr.export import byte_tokenizer, export
from fomoe_flwr.generate import stream, visible
from fomoe_flwr.hf_files import INDEX
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.placement import full_residents
from tests.test_cli import line_of
from tests.test_export import logits_of, saved, transformers

PROMPT = "Zwölf Boxkämpfer"


def varied(folder: Path) -> Saved:
    """A model that says something: as it is initialised, the likeliest token is always the last one again."""
    one, generator = saved(folder, vocab_size=257), torch.Generator().manual_seed(11)
    noisy = {
        name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(one.judged.state.items())
    }
    return dataclasses.replace(one, judged=dataclasses.replace(one.judged, state=noisy))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model as a run directory and as a folder of `fomoe export`."""
    folder = tmp_path_factory.mktemp("generate")
    one = varied(folder / "run")
    config = {"strategy": {"routing": "skip"}, "model": vars(one.judged.model), "train": {}, "data": {}}
    facts = {"config": config, "placement": {"a": one.judged.everything}, "overrides": []}
    save_checkpoint(folder / "run", 4, one.judged.state, {}, facts, 1)
    export(one, folder / "out", torch.float32)
    return folder / "run", folder / "out"


@pytest.fixture
def out(both: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the exported folder, to be spoilt."""
    return Path(shutil.copytree(both[1], tmp_path / "out"))


def text_of(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str, prompt: str = PROMPT) -> str:
    cli.main(["generate", str(folder), "--prompt", prompt, "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.endswith("\n")
    return captured.out[:-1]


@torch.no_grad()
def greedy(tmp_path: Path, num_tokens: int) -> list[int]:
    """What our own module finds likeliest, one token after the other, each from the whole text before it."""
    one, ids = varied(tmp_path / "same"), list(PROMPT.encode())
    for _ in range(num_tokens):
        ids.append(int(logits_of(one, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT.encode()) :]


def test_without_a_temperature_each_token_is_the_likeliest(
    capsys: pytest.CaptureFixture[str], both: tuple[Path, Path], tmp_path: Path
) -> None:
    ids = greedy(tmp_path, 24)
    assert len(set(ids)) > 3
    assert 256 not in ids
    expected = bytes(ids).decode(errors="replace")
    assert [text_of(capsys, folder, "--max-tokens", "24") for folder in both] == [expected, expected]


def test_the_same_seed_draws_the_same_text_through_both_doors(
    capsys: pytest.CaptureFixture[str], both: tuple[Path, Path]
) -> None:
    # So flat that two texts are never the same by chance.
    drawn = ("--max-tokens", "16", "--temperature", "100", "--top-p", "0.9")
    run, out = (text_of(capsys, folder, *drawn, "--seed", "5") for folder in both)
    assert run == out
    assert text_of(capsys, both[1], *drawn, "--seed", "6") != out
    assert text_of(capsys, both[1], *drawn) != text_of(capsys, both[1], *drawn)
    # Nothing but the likeliest is left to be drawn.
    sure = text_of(capsys, both[1], "--max-tokens", "16", "--temperature", "9", "--top-p", "1e-9")
    assert sure == text_of(capsys, both[1], "--max-tokens", "16")


def test_it_ends_with_the_document(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
    ids = greedy(tmp_path, 24)
    last = next(place for place in range(1, 24) if ids[place] not in ids[:place])
    (out / "generation_config.json").write_text(
        json.dumps(
            {"eos_token_id": [ids[last]], "do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
        )
    )
    # The folder's own settings are not asked for.
    assert text_of(capsys, out) == bytes(ids[: last + 1]).decode(errors="replace")


TEXTS = ["Zwölf Boxkämpfer\n\njagen 🥊🥊\r\n  漢字 a=b;\tend", "\n", " ", "", "é", "x" * 300 + "…"]


@pytest.mark.parametrize("text", TEXTS)
def test_letters_are_streamed_whole(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """One byte a token: what is printed is the text, and no piece of it ends within a letter."""
    tokenizer, pieces = byte_tokens(), []

    def generate(ids_1S: torch.Tensor, streamer: Any, **_: Any) -> None:
        streamer.put(ids_1S)
        for token in (*text.encode(), 256):
            streamer.put(torch.tensor([token]))
            pieces.append(capsys.readouterr().out)
        streamer.end()

    config = SimpleNamespace(model_type="fomoe", vocab_size=257)
    config.get_text_config = lambda: config
    model = SimpleNamespace(
        config=config, device="cpu", eval=lambda: None, generate=generate,
        generation_config=SimpleNamespace(eos_token_id=256),
    )  # fmt: skip
    given = argparse.Namespace(max_tokens=999, temperature=None, top_p=1.0, seed=None)
    stream(model, tokenizer, "a", given)
    pieces.append(capsys.readouterr().out)
    assert "".join(pieces) == text + "\n"
    assert len([piece for piece in pieces if piece]) >= min(len(text.split()), 3)


def byte_tokens() -> Any:
    import tokenizers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(byte_tokenizer())),
        eos_token="<|endoftext|>",
    )


def test_a_prompt_from_stdin_and_an_empty_one(
    capsys: pytest.CaptureFixture[str], both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--max-tokens", "4")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode()), "ascii"))
    assert text_of(capsys, both[1], *few, prompt="-") == text_of(capsys, both[1], *few)
    # A document begins behind the end of another.
    assert text_of(capsys, both[1], *few, prompt="") == text_of(capsys, both[1], *few, prompt="<|endoftext|>")


def test_a_text_longer_than_the_model_is_made_for_is_cut_or_refused(
    capsys: pytest.CaptureFixture[str], both: tuple[Path, Path]
) -> None:
    command = ("generate", str(both[0]), "--prompt")
    cli.main([*command, "x" * 250])
    assert (
        "--max-tokens 200: only 6, for the model is made for texts of 256 tokens" in capsys.readouterr().err
    )
    assert "has 256 tokens" in line_of(capsys, 2, *command, "x" * 256)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "0"], "--temperature: 0: needs a number from 0.001 to 1000"),
        (["--temperature", "nan"], "nan: needs a number from"),
        (["--temperature", "1", "--top-p", "1.1"], "--top-p: 1.1: needs a number above 0, at most 1"),
        (["--top-p", "0.5"], "--top-p: needs --temperature"),
        (["--seed", "-1"], "needs a whole number"),
        (["--max-tokens", "0"], "--max-tokens: 0: needs a whole number"),
        (["--device", "tpu"], "fomoe generate --device=tpu: allowed are"),
        (["--prompt", "caf\udce9"], "--prompt: is not UTF-8"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert named in line_of(capsys, 2, "generate", "nowhere", "--prompt", "a", *arguments)


def test_without_transformers_the_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = line_of(capsys, 2, "generate", "nowhere", "--prompt", "a")
    assert "needs transformers; pip install 'fomoe-flwr[hf]'" in line


def refused(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    return line_of(capsys, 1, "generate", str(folder), "--prompt", "a")


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_folders_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    assert "no such directory" in refused(capsys, tmp_path / "nowhere")
    assert "no run directory or checkpoint, and no folder of a model" in refused(capsys, tmp_path)
    (out / "tokenizer.json").rename(out / "elsewhere")
    assert "has no tokenizer (tokenizer.json, " in refused(capsys, out)
    (out / "elsewhere").rename(out / "tokenizer.json")
    change(out / "config.json", vocab_size=90)
    assert "its weights are not those of its config.json" in refused(capsys, out)
    (out / "model.safetensors").unlink()
    assert "transformers cannot load it" in refused(capsys, out)
    (out / "config.json").write_text("[1]")
    assert "config.json is no configuration" in refused(capsys, out)


def test_weights_are_not_made_up(capsys: pytest.CaptureFixture[str], out: Path) -> None:
    change(out / "config.json", num_hidden_layers=3)
    assert "missing keys, as model.layers.2." in refused(capsys, out)


def test_a_tokenizer_of_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    export(saved(tmp_path / "run", vocab_size=257), tmp_path / "out", torch.float32)
    content = byte_tokenizer()
    content["model"]["vocab"]["a"] = 300
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(content))
    assert "does not fit: it has token 300, the model 257" in refused(capsys, tmp_path / "out")


def test_what_transformers_would_open_is_a_file_of_the_folder(
    capsys: pytest.CaptureFixture[str], out: Path
) -> None:
    (out / "chat_template.jinja").symlink_to("/dev/zero")
    assert "chat_template.jinja is no regular file" in refused(capsys, out)
    (out / "chat_template.jinja").unlink()
    os.mkfifo(out / "generation_config.fifo")
    assert "generation_config.fifo is no regular file" in refused(capsys, out)
    (out / "generation_config.fifo").unlink()
    (out / "model.safetensors").rename(out.parent / "model.safetensors")
    for where in ("../model.safetensors", str(out.parent / "model.safetensors"), "model.bin"):
        (out / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": where}}))
        assert f"{INDEX} names {where}, which is no safetensors file of this folder" in refused(capsys, out)
    (out / INDEX).write_text("[" * 10**5)
    assert "JSON nested too deep" in refused(capsys, out)
    (out / INDEX).unlink()
    change(out / "config.json", transformers_weights="../model.safetensors")
    assert "transformers_weights of config.json is not followed" in refused(capsys, out)
    (out / "config.json").write_text("[" * 10**5)
    assert "JSON nested too deep" in refused(capsys, out)


EVIL = "open({!r}, 'w')\nfrom transformers import PretrainedConfig as FomoeConfig\nFomoeForCausalLM = FomoeConfig\n"


def test_the_code_of_a_folder_is_never_run(
    capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path
) -> None:
    evil, trace = EVIL.format(str(tmp_path / "was_here")), tmp_path / "was_here"
    # With our own file beside it, ours is what is used.
    (out / "evil.py").write_text(evil)
    ours = json.loads((out / "config.json").read_text())["auto_map"]
    theirs = {name: value.replace("modeling_fomoe", "evil") for name, value in ours.items()}
    change(out / "config.json", auto_map=theirs)
    change(out / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.FomoeConfig", None]})
    text_of(capsys, out, "--max-tokens", "1")
    change(out / "config.json", model_type="evil")
    line = refused(capsys, out)
    assert "model_type=evil is none of transformers" in line
    assert "trust_remote_code=True" in line
    change(out / "config.json", model_type="fomoe", auto_map=ours)
    with (out / "modeling_fomoe.py").open("a") as file:
        file.write(evil)
    assert "its modeling_fomoe.py is not the one of this version, and is not run" in refused(capsys, out)
    assert not trace.exists()


def test_a_stock_architecture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.OlmoeConfig(
        vocab_size=257, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=256, eos_token_id=256,
    )  # fmt: skip
    model = transformers.OlmoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    byte_tokens().save_pretrained(tmp_path)
    # What a folder brings beside a class that transformers has is not looked at.
    change(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "nothing.There"})
    ids = torch.tensor([list(PROMPT.encode())])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    capsys.readouterr()
    assert text_of(capsys, tmp_path, "--max-tokens", "8") == byte_tokens().decode(
        expected, skip_special_tokens=True
    )


def test_a_terminal_is_not_told_what_to_do() -> None:
    assert visible("ü\t漢\n\x1b[2J\r\x00") == "ü\t漢\n\\x1b[2J\\r\\x00"


def test_control_c_is_one_word(capsys: pytest.CaptureFixture[str], both: tuple[Path, Path],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    codes: list[int] = []
    monkeypatch.setattr(generate_module, "stream", stop)
    monkeypatch.setattr(os, "_exit", codes.append)
    cli.main(["generate", str(both[1]), "--prompt", "a"])
    assert capsys.readouterr().err == "interrupted\n"
    assert codes == [130]


@torch.no_grad()
def test_a_run_of_a_stock_architecture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = compose(["model=olmoe_tiny"]).config.model
    everything = full_residents(model.num_layers, model.num_experts)
    state = initial_state(model, everything, "skip", 3)
    config = {"strategy": {"routing": "skip"}, "model": vars(model), "train": {}, "data": {}}
    save_checkpoint(tmp_path, 1, state, {}, {"config": config, "placement": {"a": everything}}, 1)
    module, ids = build(model, everything, "skip", state, "cpu").eval(), list(PROMPT.encode())
    for _ in range(8):
        hidden_BSD, _balance = module.hidden(torch.tensor([ids]))
        ids.append(int(module.logits(hidden_BSD[0])[-1].argmax()))
    expected = byte_tokens().decode(ids[len(PROMPT.encode()) :], skip_special_tokens=True)
    assert text_of(capsys, tmp_path, "--max-tokens", "8") == expected
