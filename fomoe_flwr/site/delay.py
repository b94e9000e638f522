"""strategy.delay=1: a round whose start does not wait for the round before it (after eager updates, arXiv 2502.12996).

A site begins round r not from what message r brings, but from what message r-1 brought, moved by its own update of
round r-1. Both are there when it has finished round r-1, so what travels between two rounds can be hidden behind the
local steps. What the others have learnt in round r-1 is missing: it is in the start of round r+1.

How far a site goes by its own update alone is a guess of what all updates together will do. With 1/H of it, H being
the sites that share the tensor, as in the paper, it begins as if the others had learnt nothing: what all learn alike is
then learnt, and added to the model, twice. With all of it, it begins as if they had learnt the same, and keeps what in
its update was chance. 1/sqrt(H) lies between; docs/method.md has what was measured.

What a tensor begins from is a matter of numbers alone: they do not depend on when a message came.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.codecs import decoded, grouped, of_part, up_codec
from fomoe_flwr.config import OUTER_LR, OUTER_MOMENTUM, StrategyConfig
from fomoe_flwr.messages import Task
from fomoe_flwr.model.spec import place_of

# Of `strategy`: what a reader of an update must know of its encoder.
_CODEC_KEYS = ("up", "density", "value_bits")


@dataclass(frozen=True)
class Sent:
    """A site's own update of a round, as the start of its next round needs it; empty with strategy.delay=0."""

    parts: dict[str, Tensor] = field(default_factory=dict)  # as they travelled
    codec: dict[str, Any] = field(default_factory=dict)  # keys of `strategy` by which they were encoded
    # By tensor: how far the site goes on by this update alone, as a share of it.
    shares: dict[str, float] = field(default_factory=dict)


def gain(strategy: StrategyConfig) -> float:
    """How far one outer step moves a tensor for a mean update of 1 that is new to it: Nesterov's lr·(1 + momentum)."""
    if strategy.outer == "average":
        return 1.0
    lr = OUTER_LR[strategy.outer] if strategy.outer_lr is None else strategy.outer_lr
    momentum = OUTER_MOMENTUM if strategy.outer_momentum is None else strategy.outer_momentum
    return lr * (1 + momentum)


def sent(task: Task, blobs: Mapping[str, bytes]) -> Sent:
    """What a site must remember of the update that it answers with.

    Args:
        blobs: its bundles, whose memory stays in use.
    """
    parts = wire.from_blobs(blobs.values())
    codec = {key: getattr(task.strategy, key) for key in _CODEC_KEYS}
    names = {of_part(part)[0] for part in parts}
    return Sent(
        parts, codec, {name: gain(task.strategy) / math.sqrt(_sharers(task, name)) for name in sorted(names)}
    )


def _sharers(task: Task, name: str) -> int:
    """The sites that are asked for an update of this tensor in this round.

    Who of them answers well is not known to a site that goes on before it is decided.
    """
    place = place_of(task.model, name)
    if place is None:
        return task.asked
    layer, expert = place
    return task.holders[layer][task.residents[layer].index(expert)]


def start(
    task: Task, arrived: Mapping[str, Tensor], before: Mapping[str, Tensor], own: Sent, round_: int
) -> tuple[dict[str, Tensor], bool]:
    """What a site begins its round from; and whether it knew all of it before the message came.

    A tensor begins as it came a message before, moved by the site's own update since, H being the sites that share it:
    `A(r-1) - gain / sqrt(H) · D(r-1)`. It begins as it comes now where the site has no such update: if the state that
    counts is not that of the round before (its reply was lost or refused, the round was discarded, the site was away or
    is new), or does not hold the tensor (the expert is new to the site, the state was lost). What the message does not
    bring, because it was not its turn, is not looked at.

    Args:
        arrived: the tensors that the message brings.
        before: as the messages brought them, the last of which that with which the state that counts was made.
        own: the update of that round.
        round_: that round.

    Returns:
        The start by name, fp32 where it is not what arrived.
    """
    follows = round_ == task.round - 1
    codec = up_codec(dataclasses.replace(task.strategy, **own.codec))
    parts = grouped(own.parts)
    begun = dict(arrived)
    # A run that has just begun to delay does not know what came before.
    known = [name for name in arrived if follows and name in own.shares and name in before]
    for name in known:
        update = decoded(codec, name, parts[name], before[name].shape)
        # In two operations: as one it might be rounded once or twice, by where an element lies in memory.
        begun[name] = update.float().mul(-own.shares[name]).add_(before[name])
    return begun, len(known) == len(begun)
