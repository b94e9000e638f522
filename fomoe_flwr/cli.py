"""The console command: `fomoe train [overrides]`, `plan`, `eval`, `report DIR`, and `fomoe server`, `site`, `submit`.

Everything that can be refused is refused before Hydra starts a job, in one line.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from fomoe_flwr import __version__
from fomoe_flwr.compose import (
    Composed,
    compose,
    conf_dir,
    from_tree,
    merge_overrides,
    register_schema,
    rewrite_federation_file,
    split_sweep,
    task_overrides,
)
from fomoe_flwr.console import setup_logging
from fomoe_flwr.errors import ConfigError, FomoeError
from fomoe_flwr.report import report

USAGE = """usage: fomoe train [OVERRIDE ...]      one run, e.g. fomoe train model=tiny strategy.overlap=2
       fomoe train -m OVERRIDE ...    a run for each combination, e.g. strategy.overlap=1,2,4
       fomoe train --cfg job          show the configuration (Hydra's other flags work too)
       fomoe plan [OVERRIDE ...]      what a run would cost each site, and advice (--help: pictures, JSON)
       fomoe eval CHECKPOINT [OVERRIDE ...]   a checkpoint judged on any text (--help: reference, JSON)
       fomoe report DIR               tables and picture of a run, or the table of a sweep
       fomoe server [OPTION ...]      Flower's SuperLink, with flower-superlink's options
       fomoe site --superlink HOST:PORT --name NAME ...    a site of a federation (--help: its options)
       fomoe submit CONNECTION [OVERRIDE ...]              a run on the sites that are connected
       fomoe --version"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0: done; 1: the run failed; 2: the command cannot be right."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    setup_logging("hydra.verbose=true" in arguments)
    try:
        match arguments:
            case ["train", *overrides]:
                train(overrides)
            case ["plan", *options]:
                from fomoe_flwr.plan.command import plan

                plan(options)
            case ["eval", *options]:
                from fomoe_flwr.eval_command import evaluate_command

                evaluate_command(options)
            case ["report", directory] if not directory.startswith("-"):
                report(Path(directory), Console())
            case ["server", *options]:
                from fomoe_flwr.deploy.server import server

                server(options)
            case ["site", *options]:
                from fomoe_flwr.deploy.site import site

                sys.exit(site(options))
            case ["submit", *options]:
                from fomoe_flwr.deploy.submit import submit

                submit(options)
            case ["--version"]:
                print(f"fomoe-flwr {__version__}")
            case ["--help" | "-h"] | ["train" | "report" | "submit", "--help" | "-h"]:
                print(USAGE)
            case _:
                print(USAGE, file=sys.stderr)
                sys.exit(2)
    except FomoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; resume=RUN_DIR goes on from the last checkpoint", file=sys.stderr, flush=True)
        # Not sys.exit: it would wait for a thread of Flower's engine that may wait for a site that is gone.
        os._exit(130)


def train(arguments: Sequence[str]) -> None:
    """Check the configuration (each job's of a multirun), then let Hydra run it."""
    # PyTorch and Flower take seconds to import: not for --help, not for a plan.
    from fomoe_flwr.checkpoint import resumed_overrides
    from fomoe_flwr.server.run import check_unused

    if importlib.util.find_spec("strategies") is None:
        raise ConfigError(
            "fomoe train: the Flower app (strategies/, clients/) is not in the wheel; run it from a clone that is "
            "installed by `pip install -e .`"
        )
    flags = [item for item in arguments if item.startswith("-")]
    overrides = rewrite_federation_file([item for item in arguments if not item.startswith("-")])
    sweep_dir = None
    if {"-m", "--multirun"} & set(flags):
        if any(item.startswith("resume=") for item in overrides):
            raise ConfigError("resume: one run is resumed at a time, without -m")
        jobs = [compose(job) for job in split_sweep(overrides)]
        for job in jobs:
            check_job(job)
        # Said to Hydra outright: its default holds the time, and the table at the end must find the folder.
        sweep_dir = jobs[0].sweep_dir
        overrides = merge_overrides(overrides, [f"hydra.sweep.dir={sweep_dir}"])
    elif not flags:
        overrides = resumed_overrides(overrides)
        composed = compose(overrides)
        if not composed.config.resume:
            check_unused(composed)
        check_job(composed)
    register_schema()
    sys.argv = ["fomoe train", *flags, *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_job)()
    finally:
        if sweep_dir is not None and any(sweep_dir.glob("*/config.yaml")):
            report(sweep_dir, Console())


def check_job(composed: Composed) -> None:
    """What can be known to fail on this machine before a site is started.

    Raises:
        FomoeError: missing data, a tokenizer that does not fit, a GPU that is not there.
    """
    from fomoe_flwr.engine.device import resolve_device
    from fomoe_flwr.server.run import open_validation

    config = composed.config
    resolve_device(config.train.device)
    for site in config.federation.sites:
        # Simulated sites have no operators who could give it.
        if site.data_path is None and config.data.partition == "own":
            raise ConfigError(f"data.partition=own: site {site.name} has no data_path in the federation file")
        if site.data_path is not None and not Path(site.data_path).expanduser().exists():
            raise ConfigError(
                f"federation.sites: data_path={site.data_path} of site {site.name}: no such file or folder"
            )
    open_validation(config)


def _job(tree: DictConfig) -> None:
    launch = importlib.import_module("strategies.launch").launch

    hydra_config = HydraConfig.get()
    composed = Composed(
        from_tree(tree),
        run_dir=Path(hydra_config.runtime.output_dir),
        sweep_dir=Path(hydra_config.sweep.dir),
        overrides=task_overrides(hydra_config.overrides.task),
    )
    try:
        launch(composed)
    except FomoeError as error:
        if hydra_config.mode == RunMode.MULTIRUN:
            raise  # Hydra goes on with the other jobs and fails at the end
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
