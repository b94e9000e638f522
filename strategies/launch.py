"""Start a run from Python: over Flower's simulation engine, or in this process."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterable

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from clients.app import app as client_app
from fomoe_flwr.compose import Composed
from fomoe_flwr.config import RunConfig
from fomoe_flwr.engine.device import gpus_of_a_site, resolve_device
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.records import noted_failure
from fomoe_flwr.report import report
from fomoe_flwr.server.run import Run, alone_in, open_run
from fomoe_flwr.telemetry import OptionalOutput
from strategies.fomoe import FoMoE
from strategies.local_grid import LocalGrid


def launch(composed: Composed) -> None:
    """Run to the end by `runtime=flower` or `runtime=local`.

    Raises:
        FomoeError: as `run_server`, from either runtime.
    """
    if composed.config.runtime.name == "local":
        _run_locally(composed)
    else:
        _run_in_simulation(composed)


def run_server(grid: Grid, composed: Composed) -> None:
    """Run the federation that the configuration describes over a Grid, and leave everything in its run directory.

    Raises:
        FomoeError: nothing can be trained, or the run cannot go on.
    """
    run_dir = composed.run_dir
    with alone_in(run_dir), open_run(composed) as run, noted_failure(run_dir):
        strategy = federate(grid, composed, run)
        run.recorder.conclude(strategy.round, strategy.server.state)
    # The model is there by now; `fomoe report` draws them again.
    OptionalOutput("tables and pictures")(lambda: report(run_dir, Console()))


def federate(grid: Grid, composed: Composed, run: Run) -> FoMoE:
    """All rounds of an opened run over a Grid; returns the Strategy, which has the model.

    Raises:
        FomoeError: the run cannot go on.
    """
    config = composed.config
    strategy = FoMoE(
        config,
        run=run.name,
        run_dir=str(composed.run_dir),
        observer=run.recorder,
        plan=run.plan,
        inputs=run.inputs,
    )
    strategy.first_round = run.load_into(strategy.server, config) + 1
    strategy.start(grid, num_rounds=config.train.rounds, timeout=config.strategy.timeout_s)
    return strategy


def _run_locally(composed: Composed) -> None:
    config = composed.config
    grid = LocalGrid(client_app, len(config.federation.sites), local_workers(config))
    try:
        run_server(grid, composed)
    finally:
        grid.close()


def local_workers(config: RunConfig) -> int:
    """Sites that work at a time in this process: one a core's worth of threads, one on a GPU."""
    several = any((site.devices or config.train.devices) != "1" for site in config.federation.sites)
    if config.runtime.workers is not None:
        if several and config.runtime.workers > 1:
            raise ConfigError(
                f"runtime.workers={config.runtime.workers}: with train.devices above 1 one site works at a time"
            )
        return config.runtime.workers
    if several:
        return 1
    if resolve_device(config.train.device) != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(len(config.federation.sites), cores // max(config.train.threads, 1)))


def _run_in_simulation(composed: Composed) -> None:
    server_app, interrupted, ended = ServerApp(), threading.Event(), threading.Event()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        # Flower runs this in a thread that Ctrl-C does not reach, and the process would wait for it for ever.
        pull = grid.pull_messages

        def pull_unless_interrupted(message_ids: Iterable[str]) -> Iterable[Message]:
            if interrupted.is_set():
                raise RunError("interrupted")
            return pull(message_ids)

        grid.pull_messages = pull_unless_interrupted  # type: ignore[method-assign]
        try:
            run_server(grid, composed)
        finally:
            ended.set()

    config = composed.config
    gpus = gpus_of_a_site(config)
    try:
        import ray  # noqa: F401 - Flower itself only says so after it has started
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise ConfigError(
            "runtime=flower: needs Ray; pip install 'fomoe-flwr[sim]', or use runtime=local"
        ) from error
    # The engine of `flwr run`, in this process, so that a failure reaches our exit code. Flower announces that
    # its Python entry will go in favour of `flwr run`; that notice is for us and not for the user.
    flower_log = logging.getLogger("flwr")
    flower_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_simulation(
                server_app,
                client_app,
                num_supernodes=len(config.federation.sites),
                backend_config={
                    "client_resources": {
                        "num_cpus": config.runtime.cpus_per_site,
                        "num_gpus": gpus,
                    },
                    "init_args": {
                        # Not a cluster that RAY_ADDRESS names: what sites may use was checked on this machine.
                        "address": "local",
                        "logging_level": logging.ERROR,
                        "log_to_driver": False,
                    },
                },
            )
    except KeyboardInterrupt:
        interrupted.set()
        ended.wait(60)  # for the metrics and wandb to be closed
        raise
