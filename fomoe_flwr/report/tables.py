"""Tables of a run, of a sweep and of `fomoe eval`, and the figures in them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fomoe_flwr.config import PLANNED, RunConfig
from fomoe_flwr.console import print_whole
from fomoe_flwr.errors import LONGEST, ConfigError, FomoeError, RunError
from fomoe_flwr.inputs import differences
from fomoe_flwr.model.spec import parameter_counts, routing_in_words
from fomoe_flwr.plan.rivals import compare_strategies
from fomoe_flwr.reading import read_json, read_yaml
from fomoe_flwr.records import FAILURE
from fomoe_flwr.report.load import Run, load_run, read_config
from fomoe_flwr.units import NONE, count, decimal, duration, in_bytes, percent, times

log = logging.getLogger("fomoe")

DOMAINS_SHOWN = 12  # the largest ones; the JSON has all

Settings = dict[str, str]


def narrow_table(first: str, *others: str, title: str | None = None) -> Table:
    """An empty table with a column of names and right-aligned columns of figures."""
    table = Table(title=title, box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    return table


# ----- one run


class Summary(NamedTuple):
    """A run in a few figures; None where the run did not measure one."""

    rounds: int  # the last one
    tokens: int  # trained on, all sites
    first_val_loss: float | None  # None unless there are two evaluations
    val_loss: float | None  # of the last evaluation
    first_val_bpb: float | None
    val_bpb: float | None
    bytes_down: int  # all rounds, all sites
    bytes_up: int
    site_bytes: float | None  # down + up of a site in a round, mean over the rounds
    resident_share: float | None  # of the last round
    tokens_per_second: float | None  # all sites, over whole rounds with waiting and sending
    seconds: float  # all rounds


def summarize(run: Run) -> Summary:
    """The figures of a run."""
    rounds, last = run.rounds, run.rounds[-1]
    val_loss = [record.val_loss for record in rounds if record.val_loss is not None]
    val_bpb = [record.val_bpb for record in rounds if record.val_bpb is not None]
    site_bytes = [record.site_bytes for record in rounds if record.site_bytes is not None]
    # The tokens of the first line are not trained in these rounds: 0, or those before a run was resumed.
    trained, trained_s = last.tokens - rounds[0].tokens, sum(record.seconds for record in rounds[1:])
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
        tokens_per_second=trained / trained_s if trained_s else None,
        seconds=sum(record.seconds for record in rounds),
    )


def setting(config: RunConfig) -> str:
    """What was run, in one line."""
    model, strategy, steps = config.model, config.strategy, config.train.local_steps
    counts, num_sites = parameter_counts(model), len(config.federation.sites)
    holders = f"each expert at {config.overlap}"
    if strategy.placement in PLANNED:
        holders = "experts as planned"
    elif config.overlap == num_sites:
        holders = "all experts at every site"
    parts = (
        f"{model.name}: {count(counts.total)} parameters, {100 * counts.experts / counts.total:.0f} % in experts",
        f"{num_sites} {'site' if num_sites == 1 else 'sites'}, {holders}",
        f"K = {steps} local {'step' if steps == 1 else 'steps'}",
        f"{routing_in_words(model, strategy.routing)} routing",
        f"{strategy.outer} outer",
    )
    return " | ".join(parts)


def run_table(run: Run) -> Table:
    """What the run was and what came out of it."""
    summary, config = summarize(run), run.config
    table = Table(title=escape(str(run.directory)), box=SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("setting", escape(setting(config)))
    table.add_row("rounds", f"{summary.rounds} of {config.train.rounds}")
    table.add_row("tokens", count(summary.tokens))
    table.add_row("validation loss", _from_to(summary.first_val_loss, summary.val_loss))
    table.add_row("validation bits per byte", _from_to(summary.first_val_bpb, summary.val_bpb))
    table.add_row("bytes down, all sites", in_bytes(summary.bytes_down))
    table.add_row("bytes up, all sites", in_bytes(summary.bytes_up))
    table.add_row("router choices held by the site", percent(summary.resident_share))
    table.add_row("tokens/s, all sites, wire included", count(summary.tokens_per_second))
    table.add_row("wall time", duration(summary.seconds))
    if discarded := sum(not record.committed for record in run.rounds):
        table.add_row("rounds discarded", str(discarded))
    for site, reasons in _missing(run).items():
        told = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        table.add_row(f"replies missing of {escape(site)}", escape(f"{reasons.total()} ({told})"))
    for before, after in itertools.pairwise(run.rounds):
        for difference in differences(before.inputs, after.inputs):
            table.add_row(f"other input from round {after.round} on", escape(str(difference)))
    return table


def _from_to(first: float | None, last: float | None) -> str:
    if first is None or last is None or first == 0:
        return decimal(last)
    return f"{decimal(first)} -> {decimal(last)} ({100 * (last / first - 1):+.1f} %)"


def _missing(run: Run) -> dict[str, Counter[str]]:
    """How often each site's reply was not part of the model, and why."""
    missing: dict[str, Counter[str]] = {}
    for record in run.rounds:
        for site in sorted(record.failures | record.refused):
            reason = f"refused: {record.refused[site]}" if site in record.refused else "failed or late"
            missing.setdefault(site, Counter())[reason] += 1
    return missing


def comparison_table(run: Run) -> Table:
    """Measured bytes, and what this run and other strategies should send by formula (`plan.rivals`)."""
    columns = ("source", "bytes", "bytes/token", "vs this run", "model held")
    table = narrow_table("strategy", *columns, title="bytes per site and round, down + up")
    table.columns[1].justify = "left"
    rows = [(row, "by formula") for row in compare_strategies(run.config, run.plan, run.mean_residents)]
    this_run, measured = rows[0][0], summarize(run).site_bytes
    if measured is not None:
        ratio = measured / this_run.site_bytes
        token_bytes = this_run.token_bytes * ratio
        rows.insert(
            0, (this_run._replace(site_bytes=measured, token_bytes=token_bytes, ratio=ratio), "measured")
        )
    for row, source in rows:
        sizes = in_bytes(row.site_bytes), in_bytes(row.token_bytes)
        table.add_row(row.name, source, *sizes, times(row.ratio), percent(row.model_share))
    table.caption = (
        "measured: all rounds in the mean, with headers; by formula: tensors alone, of a round in the middle"
    )
    table.caption_justify = "left"
    return table


# ----- a sweep


def job_dirs(sweep_dir: Path) -> list[Path]:
    """The jobs' directories by number; Hydra names them 0, 1, 2, …"""
    jobs = [path for path in sweep_dir.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(jobs, key=lambda path: int(path.name))


def sweep_table(sweep_dir: Path) -> Table:
    """A row for each job. A job without a readable run is `failed`, with the reason below the table."""
    results = (
        "rounds",
        "tokens",
        "val loss",
        "val bpb",
        "bytes/site\nand round",
        "resident\nshare",
        "tokens/s",
    )
    table = narrow_table("job", "overrides", "status", *results, title=escape(str(sweep_dir)))
    table.columns[0].justify = "right"
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[1].no_wrap = False
    jobs, reasons = job_dirs(sweep_dir), []
    for job, overrides in zip(jobs, differing(jobs), strict=True):
        text = "\n".join(f"{key}={value}" for key, value in overrides.items()) or NONE
        try:
            results_of = _results(run := load_run(job))
            table.add_row(job.name, escape(text), *results_of)
            if results_of[0] == "failed":
                reasons.append(f"job {job.name}: {_failure(run)}")
        except FomoeError as error:
            table.add_row(job.name, escape(text), "failed", *(NONE for _ in results))
            reasons.append(f"job {job.name}: {error}")
    table.caption, table.caption_justify = escape("\n".join(reasons)) or None, "left"
    return table


def differing(jobs: Sequence[Path]) -> list[Settings]:
    """For each job, the settings that are not the same in all jobs.

    From the overrides that Hydra wrote, or from the configurations if no job has overrides.
    """
    settings = [_overrides(job) for job in jobs]
    if not any(settings):
        settings = [_configured(job) for job in jobs]
    # A job that failed early may have neither.
    known = [values for values in settings if values]
    keys = dict.fromkeys(key for values in known for key in values)
    apart = [key for key in keys if len({values.get(key) for values in known}) > 1]
    return [{key: values[key] for key in apart if key in values} for values in settings]


def status(run: Run) -> str:
    """`ok`, `partial` (it has not come to its last round), or `failed`: it ended with an error, or in vain."""
    if _failure(run):
        return "failed"
    return "ok" if run.rounds[-1].round >= run.config.train.rounds else "partial"


def all_ok(sweep_dir: Path) -> bool:
    """Whether every job of a sweep came to its end."""
    try:
        return all(status(load_run(job)) == "ok" for job in job_dirs(sweep_dir))
    except FomoeError:
        return False


def _failure(run: Run) -> str:
    file = run.directory / FAILURE
    if file.is_file():
        return " ".join(file.read_text(encoding="utf-8", errors="replace")[:LONGEST].split())
    return "" if run.rounds[-1].committed else "nothing was committed in the last round"


def _results(run: Run) -> tuple[str, ...]:
    summary, planned = summarize(run), run.config.train.rounds
    return (
        status(run),
        f"{summary.rounds}/{planned}",
        count(summary.tokens),
        decimal(summary.val_loss),
        decimal(summary.val_bpb),
        in_bytes(summary.site_bytes),
        percent(summary.resident_share),
        count(summary.tokens_per_second),
    )


def _overrides(job: Path) -> Settings:
    path = job / ".hydra" / "overrides.yaml"
    if not path.exists():
        return {}
    try:
        pairs = [str(item).partition("=") for item in read_yaml(path, list[Any])]
    except RunError as error:
        log.warning("%s; the sweep's table shows no overrides of this job", error)
        return {}
    return {key.lstrip("+~"): value for key, _, value in pairs}


def _configured(job: Path) -> Settings:
    try:
        return _flat(dataclasses.asdict(read_config(job / "config.yaml")))
    except ConfigError:  # the reason stands below the table
        return {}


def _flat(tree: dict[str, Any], prefix: str = "") -> Settings:
    """Dotted keys, without lists: federation.sites is the only one, and name and num_sites describe it."""
    flat: Settings = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat


# ----- an evaluation, from the JSON object that `fomoe eval --json` prints


class _Text(TypedDict):
    name: str
    part: str
    documents: int
    tokens: int


class _Figures(TypedDict):
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int


class _Whole(_Figures, total=False):
    by_domain: dict[str, _Figures]


class _Necessity(TypedDict):
    tokens: int
    necessity: float | None
    necessity_by_layer: list[float | None]
    necessity_by_draw: list[float | None]


class _Evaluation(TypedDict):
    checkpoint: str
    text: _Text
    all_experts: _Whole
    residents: dict[str, _Whole | None]
    routing: _Necessity


def show_saved(file: Path, console: Console) -> None:
    """Print the evaluation that a run left, if it left one.

    Raises:
        RunError: it cannot be read.
    """
    if not file.exists():
        return
    try:
        content = read_json(file, _Evaluation)
    except RunError as error:
        raise RunError(f"{error}; fomoe eval makes the figures anew") from error
    show_evaluation(content, console)


def show_evaluation(content: Mapping[str, Any], console: Console) -> None:
    """Print the figures of `fomoe eval`."""
    text, tokens, routing = content["text"], content["all_experts"]["tokens"], content["routing"]
    part = "validation part, " if text["part"] == "validation" else ""
    of = f"{tokens:,} of {text['tokens']:,}" if tokens < text["tokens"] else f"{tokens:,}"
    documents = "1 document" if text["documents"] == 1 else f"{text['documents']:,} documents"
    draws = len(routing["necessity_by_draw"])
    averaged = "1 draw" if draws == 1 else f"mean of {draws} draws"
    heading = f"{content['checkpoint']} on {text['name']}: {part}{documents}, {of} tokens"
    console.print(heading, soft_wrap=True, markup=False, highlight=False)
    print_whole(_loss_table(content), console)
    console.print(
        "routing necessity: loss with random routing minus loss with the learned router, nats; "
        f"{routing['tokens']:,} tokens, {averaged}",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    print_whole(_necessity_table(routing), console)


def _loss_table(content: Mapping[str, Any]) -> Table:
    everything, sites = content["all_experts"], content["residents"]
    table = narrow_table("experts", "loss, nats", "perplexity", "bits per byte", "tokens")
    table.add_row("[bold]all[/]", *_cells(everything))
    if sites and all(figures == everything for figures in sites.values()):
        table.add_row(f"residents of each of the {len(sites)} sites: all", *_cells(everything))
    else:
        for site, figures in sites.items():
            table.add_row(f"residents of {escape(site)}", *_cells(figures))
    domains = everything.get("by_domain", {})
    if len(domains) > 1:
        table.add_section()
        largest = sorted(domains, key=lambda name: -domains[name]["tokens"])
        for name in largest[:DOMAINS_SHOWN]:
            table.add_row(f"all, on {escape(name)}", *_cells(domains[name]))
        if (more := len(largest) - DOMAINS_SHOWN) > 0:
            table.add_row(f"{more} smaller ones are in the JSON")
    return table


def _necessity_table(routing: Mapping[str, Any]) -> Table:
    compared = "reference_necessity" in routing
    columns = ("of the reference", "share") if compared else ()
    table = narrow_table("random in", "necessity", *columns)
    rows = [("[bold]all layers[/]", routing["necessity"], routing.get("reference_necessity"))]
    # The reference may have fewer layers.
    theirs = dict(enumerate(routing.get("reference_necessity_by_layer", ())))
    for layer, value in enumerate(routing["necessity_by_layer"]):
        rows.append((f"layer {layer} alone", value, theirs.get(layer)))
    for name, value, other in rows:
        share = value / other if value is not None and other is not None and other > 0 else None
        table.add_row(name, decimal(value), *((decimal(other), percent(share)) if compared else ()))
    return table


def _cells(figures: Mapping[str, Any] | None) -> tuple[str, ...]:
    if figures is None:
        return (NONE, NONE, NONE, "no experts")
    value = figures["perplexity"]
    perplexity = NONE if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    if value is not None and value >= 1e9:
        perplexity = f"{value:.1e}"
    loss, bits_per_byte = decimal(figures["loss"]), decimal(figures["bits_per_byte"])
    return (loss, perplexity, bits_per_byte, f"{figures['tokens']:,}")
