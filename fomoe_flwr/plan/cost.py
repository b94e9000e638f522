"""What a token costs a site in time: by formula, or as an earlier run measured it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fomoe_flwr.config import ModelConfig, RunConfig
from fomoe_flwr.errors import ConfigError, FomoeError
from fomoe_flwr.model.spec import token_flops
from fomoe_flwr.plan.system import expert_work

if TYPE_CHECKING:
    from fomoe_flwr.report.load import Run

DISTINCT = 0.05  # spread in expert work from which on two unknowns can be told apart


class TokenCost(NamedTuple):
    """Seconds a token at a site of speed 1."""

    dense_s: float
    experts_s: float  # of all k experts in every layer
    router_s: float  # of the whole router

    def seconds(
        self, model: ModelConfig, routing: str, residents: float, hit_rate: float | None = None
    ) -> float:
        """Of a token at a site with so many residents a layer (FoMoE, compute model of section 4)."""
        gate = 1.0 if routing == "skip" else residents / model.num_experts
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


def measured_cost(config: RunConfig, directory: str) -> TokenCost:
    """Least squares of `seconds a token · speed = dense + work · experts` over the sites of a run.

    Each site counts once, with its median over the rounds after the first, which starts things up. Sites that do
    the same expert work do not tell dense and experts apart: then their sum is measured and their ratio modelled.

    Raises:
        ConfigError: see `token_cost`.
    """
    path = Path(directory).expanduser()
    metrics = path / "metrics.jsonl"
    try:
        run = _load(path, metrics.stat().st_mtime_ns if metrics.exists() else 0)
    except FomoeError as error:
        raise ConfigError(f"plan.measured={directory}: {error}") from error
    for key in ("d_model", "num_layers", "num_experts", "d_expert", "top_k", "vocab_size"):
        if (there := getattr(run.config.model, key)) != (here := getattr(config.model, key)):
            raise ConfigError(f"plan.measured={directory}: its model.{key} is {there}, here it is {here}")
    speed = {site.name: site.speed for site in run.config.federation.sites}
    seconds: dict[str, list[float]] = {name: [] for name in speed}
    share: dict[str, list[float]] = {name: [] for name in speed}
    trained = [record for record in run.rounds if record.sites]
    for record in trained[1:] or trained:
        for site in record.sites:
            if site.tokens_per_second and site.resident_share is not None:
                seconds[site.site].append(speed[site.site] / site.tokens_per_second)
                share[site.site].append(site.resident_share)
    if not any(seconds.values()):
        raise ConfigError(f"plan.measured={directory}: no site has trained in this run")
    model, routing = run.config.model, run.config.strategy.routing
    names = [name for name in seconds if seconds[name]]
    seconds_M = np.array([median(seconds[name]) for name in names])
    held = dict.fromkeys(names, run.held_share * model.num_experts)
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
    if len(work_M) > 1 and np.ptp(work_M) >= DISTINCT:
        design = np.stack([np.ones_like(work_M), work_M], axis=1)
        (dense_s, experts_s), *_ = np.linalg.lstsq(design, seconds_M, rcond=None)
        if dense_s > 0 and experts_s >= 0:
            return TokenCost(float(dense_s), float(experts_s), 0.0)
    dense_s = modelled.dense_s + modelled.router_s
    by_formula_M = dense_s + work_M * modelled.experts_s
    scale = float(np.median(seconds_M / by_formula_M))
    return TokenCost(scale * dense_s, scale * modelled.experts_s, 0.0)
