"""Payload bytes per site and round between a site and the server (a star), by formula.

Counts tensors alone: no names, no headers, no acknowledgements. Measured bytes lie a little above. Random
placement needs no term of its own: an expert new to a site comes down with the shard that is sent anyway.
"""

from __future__ import annotations

from typing import NamedTuple

from fomoe_flwr.codecs import CODECS
from fomoe_flwr.config import ModelConfig, RunConfig, StrategyConfig
from fomoe_flwr.model.spec import parameter_counts
from fomoe_flwr.plan.record import Plan, mean_residents
from fomoe_flwr.plan.system import split_parameters, star_bytes

BYTES_PER_NUMBER = {name: codec.nbytes({"": (1,)}) for name, codec in CODECS.items()}  # strategy.wire_dtype


class Traffic(NamedTuple):
    """One strategy's traffic; bytes are down + up."""

    name: str
    site_bytes: float  # per site and round
    token_bytes: float  # per token that the site trains on
    ratio: float  # site_bytes relative to the run at hand
    model_share: float  # of the parameters, held by a site


def shard_parameters(model: ModelConfig, routing: str, experts_per_layer: float) -> float:
    """Parameters of a site's shard.

    Args:
        routing: `skip` (the whole router is dense) or `partitioned` (a router row goes with its expert).
        experts_per_layer: residents in a layer; a mean over layers or sites need not be whole.
    """
    return split_parameters(model, routing).held(model.num_layers * experts_per_layer)


def copies_sent(strategy: StrategyConfig) -> int:
    """Tensors that travel for one parameter: LocalAdamW averages both Adam moments too (FoMoE, section 4)."""
    return 3 if strategy.outer == "local_adamw" else 1


def round_bytes(
    model: ModelConfig, routing: str, experts_per_layer: float, bytes_per_number: int, copies: int
) -> float:
    """Bytes per site and round, down + up: dense and residents go down, and as much comes back."""
    return 2 * star_bytes(shard_parameters(model, routing, experts_per_layer), bytes_per_number, copies)


def compare_strategies(
    config: RunConfig, plan: Plan | None = None, residents: float | None = None
) -> list[Traffic]:
    """This run, full-replica DiLoCo (same K) and DDP, all with the run's wire dtype.

    DDP exchanges the gradient of the whole model at every step: K exchanges in the time of a round.

    Args:
        plan: of a run whose sites differ; figures are then means over its sites.
        residents: experts a layer at a site, mean over the sites, where it is recorded; else the plan's.
    """
    model, strategy, train = config.model, config.strategy, config.train
    width = BYTES_PER_NUMBER[strategy.wire_dtype]
    residents = mean_residents(config, plan) if residents is None else residents
    this_run = round_bytes(model, strategy.routing, residents, width, copies_sent(strategy))
    full_exchange = round_bytes(model, strategy.routing, model.num_experts, width, copies=1)
    share = shard_parameters(model, strategy.routing, residents) / parameter_counts(model).total
    tokens: float = train.local_steps * train.batch_size * train.seq_len  # per site and round
    if plan is not None:
        tokens = plan.tokens / len(plan.sites)
    return [
        Traffic(name, site_bytes, site_bytes / tokens, site_bytes / this_run, model_share)
        for name, site_bytes, model_share in (
            ("this run", this_run, share),
            ("full-replica DiLoCo", full_exchange, 1.0),
            ("DDP", train.local_steps * full_exchange, 1.0),
        )
    ]
