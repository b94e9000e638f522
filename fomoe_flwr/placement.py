"""Which site holds which expert (FoMoE, algorithm 1): pure functions of the seed.

The paper leaves the fixed map open. Ours lays O_e copies of a shuffled circle of experts end to end and cuts the
line into M pieces, one for each site. Where N_e·O_e does not divide by M, the first sites of the federation's list
hold one expert more than the others, in every draw: so what a site needs is known before. A piece is never longer
than the circle, so a site's experts are distinct by construction; and there are at most M different sets of
holders, M / gcd(M, O_e) with equal pieces, however many experts there are, which keeps the number of bundles on the
wire small. Experts are shuffled anew for every layer, sites once for all layers, so that the sets of holders are the
same in every layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """holds_LEM[layer, expert, site] is True where the site holds the expert."""

    holds_LEM: NDArray[np.bool_]

    @property
    def num_sites(self) -> int:
        return int(self.holds_LEM.shape[2])

    def residents(self, site: int) -> list[list[int]]:
        """The experts of a site, ascending, one list a layer."""
        return [np.flatnonzero(holds_E).tolist() for holds_E in self.holds_LEM[:, :, site]]

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """The sites that hold an expert, ascending."""
        return tuple(np.flatnonzero(self.holds_LEM[layer, expert]).tolist())


class Move(NamedTuple):
    """An expert that a site did not hold before and holds now."""

    site: int
    layer: int
    expert: int


def check_overlap(num_sites: int, num_experts: int, overlap: int) -> None:
    """Raise unless every expert can be on exactly `overlap` of `num_sites` sites, and every site has one.

    Raises:
        ConfigError: naming what is allowed.
    """
    if not 1 <= overlap <= num_sites:
        raise ConfigError(
            f"strategy.overlap={overlap}: between 1 and the number of sites, {num_sites} (federation.num_sites)"
        )
    if num_experts * overlap < num_sites:
        raise ConfigError(
            f"strategy.overlap={overlap}: {num_experts} experts (model.num_experts) x {overlap} holders are fewer "
            f"than {num_sites} sites (federation.num_sites), and each needs one; overlap must be at least "
            f"{least_overlap(num_sites, num_experts)}"
        )


def least_overlap(num_sites: int, num_experts: int) -> int:
    """The smallest overlap with which every site has an expert."""
    return -(-num_sites // num_experts)


def equal_shares(num_sites: int, num_experts: int, overlap: int) -> list[int]:
    """How many experts of a layer each site holds: N_e·O_e/M, or one more at the first sites where it has a rest."""
    share, rest = divmod(num_experts * overlap, num_sites)
    return [share + (site < rest) for site in range(num_sites)]


def draw_placement(
    num_sites: int, num_experts: int, overlap: int, num_layers: int, seed: int, draw: int = 0
) -> Placement:
    """One placement: every expert on exactly `overlap` sites, every site with its `equal_shares`.

    Args:
        draw: counts the redraws of random placement; fixed placement is draw 0.

    Raises:
        ConfigError: sizes for which there is no such placement.
    """
    check_overlap(num_sites, num_experts, overlap)
    shares = equal_shares(num_sites, num_experts, overlap)
    rng = np.random.default_rng([seed, draw])
    site_order_M = rng.permutation(num_sites)
    holds_LEM = np.zeros((num_layers, num_experts, num_sites), dtype=bool)
    for layer in range(num_layers):
        line = np.tile(rng.permutation(num_experts), overlap)
        begin = 0
        for site in site_order_M:
            holds_LEM[layer, line[begin : begin + shares[site]], site] = True
            begin += shares[site]
    return Placement(holds_LEM)


def uncovered(placement: Placement, alive: Collection[int]) -> list[tuple[int, int]]:
    """(layer, expert) of those that no site in `alive` holds."""
    none_LE = ~placement.holds_LEM[:, :, sorted(alive)].any(axis=2)
    return [(layer, expert) for layer, expert in np.argwhere(none_LE).tolist()]


def adopt(placement: Placement, alive: Collection[int]) -> Placement:
    """The placement with each expert that no site in `alive` holds given to one that is.

    It goes to the site with the fewest experts of that layer, the first of several; nobody gives an expert up.
    """
    present = sorted(alive)
    holds_LEM = placement.holds_LEM.copy()
    for layer, expert in uncovered(placement, present) if present else ():
        load = holds_LEM[layer][:, present].sum(axis=0)
        holds_LEM[layer, expert, present[int(load.argmin())]] = True
    return Placement(holds_LEM)


def draw_for_round(kind: str, reshuffle_every: int, round_: int) -> int:
    """Which draw is in force in a round (counted from 1): `fixed` keeps draw 0, `random` redraws every T rounds."""
    return 0 if kind == "fixed" else (round_ - 1) // reshuffle_every


def moves(before: Placement, after: Placement) -> Iterator[Move]:
    """What each site must fetch to go from one placement to the next, by site, layer and expert."""
    gained_LEM = after.holds_LEM & ~before.holds_LEM
    for site, layer, expert in np.argwhere(gained_LEM.transpose(2, 0, 1)).tolist():
        yield Move(site, layer, expert)


def from_residents(residents_by_site: Sequence[Sequence[Sequence[int]]], num_experts: int) -> Placement:
    """The inverse of `Placement.residents`, for all sites."""
    num_sites, num_layers = len(residents_by_site), len(residents_by_site[0])
    holds_LEM = np.zeros((num_layers, num_experts, num_sites), dtype=bool)
    for site, residents in enumerate(residents_by_site):
        for layer, experts in enumerate(residents):
            holds_LEM[layer, list(experts), site] = True
    return Placement(holds_LEM)


def full_residents(num_layers: int, num_experts: int) -> list[list[int]]:
    """The residents of somebody who holds the whole model (the server, a full replica)."""
    return [list(range(num_experts)) for _ in range(num_layers)]


def holder_groups(
    residents_by_site: Sequence[Sequence[Sequence[int]]],
) -> dict[tuple[int, int], tuple[int, ...]]:
    """For every (layer, expert) that anybody holds, the indices of its holders in `residents_by_site`, ascending."""
    groups: dict[tuple[int, int], tuple[int, ...]] = {}
    for site, residents in enumerate(residents_by_site):
        for layer, experts in enumerate(residents):
            for expert in experts:
                groups[layer, expert] = (*groups.get((layer, expert), ()), site)
    return groups


def numbered(which_LE: NDArray[np.bool_], layers: Sequence[int]) -> set[tuple[int, int]]:
    """The experts that are marked, as (layer, expert) of their names.

    Args:
        layers: numbers of the layers with experts.
    """
    return {(layers[row], expert) for row, expert in np.argwhere(which_LE).tolist()}
