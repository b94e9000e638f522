"""What the server knows of one round, and how a reply becomes part of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import Size

from fomoe_flwr import wire
from fomoe_flwr.bundles import blobs_of
from fomoe_flwr.errors import RunError, WireError
from strategies.exchange import error_line


@dataclass(frozen=True)
class SiteResult:
    """What one site reported."""

    site: str
    tokens: int
    train_loss: float
    tokens_per_second: float
    resident_share: float
    seconds: float
    expert_tokens: dict[str, int]  # assignments by the expert's up-projection's name


@dataclass
class Round:
    """A round while it runs, and its figures afterwards. Sites are indices into the federation's list."""

    number: int
    began: float = field(default_factory=time.perf_counter)
    names: Mapping[int, frozenset[str]] = field(
        default_factory=dict
    )  # what each site was sent, in folding order
    down: wire.Ledger = field(default_factory=wire.Ledger)
    up: wire.Ledger = field(default_factory=wire.Ledger)
    results: dict[int, SiteResult] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # site's name -> reason
    evaluations: dict[str, float] = field(default_factory=dict)  # site's name -> loss with its residents only
    wire_s: float = 0.0  # encoding, pushing, checking
    aggregate_s: float = 0.0  # folding and the outer step


def number(metrics: MetricRecord, key: str) -> float:
    """A metric as a float; 0 where it is missing (another ClientApp may report less than ours)."""
    value = metrics.get(key, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def metrics_of(content: RecordDict) -> MetricRecord:
    """The reply's one MetricRecord, whatever its key."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise WireError(f"the reply has {len(records)} MetricRecords, expected one")
    return records[0]


def read_reply(
    current: Round,
    site: int,
    name: str,
    reply: Message,
    shapes: Mapping[str, Size],
    keys: tuple[str, str, str],
) -> tuple[SiteResult, list[bytes]]:
    """Hold a training reply against what its site was sent; return its figures and its bundles.

    Args:
        keys: of the ArrayRecord, of the ConfigRecord, and of the weight in the MetricRecord.

    Raises:
        RunError: the site reported an error.
        WireError: another round's reply, names it was not sent, or an unreadable one.
    """
    if reply.has_error():
        raise RunError(error_line(reply))
    content = reply.content
    current.up.count(site, content)
    arrays_key, config_key, weight_key = keys
    facts = content.config_records.get(config_key, ConfigRecord())
    answered = facts.get("round", current.number)
    if answered != current.number:
        raise WireError(f"answered for round {answered!r}, this is round {current.number}")
    if arrays_key not in content.array_records:
        raise WireError(f"the reply has no ArrayRecord {arrays_key!r}")
    blobs = list(blobs_of(content.array_records[arrays_key]).values())
    del content[arrays_key]  # whoever still holds the message must not hold its arrays
    for key, tensor in wire.from_blobs(blobs).items():
        if key not in current.names[site]:
            raise WireError(f"{key}: was not sent to this site")
        if tensor.shape != shapes[key]:
            raise WireError(f"{key}: shape {list(tensor.shape)}, sent was {list(shapes[key])}")
    metrics = metrics_of(content)
    weight, seconds = number(metrics, weight_key), number(metrics, "seconds")
    if not weight > 0:
        raise WireError(f"the reply's MetricRecord has no positive {weight_key!r}")
    result = SiteResult(
        site=name,
        tokens=int(weight),
        train_loss=number(metrics, "train_loss"),
        tokens_per_second=weight / seconds if seconds else 0.0,
        resident_share=number(metrics, "resident_share"),
        seconds=seconds,
        expert_tokens=json.loads(str(facts.get("expert-tokens", "{}"))),
    )
    return result, blobs
