"""Checkpoints of Hugging Face: what transformers saves comes in and goes out with the same names and bits.

Letters: E experts, D d_model, H d_expert.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fomoe_flwr import hf_files
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.hf_files import mxfp4, on_disk, read_architecture, read_state, whole_routers
from fomoe_flwr.model.spec import parameter_shapes
from fomoe_flwr.placement import full_residents
from tests.model.stock_models import CONFIGS, stock

transformers = pytest.importorskip("transformers")

families = pytest.mark.parametrize("family", CONFIGS)


def saved(family: str, folder: Path, shard: str = "5GB", **changes: Any) -> dict[str, Tensor]:
    """A checkpoint as transformers writes it, in bf16; all that is on disk."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**stock(family, **changes).hf)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    return everything_in(folder)


def everything_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@families
@pytest.mark.parametrize("shard", ["5GB", "40KB"], ids=["one file", "many"])
def test_in_and_out_are_the_same_names_and_bits(
    family: str, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_files, "PIECE_BYTES", 10_000)  # so that files are closed and opened again
    there = saved(family, tmp_path, shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    model = stock(family)
    assert read_architecture(tmp_path, "k")["model_type"] == family
    state = {name: value.float() for name, value in read_state(tmp_path, model, "skip", "k")}
    everything = full_residents(model.num_layers, model.num_experts)
    assert {name: tuple(value.shape) for name, value in state.items()} == parameter_shapes(
        model, everything, "skip"
    )
    back = {name: make(state).to(torch.bfloat16) for name, make in on_disk(model).items()}
    assert back.keys() == there.keys()
    for name, value in there.items():
        assert back[name].equal(value.to(torch.bfloat16)), name


@families
def test_partitioned_rows_of_a_router_go_with_the_experts(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    model = stock(family)
    whole = dict(read_state(tmp_path, model, "skip", "k"))
    state = dict(read_state(tmp_path, model, "partitioned", "k"))
    layer = (model.expert_layers or [])[0]
    everything = full_residents(model.num_layers, model.num_experts)
    assert state.keys() == parameter_shapes(model, everything, "partitioned").keys()
    router = whole[f"model.layers.{layer}.mlp.gate.weight"]
    assert state[f"model.layers.{layer}.mlp.experts.5.gate.weight"].equal(router[5])
    back = whole_routers(state, model)
    assert back.keys() == whole.keys()
    assert all(back[name].equal(value) for name, value in whole.items())


# What can be wrong with a folder, what is done to it, and what the line says.
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda at: (at / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda at: (at / "config.json").write_text("{"), "config.json cannot be read"),
    "unknown": (lambda at: rewrite(at, model_type="llama"), "model_type=llama: allowed are olmoe, qwen3_moe"),
    "quantised": (
        lambda at: rewrite(at, quantization_config={"quant_method": "fp8"}),
        "its weights are quantised (fp8)",
    ),
    "no weights": (
        lambda at: [file.unlink() for file in at.glob("*.safetensors*")],
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "a shard lacks": (
        lambda at: (at / "model-00002-of-00009.safetensors").unlink(),
        "lacks model-00002-of-00009.safetensors",
    ),
    "a shard is cut": (
        lambda at: (at / "model-00002-of-00009.safetensors").write_bytes(b"\0" * 9),
        "model-00002-of-00009.safetensors is damaged",
    ),
    "leads out": (
        lambda at: reindex(at, lambda name, file: f"../{file}"),
        "names ../model-00001-of-00009.safetensors, which is no safetensors file of this folder",
    ),
    "an absolute path": (
        lambda at: reindex(at, lambda name, file: str(at / file)),
        "which is no safetensors file of this folder",
    ),
    "a pickle": (
        lambda at: reindex(at, lambda name, file: "model.bin"),
        "names model.bin, which is no safetensors file of this folder",
    ),
    "nested JSON": (lambda at: (at / "config.json").write_text("[" * 10**5), "config.json cannot be read (JSON nested"),
    "a nested value": (
        lambda at: rewrite(at, more=json.loads("[" * 200 + "]" * 200)), "config.json cannot be read (JSON nested"
    ),
    "a nested index": (
        lambda at: (at / hf_files.INDEX).write_text("[" * 10**5), f"{hf_files.INDEX} cannot be read (JSON nested"
    ),
    "config is a FIFO": (lambda at: pipe(at / "config.json"), "config.json cannot be read (no regular file)"),
    "index is a FIFO": (lambda at: pipe(at / hf_files.INDEX), f"{hf_files.INDEX} cannot be read (no regular file)"),
    "a shard is a FIFO": (
        lambda at: pipe(at / "model-00002-of-00009.safetensors"),
        "has no regular file model-00002-of-00009.safetensors",
    ),
    "the only file is a FIFO": (
        lambda at: ((at / hf_files.INDEX).unlink(), pipe(at / "model.safetensors")),
        "model.safetensors is no regular file",
    ),
    "fp8": (
        lambda at: retensor(at, "model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)),
        "model.norm.weight has dtype F8_E4M3; allowed are BF16, F32, F16",
    ),
    "fp64": (
        lambda at: retensor(at, "model.norm.weight", torch.ones(64).double()),
        "model.norm.weight has dtype F64; allowed",
    ),
    "int8": (
        lambda at: retensor(at, "model.norm.weight", torch.ones(64).to(torch.int8)),
        "model.norm.weight has dtype I8; allowed",
    ),
    "NaN": (
        lambda at: retensor(at, "model.norm.weight", torch.tensor([math.nan] + [1.0] * 63)),
        "model.norm.weight has numbers that are not finite",
    ),
    "infinite": (
        lambda at: retensor(at, "model.norm.weight", torch.tensor([1.0] * 63 + [-math.inf]).half()),
        "model.norm.weight has numbers that are not finite",
    ),
    "a tensor lacks": (
        lambda at: reindex(at, lambda name, file: None if name == "model.norm.weight" else file),
        "lacks model.norm.weight",
    ),
    "another shape": (
        lambda at: retensor(at, "model.norm.weight", torch.ones(65)),
        "model.norm.weight has shape [65], which is not that of its config.json",
    ),
    "a tensor more": (
        lambda at: retensor(at, "model.extra.weight", torch.ones(3)),
        "model.extra.weight is no part of what config.json describes",
    ),
}  # fmt: skip


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def rewrite(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def reindex(folder: Path, change: Callable[[str, str], str | None]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    changed = {name: change(name, where) for name, where in index["weight_map"].items()}
    file.write_text(json.dumps({"weight_map": {name: where for name, where in changed.items() if where}}))


def retensor(folder: Path, name: str, value: Tensor) -> None:
    save_file({name: value}, folder / "more.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "more.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_folder_is_one_line(wrong: str, tmp_path: Path) -> None:
    saved("olmoe", tmp_path, "50KB")
    damage, told = WRONG[wrong]
    damage(tmp_path)

    def read() -> None:
        read_architecture(tmp_path, "model.path=in")
        list(read_state(tmp_path, stock("olmoe"), "skip", "model.path=in"))

    with pytest.raises(ConfigError) as caught:
        read()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_beside_tied_embeddings_must_be_the_embedding(tmp_path: Path) -> None:
    there = saved("qwen3_moe", tmp_path)
    assert "lm_head.weight" not in there
    embedding = there["model.embed_tokens.weight"]
    save_file(there | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in dict(read_state(tmp_path, stock("qwen3_moe"), "skip", "k"))
    save_file(there | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"config\.json ties the embeddings"):
        list(read_state(tmp_path, stock("qwen3_moe"), "skip", "k"))


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    there = saved("olmoe", tmp_path)
    del there["lm_head.weight"]
    save_file(there, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks lm_head\.weight"):
        list(read_state(tmp_path, stock("olmoe"), "skip", "k"))


def test_layers_behind_the_last_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = saved("deepseek_v3", tmp_path)
    save_file(there | {"model.layers.3.eh_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert not any("layers.3." in name for name, _ in read_state(tmp_path, stock("deepseek_v3"), "skip", "k"))
    assert "model.layers.3" in caplog.text


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """OpenAI's checkpoints have the experts so."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (8, 64, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (8, 64, 2), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert mxfp4(blocks, scales).transpose(-1, -2).equal(theirs)
    there = saved("gpt_oss", tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert there[name].shape == theirs.shape
    del there[name]
    packed = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(there | packed, tmp_path / "model.safetensors")
    state = dict(read_state(tmp_path, stock("gpt_oss"), "skip", "k"))
    assert state["model.layers.0.mlp.experts.3.up_proj.weight"].equal(theirs[3, :, 1::2].T)
    scales[3, 5, 1] = 255
    save_file(there | packed, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{name} has numbers that are not finite"):
        list(read_state(tmp_path, stock("gpt_oss"), "skip", "k"))
    for spoilt, told in (
        (scales[:, :9], "its blocks and its scales do not fit"),
        (scales.float(), "F32; allowed are U8"),
    ):
        save_file(there | packed | {f"{name}_scales": spoilt.clone()}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=told):
            list(read_state(tmp_path, stock("gpt_oss"), "skip", "k"))
