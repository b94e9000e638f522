"""A plan as data: what a round is expected to be, and `plan.json`, in which a run keeps it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from fomoe_flwr.errors import RunError
from fomoe_flwr.reading import Amount, as_type, load_json, not_empty, positive, reason

NAME = "plan.json"  # in the run directory


@dataclass(frozen=True)
class SitePlan:
    """One site's part of a round; bytes are tensors alone."""

    site: str
    experts_per_layer: int
    local_steps: Annotated[int, positive]
    batch_size: int
    tokens: int
    memory_bytes: Amount  # at the peak of a step (plan/memory.py)
    bytes_down: int
    bytes_up: int
    compute_s: Amount
    communication_s: Amount
    round_s: Amount  # compute + communication - hidden; the round of all is the longest
    resident_share: Amount  # of the router's choices, expected
    hidden_s: Amount = 0.0  # of communication, behind compute (strategy.delay=1)
    # Weights, gradients, moments and the shard as it was sent; of earlier versions, which counted nothing else, 0.
    state_bytes: Amount = 0.0


class CostSeconds(TypedDict):
    """`TokenCost` as data."""

    dense_s: Amount
    experts_s: Amount
    router_s: Amount


@dataclass(frozen=True)
class Plan:
    """What a round of the whole federation is expected to be."""

    placement: str  # strategy.placement; equal for those that go by no plan
    sites: Annotated[tuple[SitePlan, ...], not_empty]
    round_s: Amount
    tokens: Annotated[int, positive]
    tokens_per_second: Amount
    useful_tokens_per_second: Amount  # each token by its worth (plan.skip_price)
    # What it rests on, for a new plan in the middle of the run; None in those of earlier versions.
    token_cost_s: CostSeconds | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is not a plan.
        """
        if (policy := values.get("policy")) is not None:  # of an earlier version
            values = {**values, "placement": "planned" if policy == "solver" else policy}
        plan: Plan = as_type(cls, values)
        return plan

    @property
    def utilisation(self) -> float:
        """Share of a round that sites compute, mean over those that take part."""
        computing = [site.compute_s for site in self.sites if site.tokens]
        return sum(computing) / len(computing) / self.round_s if computing and self.round_s else 0.0

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


class Content(TypedDict):
    """What `plan.json` holds."""

    plan: dict[str, Any]
    request: _Request | None


class _Request(TypedDict):
    plan: dict[str, Any]
    strategy: Annotated[list[Any], not_empty]


def read_content(path: Path) -> Content:
    """What `plan.json` holds.

    Raises:
        RunError: it is damaged.
    """
    try:
        content: Content = as_type(Content, {"request": None, **load_json(path, dict[str, Any])})
        Plan.from_dict(content["plan"])
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: damaged ({reason(error)}); delete it to have a new plan made") from error
    return content
