"""`fomoe import`: what is written is the checkpoint, whole; what cannot be read is one line, and leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fomoe_flwr.cli import main
from fomoe_flwr.export import byte_tokenizer
from tests.model.stock_models import CONFIGS
from tests.test_hf_files import everything_in, retensor, saved

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_tensors_come_out_as_they_went_in_and_transformers_agrees(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = saved(family, tmp_path / "in", "60KB")
    tokenizer = json.dumps(byte_tokenizer())
    (tmp_path / "in/tokenizer.json").write_text(tokenizer)
    main(["import", str(tmp_path / "in"), "--to", str(tmp_path / "out")])
    assert f"{family}, 2 layers of 8 experts; train with model=hf" in capsys.readouterr().out
    back = everything_in(tmp_path / "out")
    assert back.keys() == there.keys()
    assert all(back[name].dtype == value.dtype and back[name].equal(value) for name, value in there.items())
    assert (tmp_path / "out/tokenizer.json").read_text() == tokenizer
    tokens_BS = torch.arange(20).view(2, 10)
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens_BS).logits
        for name in ("in", "out")
    )
    assert first.equal(second)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["import", *words])
    assert caught.value.code != 0
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("olmoe", tmp_path / "in", "60KB")
    target = tmp_path / "out"
    capsys.readouterr()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = refusal(capsys, "allenai/OLMoE-1B-7B-0924", "--to", str(target))
    assert "could not be fetched from Hugging Face's hub" in told
    assert "without a network give a folder" in told
    assert "no such folder" in refusal(capsys, "nowhere", "--to", str(target))
    assert "is there already" in refusal(capsys, str(tmp_path / "in"), "--to", str(tmp_path / "in"))
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(capsys, str(tmp_path / "empty"), "--to", str(target))
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
        assert "where 1.00 kB are free" in refusal(capsys, str(tmp_path / "in"), "--to", str(target))
    config = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text(json.dumps(config | {"router_aux_loss_coef": float("nan")}))
    told = refusal(capsys, str(tmp_path / "odd"), "--to", str(target))
    assert "model.hf.router_aux_loss_coef=nan: from 0 to" in told
    in_index = (tmp_path / "in/model.safetensors.index.json").read_text()
    for value, dtype, told in (
        (
            torch.ones(64).to(torch.float8_e4m3fn),
            [],
            "model.norm.weight has dtype F8_E4M3; allowed are BF16, F32, F16",
        ),
        (torch.full((64,), 1e5), ["--dtype", "fp16"], "model.norm.weight has numbers above 65504"),
        (torch.full((64,), torch.nan), [], "model.norm.weight has numbers that are not finite"),
    ):
        retensor(tmp_path / "in", "model.norm.weight", value)
        line = refusal(capsys, str(tmp_path / "in"), "--to", str(target), *dtype)
        assert told in line
        assert line.count(str(tmp_path / "in")) <= 1
    (tmp_path / "in/model.safetensors.index.json").write_text(in_index)
    tokenizer, large = byte_tokenizer(), byte_tokenizer()
    large["model"]["vocab"]["a"] = 300
    for content, told in (
        (large, "its tokenizer.json does not fit: it has token 300, the model 300 tokens"),
        ({}, "not a tokenizer.json: "),
        (tokenizer | {"decoder": json.loads("[" * 200 + "]" * 200)}, "recursion limit exceeded"),
    ):
        (tmp_path / "in/tokenizer.json").write_text(json.dumps(content))
        assert told in refusal(capsys, str(tmp_path / "in"), "--to", str(target))
    (tmp_path / "in/tokenizer.json").unlink()
    (tmp_path / "in/README.md").symlink_to("/dev/zero")
    assert "README.md is no regular file" in refusal(capsys, str(tmp_path / "in"), "--to", str(target))
    (tmp_path / "in/README.md").unlink()
    index = json.loads((tmp_path / "in/model.safetensors.index.json").read_text())
    (tmp_path / "in" / index["weight_map"]["model.norm.weight"]).unlink()
    assert "lacks model-0" in refusal(capsys, str(tmp_path / "in"), "--to", str(target))
    assert not target.exists()
    assert not list(tmp_path.glob(".partial*"))
