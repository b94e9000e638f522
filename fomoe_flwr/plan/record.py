"""A plan as data: what a round is expected to be, and `plan.json`, in which a run keeps it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fomoe_flwr.errors import RunError

NAME = "plan.json"  # in the run directory


@dataclass(frozen=True)
class SitePlan:
    """One site's part of a round; bytes are tensors alone."""

    site: str
    experts_per_layer: int
    local_steps: int
    batch_size: int
    tokens: int
    memory_bytes: float
    bytes_down: int
    bytes_up: int
    compute_s: float
    communication_s: float
    round_s: float  # compute + communication; the round of all is the longest
    resident_share: float  # of the router's choices, expected


@dataclass(frozen=True)
class Plan:
    """What a round of the whole federation is expected to be."""

    placement: str  # strategy.placement; equal for those that go by no plan
    sites: tuple[SitePlan, ...]
    round_s: float
    tokens: int
    tokens_per_second: float
    useful_tokens_per_second: float  # each token by its worth (plan.skip_price)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        sites = tuple(SitePlan(**site) for site in values["sites"])
        rest = {key: value for key, value in values.items() if key not in ("policy", "sites")}
        if (policy := values.get("policy")) is not None:  # of an earlier version
            rest["placement"] = "planned" if policy == "solver" else policy
        return cls(sites=sites, **rest)

    @property
    def mean_residents(self) -> float:
        """Experts a layer at a site, mean over the sites."""
        return sum(site.experts_per_layer for site in self.sites) / len(self.sites)


def load_plan(run_dir: Path) -> Plan | None:
    """The plan of a run, if it has one.

    Raises:
        RunError: it is damaged.
    """
    path = run_dir / NAME
    return Plan.from_dict(read_content(path)["plan"]) if path.exists() else None


def read_content(path: Path) -> dict[str, Any]:
    """What `plan.json` holds.

    Raises:
        RunError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        Plan.from_dict(content["plan"])
        return {"request": None, **content}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error!r}); delete it to have a new plan made") from error
