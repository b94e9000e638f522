"""Which site a Flower node is, and what its operator set by `--node-config`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fomoe_flwr.checks import check_own_source
from fomoe_flwr.config import DEVICES_RULE, DataConfig, is_devices
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.files import expanded, state_home
from fomoe_flwr.messages import Task

KEYS = (
    "site",
    "device",
    "devices",
    "parallel",
    "state-dir",
    "cache-dir",
    "data-path",
    "stall-s",
    "store-dir",
)
PARALLEL = ("ddp", "fsdp", "ep")


@dataclass(frozen=True)
class NodeSettings:
    """What a node knows about itself. In a simulation Flower's partition number picks the site."""

    site: str | None
    partition: int | None
    device: str | None
    state_dir: str | None
    cache_dir: str | None
    data_path: str | None
    stall_s: float = 600.0  # its worker is ended when it has given no sign of life for so long
    store_dir: str | None = None  # the folder of store=file:///…, as it is called on this machine
    devices: str | None = None
    parallel: str | None = None


def node_settings(node_config: Mapping[str, Any]) -> NodeSettings:
    """Read `--node-config 'site="a" device="cuda:1" state-dir="/data/fomoe" …'`.

    Raises:
        ConfigError: an unknown key, or a value that is not allowed.
    """
    simulation = {"partition-id", "num-partitions"}
    if unknown := sorted(set(node_config) - set(KEYS) - simulation):
        raise ConfigError(f"node-config {unknown[0]}: unknown key; allowed are {', '.join(KEYS)}")

    def text(key: str) -> str | None:
        return str(node_config[key]) if key in node_config else None

    stall = node_config.get("stall-s", NodeSettings.stall_s)
    if isinstance(stall, bool) or not isinstance(stall, int | float) or not 0 < stall < math.inf:
        raise ConfigError(f"node-config stall-s={stall}: must be a number of seconds above 0")
    if (devices := text("devices")) is not None and not is_devices(devices):
        raise ConfigError(f"node-config devices={devices:.80}: allowed are {DEVICES_RULE}")
    if (parallel := text("parallel")) not in (None, *PARALLEL):
        raise ConfigError(f"node-config parallel={parallel:.80}: allowed are {', '.join(PARALLEL)}")
    partition = node_config.get("partition-id")
    return NodeSettings(
        site=text("site"),
        partition=None if partition is None else int(partition),
        device=text("device"),
        state_dir=text("state-dir"),
        cache_dir=text("cache-dir"),
        data_path=text("data-path"),
        stall_s=float(stall),
        store_dir=text("store-dir"),
        devices=devices,
        parallel=parallel,
    )


def own_task(text: str, settings: NodeSettings) -> Task:
    """The task in a message, once it is known to be this site's.

    Raises:
        ConfigError: it is another site's, or another version's.
    """
    task = Task.from_json(text)
    if settings.site is not None and settings.site != task.name:
        raise ConfigError(f"node-config site={settings.site}: was given the work of site {task.name}")
    return task


def data_of(task: Task, settings: NodeSettings) -> DataConfig:
    """The corpus of this site: text of its own, or its part of the common one.

    Text that the node was given (`--data-path`) goes before that of the federation file. A corpus of the site's own
    has data.partition=own: all of it is this site's.

    Raises:
        ConfigError: the site must have text of its own and has none, or data.source reads no files.
    """
    data = replace(task.data, cache_dir=settings.cache_dir or task.data.cache_dir)
    own = settings.data_path or task.site.data_path
    if own is not None:
        check_own_source(data, f"data_path={own} of site {task.name}")
        return replace(data, path=own, partition="own")
    if data.partition == "own":
        raise ConfigError(
            f"data.partition=own: site {task.name} has no text of its own; give it by fomoe site --data-path, or by "
            "data_path in the federation file"
        )
    return data


def state_root(settings: NodeSettings) -> Path:
    """What a real site keeps its state below: `state-dir`, by default in $XDG_STATE_HOME."""
    return state_home() if settings.state_dir is None else expanded(settings.state_dir)


def state_folder(task: Task, settings: NodeSettings) -> Path:
    """Where this site keeps its state of this run: a simulated one on the server's disk, in the run directory."""
    if settings.state_dir is None and settings.partition is not None:
        return Path(task.run_dir) / "sites" / task.name
    return state_root(settings) / task.run / task.name
