"""What Flower's own commands need in order to be started by ours."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from fomoe_flwr.errors import ConfigError

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",  # seconds; Flower's default adds up to 1 s to every message
}

# Tells ServerApps, which inherit the SuperLink's environment, that it takes registered keys only: 1.
REGISTERED = "FOMOE_REGISTERED_KEYS"


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def past_the_proxy(environment: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """Variables that keep a proxy away from what runs on this machine, and from these hosts.

    Flower's parts on a machine talk HTTP to each other and would look for 127.0.0.1 at `http_proxy`; nothing ever
    happens then, without a word.
    """
    # Where both spellings are set, readers go by the small one.
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    excepted = [item.strip() for item in given.split(",") if item.strip()]
    text = ",".join(dict.fromkeys([*excepted, *LOOPBACK, *hosts]))
    return {"no_proxy": text, "NO_PROXY": text}


def flower_environment(*hosts: str) -> dict[str, str]:
    """Our environment with Flower's switches set, where the user did not, and this installation on the PATH.

    Args:
        hosts: what is reached without a proxy, besides this machine itself.
    """
    environment = SWITCHES | os.environ | past_the_proxy(os.environ, *hosts)
    beside = str(Path(sys.executable).parent)
    path = environment.get("PATH", os.defpath).split(os.pathsep)
    # `.venv/bin/fomoe` may run without an activated environment; Flower looks for its programs on the PATH.
    if beside not in path:
        environment["PATH"] = os.pathsep.join([beside, *path])
    return environment


def program(name: str, environment: Mapping[str, str]) -> str:
    """The path of one of Flower's commands.

    Raises:
        ConfigError: it is not there.
    """
    if (found := shutil.which(name, path=environment["PATH"])) is None:
        raise ConfigError(f"{name}: not found on the PATH; is Flower installed in this environment?")
    return found


def toml_string(text: str) -> str:
    """A TOML string that also survives Flower's own reading, which knows no escaped quotation mark."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'
