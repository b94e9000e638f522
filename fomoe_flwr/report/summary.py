"""A run in a dozen numbers, for the tables and for the head of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fomoe_flwr.config import PLANNED, RunConfig
from fomoe_flwr.model.spec import parameter_counts
from fomoe_flwr.report.load import Round, Run
from fomoe_flwr.units import count


class Summary(NamedTuple):
    """None is what the run did not measure."""

    rounds: int  # the last one
    tokens: int  # trained on, all sites
    first_val_loss: float | None  # None unless there are two evaluations
    val_loss: float | None  # of the last evaluation
    first_val_bpb: float | None
    val_bpb: float | None
    bytes_down: int  # all rounds, all sites
    bytes_up: int
    site_bytes: float | None  # down + up per site and round, mean over rounds
    resident_share: float | None  # of the last round
    tokens_per_second: float | None  # all sites, over whole rounds: waiting and wire included
    seconds: float  # all rounds


def summarize(run: Run) -> Summary:
    """The numbers of a run."""
    rounds, last = run.rounds, run.rounds[-1]
    val_loss = _measured([record.val_loss for record in rounds])
    val_bpb = _measured([record.val_bpb for record in rounds])
    site_bytes = _measured([record.site_bytes for record in rounds])
    return Summary(
        rounds=last.round,
        tokens=last.tokens,
        first_val_loss=val_loss[0] if len(val_loss) > 1 else None,
        val_loss=val_loss[-1] if val_loss else None,
        first_val_bpb=val_bpb[0] if len(val_bpb) > 1 else None,
        val_bpb=val_bpb[-1] if val_bpb else None,
        bytes_down=sum(record.bytes_down for record in rounds),
        bytes_up=sum(record.bytes_up for record in rounds),
        site_bytes=sum(site_bytes) / len(site_bytes) if site_bytes else None,
        resident_share=last.resident_share,
        tokens_per_second=_tokens_per_second(rounds),
        seconds=sum(record.seconds for record in rounds),
    )


def setting(config: RunConfig) -> str:
    """What was run, in one line."""
    model, strategy = config.model, config.strategy
    counts = parameter_counts(model)
    num_sites = len(config.federation.sites)
    steps = config.train.local_steps
    if config.strategy.placement in PLANNED:
        holders = "experts as planned"
    else:
        full = config.overlap == num_sites
        holders = "all experts at every site" if full else f"each expert at {config.overlap}"
    parts = (
        f"{model.name}: {count(counts.total)} parameters, {100 * counts.experts / counts.total:.0f} % in experts",
        f"{num_sites} {'site' if num_sites == 1 else 'sites'}, {holders}",
        f"K = {steps} local {'step' if steps == 1 else 'steps'}",
        f"{strategy.routing} routing",
        f"{strategy.outer} outer",
    )
    return " | ".join(parts)


def _measured(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _tokens_per_second(rounds: Sequence[Round]) -> float | None:
    # The first line's tokens are the starting point: 0, or what a resumed run had behind it.
    seconds = sum(record.seconds for record in rounds[1:])
    return (rounds[-1].tokens - rounds[0].tokens) / seconds if seconds else None
