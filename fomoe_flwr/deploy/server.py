"""`fomoe server`: `flower-superlink` without its traps, every option passed on.

What differs: no word to outside, no installation of this package's dependencies for each run (Flower would fetch
PyTorch anew), quick starts of tasks, and with `--enable-supernode-auth` the registered keys are kept on the disk,
where Flower forgets them when the SuperLink ends.
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fomoe_flwr.deploy.flower import REGISTERED, flower_environment, program
from fomoe_flwr.files import state_home

log = logging.getLogger("fomoe")


def server(arguments: Sequence[str]) -> NoReturn:
    """Become `flower-superlink` with these options.

    Raises:
        ConfigError: Flower is not installed beside this program.
    """
    host = _given(arguments, "--host", "").strip("[]")
    environment = flower_environment(*[host] * (host not in ("", "0.0.0.0", "::")))
    if "--enable-supernode-auth" in arguments:
        environment[REGISTERED] = "1"
    command = ["flower-superlink", *arguments, *_database(arguments)]
    log.info("runs without hydra.run.dir= go to %s", Path("runs").absolute())
    log.info("%s", shlex.join(command))
    sys.stdout.flush()
    os.execve(program(command[0], environment), command, environment)


def _given(arguments: Sequence[str], option: str, default: str) -> str:
    """The value of one of Flower's options; the last one counts."""
    value = default
    for item, following in itertools.pairwise([*arguments, ""]):
        if item == option:
            value = following
        elif item.startswith(f"{option}="):
            value = item.partition("=")[2]
    return value


def _database(arguments: Sequence[str]) -> list[str]:
    """Where registered keys are kept; nothing is lost by keeping no other state."""
    given = [item.partition("=")[0] for item in arguments]
    if "--enable-supernode-auth" not in given or "--database" in given:
        return []
    port = _given(arguments, "--port", "8000")
    home = state_home()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return ["--database", str(home / f"superlink-{port}.db")]
