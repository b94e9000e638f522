"""The plan of a run beside what was measured, and which assumption was off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from fomoe_flwr.plan.record import Plan, SitePlan
from fomoe_flwr.plan.system import one_way_bytes
from fomoe_flwr.report.load import Round, Run, SiteRound
from fomoe_flwr.units import NONE, duration, in_bytes, percent

MAX_ROWS = 16
OFF = 0.15  # relative difference from which on an assumption is named


class Pair(NamedTuple):
    """A planned figure and the measured one, None where there is none."""

    planned: float
    measured: float | None

    @property
    def off(self) -> bool:
        """Whether they differ by more than is worth no word."""
        if self.measured is None:
            return False
        return abs(self.measured - self.planned) > OFF * max(abs(self.planned), 1e-12)


class SiteReality(NamedTuple):
    """One site's figures; the medians over the rounds."""

    site: str
    memory_bytes: Pair
    step_s: Pair
    resident_share: Pair
    round_s: Pair


class Reality(NamedTuple):
    """A run's plan against its rounds."""

    payload_bytes: Pair  # tensors of a round in which every site answered, all sites
    round_s: Pair
    sites: list[SiteReality]


def compare(run: Run) -> Reality | None:
    """None where there is no plan or no training round."""
    trained = [record for record in run.rounds if record.sites]
    if run.plan is None or not trained:
        return None
    settled = trained[1:] or trained  # the first one starts things up
    full = [record for record in trained if len(record.sites) == len(run.plan.sites) and not record.failures]
    payload = [record.bytes_by_class["dense"] + record.bytes_by_class["expert"] for record in full]
    expected_payload = _payload(run, full[-1].round if full else trained[-1].round)
    virtual = any(record.virtual for record in settled)
    return Reality(
        Pair(expected_payload, payload[-1] if payload else None),
        Pair(run.plan.round_s, _median([_round_s(record, virtual) for record in settled])),
        [_site(run.plan, planned, settled) for planned in run.plan.sites],
    )


def _payload(run: Run, round_: int) -> float:
    """Bytes of the tensors of a round, by formula, of what the sites held in it."""
    return sum(2 * one_way_bytes(run.config, held) for held in run.residents(round_) if held)


def _site(plan: Plan, planned: SitePlan, rounds: Sequence[Round]) -> SiteReality:
    def measured(value: Callable[[Round, SiteRound], float | None]) -> float | None:
        return _median([value(r, site) for r in rounds for site in r.sites if site.site == planned.site])

    return SiteReality(
        planned.site,
        Pair(planned.memory_bytes, measured(lambda _, site: site.memory_bytes or None)),
        Pair(planned.compute_s / planned.local_steps, measured(lambda r, s: _step_s(r, s, planned))),
        Pair(planned.resident_share, measured(lambda _, site: site.resident_share)),
        Pair(planned.round_s, measured(lambda r, site: _done_s(r, site.site))),
    )


def _step_s(record: Round, site: SiteRound, planned: SitePlan) -> float | None:
    if record.virtual:
        return float(record.virtual["sites"][site.site]["compute_s"]) / planned.local_steps or None
    if not site.tokens_per_second:
        return None
    return site.tokens / site.tokens_per_second / planned.local_steps


def _done_s(record: Round, site: str) -> float | None:
    if not record.virtual:
        return None
    figures = record.virtual["sites"][site]
    return float(figures["compute_s"] + figures["communication_s"])


def _round_s(record: Round, virtual: bool) -> float | None:
    if virtual:
        return float(record.virtual["round_s"]) if record.virtual else None
    return record.seconds


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def reality_table(reality: Reality) -> Table:
    """Planned -> measured, by site."""
    table = Table(title="planned -> measured", box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("site", no_wrap=True)
    for header in ("memory", "step", "resident share", "round"):
        table.add_column(header, justify="right", no_wrap=True)
    for site in reality.sites[:MAX_ROWS]:
        table.add_row(
            escape(site.site),
            _both(site.memory_bytes, in_bytes),
            _both(site.step_s, _milliseconds),
            _both(site.resident_share, percent),
            _both(site.round_s, duration),
        )
    if len(reality.sites) > MAX_ROWS:
        table.add_row(f"… and {len(reality.sites) - MAX_ROWS} more")
    table.add_row(
        "all", "", "", f"payload {_both(reality.payload_bytes, in_bytes)}", _both(reality.round_s, duration)
    )
    return table


def notes(run: Run, reality: Reality) -> list[str]:
    """Which assumption was off, a sentence each."""
    said = []
    if reality.payload_bytes.measured is not None and reality.payload_bytes.off:
        said.append(
            "payload: more or less was sent than the shards that the sites held (evaluations at the sites?)"
        )
    plan = run.config.plan
    if _any_off(site.step_s for site in reality.sites):
        source = f"plan.tflops={plan.tflops:g}, plan.mfu={plan.mfu:g}"
        if plan.measured:
            source = f"plan.measured={plan.measured}"
        said.append(
            f"step time: assumed from {source}, off by {_worst(s.step_s for s in reality.sites)}; "
            f"plan.measured={run.directory} uses what this run measured"
        )
    if _any_off(site.memory_bytes for site in reality.sites):
        said.append(
            f"memory: plan.bytes_per_parameter={plan.bytes_per_parameter:g}, off by "
            f"{_worst(s.memory_bytes for s in reality.sites)}"
        )
    if _any_off(site.resident_share for site in reality.sites):
        said.append(
            "resident share: routing was assumed to be balanced, off by "
            f"{_worst(s.resident_share for s in reality.sites)}"
        )
    return said


def _any_off(pairs: Iterable[Pair]) -> bool:
    return any(pair.off for pair in pairs)


def _worst(pairs: Iterable[Pair]) -> str:
    ratios = [pair.measured / pair.planned for pair in pairs if pair.measured is not None and pair.planned]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1), default=1.0)
    if worst > 3:
        return f"a factor of {worst:,.0f} at most" if worst >= 10 else f"a factor of {worst:.1f} at most"
    return f"{100 * (worst - 1):+.0f} % at most"


def _both(pair: Pair, text: Callable[[float], str]) -> str:
    return f"{text(pair.planned)} -> {NONE if pair.measured is None else text(pair.measured)}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else duration(seconds)
