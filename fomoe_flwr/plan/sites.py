"""A federation's sites as the plan sees them: plain numbers, with assumptions where nothing is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_flwr.config import RunConfig

BYTES_PER_S_A_MBPS = 1e6 / 8
BYTES_A_GIB = 2**30


@dataclass(frozen=True)
class PlanSite:
    """One site. Bandwidths are to and from the server, its own share of the server's link at the most."""

    name: str
    memory_bytes: float  # infinite where it is not given
    speed: float  # relative to the device that `TokenCost` is for
    down_bytes_per_s: float
    up_bytes_per_s: float
    latency_s: float  # one way
    batch_size: int
    step_tokens: int


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
            )
        )
    return planned
