"""One table for a sweep: a row a job, with what sets the jobs apart and what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from fomoe_flwr.errors import ConfigError, FomoeError
from fomoe_flwr.report.load import Run, load_run, read_config
from fomoe_flwr.report.summary import summarize
from fomoe_flwr.units import NONE, count, decimal, in_bytes, percent

RESULTS = ("rounds", "tokens", "val loss", "val bpb", "bytes/site\nand round", "resident\nshare", "tokens/s")

Settings = dict[str, str]


def job_dirs(sweep_dir: Path) -> list[Path]:
    """The jobs' directories by number; Hydra names them 0, 1, 2, …"""
    jobs = [path for path in sweep_dir.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(jobs, key=lambda path: int(path.name))


def sweep_table(sweep_dir: Path) -> Table:
    """Every job of a sweep; one without a readable run is `failed`, with the reason below the table."""
    table = Table(title=escape(str(sweep_dir)), box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("job", justify="right", no_wrap=True)
    table.add_column("overrides")
    table.add_column("status", no_wrap=True)
    for header in RESULTS:
        table.add_column(header, justify="right", no_wrap=True)
    jobs = job_dirs(sweep_dir)
    reasons = []
    for job, overrides in zip(jobs, differing(jobs), strict=True):
        text = "\n".join(f"{key}={value}" for key, value in overrides.items()) or NONE
        try:
            table.add_row(job.name, escape(text), *_results(load_run(job)))
        except FomoeError as error:
            table.add_row(job.name, escape(text), "failed", *(NONE for _ in RESULTS))
            reasons.append(f"job {job.name}: {error}")
    table.caption, table.caption_justify = escape("\n".join(reasons)) or None, "left"
    return table


def differing(jobs: Sequence[Path]) -> list[Settings]:
    """For each job, the settings that are not the same in all jobs.

    From the overrides Hydra wrote down, or, where no job has any, from the configurations.
    """
    settings = [_overrides(job) for job in jobs]
    if not any(settings):
        settings = [_configured(job) for job in jobs]
    # A job that left no trace says nothing about the others.
    known = [values for values in settings if values]
    keys = dict.fromkeys(key for values in known for key in values)
    apart = [key for key in keys if len({values.get(key) for values in known}) > 1]
    return [{key: values[key] for key in apart if key in values} for values in settings]


def _results(run: Run) -> tuple[str, ...]:
    summary, planned = summarize(run), run.config.train.rounds
    return (
        "ok" if summary.rounds >= planned else "partial",
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
    if not path.is_file():
        return {}
    pairs = (str(item).partition("=") for item in OmegaConf.load(path))
    return {key.lstrip("+~"): value for key, _, value in pairs}


def _configured(job: Path) -> Settings:
    try:
        return _flat(dataclasses.asdict(read_config(job / "config.yaml")))
    except ConfigError:  # told below the table, where the run itself is read
        return {}


def _flat(tree: dict[str, Any], prefix: str = "") -> Settings:
    """Dotted keys. Lists are left out: the one there is, federation.sites, is told by name and num_sites."""
    flat: Settings = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat
