"""A site's SuperNode: the options of `fomoe site`, how they start it, and whether it will ever answer."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fomoe_flwr.config import DEVICE_RULE, DEVICES_RULE, NAME_RULE, is_device, is_devices, is_name
from fomoe_flwr.console import Parser
from fomoe_flwr.deploy.flower import toml_string
from fomoe_flwr.deploy.processes import Process
from fomoe_flwr.files import expanded, state_home

STOPPED_S = 15.0  # after which a stopped process is killed
WEDGED_S = 75.0  # Flower itself takes 60 s to notice that the process of a message was killed

SUPERNODE, EXECUTOR, CLIENT_APP = "flower-supernode", "flower-superexec", "flwr-clientapp"

# What we read in a SuperNode's output, as Flower 1.41 prints it.
ACCEPTED = re.compile(r"SuperNode ID: (\d+)")
REFUSED = re.compile(r"\[code: (\d+)\]")
# It cannot work with its options or files. 305 is not among them: no connection, which may come.
MISUSED = re.compile(r"Exit Code: (30[0-46-9]|3[1-9]\d|60[0-5])\b")
RECEIVED = re.compile(r"Received successfully")
SENDING = re.compile(r"Sending: \S+ message")


@dataclass(frozen=True)
class Options:
    """What `fomoe site` was asked to do; the paths are absolute."""

    superlink: str  # HOST:PORT
    name: str
    insecure: bool
    root_certificates: Path | None
    key: Path | None
    state_dir: Path
    cache_dir: Path | None
    data_path: Path | None
    store_dir: Path | None
    device: str | None
    devices: str | None
    parallel: str | None
    stall_s: float | None
    stopped_s: float
    port: int | None  # of the SuperNode's own interface on the loopback address; None: any free one

    @property
    def lock(self) -> Path:
        return self.state_dir / f"{self.name}.site.lock"


def parse(arguments: Sequence[str]) -> Options:
    """The options of the command line.

    Raises:
        ConfigError: one line naming the option, its value and what is allowed.
    """
    parser = Parser(
        prog="fomoe site", description="Keep one Flower SuperNode working: a site of the federation."
    )
    add = parser.add_argument
    add("--superlink", required=True, type=_address, metavar="HOST:PORT", help="where `fomoe server` listens")
    add("--name", required=True, type=_name, help="this site's name in the federation file")
    secured = parser.add_mutually_exclusive_group()
    secured.add_argument(
        "--root-certificates", type=_file, metavar="CA.CRT", help="of the authority that signed the server's"
    )
    secured.add_argument("--insecure", action="store_true", help="no TLS")
    add(
        "--key", type=_file, metavar="FILE", help="private key that is registered at the SuperLink; needs TLS"
    )
    add(
        "--state-dir", type=_path, metavar="DIR", help="default: $XDG_STATE_HOME/fomoe-flwr",
    )  # fmt: skip
    add("--cache-dir", type=_path, metavar="DIR", help="of tokenized text")
    add(
        "--data-path",
        type=_there,
        metavar="PATH",
        help="this site's own text, instead of the run's data.path",
    )
    add(
        "--store-dir",
        type=_there,
        metavar="DIR",
        help="with store=file:///… at the server: what that folder is called here",
    )
    add("--device", type=_device, help="cpu, cuda, cuda:1, …; default: the run's")
    add("--devices", type=_devices, metavar="N", help="of this site, or auto: all GPUs; default: the run's")
    add("--parallel", choices=("ddp", "fsdp", "ep"), help="how they share the work; default: the run's")
    add("--stall-s", type=_seconds, help="seconds without progress after which a round is given up")
    add(
        "--stopped-s", type=_seconds, default=STOPPED_S,
        help="seconds after which a stopped process is killed (default %(default)g)",
    )  # fmt: skip
    add("--port", type=_port, help="of the SuperNode's own interface, on 127.0.0.1; default: a free one")
    given = vars(parser.parse_args(arguments))
    # Only now: without a home directory there is no default.
    options = Options(**given | {"state_dir": given["state_dir"] or state_home().absolute()})
    if options.key and options.insecure:
        parser.error("--key: Flower uses keys over TLS only; give --root-certificates instead of --insecure")
    return options


def _checked(text: str, fits: Callable[[str], bool], wanted: str) -> str:
    with suppress(ValueError):
        if fits(text):
            return text
    raise argparse.ArgumentTypeError(f"{text} is not {wanted}")


def _is_port(text: str) -> bool:
    return 0 < int(text) < 65536


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and "/" not in text and port.isdigit() and _is_port(port)


def _address(text: str) -> str:
    return _checked(text, _is_address, "HOST:PORT")


def _name(text: str) -> str:
    return _checked(text, is_name, f"a name, which has {NAME_RULE}")


def _device(text: str) -> str:
    return _checked(text, is_device, f"a device; allowed are {DEVICE_RULE}")


def _devices(text: str) -> str:
    return _checked(text, is_devices, f"a number of devices; allowed are {DEVICES_RULE}")


def _seconds(text: str) -> float:
    return float(
        _checked(text, lambda number: 0 < float(number) < float("inf"), "a number of seconds above 0")
    )


def _port(text: str) -> int:
    return int(_checked(text, _is_port, "a port, 1 to 65535"))


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a path, or leave the option out")
    return expanded(text).absolute()


def _there(text: str) -> Path:
    return _path(
        _checked(text, lambda name: os.access(_path(name), os.R_OK), "a file or folder that can be read")
    )


def _file(text: str) -> Path:
    return _path(_checked(text, lambda name: _path(name).is_file(), "a file"))


def node_config(options: Options) -> str:
    """What the ClientApp is told about its site, for `flower-supernode --node-config`."""
    values = {
        "site": options.name,
        "state-dir": options.state_dir,
        "device": options.device,
        "devices": options.devices,
        "parallel": options.parallel,
        "cache-dir": options.cache_dir,
        "data-path": options.data_path,
        "store-dir": options.store_dir,
        "stall-s": options.stall_s,
    }
    return " ".join(
        f"{key}={value if isinstance(value, float) else toml_string(str(value))}"
        for key, value in values.items()
        if value is not None
    )


def supernode_command(options: Options) -> list[str]:
    """`flower-supernode` and its options, on a port that is free now."""
    words = [SUPERNODE, "--superlink", options.superlink, "--node-config", node_config(options)]
    if options.insecure:
        words.append("--insecure")
    if options.root_certificates:
        words += ["--root-certificates", str(options.root_certificates)]
    if options.key:
        words += ["--auth-supernode-private-key", str(options.key)]
    return [*words, "--host", "127.0.0.1", "--port", str(options.port or _free_port())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass
class Watch:
    """What one SuperNode said and which processes it had; from it follows whether it will ever answer.

    The time is told to it, in seconds of a clock that never goes back.
    """

    stopped_s: float = STOPPED_S
    node: str | None = None  # its id, once the SuperLink has accepted it
    refused: str | None = None  # Flower's number of the error with which the SuperLink turned it away
    misused: str | None = None  # Flower's exit code for options or files that it cannot work with
    _waiting_since: float | None = None  # it has a message, and no process works on it
    _had_executor: bool = False
    _stopped: dict[tuple[int, float], float] = field(default_factory=dict)

    def hear(self, line: str, now: float) -> None:
        """Read one line of its output.

        The wait for an answer begins when the message is complete: a large one may take long to arrive.
        """
        if found := ACCEPTED.search(line):
            self.node = found[1]
        elif found := REFUSED.search(line):
            self.refused = found[1]
        elif found := MISUSED.search(line):
            self.misused = found[1]
        elif RECEIVED.search(line):
            self._waiting_since = now
        elif SENDING.search(line):
            self._waiting_since = None

    def look(
        self, supernode: int, processes: Mapping[Process, str], now: float
    ) -> tuple[list[Process], str | None]:
        """Which of its processes to kill, and why it must be started again (None: it need not).

        `processes` are the living ones that belong to it, each with the name of its program.
        """
        stopped_now = {(each.pid, each.started) for each in processes if each.stopped}
        self._stopped = {known: self._stopped.get(known, now) for known in stopped_now}
        stopped = [
            each
            for each in processes
            if now - self._stopped.get((each.pid, each.started), now) >= self.stopped_s
        ]
        if any(each.pid == supernode for each in stopped):
            return stopped, f"the SuperNode was stopped for {self.stopped_s:g} s"

        programs = set(processes.values())
        if EXECUTOR in programs:
            self._had_executor = True
        # An empty list says nothing: the SuperNode may just have ended.
        elif processes and (self._had_executor or self.node is not None):
            return stopped, f"its {EXECUTOR} is gone, so it can handle no message"
        if self._waiting_since is not None and CLIENT_APP in programs:
            self._waiting_since = now
        if self._waiting_since is not None and now - self._waiting_since > WEDGED_S:
            return stopped, f"it has a message, but for {WEDGED_S:g} s no process has worked on it"
        return stopped, None
