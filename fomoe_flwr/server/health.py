"""The figures of routing, once a round: what the sites report, and what their routers do on a shared probe batch.

The probe is a fixed few validation tokens. Before the outer step the global model runs over it once, and the router
inputs of each layer are kept. On these inputs the sites' routers, as they are before they are averaged, are held
against each other, and the global router after the step against the one before. So these figures compare routers
and nothing else: not how the layers below have changed, and not what locality keeps private to a site.

Letters: L layers, E experts of a layer, C experts that two sites both route to, T probe tokens, D d_model.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fomoe_flwr import health
from fomoe_flwr.codecs import down_codec
from fomoe_flwr.config import ModelConfig, RunConfig
from fomoe_flwr.data import TokenCorpus, validation_batches
from fomoe_flwr.engine.device import autocast, cpu_threads, resolve_device
from fomoe_flwr.mapped import in_pieces
from fomoe_flwr.model.build import build
from fomoe_flwr.model.moe import Router
from fomoe_flwr.model.spec import expert_layers, expert_name, gate_name, table
from fomoe_flwr.placement import full_residents
from fomoe_flwr.server.replies import Inbox
from fomoe_flwr.server.rounds import Round
from fomoe_flwr.server.state import ServerState

log = logging.getLogger("fomoe")

FEWEST_CHOICES = 50  # an expert in a round, in the mean; with fewer nothing is said of the load
PROBE_TOKENS = 512
PROBE_SEQ_LEN = 64  # many short sequences: what the tokens of one text have in common is no router's doing
MAX_PAIRS = 32  # of sites whose routers are compared; of more, so many spread evenly over them
MAX_CELLS = 4096  # of a table in a line of metrics; a larger one is left out, its figures by layer are not

ByLayer = Mapping[str, Sequence[float]]  # a figure's values by layer; nan: not defined


def probe_batch(corpus: TokenCorpus | None, seq_len: int) -> Tensor | None:
    """The probe's tokens_BT; None where the server has no corpus.

    Raises:
        DataError: the validation documents do not fill one sequence.
    """
    if corpus is None:
        return None
    length = min(seq_len, PROBE_SEQ_LEN)
    return next(iter(validation_batches(corpus, None, length, max(1, PROBE_TOKENS // length), 1)))


class RoutingHealth:
    """Gathers a round's figures: `collected` before the outer step, `finished` after it.

    It remembers nothing from round to round, so a resumed run has the figures of one that was never stopped.

    Args:
        probe_BT: None, and no figure needs the model to run: agreement, distance and drift are not defined.
    """

    def __init__(self, config: RunConfig, probe_BT: Tensor | None) -> None:
        self._config, self._probe_BT = config, probe_BT
        self._forget()

    def _forget(self) -> None:
        self._probe: Probe | None = None
        self._before: list[Tensor | None] = []  # the global routers before the outer step
        self._layers: dict[str, list[float]] = {}
        self._spike = math.nan

    def collected(self, current: Round, state: ServerState, inbox: Inbox) -> None:
        """The good replies are in, and the model is still the one that the sites were sent."""
        config = self._config
        first = {
            reply.site: reply.metrics["first_loss"]
            for reply in current.replies.values()
            if "first_loss" in reply.metrics
        }
        self._spike = health.loss_spike(first, state.last_losses)
        self._before = [None if w is None else w.clone() for w in global_routers(state.tensors, config)]
        if self._probe_BT is None or not current.replies:
            return
        with cpu_threads(config.train.threads), torch.no_grad():
            self._probe = run_probe(config, state.parameters(), self._probe_BT)
            sent = self._before
            if (public := state.public) is not None:
                gates = [name for name in public.tensors if ".gate" in name]
                sent = global_routers({name: public.sent(name) for name in gates}, config)
            self._layers = between_sites(SiteRouters(config, current, inbox), self._probe, sent)

    def finished(self, current: Round, state: ServerState) -> dict[str, Any]:
        """The round's figures for its line of metrics; a layer that is sick is named in the log."""
        config = self._config
        load = federation_load(current, config)
        # A few tokens leave some expert without any by chance.
        enough = load.load_LE.sum() >= FEWEST_CHOICES * load.load_LE.size
        if enough and (sick := health.symptoms(load.load_LE, load.offered_LE, expert_layers(config.model))):
            log.warning("round %d: routing is sick: %s", current.number, health.symptoms_line(sick))
        with cpu_threads(config.train.threads), torch.no_grad():
            after = global_routers(state.tensors, config)
            layers = self._layers | drift(self._probe, self._before, after, config.model.top_k)
            layers |= {"expert_similarity": expert_similarity(state.tensors, config.model)}
        figures = routing_figures(load, layers, self._spike)
        self._forget()
        return figures


# ----- load


class Load(NamedTuple):
    """What the routers of the sites that answered chose while they trained."""

    load_LE: NDArray[np.int64]  # assignments, ghosts too
    offered_LE: NDArray[np.int64]  # tokens that could have chosen the expert
    resident_L: NDArray[np.float64]  # share of the assignments whose expert was at the site
    resident_by_site: dict[str, NDArray[np.float64]]  # the same of each site, by layer


def federation_load(current: Round, config: RunConfig) -> Load:
    """The load of all sites together. A site that does not report what its router chose counts nowhere."""
    shape = (config.model.num_layers, config.model.num_experts)
    load_LE, offered_LE, resident_LE = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    by_site = {}
    for site in sorted(current.replies):
        reply, own_LE = current.replies[site], current.loads[site]
        held_LE = current.placement.holds_LEM[:, :, site]
        if not own_LE.any():
            continue
        candidates_LE = held_LE if config.strategy.routing == "partitioned" else np.ones_like(held_LE)
        load_LE += own_LE * candidates_LE
        offered_LE += reply.num_examples * candidates_LE
        resident_LE += own_LE * held_LE
        by_site[reply.site] = health.resident_share(own_LE, held_LE)
    with np.errstate(invalid="ignore"):
        resident_L = resident_LE.sum(axis=1) / load_LE.sum(axis=1)
    return Load(load_LE, offered_LE, resident_L, by_site)


# ----- routers


class Probe(NamedTuple):
    """The model's run over the probe batch, by layer."""

    inputs: list[Tensor]  # x_TD, what the router got
    routers: list[Router]  # of a copy of the model: their weights may be exchanged

    def scores(self, layer: int, weight_ED: Tensor | None) -> Tensor:
        """What a router with these weights (None: it has none) makes of the layer's inputs, scores_TE."""
        router, x_TD = self.routers[layer], self.inputs[layer]
        if weight_ED is not None:
            router.weight.data = weight_ED.to(x_TD.device)
        return router.scores(x_TD)


def run_probe(config: RunConfig, parameters: Mapping[str, Tensor], probe_BT: Tensor) -> Probe:
    """Run the whole model, all experts, over the probe."""
    model, train = config.model, config.train
    device = resolve_device(train.device)
    everything = full_residents(model.num_layers, model.num_experts)
    module = build(model, everything, config.strategy.routing, parameters, device).eval()
    routers = [moe.gate for moe in module.moe_layers]
    inputs: list[Tensor] = []
    for router in routers:
        router.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with autocast(device, train.dtype):
        # No logits: with a large vocabulary they are most of the work.
        module.hidden(probe_BT[:, :-1].to(device))
    return Probe(inputs, routers)


def global_routers(state: Mapping[str, Tensor], config: RunConfig) -> list[Tensor | None]:
    """Weights of each layer's router over all experts, weight_ED; None for a router that has none."""
    layers, experts = expert_layers(config.model), range(config.model.num_experts)
    if config.strategy.routing != "partitioned":
        return [state.get(gate_name(layer)) for layer in layers]
    return [
        torch.stack([state[expert_name(layer, expert, "gate")] for expert in experts]) for layer in layers
    ]


class SiteRouters(NamedTuple):
    """Where the sites' own routers of a round are read from."""

    config: RunConfig
    current: Round
    inbox: Inbox

    def weight(self, site: int, layer: int, weight_ED: Tensor) -> Tensor:
        """A site's router before it is averaged: what the site was sent minus the pseudo-gradient it answered with.

        With strategy.delay=1 that is what the server would have of this update alone; the site began elsewhere.

        Args:
            weight_ED: the global router that was sent; the wire may have rounded it.
        """
        settings = self.config.strategy
        weight_ED = down_codec(settings).round_trip(weight_ED).to(torch.float32, copy=True)
        if settings.inner == "gradient":  # a site that takes no step has the router that it was sent
            return weight_ED
        number = expert_layers(self.config.model)[layer]
        rows: dict[str, int | slice] = {gate_name(number): slice(None)}
        if settings.routing == "partitioned":
            residents = self.current.placement.residents(site)[layer]
            rows = {expert_name(number, expert, "gate"): expert for expert in residents}
        shapes = {name: weight_ED[row].shape for name, row in rows.items()}
        for name, update in self.inbox.tensors(site, shapes).items():
            weight_ED[rows[name]] -= update.float()
        return weight_ED

    def rests(self, layer: int) -> bool:
        """Whether this round's updates say nothing of a layer's router."""
        number = expert_layers(self.config.model)[layer]
        if self.config.strategy.routing != "partitioned":
            return gate_name(number) in self.current.resting
        experts = range(self.config.model.num_experts)
        return all(expert_name(number, expert, "gate") in self.current.resting for expert in experts)

    def shared_experts(self, layer: int, one: int, other: int) -> list[int]:
        """The experts to which both sites' routers can send a token."""
        holds_EM = self.current.placement.holds_LEM[layer]
        if self.config.strategy.routing != "partitioned":
            return list(range(len(holds_EM)))
        return np.flatnonzero(holds_EM[:, one] & holds_EM[:, other]).tolist()


def between_sites(
    sites: SiteRouters, probe: Probe, routers: Sequence[Tensor | None]
) -> dict[str, list[float]]:
    """Agreement and distance of the sites' routers by layer, each the mean over pairs of sites."""
    pairs = some_pairs(sorted(sites.current.replies))
    found = [_compared(sites, probe, layer, weight_ED, pairs) for layer, weight_ED in enumerate(routers)]
    return {
        "agreement": [agreement for agreement, _ in found],
        "js_distance": [distance for _, distance in found],
    }


def some_pairs(sites: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs of sites, or `MAX_PAIRS` of them, spread evenly."""
    pairs = list(itertools.combinations(sites, 2))
    if len(pairs) <= MAX_PAIRS:
        return pairs
    return [pairs[index * len(pairs) // MAX_PAIRS] for index in range(MAX_PAIRS)]


def _compared(
    sites: SiteRouters, probe: Probe, layer: int, weight_ED: Tensor | None, pairs: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """Of one layer. In partitioned mode over the experts that both sites hold, where there are more than k."""
    if not pairs or sites.rests(layer):
        return math.nan, math.nan
    if weight_ED is None:
        return 1.0, 0.0
    scores_TE = {
        site: probe.scores(layer, sites.weight(site, layer, weight_ED))
        for site in sorted(set(itertools.chain.from_iterable(pairs)))
    }
    agreements, distances = [], []
    for one, other in pairs:
        shared = sites.shared_experts(layer, one, other)
        if len(shared) > (top_k := sites.config.model.top_k):  # else there is nothing to choose
            one_TC, other_TC = scores_TE[one][:, shared], scores_TE[other][:, shared]
            sets = health.top_k_sets(one_TC, top_k), health.top_k_sets(other_TC, top_k)
            agreements.append(health.agreement(*sets))
            distances.append(health.js_distance(health.gate_shares(one_TC), health.gate_shares(other_TC)))
    return _mean(agreements), _mean(distances)


def drift(
    probe: Probe | None, before: Sequence[Tensor | None], after: Sequence[Tensor | None], top_k: int
) -> dict[str, list[float]]:
    """How far the global routers have come by the outer step, by layer.

    `drift` is the share of the probe's choices that are others now; `router_change` is by how much the weights have
    changed, relative to their norm.
    """
    if not before:
        return {}
    both = list(zip(before, after, strict=True))
    figures = {"router_change": [_change(b, a) for b, a in both]}
    if probe is not None:
        sets = [
            [health.top_k_sets(probe.scores(layer, weight_ED), top_k) for weight_ED in pair]
            for layer, pair in enumerate(both)
        ]
        figures["drift"] = [1 - health.agreement(*pair) for pair in sets]
    return figures


def _change(before: Tensor | None, after: Tensor | None) -> float:
    return 0.0 if before is None or after is None else health.relative_change(before, after)


def expert_similarity(state: Mapping[str, Tensor], model: ModelConfig) -> list[float]:
    """Mean cosine between the experts of a layer, all their tensors together, by layer."""
    tensors = [param.name for param in table(model, "skip") if param.kind == "expert"]

    def experts(layer: int) -> Iterator[Sequence[Tensor]]:
        for expert in range(model.num_experts):
            yield [state[name.format(layer=layer, expert=expert)] for name in tensors]

    def nbytes(expert: Sequence[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in expert)

    return [health.mean_cosine(in_pieces(experts(layer), nbytes)) for layer in expert_layers(model)]


# ----- the line of metrics


def routing_figures(load: Load, layers: ByLayer, spike: float) -> dict[str, Any]:
    """The figures as JSON values: means over the layers, then lists by layer, then the tables."""
    known = dict(layers) | (_load_figures(load) if load.load_LE.any() else {})
    by_layer = {name: list(known.get(name, [math.nan] * len(load.load_LE))) for name in FIGURES}
    return {
        **{name: plain(_mean(values)) for name, values in by_layer.items()},
        "dead_experts": plain(sum(by_layer["dead_experts"])),
        "spike": plain(spike),
        "resident_share_by_layer": _plain_list(load.resident_L),
        "by_layer": {name: _plain_list(values) for name, values in by_layer.items()},
        "load": load.load_LE.tolist() if load.load_LE.any() and load.load_LE.size <= MAX_CELLS else None,
        "residents": {site: _plain_list(share_L) for site, share_L in load.resident_by_site.items()}
        if len(load.resident_by_site) * len(load.load_LE) <= MAX_CELLS
        else None,
    }


FIGURES = (
    "load_entropy", "load_cv", "load_max_min", "dead_experts", "agreement", "js_distance", "drift", "router_change",
    "expert_similarity",
)  # fmt: skip


def _load_figures(load: Load) -> dict[str, list[float]]:
    load_LE, offered_LE = load.load_LE, load.offered_LE
    return {
        "load_entropy": health.load_entropy(load_LE, offered_LE).tolist(),
        "load_cv": health.load_variation(load_LE, offered_LE).tolist(),
        "load_max_min": health.load_ratio(load_LE, offered_LE).tolist(),
        "dead_experts": health.dead_experts(load_LE, offered_LE).sum(axis=1).tolist(),
    }


def _mean(values: Iterable[float]) -> float:
    """Of those that are defined."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _plain_list(values: Iterable[float]) -> list[int | float | None]:
    return [plain(value) for value in values]


def plain(value: float) -> int | float | None:
    """As it is written: None for what is not defined, six digits of what is no whole number."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
