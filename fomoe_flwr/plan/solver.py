"""How many experts each site holds and how many steps it takes, and which experts these are (ours).

First the numbers: the least round time in which the federation does a given amount of useful work, with memory and
holders respected. For a given time each site's best is read off a table, so only the time is searched for; where
the sites' own choices leave experts without a holder, a dynamic program finds the best that does not. Then the
experts: without demand in a circle, as fixed placement does; with demand a transportation problem per layer,
whose linear relaxation is integral (HiGHS).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.placement import Placement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PRECISION = 1e-12  # of the round time that is searched for; `finish_s` then says it exactly
_SLACK = 1e-9  # of a step: so much rounding does not cost a site its last step


@dataclass(frozen=True)
class Options:
    """What each site could do: rows are sites, column R-1 is a site with R residents a layer."""

    fits_MR: NDArray[np.bool_]  # in its memory, and enough to choose from: true from one column to another
    step_s_MR: Floats
    communication_s_MR: Floats  # of a round
    worth_MR: Floats  # of a token; 1: all of its assignments are resident
    step_tokens_M: Ints
    max_steps: int
    hides: bool = False  # whether a site takes its steps while its link is busy

    @property
    def num_experts(self) -> int:
        return int(self.fits_MR.shape[1])

    @property
    def least_M(self) -> Ints:
        """The fewest residents a layer that each site may have."""
        least_M: Ints = self.fits_MR.argmax(axis=1) + 1
        return least_M

    @property
    def most_M(self) -> Ints:
        """The most."""
        most_M: Ints = self.num_experts - self.fits_MR[:, ::-1].argmax(axis=1)
        return most_M


@dataclass(frozen=True)
class Choice:
    """The numbers of a plan."""

    residents_M: Ints  # a layer
    steps_M: Ints
    round_s: float  # when the last site is done


def useful_tokens(options: Options, residents_M: Ints, steps_M: Ints) -> float:
    """Tokens of a round, each by its worth."""
    rows = np.arange(len(residents_M))
    return float((steps_M * options.step_tokens_M * options.worth_MR[rows, residents_M - 1]).sum())


def finish_s(options: Options, residents_M: Ints, steps_M: Ints) -> Floats:
    """When each site is done: its steps and its link, or the longer of the two."""
    rows, columns = np.arange(len(residents_M)), residents_M - 1
    communication_s_M = options.communication_s_MR[rows, columns]
    compute_s_M = steps_M * options.step_s_MR[rows, columns]
    done_s_M: Floats = communication_s_M + compute_s_M
    return np.maximum(communication_s_M, compute_s_M) if options.hides else done_s_M


def solve(options: Options, target: float, holders: int) -> Choice:
    """The least round time in which `target` useful tokens can be done, and who does what in it.

    Every site holds its least number of experts of each layer, or more, and takes at least one step.

    Args:
        holders: rho; every expert is on at least so many sites.

    Raises:
        ConfigError: which constraint cannot be met.
    """
    needed = needed_copies(options, holders)
    slowest = options.communication_s_MR + options.max_steps * options.step_s_MR
    too_short, enough = 0.0, float(slowest[options.fits_MR].max())
    best = _best(options, enough, needed)
    reachable = 0.0 if best is None else useful_tokens(options, *best)
    if best is None or reachable < target * (1 - 1e-12):
        raise ConfigError(
            f"plan.max_steps_ratio: with {options.max_steps} local steps at each site a round does the work of "
            f"{reachable:.0f} tokens, {target:.0f} are wanted"
        )
    while enough - too_short > _PRECISION * enough:
        middle = (too_short + enough) / 2
        tried = _best(options, middle, needed)
        if tried is not None and useful_tokens(options, *tried) >= target * (1 - 1e-12):
            best, enough = tried, middle
        else:
            too_short = middle
    residents_M, steps_M = best
    return Choice(residents_M, steps_M, float(finish_s(options, residents_M, steps_M).max()))


def needed_copies(options: Options, holders: int) -> int:
    """Experts of a layer that must be held, each copy counted.

    Raises:
        ConfigError: all sites' memory together has no room for them.
    """
    needed, room = holders * options.num_experts, int(options.most_M.sum())
    if room < needed:
        raise ConfigError(
            f"plan.holders={holders}: {needed} experts a layer must be held, and all sites' memory together has "
            f"room for {room}"
        )
    return needed


def _best(options: Options, round_s: float, needed: int) -> tuple[Ints, Ints] | None:
    """Residents and steps that do the most useful work in this time; None if some site cannot take a step."""
    compute_s_MR = round_s - options.communication_s_MR
    if options.hides:
        compute_s_MR = np.where(compute_s_MR < 0, 0.0, round_s)
    steps_MR = np.floor(compute_s_MR / options.step_s_MR + _SLACK)
    steps_MR = np.clip(steps_MR, 0, options.max_steps)
    useful_MR = steps_MR * options.step_tokens_M[:, None] * options.worth_MR
    useful_MR[~options.fits_MR | (steps_MR < 1)] = -np.inf
    if np.isneginf(useful_MR.max(axis=1)).any():
        return None
    column_M = useful_MR.argmax(axis=1)
    if (column_M + 1).sum() < needed:
        covered = _best_covering(useful_MR, needed)
        if covered is None:
            return None
        column_M = covered
    steps_M = steps_MR[np.arange(len(column_M)), column_M].astype(np.int64)
    return column_M.astype(np.int64) + 1, steps_M


def _best_covering(useful_MR: Floats, needed: int) -> Ints | None:
    """The columns of greatest sum with at least `needed` residents together: a knapsack, exact."""
    num_sites = len(useful_MR)
    # More residents that do more, too, are always better; most columns fall away.
    best_from_MR = np.maximum.accumulate(useful_MR[:, ::-1], axis=1)[:, ::-1]
    worth_it_MR = np.isfinite(useful_MR) & (useful_MR >= best_from_MR)
    # value_C[c]: the best of the sites so far with c residents together, c = needed meaning that or more.
    value_C = np.full(needed + 1, -np.inf)
    value_C[0] = 0.0
    came_from = np.zeros((num_sites, needed + 1), dtype=np.int64)
    chosen = np.zeros((num_sites, needed + 1), dtype=np.int64)
    at_C = np.arange(needed + 1)
    for site in range(num_sites):
        next_C = np.full(needed + 1, -np.inf)
        for column in np.flatnonzero(worth_it_MR[site]):
            step = min(int(column) + 1, needed)
            # c - step residents before; for the last cell the best of all that reach it.
            from_C = at_C - step
            from_C[needed] = needed - step + int(value_C[needed - step :].argmax())
            sums_C = np.full(needed + 1, -np.inf)
            sums_C[step:] = value_C[from_C[step:]] + useful_MR[site, column]
            better_C = sums_C > next_C
            next_C[better_C] = sums_C[better_C]
            came_from[site, better_C] = from_C[better_C]
            chosen[site, better_C] = column
        value_C = next_C
    if np.isneginf(value_C[needed]):
        return None
    columns, at = np.zeros(num_sites, dtype=np.int64), needed
    for site in reversed(range(num_sites)):
        columns[site], at = chosen[site, at], came_from[site, at]
    return columns


# ----- which experts


def place_in_circle(residents_M: Ints, num_layers: int, num_experts: int, seed: int) -> Placement:
    """Sites take consecutive pieces of a circle of shuffled experts, as in fixed placement.

    A piece is never longer than the circle, so a site's experts are distinct; and every expert has the same number of
    holders or one more. Sites stand in the same order in every layer, so there are few different sets of
    holders, which keeps the number of bundles on the wire small.
    """
    rng = np.random.default_rng([seed, 0])
    site_order = rng.permutation(len(residents_M))
    holds_LEM = np.zeros((num_layers, num_experts, len(residents_M)), dtype=bool)
    for layer in range(num_layers):
        circle, start = rng.permutation(num_experts), 0
        for site in site_order:
            piece = np.arange(start, start + residents_M[site]) % num_experts
            holds_LEM[layer, circle[piece], site] = True
            start += int(residents_M[site])
    return Placement(holds_LEM)


def place_by_demand(
    residents_M: Ints, demand_MLE: Floats, holders: int, held: Placement | None = None, stay: float = 0.0
) -> Placement:
    """The experts with which sites hold most of what their own tokens ask for.

    Per layer: maximise `sum demand · x` with x in [0, 1], a row sum of R_i for each site and a column sum of at
    least rho for each expert. The matrix is totally unimodular, so an optimal vertex is integral.

    Args:
        demand_MLE: share of a site's assignments that each expert of a layer gets, sums to 1 over the experts.
        held: the placement in force.
        stay: what keeping an expert is worth, as a share of a site's assignments; a move must gain more than this.

    Raises:
        ConfigError: the sites' experts are too few for `holders`.
    """
    num_sites, num_layers, num_experts = demand_MLE.shape
    if residents_M.sum() < holders * num_experts or holders > num_sites:
        raise ConfigError(
            f"plan.holders={holders}: the sites hold {int(residents_M.sum())} experts a layer, "
            f"{holders * num_experts} are needed"
        )
    holds_LEM = np.zeros((num_layers, num_experts, num_sites), dtype=bool)
    for layer in range(num_layers):
        gain_ME = demand_MLE[:, layer].copy()
        if held is not None:
            gain_ME += stay * held.holds_LEM[layer].T
        holds_LEM[layer] = _transport(gain_ME, residents_M, holders).T
    return Placement(holds_LEM)


def _transport(gain_ME: Floats, residents_M: Ints, holders: int) -> NDArray[np.bool_]:
    from scipy.optimize import linprog  # seconds to import, and only this needs it
    from scipy.sparse import identity, kron

    num_sites, num_experts = gain_ME.shape
    rows = kron(identity(num_sites), np.ones((1, num_experts)))
    columns = kron(np.ones((1, num_sites)), identity(num_experts))
    solved = linprog(
        -gain_ME.ravel(),
        A_ub=-columns,
        b_ub=-np.full(num_experts, holders),
        A_eq=rows,
        b_eq=residents_M,
        bounds=(0, 1),
        method="highs-ds",  # simplex: a vertex
    )
    if not solved.success:
        raise ConfigError(f"plan: no placement with {holders} holders of each expert ({solved.message})")
    return np.asarray(solved.x.reshape(num_sites, num_experts) > 0.5)
