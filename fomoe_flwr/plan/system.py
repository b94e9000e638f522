"""What a site computes, holds and sends, in numbers (FoMoE, section 4 and appendix D).

The unit is the end of a name (`_bytes`, `_s`, `_flops`). Bytes are of tensors alone, without names and headers, for a
site and a round. Sizes are decimal except memory, which people give in GiB.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fomoe_flwr.codecs import Codec, down_codec, down_differences, nbytes, up_codec
from fomoe_flwr.codecs.public import Differences
from fomoe_flwr.config import ModelConfig, RunConfig
from fomoe_flwr.errors import ConfigError, FomoeError
from fomoe_flwr.files import expanded
from fomoe_flwr.model.spec import (
    expert_layers,
    expert_of,
    expert_parameters,
    parameter_counts,
    parameter_shapes,
    place_of,
    table,
    token_flops,
)
from fomoe_flwr.placement import Placement, full_residents, numbered
from fomoe_flwr.reading import reason
from fomoe_flwr.turns import resting, takes_turns

if TYPE_CHECKING:
    from fomoe_flwr.report.load import Run

BYTES_PER_S_A_MBPS = 1e6 / 8
BYTES_A_GIB = 2**30

# A number, or one for each of many cases at once.
Amounts = TypeVar("Amounts", float, NDArray[np.float64])

# Two unknowns cannot be told apart where the sites' expert work differs by less.
LEAST_SPREAD = 0.05


# ----- the sites


@dataclass(frozen=True)
class PlanSite:
    """One site. Bandwidths are to and from the server, at most its share of the server's link."""

    name: str
    memory_bytes: float  # infinite where it is not given
    speed: float  # relative to the device that `TokenCost` is for
    down_bytes_per_s: float
    up_bytes_per_s: float
    latency_s: float  # one way
    batch_size: int
    step_tokens: int
    device: str = "auto"  # as it is given


def plan_sites(config: RunConfig) -> list[PlanSite]:
    """The sites in the federation's order; links that are not given are plan.assumed_mbps and _latency_ms."""
    plan, train, sites = config.plan, config.train, config.federation.sites
    share = math.inf if plan.server_mbps is None else plan.server_mbps / len(sites)

    def bytes_per_s(mbps: float | None) -> float:
        return min(plan.assumed_mbps if mbps is None else mbps, share) * BYTES_PER_S_A_MBPS

    planned = []
    for site in sites:
        latency_ms = plan.assumed_latency_ms if site.latency_ms is None else site.latency_ms
        batch_size = site.batch_size or train.batch_size
        planned.append(
            PlanSite(
                name=site.name,
                memory_bytes=math.inf if site.memory_gib is None else site.memory_gib * BYTES_A_GIB,
                speed=site.speed,
                down_bytes_per_s=bytes_per_s(site.down_mbps),
                up_bytes_per_s=bytes_per_s(site.up_mbps),
                latency_s=latency_ms / 1e3,
                batch_size=batch_size,
                step_tokens=batch_size * train.seq_len,
                device=site.device or train.device,
            )
        )
    return planned


# ----- what it holds and sends


class Split(NamedTuple):
    """Parameters, or their bytes, by what happens to them (theta_dense and theta_sparse)."""

    dense: int  # at every site
    per_expert: int  # goes with one expert

    def held(self, experts: Amounts) -> Amounts:
        """Parameters of a site with so many experts over all its layers; a mean need not be whole."""
        return self.dense + experts * self.per_expert


def split_parameters(model: ModelConfig, routing: str) -> Split:
    """theta_dense and theta_sparse: stand-ins are dense; the router is, in `skip` mode, and sparse in `partitioned`."""
    counts = parameter_counts(model)
    if routing != "partitioned":
        return Split(counts.dense + counts.router + counts.standins, expert_parameters(model))
    row = counts.router // (model.num_layers * model.num_experts)
    return Split(counts.dense, expert_parameters(model) + row)


def held_parameters(config: RunConfig, residents: Amounts) -> Amounts:
    """Parameters of a site's shard with so many residents a layer; a mean over layers or sites need not be whole."""
    split = split_parameters(config.model, config.strategy.routing)
    return split.held(config.model.num_layers * residents)


def down_bytes(config: RunConfig, residents: Amounts) -> Amounts:
    """From the server to a site with so many residents a layer: its dense part and its residents.

    A redrawn placement costs nothing more: an expert that is new to a site comes with the rest of its shard. LocalAdamW
    sends both Adam moments, too. With a lossy strategy.down it is what a site is sent whose last reply counts; in round
    1, after an absence, and for an expert that is new to a site tensors come whole, in bf16, which is not counted here.

    Where parts of the model take turns it is the mean of a round; an expert is taken to have one holder if
    strategy.overlap=1. `round_bytes` is of one round, to the byte.
    """
    return _mean_bytes(config, down_differences(config.strategy) or down_codec(config.strategy), residents)


def up_bytes(config: RunConfig, residents: Amounts) -> Amounts:
    """From such a site to the server. Unlike a ring of sites, a server also receives experts of a single holder."""
    return _mean_bytes(config, up_codec(config.strategy), residents)


def peak_bytes(config: RunConfig, residents: Sequence[int]) -> float:
    """Down to sites with so many residents a layer and up again, in the round with the most of them. The first, which
    brings everything, the last, in which everything goes up, and those around a new placement are not counted.
    """
    down = down_differences(config.strategy) or down_codec(config.strategy)
    fragments, up = config.strategy.fragments, up_codec(config.strategy)
    # The turns in which the experts of one holder are due, the round before them and the one after them.
    last = 2 * config.strategy.sole_every * fragments
    rounds = range(last - fragments, last + 2)
    received, sent = (
        [_all_due_bytes(config, codec, residents, round_) for round_ in rounds] for codec in (down, up)
    )
    # What was due in a round comes down in the next.
    return max(before + now for before, now in zip(received, sent[1:], strict=False))


def edge_bytes(config: RunConfig, residents: Sequence[int]) -> tuple[float, float]:
    """Down to sites with so many residents a layer and up again, in the first round of a run, which brings everything
    whole, and in the last, in which everything goes up.
    """
    whole, up = down_codec(config.strategy), up_codec(config.strategy)
    down = down_differences(config.strategy) or whole
    rounds = config.train.rounds

    def of(codec: Codec | Differences, round_: int, last: int) -> float:
        return _all_due_bytes(config, codec, residents, round_, last)

    first = of(whole, 1, 1) + of(up, 1, rounds)
    # What was due in a round comes down in the next.
    return first, of(down, rounds - 1, rounds) + of(up, rounds, rounds) if rounds > 1 else first


def run_bytes(config: RunConfig, residents: Sequence[int], mean: float) -> float:
    """Of all rounds.

    Args:
        mean: of a round that is neither the first nor the last.
    """
    rounds = config.train.rounds
    first, last = edge_bytes(config, residents)
    return first * min(rounds, 1) + mean * max(rounds - 2, 0) + last * (rounds > 1)


def _mean_bytes(config: RunConfig, codec: Codec | Differences, residents: Amounts) -> Amounts:
    """Of the tensors that are due in a round, in the mean."""
    strategy = config.strategy
    if not takes_turns(strategy):
        return _due_bytes(config, codec, residents, 1)
    fragments, every = strategy.fragments, strategy.sole_every
    total = 0 * residents
    for first in range(1, fragments + 1):
        # In one of so many turns with experts of one holder, in the others without.
        total = total + _due_bytes(config, codec, residents, first + (every - 1) * fragments)
        if every > 1:
            total = total + (every - 1) * _due_bytes(config, codec, residents, first)
    return total / (fragments * every)


def _all_due_bytes(
    config: RunConfig,
    codec: Codec | Differences,
    residents: Sequence[int],
    round_: int,
    last: int | None = None,
) -> float:
    """`_due_bytes` of all sites; a thousand that are alike cost no more than one."""
    sites = Counter(residents)
    return sum(count * _due_bytes(config, codec, held, round_, last) for held, count in sites.items())


def _due_bytes(
    config: RunConfig, codec: Codec | Differences, residents: Amounts, round_: int, last: int | None = None
) -> Amounts:
    """Of the tensors that are due in a round.

    Args:
        last: the last round, in which all are; by default a later one.
    """
    model, strategy = config.model, config.strategy
    copies = 3 if strategy.outer == "local_adamw" else 1
    # Of each layer one expert, which is as large as the others.
    shapes = parameter_shapes(model, [[0]] * model.num_layers, strategy.routing)
    sole = {(layer, 0) for layer in expert_layers(model)} if config.overlap == 1 else ()
    rest = resting(shapes, model, strategy, round_, round_ + 1 if last is None else last, sole)
    due = [name for name in shapes if name not in rest]
    dense = copies * nbytes(codec, (shapes[name] for name in due if expert_of(name) is None))
    per_expert = copies * nbytes(
        codec, (param.shape for param in table(model, strategy.routing) if param.per_expert)
    )
    layers = len({expert for name in due if (expert := expert_of(name)) is not None})
    return Split(dense, per_expert).held(layers * residents)


def round_bytes(
    config: RunConfig, round_: int, placement_of: Callable[[int], Placement]
) -> list[tuple[int, int]]:
    """Down to each site and up again in a round, if all take part in it and in the one before: to the byte.

    Args:
        placement_of: of this round, the one before and the one after it, and of that before.
    """
    model, strategy = config.model, config.strategy
    whole, up = down_codec(strategy), up_codec(strategy)
    down = down_differences(strategy) or whole
    everything = full_residents(model.num_layers, model.num_experts)
    shapes = parameter_shapes(model, everything, strategy.routing)
    layers = expert_layers(model)
    holds_LEM = placement_of(round_).holds_LEM

    def due_in(number: int) -> tuple[list[str], NDArray[np.bool_]]:
        """Dense names, and experts by row and column."""
        own_LEM = placement_of(number).holds_LEM
        sole_LE = own_LEM.sum(axis=2) == 1
        moving_LE = (own_LEM != placement_of(number + 1).holds_LEM).any(axis=2)
        sole, moving = (numbered(which_LE, layers) for which_LE in (sole_LE, moving_LE))
        rest = resting(shapes, model, strategy, number, config.train.rounds, sole, moving)
        due = [name for name in shapes if name not in rest]
        due_LE = np.zeros_like(sole_LE)
        for name in due:
            if (place := place_of(model, name)) is not None:
                due_LE[place] = True
        return [name for name in due if expert_of(name) is None], due_LE

    def of(codec: Codec | Differences, names: Iterable[str]) -> int:
        return nbytes(codec, (shapes[name] for name in names))

    one = [param.shape for param in table(model, strategy.routing) if param.per_expert]
    sent, sent_LE = due_in(round_)
    held_LEM, came_LE = np.zeros_like(holds_LEM), np.ones_like(sent_LE)
    came = of(whole, (name for name in shapes if expert_of(name) is None))
    if round_ > 1:
        names, came_LE = due_in(round_ - 1)
        came, held_LEM = of(down, names), placement_of(round_ - 1).holds_LEM
    found = []
    for site in range(holds_LEM.shape[2]):
        holds_LE, held_LE = holds_LEM[:, :, site], held_LEM[:, :, site]
        new, moved = int((holds_LE & ~held_LE).sum()), int((holds_LE & held_LE & came_LE).sum())
        received = came + new * nbytes(whole, one) + moved * nbytes(down, one)
        found.append((received, of(up, sent) + int((holds_LE & sent_LE).sum()) * nbytes(up, one)))
    return found


def transfer_s(num_bytes: Amounts, bytes_per_s: float, latency_s: float) -> Amounts:
    """`t_comm = B / B_eff`, and the latency once."""
    return latency_s + num_bytes / bytes_per_s


def exchange_s(site: PlanSite, down_bytes: Amounts, up_bytes: Amounts) -> Amounts:
    """Down to a site and up again, one after the other."""
    down_s = transfer_s(down_bytes, site.down_bytes_per_s, site.latency_s)
    return down_s + transfer_s(up_bytes, site.up_bytes_per_s, site.latency_s)


def hides_communication(config: RunConfig) -> bool:
    """Whether sites train while they receive and send: with strategy.delay=1, unless each round brings new experts."""
    strategy = config.strategy
    every_round = strategy.placement == "random" and strategy.reshuffle_every == 1
    return strategy.delay == 1 and not (every_round and config.overlap < len(config.federation.sites))


# ----- what a token costs it in time


def held_share(config: RunConfig, residents: float) -> float:
    """Share of the router's choices that so many residents a layer are expected to be.

    Without locality the share of the experts that they are. model.locality_target is what a site with equal shares
    comes to, `1 - target = κ (1 - O_e/M)`; at one that holds more or less, the same part κ of what would go to ghosts
    still does (ours). More than it can choose a site cannot have.
    """
    model = config.model
    share, equal = residents / model.num_experts, config.overlap / len(config.federation.sites)
    if model.locality != "bias" or model.locality_target is None or equal == 1:
        return share
    local = 1 - (1 - share) * (1 - model.locality_target) / (1 - equal)
    return max(0.0, min(local, 1.0, residents / model.top_k))


def expert_work(
    routing: str, num_experts: int, top_k: int, residents: float, hit_rate: float | None
) -> float:
    """`sigma · min(k, N_le)/k`: the part of the k experts' work that a site with N_le residents does for a token.

    In `skip` mode sigma is the share of the assignments that hit a resident, `N_le/N_e` where routing is balanced
    (FoMoE, main text), and top-k always chooses k. In `partitioned` mode every assignment is resident.
    """
    if routing == "partitioned":
        return min(top_k, residents) / top_k
    return residents / num_experts if hit_rate is None else hit_rate


class TokenCost(NamedTuple):
    """Seconds a token at a site of speed 1."""

    dense_s: float
    experts_s: float  # of all k experts in every layer
    router_s: float  # of the whole router

    def seconds(
        self, model: ModelConfig, routing: str, residents: float, hit_rate: float | None = None
    ) -> float:
        """Of a token at a site with so many residents a layer (FoMoE, compute model of section 4)."""
        gate = residents / model.num_experts if routing == "partitioned" else 1.0
        work = expert_work(routing, model.num_experts, model.top_k, residents, hit_rate)
        return self.dense_s + work * self.experts_s + gate * self.router_s


def modelled_cost(config: RunConfig) -> TokenCost:
    """`F / (MFU · Phi)`."""
    flops_per_s = config.plan.mfu * config.plan.tflops * 1e12
    return TokenCost(*(part / flops_per_s for part in token_flops(config.model, config.train.seq_len)))


def token_cost(config: RunConfig) -> TokenCost:
    """Measured where plan.measured names a run, else modelled.

    Raises:
        ConfigError: the run cannot be read, is of another model, or has no training round.
    """
    return (
        modelled_cost(config) if config.plan.measured is None else measured_cost(config, config.plan.measured)
    )


def compute_source(config: RunConfig) -> str:
    """What the plan's times come from, as the user gave it."""
    plan = config.plan
    if plan.measured is not None:
        return f"plan.measured={plan.measured}"
    return f"plan.tflops={plan.tflops:g}, plan.mfu={plan.mfu:g}"


def measured_cost(config: RunConfig, directory: str) -> TokenCost:
    """Least squares of `seconds a token · speed = dense + work · experts` over the sites of a run.

    Each site counts once, with its median over the rounds after the first, which starts things up. Sites that do
    the same expert work do not tell dense and experts apart: then their sum is measured and their ratio modelled.

    Raises:
        ConfigError: see `token_cost`.
    """
    path = expanded(directory)
    metrics = path / "metrics.jsonl"
    try:
        run = _load(path, metrics.stat().st_mtime_ns if metrics.exists() else 0)
    except (FomoeError, OSError) as error:
        raise ConfigError(f"plan.measured={directory:.200}: {reason(error)}") from error
    for key in ("d_model", "num_layers", "num_experts", "d_expert", "top_k", "vocab_size"):
        if (there := getattr(run.config.model, key)) != (here := getattr(config.model, key)):
            raise ConfigError(f"plan.measured={directory}: its model.{key} is {there}, here it is {here}")
    speed = {site.name: site.speed for site in run.config.federation.sites}
    seconds: dict[str, list[float]] = {name: [] for name in speed}
    share: dict[str, list[float]] = {name: [] for name in speed}
    trained = [record for record in run.rounds if record.sites]
    for record in trained[1:] or trained:
        for site in record.sites:
            tokens_per_second, resident_share = site.tokens_per_second, site.resident_share
            if tokens_per_second is None or resident_share is None:
                continue
            # A site may report what it likes.
            if tokens_per_second > 0 and 0 <= resident_share <= 1:
                seconds[site.site].append(speed[site.site] / tokens_per_second)
                share[site.site].append(resident_share)
    if not any(seconds.values()):
        raise ConfigError(f"plan.measured={directory}: no site has trained in this run")
    model, routing = run.config.model, run.config.strategy.routing
    names = [name for name in seconds if seconds[name]]
    seconds_M = np.array([median(seconds[name]) for name in names])
    held = dict.fromkeys(names, run.mean_residents)
    if run.plan is not None:
        held = {site.site: site.experts_per_layer for site in run.plan.sites}
    work_M = np.array(
        [
            expert_work(routing, model.num_experts, model.top_k, held[name], median(share[name]))
            for name in names
        ]
    )
    return _fit(seconds_M, work_M, modelled_cost(dataclasses.replace(config, model=model)))


@functools.lru_cache(maxsize=1)
def _load(directory: Path, written: int) -> Run:
    """The run as it was `written`; a plan and its rivals ask for the same one a dozen times."""
    from fomoe_flwr.report.load import load_run  # the report reads plans, too

    return load_run(directory)


def _fit(seconds_M: np.ndarray, work_M: np.ndarray, modelled: TokenCost) -> TokenCost:
    if len(work_M) > 1 and np.ptp(work_M) >= LEAST_SPREAD:
        design = np.stack([np.ones_like(work_M), work_M], axis=1)
        (dense_s, experts_s), *_ = np.linalg.lstsq(design, seconds_M, rcond=None)
        if dense_s > 0 and experts_s >= 0:
            return TokenCost(float(dense_s), float(experts_s), 0.0)
    dense_s = modelled.dense_s + modelled.router_s
    by_formula_M = dense_s + work_M * modelled.experts_s
    scale = float(np.median(seconds_M / by_formula_M))
    return TokenCost(scale * dense_s, scale * modelled.experts_s, 0.0)


# ----- the virtual clock of a simulation


class Measured(NamedTuple):
    """What a site did in a simulated round."""

    seconds: float  # of its local steps, on the simulation's device, which counts as speed 1
    bytes_down: int  # everything, not tensors alone
    bytes_up: int
    ahead: bool = False  # it had begun before the message came (strategy.delay=1)


def virtual_round(sites: Sequence[PlanSite], measured: Mapping[int, Measured]) -> dict[str, Any]:
    """Charge each site its compute, scaled by its speed, and its bytes, by its link.

    A site is done after `compute_s + communication_s - hidden_s`. With strategy.delay=1 it computes round r while its
    reply of round r-1 goes up and message r comes down, so one that went ahead hides the shorter of the two,
    `hidden_s = min(compute_s, communication_s)`, and is done after the longer. In a federation that goes on like that
    a round takes as long as at the site where that is longest. One that began with the message hides nothing: so the
    first round also pays for the last reply, which nothing hides.

    Returns:
        `round_s`; `utilisation`, the share of it that sites compute, in the mean; `slowest`, the site for whom the
        others waited; and by site `compute_s`, `communication_s`, `hidden_s` and `waited_s`.
    """
    by_site: dict[str, dict[str, float]] = {}
    done_s: dict[str, float] = {}
    for index, work in sorted(measured.items()):
        site = sites[index]
        compute_s = work.seconds / site.speed
        communication_s = exchange_s(site, work.bytes_down, work.bytes_up)
        hidden_s = min(compute_s, communication_s) if work.ahead else 0.0
        by_site[site.name] = {
            "compute_s": compute_s,
            "communication_s": communication_s,
            "hidden_s": hidden_s,
        }
        done_s[site.name] = compute_s + communication_s - hidden_s
    slowest = max(done_s, key=lambda name: done_s[name])
    for name, figures in by_site.items():
        figures["waited_s"] = done_s[slowest] - done_s[name]
    used_s = mean(figures["compute_s"] for figures in by_site.values())
    return {
        "round_s": done_s[slowest],
        "utilisation": used_s / done_s[slowest] if used_s else 0.0,
        "slowest": slowest,
        "sites": by_site,
    }
