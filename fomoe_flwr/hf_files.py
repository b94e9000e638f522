"""Checkpoints of Hugging Face: a folder's config.json and safetensors to our names and back, a tensor at a time.

What is in a folder comes from anybody: only JSON and safetensors are read, and no code of it is run.

Letters: E experts, R rows, B blocks of 32 numbers.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fomoe_flwr.config import ModelConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.mapped import PIECE_BYTES
from fomoe_flwr.model.families import family_of
from fomoe_flwr.model.spec import Param, expert_layers, expert_name, gate_name, is_standin, parameters, table
from fomoe_flwr.placement import full_residents
from fomoe_flwr.reading import reason
from fomoe_flwr.untrusted import parse_json_file

log = logging.getLogger("fomoe")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What says nothing of the architecture, or runs code.
_NOT_KEPT = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_FLOATS = ("BF16", "F32", "F16")  # as safetensors calls them
# In files of earlier versions of transformers; computed anew.
_COMPUTED = ("rotary_emb.inv_freq",)


def read_architecture(folder: Path, where: str) -> dict[str, Any]:
    """What `config.json` says of the architecture.

    Args:
        where: what the user wrote to name the folder, for the error lines.

    Raises:
        ConfigError: no such folder or file, or weights in a format that is not read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{where}: no such folder")
    file = folder / "config.json"
    try:
        values = parse_json_file(file)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{where}: has no config.json; give the folder of a Hugging Face checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: config.json cannot be read ({reason(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: config.json is not a table of keys")
    quantised = values.pop("quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if method not in (None, "mxfp4"):
        raise ConfigError(
            f"{where}: its weights are quantised ({method!s:.40}); give a checkpoint in bf16, fp32 or mxfp4"
        )
    family_of(values)
    return {name: value for name, value in values.items() if name not in _NOT_KEPT}


# ----- in


def indexed(folder: Path, where: str) -> dict[str, str]:
    """Which file has which tensor, by the folder's index.

    Args:
        where: what the user wrote to name the folder, for the error lines.

    Raises:
        ConfigError: the index cannot be read, or names what is no safetensors file in the folder itself.
    """
    try:
        found = parse_json_file(folder / INDEX)["weight_map"]
        files = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {INDEX} cannot be read ({reason(error)})") from error
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(
                f"{where}: {INDEX} names {file:.200}, which is no safetensors file of this folder"
            )
        if not (folder / file).is_file():
            lacks = "has no regular file" if (folder / file).exists() else "lacks"
            raise ConfigError(f"{where}: {lacks} {file}, which {INDEX} names")
    return files


def largest(tensor: Tensor) -> float:
    """The largest size of a number in it; NaN if there is one. Makes no second tensor (`isfinite` would)."""
    return float(torch.stack(tensor.aminmax()).abs().max()) if tensor.numel() else 0.0


class _Shards:
    """The files of a folder, each opened when it is first needed."""

    def __init__(self, folder: Path, where: str) -> None:
        self._folder, self._where = folder, where
        self._opened: dict[str, Any] = {}
        self._touched = 0  # bytes that were read of the open files
        self._stack = contextlib.ExitStack()
        self.file_of = self._find()

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _find(self) -> dict[str, str]:
        if (self._folder / INDEX).exists():
            return indexed(self._folder, self._where)
        if (self._folder / SINGLE).exists():
            return dict.fromkeys(self.open(SINGLE).keys(), SINGLE)
        raise self._error(f"has neither {SINGLE} nor {INDEX}; only safetensors are read")

    def open(self, file: str) -> Any:
        """An open file."""
        if file not in self._opened:
            if not (self._folder / file).is_file():
                raise self._error(f"{file} is no regular file")
            try:
                self._opened[file] = self._stack.enter_context(safe_open(self._folder / file, "pt"))
            except (SafetensorError, OSError) as error:
                raise self._error(f"{file} is damaged ({reason(error)})") from error
        return self._opened[file]

    def read(self, name: str) -> Tensor:
        """A tensor of this name, dequantised if it is in MXFP4."""
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        if name not in self.file_of and blocks in self.file_of and scales in self.file_of:
            blocks_ERB, scales_ERB = self._tensor(blocks, ("U8",)), self._tensor(scales, ("U8",))
            if blocks_ERB.ndim != 4 or blocks_ERB.shape[:-1] != scales_ERB.shape:
                raise self._error(f"{name}: its blocks and its scales do not fit each other")
            return mxfp4(blocks_ERB, scales_ERB).transpose(-1, -2)
        if name not in self.file_of:
            raise self._error(f"lacks {name}")
        return self._tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives."""
        if name not in self.file_of:
            return torch.bfloat16 if f"{name}_blocks" in self.file_of else self.read(name).dtype
        return self._tensor(name).dtype

    def _tensor(self, name: str, allowed: Sequence[str] = _FLOATS) -> Tensor:
        # What was read counts as this process's memory until its file is closed.
        if self._touched >= PIECE_BYTES:
            self._stack.close()
            self._opened.clear()
            self._touched = 0
        try:
            file = self.open(self.file_of[name])
            # Anything else is quantised, and means nothing without its scales.
            if (dtype := file.get_slice(name).get_dtype()) not in allowed:
                raise self._error(f"{name} has dtype {dtype}; allowed are {', '.join(allowed)}")
            tensor: Tensor = file.get_tensor(name)
            self._touched += tensor.nbytes
        except SafetensorError as error:
            raise self._error(f"{self.file_of[name]} lacks {name} ({reason(error)})") from error
        return tensor

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"{self._where}: {what}")


class Opened(NamedTuple):
    """The tensors of a folder, by their names there."""

    shapes: Mapping[str, Tensor]  # without content (`meta`)
    dtype: Callable[[str], torch.dtype]  # of what `read` gives
    read: Callable[[str], Tensor]


@contextlib.contextmanager
def open_checkpoint(folder: Path, model: ModelConfig, where: str) -> Iterator[Opened]:
    """A folder that has this model's tensors and no others.

    Args:
        where: what the user wrote to name the folder, for the error lines.

    Raises:
        ConfigError: see `read_state`; also when a tensor is read.
    """
    blank = {name: torch.empty(param.shape, device="meta") for name, param in _standard(model).items()}
    shapes = {name: make(blank) for name, make in on_disk(model).items()}
    with _Shards(folder, where) as shards:
        _check_names(shards, _by_disk_name(model), model, where)

        def read(name: str) -> Tensor:
            tensor = shards.read(name)
            if tensor.shape != shapes[name].shape:
                raise ConfigError(
                    f"{where}: {name} has shape {list(tensor.shape)}, which is not that of its config.json"
                )
            if not math.isfinite(largest(tensor)):
                raise ConfigError(f"{where}: {name} has numbers that are not finite (NaN or infinite)")
            return tensor

        yield Opened(shapes, shards.dtype, read)


def read_state(folder: Path, model: ModelConfig, routing: str, where: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model by our names, in the dtype that they have on disk, one after the other.

    A tensor is a view of the file where that is possible: take what is wanted of it before the next one.

    Raises:
        ConfigError: a file or tensor is missing, has another shape or dtype or numbers that are not finite, or is no
            part of the architecture.
    """
    family = family_of(model.hf)
    with open_checkpoint(folder, model, where) as found:
        for there, names in _by_disk_name(model).items():
            whole = found.read(there)
            for name in names:
                yield from as_held(name, family.cut(name, whole), model, routing)


def _check_names(shards: _Shards, ours: Mapping[str, list[str]], model: ModelConfig, where: str) -> None:
    """What is on disk and is not ours: left out where it is known to be none of the model's, else refused."""
    layers = int(model.hf.get("num_hidden_layers") or 0)
    left_out = set()
    for name in shards.file_of:
        if name in ours or name.removesuffix("_blocks").removesuffix("_scales") in ours:
            continue
        parts = name.split(".")
        number = parts[2] if name.startswith("model.layers.") and len(parts) > 3 else ""
        if name == "lm_head.weight":
            # Tied in config.json: a file may have it all the same, but then it must be the embedding.
            if not torch.equal(shards.read(name), shards.read("model.embed_tokens.weight")):
                raise ConfigError(
                    f"{where}: config.json ties the embeddings (tie_word_embeddings), but lm_head.weight is "
                    "another than model.embed_tokens.weight"
                )
        elif number.isdecimal() and len(number) < 9 and layers and int(number) >= layers:
            left_out.add(f"model.layers.{number}")  # DeepSeek-V3 predicts more than one token with these
        elif not name.endswith(_COMPUTED):
            raise ConfigError(f"{where}: {name:.200} is no part of what config.json describes")
    if left_out:
        log.warning(
            "%s: left out, for they are behind the last layer of config.json: %s",
            where, ", ".join(sorted(left_out)),
        )  # fmt: skip


def as_held(name: str, tensor: Tensor, model: ModelConfig, routing: str) -> Iterator[tuple[str, Tensor]]:
    """A router's rows go with the experts in partitioned mode."""
    for layer in expert_layers(model) if routing == "partitioned" else ():
        whole = gate_name(layer).removesuffix("weight")
        if name.startswith(whole):
            for expert in range(model.num_experts):
                row = expert_name(layer, expert, "gate").removesuffix("weight")
                yield row + name.removeprefix(whole), tensor[expert]
            return
    yield name, tensor


def whole_routers(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """A state of partitioned mode under the names of skip mode: a router's rows make one matrix."""
    whole = dict(state)
    # A router may have more than its weight (gpt-oss, DeepSeek-V3).
    for param in table(model, "skip"):
        if param.kind == "router":
            part = param.name.removeprefix(gate_name(0).replace(".0.", ".{layer}.").removesuffix("weight"))
            for layer in expert_layers(model):
                rows = [
                    whole.pop(expert_name(layer, expert, "gate").removesuffix("weight") + part)
                    for expert in range(model.num_experts)
                ]
                whole[param.name.format(layer=layer)] = torch.stack(rows)
    return whole


# Sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers of an MXFP4 tensor, bf16, in which each of them is exact.

    Args:
        blocks: uint8 [..., R, B, 16]: two numbers a byte, the first in the lower half.
        scales: uint8 [..., R, B]: each block's exponent of two, plus 127.

    Returns:
        [..., R, 32·B].
    """
    values = torch.tensor(_E2M1)
    pairs = torch.stack((values[(blocks & 15).long()], values[(blocks >> 4).long()]), dim=-1)
    numbers = torch.ldexp(pairs.flatten(-2), scales.int().unsqueeze(-1) - 127)
    return numbers.flatten(-2).to(torch.bfloat16)


# ----- out


# Makes a tensor of an export from a state whose routers are whole.
Maker = Callable[[Mapping[str, Tensor]], Tensor]


def on_disk(model: ModelConfig) -> dict[str, Maker]:
    """The tensors of an export by their names, and how each is made."""
    family = family_of(model.hf)

    def maker(ours: Sequence[str]) -> Maker:
        return lambda state: family.join({one: state[one] for one in ours})

    return {name: maker(ours) for name, ours in _by_disk_name(model).items()}


def _standard(model: ModelConfig) -> dict[str, Param]:
    """The tensors that the architecture itself has."""
    everything = full_residents(model.num_layers, model.num_experts)
    own = parameters(model, everything, "skip").items()
    return {name: param for name, param in own if not is_standin(name)}


def _by_disk_name(model: ModelConfig) -> dict[str, list[str]]:
    """Of which of our names (skip mode) each tensor of a checkpoint is made."""
    family = family_of(model.hf)
    found: dict[str, list[str]] = {}
    for name in _standard(model):
        found.setdefault(family.to_disk(name), []).append(name)
    return found
