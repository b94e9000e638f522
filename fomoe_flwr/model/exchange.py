"""Experts that are spread over the devices of a site: tokens are sent to them, or they to the tokens.

The devices form domains of S neighbours (HybridEP, arXiv 2510.19470, section 4). Within a domain the experts' weights
are gathered, so that each device computes all experts of its domain; tokens for another domain's experts go to the
device at the same place there, and their outputs come back. S = 1 is plain expert parallelism, with S = G devices no
token travels. Every S gives the same numbers.

Weights are gathered while the block computes what comes before its experts, and their gradients are brought back while
it computes that backward.

Each device holds a run of neighbouring slots of each layer's stack. So does each domain, and rows that are sorted by
expert are sorted by domain, too.

Letters: E slots of a layer, H those of a domain, P rows here, R rows that came, D d_model, G devices, S of a domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe_flwr.model.experts import compute_dtype
from fomoe_flwr.model.moe import Experts


@dataclass
class Traffic:
    """Bytes that this device has sent to other devices."""

    tokens: int = 0  # rows, their outputs and their gradients
    experts: int = 0  # weights and their gradients
    counts: int = 0  # how many rows come for each expert
    dispatched: int = 0  # rows on their way to an expert, those that stay here too


@dataclass(frozen=True)
class Domains:
    """The devices of a site as this one sees them.

    Args:
        rank: of this device.
        inside: the devices of its domain, in their order.
        across: of each domain the device at this one's place, in their order.
    """

    rank: int
    inside: dist.ProcessGroup
    across: dist.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        """S."""
        return self.inside.size()


def domains_of(rank: int, devices: int, size: int) -> Domains:
    """Divide the devices into domains of `size` neighbours. All devices must call it.

    Args:
        size: divides `devices`.
    """
    inside, across = [], []
    # Every device must make every group, also those that it is not in.
    for first in range(0, devices, size):
        inside.append(dist.new_group(list(range(first, first + size))))
    for place in range(size):
        across.append(dist.new_group(list(range(place, devices, size))))
    return Domains(rank, inside[rank // size], across[rank % size])


class Gathering:
    """The experts of a layer, of all devices of the domain.

    Args:
        weights: of this device, slots first.
        ends: end of each device's slots in the stack, by rank.
    """

    def __init__(self, domains: Domains, weights: Sequence[nn.Parameter], ends: Sequence[int]) -> None:
        first = domains.rank // domains.size * domains.size
        bounds = [ends[first - 1] if first else 0, *ends[first : first + domains.size]]
        self.domains, self.weights = domains, weights
        self.counts = [end - start for start, end in pairwise(bounds)]
        self._coming: dict[int, tuple[dist.Work, list[Tensor]]] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._going: list[tuple[Tensor, dist.Work, Tensor]] = []

    def begin(self) -> None:
        """Have them come, in the dtype of the computation."""
        for weight in self.weights:
            self._coming[id(weight)] = self._start(weight)

    def _start(self, weight_E: Tensor) -> tuple[dist.Work, list[Tensor]]:
        # Collectives want equal parts; only the last devices have fewer.
        part = weight_E.new_zeros(
            max(self.counts), *weight_E.shape[1:], dtype=compute_dtype(weight_E), requires_grad=False
        )
        part[: len(weight_E)] = weight_E.detach()
        parts = [torch.empty_like(part) for _ in self.counts]
        work = dist.all_gather(parts, part, group=self.domains.inside, async_op=True)
        self.domains.traffic.experts += (self.domains.size - 1) * part.nbytes
        return work, parts

    def __call__(self, weight_E: Tensor) -> Tensor:
        """Those of one of the weights, [H, ...]; its gradient is there after `finish`."""
        whole: Tensor = _Gather.apply(weight_E, self)  # type: ignore[no-untyped-call]
        return whole

    def take(self, weight_E: Tensor) -> Tensor:
        """What was begun, or is begun now: when experts are computed again, nobody has asked for them before."""
        begun = self._coming.pop(id(weight_E)) if id(weight_E) in self._coming else self._start(weight_E)
        work, parts = begun
        work.wait()
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def keep(self, weight_E: Tensor, grad_H: Tensor) -> None:
        """A gradient of all experts of the domain."""
        self._kept.append((weight_E, grad_H))

    def bring_back(self) -> None:
        """Send each device the gradients of its experts, which are added up there."""
        for weight_E, grad_H in self._kept:
            parts = grad_H.new_zeros(len(self.counts), max(self.counts), *grad_H.shape[1:])
            for padded, part in zip(parts, torch.split(grad_H, self.counts), strict=True):
                padded[: len(part)] = part
            own = torch.empty_like(parts)
            # As parts and not as a reduce-scatter: gloo makes that an all-reduce, of twice the bytes.
            work = dist.all_to_all_single(own, parts, group=self.domains.inside, async_op=True)
            self.domains.traffic.experts += (self.domains.size - 1) * parts[0].nbytes
            self._going.append((weight_E, work, own))
        self._kept.clear()

    def finish(self, devices: int) -> None:
        """Wait for the gradients, and add them, over the number of devices, to those of this device's weights."""
        self.bring_back()
        for weight_E, work, own in self._going:
            work.wait()
            gradient = own.to(weight_E.dtype).sum(0)[: len(weight_E)] / devices
            weight_E.grad = gradient if weight_E.grad is None else weight_E.grad + gradient
        self._going.clear()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_E: Tensor, gathering: Gathering) -> Tensor:
        ctx.of = weight_E, gathering
        return gathering.take(weight_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_H: Tensor) -> tuple[None, None]:
        weight_E, gathering = ctx.of
        gathering.keep(weight_E, grad_H)
        if gathering.domains.across.size() == 1:
            gathering.bring_back()
        return None, None


def exchanged(
    experts: Experts,
    x_PD: Tensor,
    offsets_E: Tensor,
    *,
    domains: Domains,
    ends: Sequence[int],
    then: Callable[[], None] = lambda: None,
) -> Tensor:
    """Outputs of rows whose experts may be computed on other devices, y_PD.

    Args:
        experts: outputs of rows in the order of the experts of this domain, and the ends of each expert's.
        x_PD: rows in the order of their experts.
        offsets_E: int32, end of each expert's rows, over all slots of the layer.
        ends: as in `Gathering`.
        then: called in the backward pass when the rows' gradients are back. Gradients of experts that travel wait for
            that: nobody needs them before the step, and the rows' are waited for.
    """
    size, group = domains.size, domains.across
    own, num_domains = domains.rank // size, group.size()
    starts = [0, *ends[size - 1 :: size]]
    slots = [end - start for start, end in pairwise(starts)]
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    # Of each domain's device at this place, how many rows it has for each expert here.
    counts_GH = counts_E.new_empty(num_domains * slots[own])
    dist.all_to_all_single(counts_GH, counts_E, [slots[own]] * num_domains, slots, group=group)
    domains.traffic.counts += counts_E.itemsize * (len(counts_E) - slots[own])
    counts_GH = counts_GH.view(num_domains, slots[own])
    # How many rows go and come must be known to the host.
    going = [int(part.sum()) for part in torch.split(counts_E, slots)]
    coming = [int(count) for count in counts_GH.sum(1).tolist()]
    x_PD = x_PD.to(compute_dtype(x_PD))
    domains.traffic.dispatched += x_PD.nbytes
    x_RD = _Exchange.apply(x_PD, domains, going, coming, then)  # type: ignore[no-untyped-call]
    if not slots[own]:
        # Of no expert there are no rows.
        y_RD = x_RD
    else:
        # They came by domain and within it by expert.
        slot_GH = torch.arange(slots[own], device=x_PD.device).repeat(num_domains)
        slot_R = slot_GH.repeat_interleave(counts_GH.flatten(), output_size=sum(coming))
        order_R = slot_R.argsort(stable=True)
        ends_H = counts_GH.sum(0).cumsum(0).to(torch.int32)
        sorted_RD = experts(x_RD.index_select(0, order_R), ends_H)
        y_RD = torch.zeros_like(sorted_RD).index_copy(0, order_R, sorted_RD)
    y_PD: Tensor = _Exchange.apply(y_RD, domains, coming, going, lambda: None)  # type: ignore[no-untyped-call]
    return y_PD


class _Exchange(torch.autograd.Function):
    """Rows to the devices at the same place of the other domains, and their gradients back."""

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        domains: Domains,
        going: list[int],
        coming: list[int],
        then: Callable[[], None],
    ) -> Tensor:
        ctx.of = domains, going, coming, then
        return _sent(x_PD, domains, going, coming)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        domains, going, coming, then = ctx.of
        grad_PD = _sent(grad_RD, domains, coming, going)
        then()
        return grad_PD, None, None, None, None


def _sent(x_PD: Tensor, domains: Domains, going: list[int], coming: list[int]) -> Tensor:
    x_RD = x_PD.new_empty(sum(coming), x_PD.shape[1])
    dist.all_to_all_single(x_RD, x_PD.contiguous(), coming, going, group=domains.across)
    others = sum(going) - going[domains.rank // domains.size]
    domains.traffic.tokens += others * x_PD.shape[1] * x_PD.itemsize
    return x_RD
