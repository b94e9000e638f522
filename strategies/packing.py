"""From the global state to the messages of a round: shards as bundles that sites share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import Array
from torch import Tensor

from fomoe_flwr.model.names import expert_of
from fomoe_flwr.placement import holder_groups
from fomoe_flwr.wire import blob_digests, to_arrays

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


class Shards:
    """The bundles of a round, encoded once each, and who gets which."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        residents_by_site: Sequence[Sequence[Sequence[int]]],
        sites: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        groups = group_names(list(state), residents_by_site)
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

    def arrays(self, site: int) -> dict[str, Array]:
        """A site's bundles. The Array objects are shared between sites, so Flower stores each once."""
        return self._by_site[site]
