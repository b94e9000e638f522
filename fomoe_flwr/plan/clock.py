"""The virtual clock of a simulation: what a round would have taken with the federation's own devices and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fomoe_flwr.plan.sites import PlanSite
from fomoe_flwr.plan.system import transfer_s


class Measured(NamedTuple):
    """What a site did in a simulated round."""

    seconds: float  # of its local steps, on the simulation's device, which counts as speed 1
    bytes_down: int  # everything, not tensors alone
    bytes_up: int


def virtual_round(sites: Sequence[PlanSite], measured: Mapping[int, Measured]) -> dict[str, Any]:
    """Charge each site its compute, scaled by its speed, and its bytes, by its link.

    Returns:
        `round_s`; `slowest`, the site for whom the others waited; and by site `compute_s`, `communication_s` and
        `waited_s`.
    """
    by_site: dict[str, dict[str, float]] = {}
    done_s: dict[str, float] = {}
    for index, work in sorted(measured.items()):
        site = sites[index]
        compute_s = work.seconds / site.speed
        communication_s = transfer_s(work.bytes_down, site.down_bytes_per_s, site.latency_s) + transfer_s(
            work.bytes_up, site.up_bytes_per_s, site.latency_s
        )
        by_site[site.name] = {"compute_s": compute_s, "communication_s": communication_s}
        done_s[site.name] = compute_s + communication_s
    slowest = max(done_s, key=lambda name: done_s[name])
    for name, figures in by_site.items():
        figures["waited_s"] = done_s[slowest] - done_s[name]
    return {"round_s": done_s[slowest], "slowest": slowest, "sites": by_site}
