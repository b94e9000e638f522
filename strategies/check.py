"""What a reply must be before it may become part of the model. A bad one is refused whole, with its reason.

A site is not trusted to send sense: it may be damaged, late, of another version, or hostile. It can only change
what it holds, by an amount that its fellows find ordinary.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Size, Tensor

from fomoe_flwr import wire
from fomoe_flwr.bundles import blobs_of, bundle_digests, record_in
from fomoe_flwr.errors import WireError
from fomoe_flwr.model.names import MOMENTS
from strategies.round import SiteResult

T = TypeVar("T")

PIECE = 2**22  # numbers


class Refused(WireError):
    """A reply that does not become part of the model. `kind` is one word for the metrics."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Expected:
    """What a site's reply is held against.

    Args:
        digests: of each tensor it was sent (`wire.tensor_digest`), by name.
        tokens: that its round has at the most.
        top_k: experts a token chooses in a layer.
        load_shape: layers, experts of a layer.
        dtype: of every tensor on the wire.
    """

    run: str
    round: int
    site: str
    digests: Mapping[str, bytes]
    shapes: Mapping[str, Size]
    dtype: torch.dtype
    tokens: int
    top_k: int
    load_shape: tuple[int, int]  # layers, experts of a layer
    pace: float = 1.0  # by which its update's norm is multiplied before it is held against the others'

    def start_digests(self) -> bytes:
        """The digests as the site reports them: end to end, by sorted name."""
        return b"".join(self.digests[name] for name in sorted(self.digests))


def check_facts(facts: ConfigRecord, expected: Expected) -> None:
    """Which run, round and site a reply says it is for.

    Raises:
        Refused: another one.
    """
    for key, value in (("run", expected.run), ("round", expected.round), ("site", expected.site)):
        if facts.get(key) != value:
            raise Refused(key, f"answered for {key} {facts.get(key)!r}, asked was {key} {value!r}")


def check_start(facts: ConfigRecord, expected: Expected) -> None:
    """Whether the site started from what it was sent, tensor by tensor.

    Raises:
        Refused: naming the first tensor that differs.
    """
    reported, size = facts.get("start-digests"), wire.DIGEST_BYTES
    if reported == expected.start_digests():
        return
    if not isinstance(reported, bytes) or len(reported) != size * len(expected.digests):
        raise Refused("attestation", "does not say which tensors it started from")
    differing = [
        name
        for index, name in enumerate(sorted(expected.digests))
        if reported[index * size : (index + 1) * size] != expected.digests[name]
    ]
    raise Refused(
        "attestation",
        f"started from another {differing[0]} than it was sent ({len(differing)} such tensors)",
    )


def check_reply(
    content: RecordDict, expected: Expected, keys: tuple[str, str, str]
) -> tuple[SiteResult, dict[str, float]]:
    """Hold a training reply against what its site was asked; its figures, and its norms by kind of tensor.

    Args:
        keys: of the ArrayRecord, of the ConfigRecord, and of the weight in the MetricRecord.

    Raises:
        Refused: the first thing that is wrong.
    """
    arrays_key, config_key, weight_key = keys
    facts = facts_of(content, config_key)
    check_facts(facts, expected)
    arrays = record_in(content, arrays_key, ArrayRecord)
    if arrays is None:
        raise Refused("damaged", f"the reply has no ArrayRecord {arrays_key!r}")
    try:
        blobs = blobs_of(arrays)
        if _json(facts, "bundle-digests", dict) != bundle_digests(blobs):
            raise Refused("digest", "its bundles are not those whose SHA-256 it names")
        named = wire.from_blobs(blobs.values())
    except Refused:
        raise
    except WireError as error:
        raise Refused("damaged", str(error)) from error
    _check_tensors(named, expected)
    norms = _norms(named)
    if "update" in norms:  # a site that takes more steps goes farther, and must not stand out for it
        norms["update"] *= expected.pace
    check_start(facts, expected)
    metrics = metrics_of(content)
    weight, seconds = number(metrics, weight_key), number(metrics, "seconds")
    if not 0 < weight <= expected.tokens:
        raise Refused(
            "weight", f"{weight_key}={weight:g}: must be above 0 and at most the round's {expected.tokens}"
        )
    result = SiteResult(
        site=expected.site,
        tokens=int(weight),
        train_loss=number(metrics, "train_loss"),
        tokens_per_second=weight / seconds if seconds > 0 else 0.0,
        resident_share=number(metrics, "resident_share"),
        seconds=seconds,
        memory_bytes=number(metrics, "memory_bytes"),
        load_LE=_router_load(facts, expected),
        first_loss=number(metrics, "first_loss") if "first_loss" in metrics else None,
        last_loss=number(metrics, "last_loss") if "last_loss" in metrics else None,
    )
    return result, norms


def _check_tensors(named: Mapping[str, Tensor], expected: Expected) -> None:
    for name, tensor in named.items():
        if name not in expected.shapes:
            raise Refused("unknown_name", f"{name}: no tensor of this model")
        if name not in expected.digests:
            raise Refused("not_held", f"{name}: was not sent to this site")
        if tensor.shape != expected.shapes[name]:
            raise Refused(
                "shape", f"{name}: shape {list(tensor.shape)}, sent was {list(expected.shapes[name])}"
            )
        if tensor.dtype != expected.dtype:
            raise Refused("dtype", f"{name}: dtype {tensor.dtype}, agreed is {expected.dtype}")


def _norms(named: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of the pseudo-gradients, and of each of LocalAdamW's moments, over all tensors together.

    Raises:
        Refused: a value that is not finite, or a negative second moment.
    """
    if not named:
        raise Refused("damaged", "the reply has no tensors")
    names = list(named)
    # One pass for size and finiteness: a norm is finite only if every value is. In pieces, for PyTorch turns what it
    # takes the norm of into fp32 first, and an embedding may be most of the model.
    flat = [tensor.reshape(-1) for tensor in named.values()]
    pieces = [[own[at : at + PIECE] for at in range(0, own.numel(), PIECE)] for own in flat]
    norms = iter(torch._foreach_norm([piece for own in pieces for piece in own], 2, dtype=torch.float32))
    each = [math.hypot(*(float(next(norms)) for _ in own)) for own in pieces]
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, norm in zip(names, each, strict=True):
        tensor = named[name]
        if not math.isfinite(norm) and not bool(torch.isfinite(tensor).all()):
            raise Refused("not_finite", f"{name}: has values that are not finite")
        if name.startswith("exp_avg_sq.") and tensor.numel() and float(tensor.min()) < 0:
            raise Refused("not_finite", f"{name}: a second moment cannot be negative")
        kind = next((moment for moment in MOMENTS if name.startswith(f"{moment}.")), "update")
        squares[kind] = squares.get(kind, 0.0) + norm**2
        counts[kind] = counts.get(kind, 0) + tensor.numel()
    return {kind: math.sqrt(squares[kind] / max(counts[kind], 1)) for kind in squares}


def outliers(
    norms: Mapping[int, Mapping[str, float]], history: Sequence[Mapping[str, float]], bound: float
) -> dict[int, str]:
    """Sites whose update is more than `bound` times the median of the others'.

    Each is held against the others alone, so that a huge one cannot hide in its own median; and against this round's
    alone, because what makes all updates large (a hard stretch of data, a higher learning rate) is no site's fault.
    Only where fewer than two others answered do rounds before count too. With nobody to compare with, nothing
    is refused.

    Returns:
        The reason by site; empty if `bound` is 0.
    """
    found = {}
    for site, own in norms.items():
        others = [norms[other] for other in norms if other != site]
        if len(others) < 2:
            others += history
        for kind, value in own.items():
            known = [other[kind] for other in others if kind in other]
            if bound and known and not value <= bound * statistics.median(known):
                found[site] = (
                    f"{kind} of RMS {value:.3g}, the others' median is {statistics.median(known):.3g} "
                    f"(strategy.norm_bound={bound:g})"
                )
                break
    return found


def facts_of(content: RecordDict, key: str) -> ConfigRecord:
    """The reply's ConfigRecord, empty where it has none."""
    return record_in(content, key, ConfigRecord) or ConfigRecord()


def metrics_of(content: RecordDict) -> MetricRecord:
    """The reply's one MetricRecord, whatever its key.

    Raises:
        Refused: none or several, or a value that is no finite number.
    """
    records = [record for record in content.values() if isinstance(record, MetricRecord)]
    if len(records) != 1:
        raise Refused("damaged", f"the reply has {len(records)} MetricRecords, expected one")
    for key, value in records[0].items():
        if isinstance(value, list) or not math.isfinite(value):
            raise Refused("not_finite", f"metric {key}={value!r}: must be a finite number")
    return records[0]


def number(metrics: MetricRecord, key: str) -> float:
    """A metric as a float; 0 where it is missing (another ClientApp may report less than ours)."""
    value = metrics.get(key, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def _router_load(facts: ConfigRecord, expected: Expected) -> NDArray[np.int64]:
    """How often the site's router chose each expert; zeros where a ClientApp of another make does not say."""
    reported = _json(facts, "router-load", list)
    if not reported:
        return np.zeros(expected.load_shape, dtype=np.int64)
    most = expected.tokens * expected.top_k
    try:
        load_LE = np.array(reported)
        good = load_LE.shape == expected.load_shape and load_LE.dtype.kind == "i"
    except ValueError:  # rows of different lengths
        good = False
    if not good or load_LE.min() < 0 or load_LE.sum(axis=1).max() > most:
        raise Refused(
            "weight", f"router-load: not at most {most} choices in each of {expected.load_shape[0]} layers"
        )
    return load_LE.astype(np.int64)


def _json(facts: ConfigRecord, key: str, kind: type[T]) -> T:
    """What a fact holds, empty where it is missing."""
    if key not in facts:
        return kind()
    try:
        value = json.loads(str(facts[key]))
    except (ValueError, RecursionError) as error:
        raise Refused("damaged", f"{key}: not JSON") from error
    if not isinstance(value, kind):
        raise Refused("damaged", f"{key}: not a {kind.__name__}")
    return value
