"""`fomoe export`: a checkpoint as a folder that `transformers` loads, with its tokenizer and where it came from.

The σ-MoE brings its own class (`model/modeling_fomoe.py`), so it is loaded with `trust_remote_code=True`. A stock
architecture (`model.hf`) is written as its checkpoints are, and needs no code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe_flwr import __version__
from fomoe_flwr.checkpoint import Checkpoint
from fomoe_flwr.config import ModelConfig
from fomoe_flwr.console import Parser
from fomoe_flwr.data.tokenizer import load_tokenizer
from fomoe_flwr.errors import CheckpointError, ConfigError
from fomoe_flwr.eval_command import Saved, check_tokenizer, load
from fomoe_flwr.files import expanded, whole_folder
from fomoe_flwr.hf_files import largest, on_disk, whole_routers
from fomoe_flwr.model.spec import (
    depth_multiplier,
    is_standin,
    logit_multiplier,
    parameters,
    routing_in_words,
)
from fomoe_flwr.placement import full_residents
from fomoe_flwr.wire import split_bundle, write_tensors

CODE = "modeling_fomoe.py"
SHARD_BYTES = 5 * 10**9  # of a file of weights, as huggingface_hub has it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_command(arguments: Sequence[str]) -> None:
    """The command.

    Raises:
        ConfigError: an argument is wrong.
        CheckpointError: the checkpoint is missing, damaged or not of this program.
        OSError: the folder cannot be written; nothing of it is left then.
    """
    parser = Parser(prog="fomoe export", description="A checkpoint as a folder that transformers loads.")
    parser.add_argument("checkpoint", help="a run directory, its checkpoints folder, or one checkpoint")
    parser.add_argument("--to", required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument(
        "--dtype", default="fp32", choices=sorted(DTYPES), help="of the weights (default fp32)"
    )
    given = parser.parse_args(list(arguments))
    target = expanded(given.to).absolute()
    if target.exists():
        raise ConfigError(f"fomoe export --to {given.to}: is there already; name a new folder")
    saved = load(given.checkpoint, f"fomoe export {given.checkpoint}")
    export(saved, target, DTYPES[given.dtype])
    how = "" if saved.judged.model.hf else " with trust_remote_code=True"
    print(f"{target}: {saved.checkpoint.path.name} as {given.dtype}; transformers loads it{how}")


def export(saved: Saved, target: Path, dtype: torch.dtype) -> None:
    """Write the folder aside, and rename it into its place when it is whole.

    Raises:
        CheckpointError: the checkpoint's tensors are not those of its model, or the tokenizer has changed since.
        OSError: it cannot be written.
    """
    model, state = saved.judged.model, whole_state(saved)
    makers = on_disk(model) if model.hf else {name: itemgetter(name) for name in state}
    # Sizes and shapes, before anything is read.
    blank = {name: tensor.to("meta") for name, tensor in state.items()}
    shapes = {name: make(blank).to(_written(name, dtype)) for name, make in makers.items()}
    with whole_folder(target) as aside:
        write_weights(aside, shapes, lambda name: makers[name](state))
        eos = write_tokenizer(aside, saved)
        config = stock_json(model, dtype, eos) if model.hf else hf_config(saved, eos, dtype)
        for name, content in (
            ("config.json", config),
            ("generation_config.json", {"eos_token_id": eos, "pad_token_id": eos}),
        ):
            (aside / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if not model.hf:
            shutil.copyfile(str(files("fomoe_flwr") / "model" / CODE), aside / CODE)
        (aside / "README.md").write_text(_card(saved, dtype), encoding="utf-8")


def whole_state(saved: Saved) -> dict[str, Tensor]:
    """The parameters under the names of the exported class; rows of a partitioned router make one matrix.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    model, routing, state = saved.judged.model, saved.judged.routing, dict(saved.judged.state)
    everything = full_residents(model.num_layers, model.num_experts)
    for name, param in parameters(model, everything, routing).items():
        if name not in state or tuple(state[name].shape) != tuple(param.shape):
            raise CheckpointError(f"checkpoint {saved.checkpoint.path}: not of the model it names: {name}")
    state = {name: tensor for name, tensor in state.items() if not is_standin(name)}
    return whole_routers(state, model) if routing == "partitioned" else state


def stock_json(model: ModelConfig, dtype: torch.dtype, eos: int | None = None) -> dict[str, Any]:
    """`config.json` of a stock architecture.

    Args:
        eos: the id that ends a document, where the architecture names none.
    """
    # Not needed for the σ-MoE.
    from fomoe_flwr.model.stock import class_name

    hf = model.hf
    return {
        "architectures": [class_name(hf)],
        **({} if eos is None else {"eos_token_id": eos}),
        **hf,
        "dtype": str(dtype).removeprefix("torch."),
        "transformers_version": version("transformers"),
    }


def hf_config(saved: Saved, eos: int, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json`."""
    model = saved.judged.model
    module = CODE.removesuffix(".py")
    return {
        "architectures": ["FomoeForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.FomoeConfig",
            "AutoModelForCausalLM": f"{module}.FomoeForCausalLM",
        },
        "model_type": "fomoe",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        # By which tools choose the length of their texts. The model itself has no limit, but it never saw more.
        "max_position_embeddings": saved.train.seq_len,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_experts": model.num_experts,
        "moe_intermediate_size": model.d_expert,
        "num_experts_per_tok": model.top_k,
        "num_shared_experts": model.num_shared_experts,
        "router": model.router,
        "rope_theta": model.rope_theta,
        "norm_eps": model.norm_eps,
        "depth_multiplier": depth_multiplier(model),
        "logit_multiplier": logit_multiplier(model),
        "tie_word_embeddings": True,
        "eos_token_id": eos,
    }


def _written(name: str, dtype: torch.dtype) -> torch.dtype:
    """DeepSeek-V3's bias is added to scores that differ by less than bf16 can tell."""
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


def write_weights(folder: Path, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """One file, or several and their index, named as transformers looks for them; one tensor is in memory at a time.

    Args:
        shapes: the tensors without content (`meta`), in the dtype in which they are written.
        read: a tensor by its name, when its turn has come.

    Raises:
        ConfigError: a number is too large for fp16.
    """

    def fitting(name: str) -> Tensor:
        tensor = read(name)
        most = torch.finfo(torch.float16).max
        if shapes[name].dtype == torch.float16 and not largest(tensor) <= most:
            raise ConfigError(
                f"--dtype fp16: {name} has numbers above {most:g}, the largest of fp16; give bf16"
            )
        return tensor

    sizes = {name: tensor.nbytes for name, tensor in shapes.items()}
    shards = list(split_bundle(sorted(shapes), sizes, SHARD_BYTES))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        shard = {name: shapes[name] for name in names}
        write_tensors(folder / file, shard, read=fitting)
        where |= dict.fromkeys(names, file)
    if len(shards) == 1:
        return
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_tokenizer(folder: Path, saved: Saved) -> int:
    """`tokenizer.json` and its configuration; returns the id that ends a document."""
    spec = saved.data.tokenizer
    tokenizer = load_tokenizer(spec)
    check_tokenizer(saved, tokenizer, asked=False)
    if spec == "bytes":
        content = json.dumps(byte_tokenizer(), ensure_ascii=False)
    else:
        content = expanded(spec).read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    vocabulary = json.loads(content)
    added = {token["id"]: token["content"] for token in vocabulary.get("added_tokens", [])}
    known = vocabulary["model"].get("vocab", {})
    names = {index: name for name, index in known.items()} if isinstance(known, dict) else {}
    end = added.get(tokenizer.eos_id, names.get(tokenizer.eos_id))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return tokenizer.eos_id


def byte_tokenizer() -> dict[str, Any]:
    """`data.tokenizer=bytes` as a tokenizer.json: one token a byte, whose id is the byte, and 256 to end a document."""
    # ByteLevel writes a byte that is not printable as a character from 256 on (GPT-2).
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }
    end = "<|endoftext|>"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 256, "content": end, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        ],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(256)} | {end: 256}, "merges": []},
    }  # fmt: skip


def _card(saved: Saved, dtype: torch.dtype) -> str:
    """README.md: where the model came from."""
    checkpoint: Checkpoint = saved.checkpoint
    manifest, data = checkpoint.manifest, saved.data
    metrics = manifest.get("metrics") or {}
    inputs = "\n".join(f"| {key} | {value} |" for key, value in manifest.get("inputs", {}).items() if value)
    sites = ", ".join(manifest.get("placement", {}))
    loss = metrics.get("val_loss")
    begun = Path(saved.judged.model.path or "").name if saved.judged.model.init == "checkpoint" else ""
    if (origin := manifest.get("init_from")) is not None:
        begun = f"{Path(origin['path']).name}, round {origin['round']} of run {origin['run']}, "
        begun += f"SHA-256 of the parameters {origin['sha256']}"
    trust = "" if saved.judged.model.hf else ", trust_remote_code=True"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# A mixture of experts, trained by a federation

Exported by fomoe-flwr {__version__} from round {checkpoint.round} of run {manifest.get("run", "?")}, as {dtype}.

| | |
|---|---|
| text | {data.source} {data.name or Path(data.path or "").name} |
| tokens trained, all sites | {manifest.get("tokens", "?")} |
| sites | {sites} |
| model at step 0 | {begun or "at random"} |
| routing in training | {routing_in_words(saved.judged.model, saved.judged.routing)} |
| validation loss, nats a token | {"not measured" if loss is None else f"{loss:.4f}"} |
| SHA-256 of the parameters in the checkpoint | {manifest["sha256"].get("parameters.safetensors", "?")} |
{inputs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER"{trust})
```
"""
