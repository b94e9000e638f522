"""`plan.json` in a run directory: what the run expects of its rounds, and what that rests on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fomoe_flwr.config import RunConfig
from fomoe_flwr.files import write_atomically
from fomoe_flwr.plan.cost import token_cost
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.record import NAME, Plan, read_content


def plan_for_run(run_dir: Path, config: RunConfig) -> Plan:
    """The plan of a run, written beside its metrics; a resumed run goes on by the one it has.

    Speeds that were measured for it may be gone by then, and another plan would move experts for nothing. Only where
    what was asked of the planner has changed is there a new one.

    Raises:
        ConfigError: there is no plan for this configuration.
    """
    request = _request(config)
    if (path := run_dir / NAME).exists():
        saved = read_content(path)
        if saved["request"] == request:
            return Plan.from_dict(saved["plan"])
    cost = token_cost(config)
    plan = make_plan(config, cost=cost)
    content = {"plan": plan.to_dict(), "token_cost_s": cost._asdict(), "request": request}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1)))
    return plan


def _request(config: RunConfig) -> dict[str, Any]:
    """What a plan is made from, as JSON gives it back."""
    train, strategy = config.train, config.strategy
    request = {
        "model": dataclasses.asdict(config.model),
        "sites": [dataclasses.asdict(site) for site in config.federation.sites],
        "plan": dataclasses.asdict(config.plan),
        "train": [train.local_steps, train.batch_size, train.seq_len],
        "strategy": [
            strategy.placement, strategy.overlap, strategy.routing, strategy.outer, strategy.wire_dtype,
        ],
    }  # fmt: skip
    loaded: dict[str, Any] = json.loads(json.dumps(request))
    return loaded
