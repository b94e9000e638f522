"""An expert's move to a new holder, made cheap: only its largest differences from a shared tensor travel.

The shared tensor of a projection is the mean over all experts of its layer, and every site keeps it. An
expert is encoded as the top-k, by magnitude, of (expert - shared): the values in the wire's dtype and where
they belong. The receiver adds them to its shared tensor. Entries that do not travel fall back to the mean, so
the move loses something; `relative_error` says how much.

A bundle (wire.py) has one dtype, fp32 or bf16, and no integers. So a whole number travels as the 16 bits of
an ordinary number: one to a bf16, two to an fp32. They are chosen so that the result is positive, finite
and normal, and neither a check for NaN nor flushed denormals nor bf16 -> fp32 -> bf16 on the way can harm it.

Shapes: N entries of a tensor, K of them that travel, B blocks of 32,000 entries, one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fomoe_flwr.errors import WireError

SCHEME = "residual"  # in front of the names of parts; a change of the format needs another
PARTS = ("values", "indices", "counts")
DTYPES = (torch.bfloat16, torch.float32)

# 16 bits read as bf16, or as the upper half of an fp32, are positive, finite, normal from 0x0080 to 0x7f7f.
# Places in a block (below 32,000) and counts of a block (up to 32,000) stay inside once 0x80 is added.
BLOCK = 32_000
_FIRST = 0x80
_WORD_BYTES = 2

# The router's row (gate) is left out: it is tiny beside its expert, and what it loses would misroute tokens.
_PROJECTION = re.compile(r"(model\.layers\.\d+\.mlp\.)experts\.(\d+)\.(\w+_proj\.weight)")
_SHARED = re.compile(r"model\.layers\.\d+\.mlp\.shared_mean\.\w+_proj\.weight")


def shared_name(name: str) -> str | None:
    """Name of the shared tensor of an expert's projection; None for a tensor that always travels whole.

    model.layers.3.mlp.experts.7.up_proj.weight -> model.layers.3.mlp.shared_mean.up_proj.weight
    """
    match = _PROJECTION.fullmatch(name)
    return f"{match[1]}shared_mean.{match[3]}" if match else None


def shared_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shared tensors of a full state: for every layer and projection, the mean over its experts in fp32.

    Raises:
        ValueError: a state without some of the experts, whose mean would be another.
    """
    members: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if match := _PROJECTION.fullmatch(name):
            members.setdefault(f"{match[1]}shared_mean.{match[3]}", {})[int(match[2])] = tensor
    everyone = range(max((max(by_expert) for by_expert in members.values()), default=-1) + 1)
    for shared, by_expert in members.items():
        if missing := set(everyone) - by_expert.keys():
            raise ValueError(f"{shared}: needs every expert, but expert {min(missing)} is not in the state")
    return {shared: _mean([by_expert[e] for e in everyone]) for shared, by_expert in members.items()}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor in tensors:  # one at a time: a stack would need them all twice
        total += tensor.detach()
    return total / len(tensors)


def rounded(shared: Tensor, dtype: torch.dtype) -> Tensor:
    """The shared tensor as it arrives in `dtype`, in fp32 again: what both sides compute with.

    `encode` and `decode` do this themselves; doing it twice changes nothing.
    """
    return _normal(_normal(shared.detach().float()).to(dtype).float())


def _normal(tensor: Tensor) -> Tensor:
    """Zero for -0.0 and denormals: whether a processor keeps them is set per process, and would be seen."""
    return torch.where(tensor.abs() < torch.finfo(torch.float32).tiny, 0.0, tensor)


def encode(tensor: Tensor, shared: Tensor, ratio: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The largest differences of a tensor from the shared one, in at most 1/ratio of its bytes in `dtype`.

    As many entries as fit, but one at the least, whatever the ratio. Among equal ones the first are taken.

    Returns:
        values: in `dtype`, in the order of their places in the flattened tensor.
        indices: place of each in its block of 32,000 entries.
        counts: how many of the values lie in each block.

    Raises:
        WireError: a difference that is not finite in `dtype`.
        ValueError: a ratio below 1, another dtype than bf16 or fp32, or tensors of two shapes.
    """
    if not (ratio >= 1 and math.isfinite(ratio)):
        raise ValueError(f"ratio={ratio}: must be a finite number of at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(map(str, DTYPES))}")
    if tensor.shape != shared.shape:
        raise ValueError(f"a tensor {list(tensor.shape)} has no residual from {list(shared.shape)}")
    delta_N = _normal((tensor.detach().float() - rounded(shared, dtype)).flatten())
    if not bool(delta_N.to(dtype).isfinite().all()):
        raise WireError(f"its difference from the shared tensor has values that are not finite in {dtype}")
    where_K = _largest(delta_N.abs(), _affordable(tensor.numel(), ratio, dtype))
    counts_B = torch.bincount(where_K // BLOCK, minlength=_blocks(tensor.numel()))
    return {
        "values": delta_N[where_K].to(dtype),
        "indices": _to_words(where_K % BLOCK, dtype),
        "counts": _to_words(counts_B, dtype),
    }


def decode(parts: Mapping[str, Tensor], shared: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor that parts and the shared tensor make, in fp32: the same bits wherever it is computed.

    Raises:
        WireError: parts that `encode` cannot have made for this shape, or values that are not finite.
    """
    if tuple(shared.shape) != tuple(shape):
        raise WireError(f"residual for {list(shape)}, but the shared tensor is {list(shared.shape)}")
    values_K = _checked_values(parts)
    where_K = _places(parts, len(values_K), math.prod(shape))
    whole_N = rounded(shared, values_K.dtype).flatten()
    reached_K = _normal(whole_N[where_K] + _normal(values_K.float()))
    if not bool(reached_K.isfinite().all()):
        raise WireError("residual with values that are not finite")
    whole_N[where_K] = reached_K
    return whole_N.reshape(tuple(shape))


def pack(
    named: Mapping[str, Tensor], shared: Mapping[str, Tensor], ratio: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Named tensors for a bundle in `dtype`: residuals where there is a shared tensor, others as they are.

    The shared tensors themselves are not added: only a receiver that has none yet needs them beside.

    Raises:
        WireError, ValueError: as `encode`.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in named.items():
        base = _shared_of(name, shared)
        if base is None:
            packed[name] = tensor
            continue
        try:
            parts = encode(tensor, base, ratio, dtype)
        except WireError as error:
            raise WireError(f"{name}: {error}") from error
        packed.update({part_name(part, name): value for part, value in parts.items()})
    return packed


def unpack(named: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given, from ordinary tensors, shared ones and residuals in any order.

    Args:
        shared: that the receiver keeps. Those in `named` go before them, and are left out of the result.

    Raises:
        WireError: a residual that is damaged or incomplete, or has no shared tensor.
    """
    known = {**shared, **shared_in(named)}
    whole: dict[str, Tensor] = {}
    residuals: dict[str, dict[str, Tensor]] = {}
    for key, tensor in named.items():
        part, name = _split(key)
        if part:
            residuals.setdefault(name, {})[part] = tensor
        elif not _SHARED.fullmatch(name):
            whole[name] = tensor
    if twice := residuals.keys() & whole.keys():
        raise WireError(f"{min(twice)}: sent both whole and as a residual")
    return whole | {name: _restored(name, parts, known) for name, parts in residuals.items()}


def shared_in(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shared tensors among named ones: what a receiver keeps for the next message."""
    return {name: tensor for name, tensor in named.items() if _SHARED.fullmatch(name)}


def part_name(part: str, name: str) -> str:
    """Name under which a part of tensor `name` travels: residual.values/model.layers.3.mlp.experts.7.…"""
    return f"{SCHEME}.{part}/{name}"


def relative_error(tensor: Tensor, decoded: Tensor, shared: Tensor) -> float:
    """||decoded - tensor|| / ||tensor - shared||: how much of the expert's own is lost.

    0 if all arrived, 1 if nothing was sent. Against ||tensor|| it would look small whatever was lost, since
    much of an expert may be the mean. Give `shared` as the receiver has it (`rounded`).
    """
    lost, all_of_it = _distance(tensor, decoded), _distance(tensor, shared)
    if not all_of_it:
        return math.inf if lost else 0.0
    return lost / all_of_it


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one.detach().double() - other.detach().double()))


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _words_bytes(count: int, dtype: torch.dtype) -> int:
    """Bytes of `count` whole numbers in `dtype`, the last one filled up."""
    return -(-count * _WORD_BYTES // dtype.itemsize) * dtype.itemsize


def _affordable(numel: int, ratio: float, dtype: torch.dtype) -> int:
    """How many entries fit into 1/ratio of a tensor's bytes; one where none does."""
    budget = numel * dtype.itemsize / ratio - _words_bytes(_blocks(numel), dtype)
    entries = int(budget // (dtype.itemsize + _WORD_BYTES))
    if entries * dtype.itemsize + _words_bytes(entries, dtype) > budget:  # an odd one's filling
        entries -= 1
    return min(numel, max(1, entries))


def _largest(size_N: Tensor, count: int) -> Tensor:
    """Places of the `count` largest, ascending. Which of equal ones topk takes differs between devices."""
    if not count:
        return torch.empty(0, dtype=torch.int64, device=size_N.device)
    least = size_N.topk(count).values.min()
    above = (size_N > least).nonzero().flatten()
    equal = (size_N == least).nonzero().flatten()
    return torch.cat([above, equal[: count - len(above)]]).sort().values


def _to_words(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers below 0x7f00 as the bits of numbers in `dtype`."""
    words = torch.full(
        (_words_bytes(len(numbers), dtype) // _WORD_BYTES,), _FIRST, dtype=torch.int16, device=numbers.device
    )
    words[: len(numbers)] += numbers.to(torch.int16)
    return words.view(dtype)


def _from_words(part: Tensor, count: int, what: str) -> Tensor:
    """The `count` whole numbers in the bits of a part; any 16 bits may have been sent."""
    if part.numel() * part.dtype.itemsize != _words_bytes(count, part.dtype):
        raise WireError(f"residual with {part.numel()} x {part.dtype} of {what}, which do not hold {count}")
    words = part.contiguous().view(torch.int16).long() - _FIRST
    if bool(words[count:].any()):
        raise WireError(f"residual with more {what} than the {count} that belong to it")
    return words[:count]


def _checked_values(parts: Mapping[str, Tensor]) -> Tensor:
    """The values, once the parts are complete and of one dtype that travels."""
    if parts.keys() != set(PARTS):
        raise WireError(f"residual with {', '.join(sorted(parts)) or 'no parts'}: needs {', '.join(PARTS)}")
    dtypes = {part.dtype for part in parts.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        found = ", ".join(f"{part} {parts[part].dtype}" for part in PARTS)
        raise WireError(f"residual of {found}: needs one of {', '.join(map(str, DTYPES))} for all")
    if any(part.dim() != 1 for part in parts.values()):
        raise WireError(f"residual of shapes {[list(parts[part].shape) for part in PARTS]}: needs flat parts")
    return parts["values"]


def _places(parts: Mapping[str, Tensor], count: int, numel: int) -> Tensor:
    """Where in the flattened tensor each value belongs: ascending, none twice, none outside."""
    counts_B = _from_words(parts["counts"], _blocks(numel), "counts")
    if bool((counts_B < 0).any()) or int(counts_B.sum()) != count:
        raise WireError(f"residual of {count} values: its counts do not add up to them")
    indices_K = _from_words(parts["indices"], count, "indices")
    if bool(((indices_K < 0) | (indices_K >= BLOCK)).any()):
        raise WireError(f"residual with an index outside of its block of {BLOCK} entries")
    starts_B = torch.arange(len(counts_B), device=counts_B.device) * BLOCK
    where_K = starts_B.repeat_interleave(counts_B) + indices_K
    if bool((where_K >= numel).any()):
        raise WireError(f"residual with an index beyond the tensor's {numel} entries")
    if bool((where_K.diff() <= 0).any()):
        raise WireError("residual with indices that do not ascend")
    return where_K


def _split(key: str) -> tuple[str | None, str]:
    """(part, name of the tensor) for a name that `part_name` made, (None, key) for any other."""
    if not key.startswith(f"{SCHEME}."):
        return None, key
    part, _, name = key.removeprefix(f"{SCHEME}.").partition("/")
    if part not in PARTS:
        raise WireError(f"{key}: a residual has no such part")
    return part, name


def _shared_of(name: str, shared: Mapping[str, Tensor]) -> Tensor | None:
    key = shared_name(name)
    return None if key is None else shared.get(key)


def _restored(name: str, parts: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
    base = _shared_of(name, shared)
    if base is None:
        raise WireError(f"{name}: residual without a shared tensor")
    try:
        return decode(parts, base, base.shape)
    except WireError as error:
        raise WireError(f"{name}: {error}") from error
