"""From the global state to the messages of a round: shards as bundles that sites share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Array
from torch import Tensor

from fomoe_flwr import residual
from fomoe_flwr.model.names import expert_of
from fomoe_flwr.placement import holder_groups
from fomoe_flwr.wire import blob_digests, tensor_digest, to_arrays

_ALL: tuple[int, ...] = ()  # key of the dense group, which every site gets


def group_names(
    names: Sequence[str], residents_by_site: Sequence[Sequence[Sequence[int]]]
) -> dict[tuple[int, ...], list[str]]:
    """Names by the set of sites that get them. Dense names go to all, an expert that nobody holds to nobody."""
    holders = holder_groups(residents_by_site)
    groups: dict[tuple[int, ...], list[str]] = {_ALL: []}
    for name in names:
        expert = expert_of(name)
        if expert is None:
            groups[_ALL].append(name)
        elif expert in holders:
            groups.setdefault(holders[expert], []).append(name)
    return groups


@dataclass
class MoveFigures:
    """What the experts cost that came to a new holder this round; bytes are to all sites."""

    experts: int = 0  # expert and site
    tensors: int = 0  # that arrived as residuals
    bytes_sent: int = 0  # of the experts
    bytes_shared: int = 0  # of the mean experts that the sites need beside
    bytes_full: int = 0  # that the same experts have in full
    error: float = (
        0.0  # mean of residual.relative_error over the tensors; 0: nothing lost, 1: all but the mean
    )


Residents = Sequence[Sequence[Sequence[int]]]  # by site and layer


def without(residents: Residents, moved: Residents) -> list[list[list[int]]]:
    """The residents that are not among the moved."""
    return [
        [[expert for expert in kept if expert not in gone] for kept, gone in zip(layers, left, strict=True)]
        for layers, left in zip(residents, moved, strict=True)
    ]


class Shards:
    """The bundles of a round, encoded once each, and who gets which.

    Args:
        moved: experts that are new to a site and travel as residuals; they are residents, too.
        ratio: full bytes of a moved expert to those of its residual.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        residents_by_site: Sequence[Sequence[Sequence[int]]],
        sites: Sequence[int],
        dtype: torch.dtype,
        moved: Residents | None = None,
        ratio: float = 1.0,
    ) -> None:
        self.moves = MoveFigures()
        in_full = residents_by_site if moved is None else without(residents_by_site, moved)
        groups = group_names(list(state), in_full)
        self._by_site: dict[int, dict[str, Array]] = {site: {} for site in sites}
        self.digests: dict[int, dict[str, bytes]] = {site: {} for site in sites}  # of every tensor, by name
        for index, (holders, names) in enumerate(groups.items()):
            receivers = [site for site in sites if holders == _ALL or site in holders]
            if not receivers or not names:
                continue
            key = "dense" if holders == _ALL else f"expert-{index}"
            arrays = to_arrays(key, {name: state[name] for name in names}, dtype)
            digests: dict[str, bytes] = {}
            for array in arrays.values():
                digests |= blob_digests(array.data)
            for site in receivers:
                self._by_site[site] |= arrays
                self.digests[site] |= digests
        if moved is not None:
            self._add_moves(state, moved, sites, dtype, ratio)

    def _add_moves(
        self,
        state: Mapping[str, Tensor],
        moved: Residents,
        sites: Sequence[int],
        dtype: torch.dtype,
        ratio: float,
    ) -> None:
        groups = group_names(list(state), moved)
        del groups[_ALL]
        receivers = {holders: [site for site in sites if site in holders] for holders in groups}
        if not any(receivers.values()):
            return
        shared = residual.shared_experts(state)
        arrays = to_arrays("shared", shared, dtype)
        for site in sorted({site for group in receivers.values() for site in group}):
            self._by_site[site] |= arrays
            self.moves.bytes_shared += sum(tensor.numel() for tensor in shared.values()) * dtype.itemsize
        errors: list[float] = []
        for index, (holders, names) in enumerate(groups.items()):
            if not receivers[holders]:
                continue
            named = {name: state[name] for name in names}
            packed = residual.pack(named, shared, ratio, dtype)
            arrays, digests = to_arrays(f"moved-{index}", packed, dtype), {}
            for name, arrived in residual.unpack(packed, shared).items():
                digests[name] = tensor_digest(arrived, dtype)
                base = residual.shared_name(name)
                if base is not None:
                    known = residual.rounded(shared[base], dtype)
                    errors.append(residual.relative_error(named[name], arrived, known))
            figures = MoveFigures(
                experts=len({expert_of(name) for name in names}),
                tensors=sum(residual.shared_name(name) is not None for name in names),
                bytes_sent=sum(tensor.numel() for tensor in packed.values()) * dtype.itemsize,
                bytes_full=sum(tensor.numel() for tensor in named.values()) * dtype.itemsize,
            )
            for site in receivers[holders]:
                self._by_site[site] |= arrays
                self.digests[site] |= digests
                self.moves = _sum(self.moves, figures)
        self.moves.error = sum(errors) / len(errors)

    def arrays(self, site: int) -> dict[str, Array]:
        """A site's bundles. The Array objects are shared between sites, so Flower stores each once."""
        return self._by_site[site]


def _sum(one: MoveFigures, other: MoveFigures) -> MoveFigures:
    added = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return MoveFigures(*(a + b for a, b in added))
