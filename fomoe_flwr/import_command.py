"""`fomoe import`: a checkpoint of Hugging Face, looked through and written anew for `model.path` and everybody's tools.

A checkpoint in bf16 or fp32 needs no import: `model.path` may name its folder. This fetches one by its name, turns
MXFP4 into bf16, leaves out what the architecture does not have, and says what is wrong before a run is begun.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.console import Parser
from fomoe_flwr.data.tokenizer import load_tokenizer
from fomoe_flwr.errors import ConfigError, DataError
from fomoe_flwr.export import DTYPES, stock_json, write_weights
from fomoe_flwr.files import expanded, whole_folder
from fomoe_flwr.hf_files import open_checkpoint, read_architecture
from fomoe_flwr.reading import reason
from fomoe_flwr.units import in_bytes

# Copied as they are, where they are there.
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "README.md",
)
_WANTED = ("config.json", "*.safetensors", "*.safetensors.index.json", *_BESIDE)


def import_command(arguments: Sequence[str]) -> None:
    """The command.

    Raises:
        ConfigError: an argument is wrong, or the checkpoint is not what its config.json describes.
        OSError: the folder cannot be written; nothing of it is left then.
    """
    parser = Parser(prog="fomoe import", description="A checkpoint of Hugging Face as model.path reads it.")
    parser.add_argument("source", help="a folder, or OWNER/NAME on Hugging Face's hub")
    parser.add_argument("--to", required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="of the weights (default: each as it is, MXFP4 as bf16)"
    )
    given = parser.parse_args(list(arguments))
    target = expanded(given.to).absolute()
    if target.exists():
        raise ConfigError(f"fomoe import --to {given.to}: is there already; name a new folder")
    source = expanded(given.source)
    folder = source.absolute() if source.is_dir() else fetch(given.source)
    dtype = DTYPES[given.dtype] if given.dtype else None
    model = write(folder, target, dtype, f"fomoe import {given.source}")
    print(
        f"{target}: {model.hf['model_type']}, {model.num_layers} layers of {model.num_experts} experts; train with "
        f"model=hf model.path={target}"
    )


def fetch(name: str) -> Path:
    """The folder into which a checkpoint of the hub was fetched; what is there already is not fetched again.

    Raises:
        ConfigError: no folder and no name, no such checkpoint, or no network.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(
            f"fomoe import {name:.200}: no such folder; give one, or OWNER/NAME on Hugging Face's hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"fomoe import {name:.200}: needs huggingface_hub; pip install 'fomoe-flwr[hf]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # of many kinds: of the network, of the hub, of a name that is none
        raise ConfigError(
            f"fomoe import {name:.200}: is no folder here, and could not be fetched from Hugging Face's hub "
            f"({reason(error)}); without a network give a folder"
        ) from error


def write(folder: Path, target: Path, dtype: torch.dtype | None, asked: str) -> ModelConfig:
    """Write the checkpoint aside, and rename it into its place when it is whole. One tensor is in memory at a time.

    Args:
        dtype: None: each as it is.
        asked: what the user wrote, for the error lines.

    Raises:
        ConfigError: see `import_command`.
        OSError: it cannot be written.
    """
    from fomoe_flwr.model.stock import sizes_of

    hf = read_architecture(folder, asked)
    model = ModelConfig(name=folder.name, hf=hf, **sizes_of(hf))
    with open_checkpoint(folder, model, asked) as found:
        shapes = {name: tensor.to(dtype or found.dtype(name)) for name, tensor in found.shapes.items()}
        needed = sum(tensor.nbytes for tensor in shapes.values())
        parent = next(parent for parent in target.parents if parent.exists())
        if (free := shutil.disk_usage(parent).free) < needed:
            raise ConfigError(
                f"{asked}: needs {in_bytes(needed)} in {parent}, where {in_bytes(free)} are free"
            )
        beside = [folder / name for name in _BESIDE if (folder / name).exists()]
        for file in beside:
            if not file.is_file():
                raise ConfigError(f"{asked}: {file.name} is no regular file")
            if file.name == "tokenizer.json":
                _check_tokenizer(file, model.vocab_size, asked)
        with whole_folder(target) as aside:
            write_weights(aside, shapes, found.read)
            for file in beside:
                shutil.copyfile(file, aside / file.name)
            config = json.dumps(stock_json(model, dtype or _common(shapes.values())), indent=1)
            (aside / "config.json").write_text(config + "\n", encoding="utf-8")
    return model


def _check_tokenizer(file: Path, vocab_size: int, asked: str) -> None:
    try:
        tokenizer = load_tokenizer(str(file))
    except DataError as error:
        raise ConfigError(f"{asked}: {str(error).removeprefix(f'data.tokenizer={file}: ')}") from error
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{asked}: its tokenizer.json does not fit: it has token {tokenizer.vocab_size - 1}, the model "
            f"{vocab_size} tokens (vocab_size of config.json)"
        )


def _common(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of most numbers."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0]
