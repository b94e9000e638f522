"""The command line of `fomoe site`, and the command line of the SuperNode that follows from it."""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fomoe_flwr.deploy.flower import toml_string
from fomoe_flwr.deploy.supernode import STOPPED_S
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.files import state_home


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
    device: str | None
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
    parser = _Parser(
        prog="fomoe site", description="Keep one Flower SuperNode working: a site of the federation."
    )
    parser.add_argument(
        "--superlink", required=True, metavar="HOST:PORT", help="where `fomoe server` listens"
    )
    parser.add_argument("--name", required=True, help="this site's name in the federation file")
    secured = parser.add_mutually_exclusive_group()
    secured.add_argument(
        "--root-certificates", metavar="CA.CRT", help="of the authority that signed the server's"
    )
    secured.add_argument("--insecure", action="store_true", help="no TLS")
    parser.add_argument(
        "--key", metavar="FILE", help="private key that is registered at the SuperLink; needs TLS"
    )
    parser.add_argument("--state-dir", metavar="DIR", help="default: $XDG_STATE_HOME/fomoe-flwr")
    parser.add_argument("--cache-dir", metavar="DIR", help="of tokenized text")
    parser.add_argument(
        "--data-path", metavar="PATH", help="this site's own text, instead of the run's data.path"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: the run's")
    parser.add_argument(
        "--stall-s", type=_seconds, help="seconds without progress after which a round is given up"
    )
    parser.add_argument(
        "--stopped-s", type=_seconds, default=STOPPED_S,
        help="seconds after which a stopped process is killed (default %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=_port, help="of the SuperNode's own interface, on 127.0.0.1; default: a free one"
    )
    given = parser.parse_args(arguments)

    host, _, port = given.superlink.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"--superlink {given.superlink}: not HOST:PORT")
    if not re.fullmatch(r"\w[\w.-]*", given.name):
        raise ConfigError(f"--name {given.name}: letters, digits, '_', '-' and '.' only")
    if given.key and given.insecure:
        raise ConfigError(
            "--key: Flower uses keys over TLS only; give --root-certificates instead of --insecure"
        )
    for option, path in (("--root-certificates", given.root_certificates), ("--key", given.key)):
        if path and not Path(path).expanduser().is_file():
            raise ConfigError(f"{option} {path}: no such file")
    return Options(
        superlink=given.superlink,
        name=given.name,
        insecure=given.insecure,
        root_certificates=_absolute(given.root_certificates),
        key=_absolute(given.key),
        state_dir=_absolute(given.state_dir) or state_home().absolute(),
        cache_dir=_absolute(given.cache_dir),
        data_path=_absolute(given.data_path),
        device=given.device,
        stall_s=given.stall_s,
        stopped_s=given.stopped_s,
        port=given.port,
    )


def node_config(options: Options) -> str:
    """What `clients.identity` reads, in the form that Flower's `--node-config` takes."""
    values: dict[str, Any] = {
        "site": options.name,
        "device": options.device,
        "state-dir": options.state_dir,
        "cache-dir": options.cache_dir,
        "data-path": options.data_path,
        "stall-s": options.stall_s,
    }
    return " ".join(
        f"{key}={value if isinstance(value, float) else toml_string(str(value))}"
        for key, value in values.items()
        if value is not None
    )


def supernode_command(options: Options) -> list[str]:
    """`flower-supernode` and its options, on a port that is free now."""
    words = ["flower-supernode", "--superlink", options.superlink, "--node-config", node_config(options)]
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


def _absolute(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")


def _port(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 < (value := int(text)) < 65536:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a port, 1 to 65535")


class _Parser(argparse.ArgumentParser):
    """Errors in one line, by way of `ConfigError`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")
