"""What a site computes on. Apart from `identity`, which processes without PyTorch need."""

from __future__ import annotations

from fomoe_flwr.engine.device import Devices, resolve_device, resolve_devices
from fomoe_flwr.messages import Task
from fomoe_flwr.site.identity import NodeSettings


def devices_of(task: Task, settings: NodeSettings) -> Devices:
    """What this site computes on: the node's own settings first, then the federation file's, then those of `train`.

    Raises:
        ConfigError: it is not there.
    """

    def first(key: str) -> tuple[str, str]:
        if own := getattr(settings, key):
            return own, f"fomoe site --{key}"
        if own := getattr(task.site, key):
            return own, f"federation.sites: {key} of {task.name}"
        return getattr(task.train, key), f"train.{key}"

    device = resolve_device(*first("device"))
    devices, key = first("devices")
    count = resolve_devices(device, devices, key)
    return Devices(device, count, first("parallel")[0], task.train.ep_domain if count > 1 else "1")
