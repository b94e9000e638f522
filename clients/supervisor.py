"""`fomoe site`: keeps one Flower SuperNode working.

A SuperNode handles one message at a time, each in a process of its own (`flwr-clientapp`), started by a helper
(`flower-superexec`). When one of these is killed at a bad moment, stopped or lost, the SuperNode looks online and
answers nothing until somebody starts it again. This program is that somebody: it starts the SuperNode, passes its
output on, looks at its processes every second and starts it again when it is dead or will never answer.

Everything below a SuperNode carries the path of the site's lock file in its environment, so that it is found
whoever its parent is by now: nothing of an old SuperNode is left when the next one starts, also when this program
itself was killed. Where there is no `/proc` only a dead SuperNode is noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from clients.processes import Marked, Process, end_marked, kill, program_of
from fomoe_flwr.errors import ConfigError, RunError
from strategies.superlink import flower_environment, program, toml_string

log = logging.getLogger("fomoe.site")

MARK = (
    "FOMOE_SITE_LOCK"  # environment variable of everything that belongs to a site: the path of its lock file
)
POLL_S = 1.0
STOPPED_S = 15.0
WEDGED_S = 75.0  # Flower itself takes 60 s to notice that the process of a message was killed
REFUSED_S = 120.0  # a SuperLink believes for up to 60 s that a killed SuperNode is still there
REFUSED_PAUSE_S = 5.0  # so that the site is back soon after that
GRACE_S = 10.0  # between asking a SuperNode to end and killing it
LONGEST_PAUSE_S = 15.0
SETTLED_S = 60.0  # a SuperNode that lived so long did not die of its start


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


def site(arguments: Sequence[str]) -> int:
    """Supervise a site until SIGTERM (exit code 0) or Ctrl-C (130).

    Raises:
        ConfigError: an option that cannot be right, or a site that is supervised already.
        RunError: the SuperLink does not accept this site's key.
    """
    options = parse(arguments)
    log.setLevel(logging.INFO)
    ended, received = threading.Event(), []

    def end(signum: int, _: object) -> None:
        received.append(signum)
        ended.set()

    with _locked(options) as memory:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # `nohup fomoe site …` ignores SIGHUP
                signal.signal(signum, end)
        supervise(options, memory, ended)
    return 130 if received[0] == signal.SIGINT else 0


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
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "fomoe-flwr"
    return Options(
        superlink=given.superlink,
        name=given.name,
        insecure=given.insecure,
        root_certificates=_absolute(given.root_certificates),
        key=_absolute(given.key),
        state_dir=_absolute(given.state_dir) or home.expanduser().absolute(),
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


def pause_s(short_lives: int, longest: float) -> float:
    """Seconds to wait before the next start, after so many SuperNodes in a row that died young: 1, 2, 4, …"""
    return min(2.0 ** min(short_lives - 1, 10), longest)


@dataclass
class Watch:
    """What one SuperNode said and which processes it had; from it follows whether it will ever answer.

    The time is told to it, in seconds of a clock that never goes back.
    """

    stopped_s: float = STOPPED_S
    node: str | None = None  # its id, once the SuperLink has accepted it
    refused: str | None = None  # Flower's number of the error with which the SuperLink turned it away
    _waiting_since: float | None = None  # it has a message, and nothing works on it
    _had_executor: bool = False
    _stopped: dict[tuple[int, int], float] = field(default_factory=dict)

    def hear(self, line: str, now: float) -> None:
        """Read one line of its output.

        The wait for an answer begins when the message is complete: a large one may take long to arrive.
        """
        if found := re.search(r"SuperNode ID: (\d+)", line):
            self.node = found[1]
        elif found := re.search(r"\[code: (\d+)\]", line):
            self.refused = found[1]
        elif "Received successfully" in line:
            self._waiting_since = now
        elif re.search(r"Sending: \S+ message", line):
            self._waiting_since = None

    def look(
        self, supernode: int, processes: Mapping[Process, str], now: float
    ) -> tuple[list[Process], str | None]:
        """Which of its processes to kill, and why it must be started again (None: it need not).

        `processes` are the living ones that belong to it, each with the name of its program.
        """
        living = {(process.pid, process.started) for process in processes if process.state == "T"}
        self._stopped = {known: self._stopped.get(known, now) for known in living}
        stopped = [
            process
            for process in processes
            if now - self._stopped.get((process.pid, process.started), now) >= self.stopped_s
        ]
        if any(process.pid == supernode for process in stopped):
            return stopped, f"the SuperNode was stopped for {self.stopped_s:g} s"

        programs = set(processes.values())
        if "flower-superexec" in programs:
            self._had_executor = True
        elif processes and (self._had_executor or self.node is not None):
            return stopped, "its flower-superexec is gone, so it can handle no message"
        if self._waiting_since is not None and "flwr-clientapp" in programs:
            self._waiting_since = now
        if self._waiting_since is not None and now - self._waiting_since > WEDGED_S:
            return stopped, f"it has a message, but for {WEDGED_S:g} s no process has worked on it"
        return stopped, None


def supervise(options: Options, memory: dict[str, Any], ended: threading.Event) -> None:
    """Start the SuperNode again and again until `ended`; `memory` is kept across starts of this program.

    Raises:
        RunError: the SuperLink does not accept this site.
    """
    marked = Marked(MARK, str(options.lock))
    if orphans := end_marked(marked):
        log.warning("site %s: ended %d processes that an earlier supervisor left", options.name, orphans)
    short_lives = 0
    refused_since: float | None = None
    while not ended.is_set():
        began = time.monotonic()
        watch = _one_life(options, memory, marked, ended)
        lived = time.monotonic() - began
        if watch.node is not None:
            refused_since = None
            _remember(options, memory)
        elif watch.refused is not None:
            refused_since = refused_since or began
            if not may_be_accepted_later(
                watch.refused, _known(options, memory), time.monotonic() - refused_since
            ):
                raise RunError(refusal(options, watch.refused))
            log.info(
                "site %s: refused; either the SuperLink still believes in the SuperNode before (up to 60 s), or it "
                "does not know the key any more", options.name,
            )  # fmt: skip
        short_lives = 1 if lived >= SETTLED_S else short_lives + 1
        if not ended.is_set():
            pause = pause_s(short_lives, LONGEST_PAUSE_S if refused_since is None else REFUSED_PAUSE_S)
            log.info("site %s: starting again in %g s", options.name, pause)
            ended.wait(pause)
    log.info("site %s: ended", options.name)


def may_be_accepted_later(error: str, accepted_before: bool, refused_s: float) -> bool:
    """Whether another try may help after the SuperLink's error of this number.

    2004 says that the key is unknown *or* that the last SuperNode of this key has not been missed yet; the reply is
    the same. So a key that was never accepted from here is taken as unknown at once, any other after the
    time within which the SuperLink must have missed its last SuperNode.
    """
    return error == "2004" and accepted_before and refused_s <= REFUSED_S


def refusal(options: Options, error: str) -> str:
    """Why the SuperLink turned the site away, in one line."""
    if options.key is None:
        return f"the SuperLink at {options.superlink} takes registered keys only (Flower's error {error}): give --key"
    return (
        f"the SuperLink at {options.superlink} does not know the key {options.key} (Flower's error {error}): register "
        f"it by `flwr supernode register {options.key}.pub CONNECTION`, or end the SuperNode that uses it elsewhere"
    )


def _one_life(options: Options, memory: dict[str, Any], marked: Marked, ended: threading.Event) -> Watch:
    """Start one SuperNode and stay with it until it is gone; nothing that it started is left then."""
    home = options.state_dir / f"{options.name}.flower"
    # Flower copies each app into its home and believes a copy that exists, even one that a killed process left half
    # done or another site is just making. So each site has a home of its own, and each SuperNode an empty one.
    shutil.rmtree(home / "apps", ignore_errors=True)
    environment = flower_environment() | {MARK: str(options.lock), "FLWR_HOME": str(home)}
    watch = Watch(options.stopped_s)
    words = supernode_command(options)
    words[0] = program(words[0], environment)
    process = subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    log.info("site %s: SuperNode is process %d, SuperLink %s", options.name, process.pid, options.superlink)
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, watch), daemon=True)
    reader.start()
    why = None
    try:
        while not ended.wait(POLL_S) and process.poll() is None and why is None:
            if watch.node is not None:
                _remember(options, memory)
            processes = {each: program_of(each.pid) for each in marked.look()}
            stopped, why = watch.look(process.pid, processes, time.monotonic())
            for each in stopped:
                log.warning(
                    "site %s: process %d (%s) was stopped for %g s: killed",
                    options.name, each.pid, processes[each], options.stopped_s,
                )  # fmt: skip
                kill(each.pid, each.started)
        if ended.is_set():
            log.info("site %s: ending", options.name)
        elif why is not None:
            log.warning("site %s: SuperNode is started again: %s", options.name, why)
        else:
            log.warning("site %s: SuperNode ended with exit code %s", options.name, process.poll())
    finally:
        if process.poll() is None:
            process.terminate()  # it takes leave of the SuperLink
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            process.kill()
        process.wait()
        end_marked(marked, grace_s=2.0 if ended.is_set() else 0.0)
        reader.join(5.0)
    return watch


def _pass_on(output: IO[str], watch: Watch) -> None:
    readable = True
    for line in output:
        watch.hear(line, time.monotonic())
        if readable:
            try:
                sys.stdout.write(line)
                sys.stdout.flush()
            except (OSError, ValueError):  # our reader is gone; the SuperNode must not wait for it
                readable = False


@contextlib.contextmanager
def _locked(options: Options) -> Iterator[dict[str, Any]]:
    """Be the only supervisor of this site; what an earlier one wrote into the lock file."""
    options.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with options.lock.open("a+") as file:
        free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        file.seek(0)
        try:
            memory = dict(json.loads(file.read() or "{}"))
        except (ValueError, TypeError):  # a write that was cut off; all it holds can be learnt anew
            memory = {}
        if not free:
            raise ConfigError(
                f"--name {options.name}: process {memory.get('pid')} supervises this site already ({options.lock})"
            )
        memory["pid"] = os.getpid()
        _write(options, memory)
        yield memory


def _write(options: Options, memory: Mapping[str, Any]) -> None:
    options.lock.write_text(json.dumps(memory))  # in place: the lock is on this very file


def _identity(options: Options) -> str:
    key = hashlib.sha256(options.key.read_bytes()).hexdigest() if options.key else ""
    return f"{options.superlink} {key}"


def _known(options: Options, memory: Mapping[str, Any]) -> bool:
    return memory.get("accepted") == _identity(options)


def _remember(options: Options, memory: dict[str, Any]) -> None:
    if not _known(options, memory):
        memory["accepted"] = _identity(options)
        _write(options, memory)


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
