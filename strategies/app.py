"""The Flower ServerApp: `flwr run . --run-config 'hydra-overrides="model=tiny strategy.overlap=2"'`."""

from __future__ import annotations

import shlex

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fomoe_flwr.checkpoint import compose_run
from fomoe_flwr.console import setup_logging
from strategies.launch import run_server

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Compose the configuration from the run-config's one key, and run."""
    setup_logging()
    run_server(grid, compose_run(shlex.split(str(context.run_config.get("hydra-overrides", "")))))
