"""`fomoe site`: keeps one Flower SuperNode working.

A SuperNode handles one message at a time, each in a process of its own (`flwr-clientapp`), started by a helper
(`flower-superexec`). When one of these is killed at a bad moment, stopped or lost, the SuperNode looks online and
answers nothing until it is started again. This program does that: it starts the SuperNode, passes its output on,
looks at its processes every second and starts it again when it is dead or will never answer.

Everything below a SuperNode carries the path of the site's lock file in its environment, so that it is found
whoever its parent is by now: nothing of an old SuperNode is left when the next one starts, also when this program
itself was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from fomoe_flwr.deploy.clock import clock_fault
from fomoe_flwr.deploy.flower import flower_environment, program
from fomoe_flwr.deploy.processes import Marked, end_marked, kill, program_of
from fomoe_flwr.deploy.supernode import Options, Watch, parse, supernode_command
from fomoe_flwr.errors import ConfigError, RunError

log = logging.getLogger("fomoe.site")

# Environment variable of everything that belongs to a site: the path of its lock file.
MARK = "FOMOE_SITE_LOCK"
KEY_REFUSED = "2004"  # Flower's number of the error
POLL_S = 1.0
REFUSED_S = 120.0  # a SuperLink takes up to 60 s to notice that a SuperNode was killed
REFUSED_PAUSE_S = 5.0  # so that the site is back soon after that
GRACE_S = 10.0  # between asking a SuperNode to end and killing it
REST_GRACE_S = 2.0  # after the end of the last SuperNode, for its worker to end by itself
LONGEST_PAUSE_S = 15.0
SETTLED_S = 60.0  # a SuperNode that lived so long had started well


def site(arguments: Sequence[str]) -> int:
    """Supervise a site until SIGTERM (exit code 0) or Ctrl-C (130).

    Raises:
        ConfigError: an option that cannot be right, or a site that is supervised already.
        RunError: the SuperLink does not accept this site's key.
    """
    options = parse(arguments)
    check_device(options.device)
    log.setLevel(logging.INFO)
    ended, received = threading.Event(), []

    def end(signum: int, _: object) -> None:
        received.append(signum)
        ended.set()

    with _locked(options) as memory:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # `nohup fomoe site …` ignores SIGHUP.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, end)
        supervise(options, memory, ended)
    return 130 if received[0] == signal.SIGINT else 0


def check_device(device: str | None) -> None:
    """Look for a GPU that is asked for, in a process of its own: PyTorch is not to stay in the supervisor's memory.

    Raises:
        ConfigError: it is not there.
    """
    if device is None or not device.startswith("cuda"):
        return
    look = (
        "from fomoe_flwr.engine.device import resolve_device\n"
        "from fomoe_flwr.errors import ConfigError\n"
        f"try: resolve_device({device!r}, 'fomoe site --device')\n"
        "except ConfigError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", look], stdout=subprocess.PIPE, text=True, check=True)
    if found.stdout:
        raise ConfigError(found.stdout.strip())


def pause_s(short_lives: int, longest: float) -> float:
    """Seconds to wait before the next start, after so many SuperNodes in a row that died young: 1, 2, 4, …"""
    return min(2.0 ** min(short_lives - 1, 10), longest)


def supervise(options: Options, memory: dict[str, Any], ended: threading.Event) -> None:
    """Start the SuperNode again and again until `ended`; `memory` is kept across starts of this program.

    Raises:
        RunError: the SuperLink does not accept this site, or this machine's clock.
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
        elif watch.misused is not None:
            raise RunError(
                f"site {options.name}: the SuperNode cannot work with what it was given (Flower's exit code "
                f"{watch.misused}, see above); starting it again would not help"
            )
        elif watch.refused is not None:
            refused_since = refused_since or began
            if not may_be_accepted_later(
                watch.refused, _known(options, memory), time.monotonic() - refused_since
            ):
                raise RunError(refusal(options, watch.refused))
            log.info(
                "site %s: refused; either the SuperLink still counts on the SuperNode before (up to 60 s), or it "
                "does not know the key any more", options.name,
            )  # fmt: skip
        # A SuperNode that was accepted ends likewise when the clock is set while it works.
        if not ended.is_set() and watch.refused is None:
            _wait_for_the_clock(options, ended)
        short_lives = 1 if lived >= SETTLED_S else short_lives + 1
        if not ended.is_set():
            pause = pause_s(short_lives, LONGEST_PAUSE_S if refused_since is None else REFUSED_PAUSE_S)
            log.info("site %s: starting again in %g s", options.name, pause)
            ended.wait(pause)
    log.info("site %s: ended", options.name)


def _wait_for_the_clock(options: Options, ended: threading.Event) -> None:
    """Say so if the SuperLink takes nothing from this machine's clock, and wait for it to be set.

    It may be about to be: NTP needs some time after a machine was started.

    Raises:
        RunError: it is still wrong after REFUSED_S.
    """
    deadline, said = time.monotonic() + REFUSED_S, False
    while (fault := clock_fault(options.superlink, options.insecure)) and not ended.is_set():
        if time.monotonic() >= deadline:
            raise RunError(f"site {options.name}: {fault}")
        if not said:
            log.warning("site %s: %s; waiting for that for %g s", options.name, fault, REFUSED_S)
        said = True
        ended.wait(REFUSED_PAUSE_S)


def may_be_accepted_later(error: str, accepted_before: bool, refused_s: float) -> bool:
    """Whether another try may help after the SuperLink's error of this number.

    KEY_REFUSED says that the key is unknown *or* that the SuperLink has not noticed yet that the last SuperNode of this
    key is gone. So a key that was never accepted from here is taken as unknown at once, any other only after the time
    that the SuperLink needs to notice.
    """
    return error == KEY_REFUSED and accepted_before and refused_s <= REFUSED_S


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
    # Flower copies each app into its home, and uses a copy that exists even if a killed process left it half done or
    # another site is still making it. So each site has a home of its own, and each SuperNode an empty one.
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
            # Not killed at once: it tells the SuperLink that it leaves.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            process.kill()
        process.wait()
        end_marked(marked, grace_s=REST_GRACE_S if ended.is_set() else 0.0)
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
            except (OSError, ValueError):
                # No one reads our output any more. Go on reading, or the SuperNode would wait.
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
        except (ValueError, TypeError):
            # A write that was cut off. All that the file holds can be found out again.
            memory = {}
        if not free:
            raise ConfigError(
                f"--name {options.name}: process {memory.get('pid')} supervises this site already ({options.lock})"
            )
        memory["pid"] = os.getpid()
        _write(options, memory)
        yield memory


def _write(options: Options, memory: Mapping[str, Any]) -> None:
    # Not as a new file: the lock is on this very one.
    options.lock.write_text(json.dumps(memory))


def _identity(options: Options) -> str:
    key = hashlib.sha256(options.key.read_bytes()).hexdigest() if options.key else ""
    return f"{options.superlink} {key}"


def _known(options: Options, memory: Mapping[str, Any]) -> bool:
    return memory.get("accepted") == _identity(options)


def _remember(options: Options, memory: dict[str, Any]) -> None:
    if not _known(options, memory):
        memory["accepted"] = _identity(options)
        try:
            _write(options, memory)
        except OSError as error:
            # The disk may be full, which is no reason to leave the site alone: this only helps the next start.
            log.warning("%s: cannot be written: %s", options.lock, error.strerror)
