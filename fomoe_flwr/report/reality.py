"""What was planned for a run beside what was measured, and which assumption was wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from fomoe_flwr.plan.record import SitePlan
from fomoe_flwr.plan.system import compute_source, down_bytes, round_bytes, up_bytes
from fomoe_flwr.report.load import Round, Run, SiteRound
from fomoe_flwr.report.tables import narrow_table
from fomoe_flwr.turns import takes_turns
from fomoe_flwr.units import NONE, duration, in_bytes, percent

MAX_ROWS = 16
OFF = 0.15  # an assumption is named if its figure is wrong by more than this share


class Pair(NamedTuple):
    """A planned figure and the measured one; None if it was not measured."""

    planned: float
    measured: float | None

    @property
    def off(self) -> bool:
        """Whether the plan was wrong by more than `OFF`."""
        if self.measured is None:
            return False
        return abs(self.measured - self.planned) > OFF * max(abs(self.planned), 1e-12)

    def told(self, text: Callable[[float], str]) -> str:
        """Both, as text."""
        return f"{text(self.planned)} -> {NONE if self.measured is None else text(self.measured)}"


class SiteReality(NamedTuple):
    """One site's figures; measured ones are medians over the rounds."""

    site: str
    memory_bytes: Pair
    step_s: Pair
    resident_share: Pair
    round_s: Pair


class Reality(NamedTuple):
    """A run's plan and its rounds."""

    payload_bytes: Pair  # tensors of a round in which every site answered, all sites
    round_s: Pair
    utilisation: Pair  # share of a round that sites compute, in the mean
    sites: list[SiteReality]


def compare(run: Run) -> Reality | None:
    """None if there is no plan or no training round."""
    trained = [record for record in run.rounds if record.sites]
    if run.plan is None or not trained:
        return None
    # The first round also starts things up, so its times say little.
    settled = trained[1:] or trained
    full = [record for record in trained if len(record.sites) == len(run.plan.sites) and not record.failures]
    payload = [record.bytes_by_class["dense"] + record.bytes_by_class["expert"] for record in full]
    if any(record.virtual for record in settled):
        round_s = [float(record.virtual["round_s"]) for record in settled if record.virtual]
    else:
        round_s = [record.seconds for record in settled]
    return Reality(
        Pair(_payload(run, (full or trained)[-1].round), payload[-1] if payload else None),
        Pair(run.plan.round_s, _median(round_s)),
        Pair(run.plan.utilisation, _median(_utilisation(record) for record in settled)),
        [_site(planned, settled) for planned in run.plan.sites],
    )


def _payload(run: Run, round_: int) -> float:
    """Bytes of the tensors of a round, by formula, of what the sites held in it."""
    config, residents = run.config, [held for held in run.residents(round_) if held]
    if takes_turns(config.strategy) and (placement := run.placement(round_ - 1)) is not None:
        return sum(map(sum, round_bytes(config, round_, lambda number: run.placement(number) or placement)))
    return sum(down_bytes(config, held) + up_bytes(config, held) for held in residents)


def _site(planned: SitePlan, rounds: Sequence[Round]) -> SiteReality:
    mine = [(record, site) for record in rounds for site in record.sites if site.site == planned.site]
    return SiteReality(
        planned.site,
        Pair(_memory(planned, mine), _median(site.memory_bytes or None for _, site in mine)),
        Pair(planned.compute_s / planned.local_steps, _median(_step_s(*pair, planned) for pair in mine)),
        Pair(planned.resident_share, _median(site.resident_share for _, site in mine)),
        Pair(planned.round_s, _median(_done_s(*pair) for pair in mine)),
    )


def _memory(planned: SitePlan, rounds: Sequence[tuple[Round, SiteRound]]) -> float:
    """What of the plan a site measures: on a CPU nobody knows what activations took."""
    if planned.state_bytes and not any(site.activations_counted for _, site in rounds):
        return planned.state_bytes
    return planned.memory_bytes


def _step_s(record: Round, site: SiteRound, planned: SitePlan) -> float | None:
    if record.virtual:
        return float(record.virtual["sites"][site.site]["compute_s"]) / planned.local_steps or None
    if not site.tokens_per_second:
        return None
    return site.tokens / site.tokens_per_second / planned.local_steps


def _utilisation(record: Round) -> float | None:
    if record.virtual:
        return record.virtual.get("utilisation")
    used_s = [site.tokens / site.tokens_per_second for site in record.sites if site.tokens_per_second]
    return sum(used_s) / len(used_s) / record.seconds if used_s and record.seconds else None


def _done_s(record: Round, site: SiteRound) -> float | None:
    if not record.virtual:
        return None
    figures = record.virtual["sites"][site.site]
    return float(figures["compute_s"] + figures["communication_s"] - figures.get("hidden_s", 0.0))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def reality_table(reality: Reality) -> Table:
    """Planned -> measured, by site."""
    table = narrow_table("site", "memory", "step", "resident share", "round", title="planned -> measured")
    for site in reality.sites[:MAX_ROWS]:
        table.add_row(
            escape(site.site),
            site.memory_bytes.told(in_bytes),
            site.step_s.told(_milliseconds),
            site.resident_share.told(percent),
            site.round_s.told(duration),
        )
    if len(reality.sites) > MAX_ROWS:
        table.add_row(f"… and {len(reality.sites) - MAX_ROWS} more")
    payload = f"payload {reality.payload_bytes.told(in_bytes)}"
    training = f"training {reality.utilisation.told(percent)}"
    table.add_row("all", payload, "", training, reality.round_s.told(duration))
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else duration(seconds)


def notes(run: Run, reality: Reality) -> list[str]:
    """Which assumptions were wrong, a sentence each."""
    plan, sites, said = run.config.plan, reality.sites, []
    if reality.payload_bytes.off:
        said.append(
            "payload: more or less was sent than the shards that the sites held (evaluations at the sites? tensors "
            "that a lossy strategy.down sent whole?)"
        )
    if worst := _worst([site.step_s for site in sites]):
        said.append(
            f"step time: assumed from {compute_source(run.config)}, off by {worst}; "
            f"plan.measured={run.directory} uses what this run measured"
        )
    if worst := _worst([site.memory_bytes for site in sites]):
        given = f"plan.bytes_per_parameter={plan.bytes_per_parameter:g}, " if plan.bytes_per_parameter else ""
        said.append(f"memory: {given}off by {worst}")
    if worst := _worst([site.resident_share for site in sites]):
        said.append(f"resident share: routing was assumed to be balanced, off by {worst}")
    return said


def _worst(pairs: Sequence[Pair]) -> str | None:
    """The largest relative difference in words; None if all pairs are as planned."""
    if not any(pair.off for pair in pairs):
        return None
    ratios = [pair.measured / pair.planned for pair in pairs if pair.measured is not None and pair.planned]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1), default=1.0)
    if worst > 3:
        return f"a factor of {worst:,.0f} at most" if worst >= 10 else f"a factor of {worst:.1f} at most"
    return f"{100 * (worst - 1):+.0f} % at most"
