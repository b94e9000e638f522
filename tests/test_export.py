"""What is exported is the model: `transformers` gives the same logits, generates, and reads the tokenizer."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fomoe_flwr.export as export_module
from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint, save_checkpoint
from fomoe_flwr.cli import main
from fomoe_flwr.config import DataConfig, ModelConfig, TrainConfig
from fomoe_flwr.data import load_tokenizer
from fomoe_flwr.errors import CheckpointError
from fomoe_flwr.eval_command import Saved
from fomoe_flwr.evaluation import Judged
from fomoe_flwr.export import DTYPES, byte_tokenizer, export
from fomoe_flwr.inputs import UNKNOWN, Inputs
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.placement import full_residents
from tests.conftest import WORDS
from tests.data.test_tokenizer import train_bpe

# Read by transformers when it is imported: no network, and copies of the exported class not in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
MODULES = tempfile.TemporaryDirectory(prefix="fomoe-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name
transformers = pytest.importorskip("transformers")


def saved(folder: Path, routing: str = "skip", tokenizer: str = "bytes", **model: object) -> Saved:
    sizes = {
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": 8,
        "d_expert": 16,
        "vocab_size": 300,
    }
    config = ModelConfig(**(sizes | model))  # type: ignore[arg-type]
    everything = full_residents(config.num_layers, config.num_experts)
    state = initial_state(config, everything, routing, 7)
    facts = {"metrics": {"val_loss": 2.5}, "placement": {"a": everything}, "run": "r", "tokens": 10}
    save_checkpoint(folder, 3, state, {}, facts, 1)
    checkpoint = read_checkpoint(checkpoint_path(folder, 3))
    judged = Judged(config, routing, checkpoint.parameters, {"a": everything})
    return Saved(checkpoint, judged, TrainConfig(), DataConfig(tokenizer=tokenizer), UNKNOWN)


def logits_of(one: Saved, tokens_BS: torch.Tensor) -> torch.Tensor:
    module = build(
        one.judged.model, one.judged.everything, one.judged.routing, one.judged.state, "cpu"
    ).eval()
    hidden_BSD, _ = module.hidden(tokens_BS)
    return module.logits(hidden_BSD.flatten(0, 1)).view(*tokens_BS.shape, -1)


def loaded(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(
    ("router", "routing"),
    [("linear", "skip"), ("linear", "partitioned"), ("orthogonal", "skip"), ("grap", "skip")],
)
@torch.no_grad()
def test_transformers_gives_the_same_logits(tmp_path: Path, router: str, routing: str, shared: int) -> None:
    one = saved(tmp_path / "run", routing, router=router, num_shared_experts=shared)
    export(one, tmp_path / "out", torch.float32)
    tokens_BS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    module = loaded(tmp_path / "out")
    theirs = module(tokens_BS).logits
    torch.testing.assert_close(theirs, logits_of(one, tokens_BS), rtol=1e-5, atol=1e-5)
    # Padding on the left changes nothing, and a cache gives what the whole gives.
    padded_BS = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens_BS], dim=1)
    mask_BS = (torch.arange(27) >= 3).long().expand(2, -1)
    torch.testing.assert_close(
        module(padded_BS, attention_mask=mask_BS).logits[:, 3:], theirs, rtol=1e-4, atol=1e-5
    )
    first = module(tokens_BS[:, :20], use_cache=True)
    rest = module(tokens_BS[:, 20:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, theirs[:, 20:], rtol=1e-4, atol=1e-5)
    greedy = module.generate(tokens_BS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert greedy[:, 24].equal(theirs[:, -1].argmax(-1))


def test_a_run_is_exported_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = saved(tmp_path / "run")
    manifest = {
        "config": {"strategy": {"routing": "skip"}, "model": vars(one.judged.model), "train": {}, "data": {}}
    }
    facts = {**manifest, "placement": {"a": one.judged.everything}, "overrides": []}
    save_checkpoint(tmp_path / "run", 4, one.judged.state, {}, facts, 2)
    main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--dtype", "bf16"])
    assert "round_00004 as bf16" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_fomoe.py",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert loaded(tmp_path / "out").dtype == torch.bfloat16
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")])
    assert "is there already" in capsys.readouterr().err


def test_large_models_are_cut_into_files_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    one = saved(tmp_path / "run")
    export(one, tmp_path / "out", torch.float32)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(one.judged.state)
    assert len(set(index["weight_map"].values())) > 3
    named = dict(loaded(tmp_path / "out").named_parameters())
    assert all(named[name].equal(tensor) for name, tensor in one.judged.state.items())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_numbers_are_cast_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Files are cut by what is written, not by what is read: the same names with half of the bytes."""
    dtype, one = DTYPES[name], saved(tmp_path / "run", "partitioned")
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    export(one, tmp_path / "out", dtype)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert max(file.stat().st_size for file in files) < 25_000
    written = {key: value for file in files for key, value in load_file(file).items()}
    assert sum(value.nbytes for value in written.values()) * 2 == sum(
        value.nbytes for value in one.judged.state.values()
    )
    for key, value in one.judged.state.items():
        if not key.endswith("gate.weight"):
            assert written[key].equal(value.to(dtype))
    rows = [one.judged.state[f"model.layers.1.mlp.experts.{expert}.gate.weight"] for expert in range(8)]
    assert written["model.layers.1.mlp.gate.weight"].equal(torch.stack(rows).to(dtype))


def test_nothing_half_there_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export(saved(tmp_path / "run"), tmp_path / "out", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_byte_tokenizer_is_ours(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(byte_tokenizer()))
    text = "".join(map(chr, range(400))) + " Zwölf Boxkämpfer 🥊\r\n\tend"
    ours = load_tokenizer("bytes")
    assert theirs.encode(text).ids == ours.encode_batch([text])[0].tolist() == list(text.encode())
    assert theirs.decode(list(text.encode())) == text
    assert theirs.encode("a<|endoftext|>").ids == [97, ours.eos_id]


def test_a_tokenizer_of_the_users_goes_along(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    train_bpe(file)
    export(saved(tmp_path / "run", tokenizer=str(file)), tmp_path / "out", torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(str(file))
    text = " ".join(WORDS)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.encode_batch([text])[0].tolist()
    assert tokenizer.eos_token_id == ours.eos_id


def test_another_tokenizer_under_the_same_name_does_not_go_along(tmp_path: Path) -> None:
    """The ids of its tokens would mean something else."""
    one = dataclasses.replace(saved(tmp_path / "run"), inputs=Inputs(tokenizer="another"))
    with pytest.raises(CheckpointError, match=r"data\.tokenizer: .* before another"):
        export(one, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()
