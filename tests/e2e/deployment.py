"""A federation of real processes on the loopback address, for tests that look at it or break it.

    with Deployment(tmp_path, sites=["a", "b"]) as deployment:
        run = deployment.submit(overrides, run_dir)
        os.kill(deployment.wait_for("flwr-clientapp", site="a").pid, signal.SIGKILL)
        assert run.wait(120) == 0, deployment.logs()

Everything that is started carries a mark in its environment. By it processes are found, whoever their parent is, and
at the end all are ended and the test fails if one is left.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from fomoe_flwr.deploy.processes import Marked, Process, end_marked, program_of

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DOCUMENT = REPOSITORY / "docs" / "deployment.md"
MARK, SITE_MARK = "FOMOE_TEST_MARK", "FOMOE_TEST_SITE"

T = TypeVar("T")


def blocks(document: Path = DOCUMENT) -> list[tuple[str, str]]:
    """The document's ```bash blocks, each with the heading it stands under."""
    found, heading = [], ""
    for match in re.finditer(
        r"^## (.*?)$|^```bash\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL
    ):
        if match[1] is not None:
            heading = match[1]
        else:
            found.append((heading, match[2]))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def until(look: Callable[[], T | None], seconds: float, why: Callable[[], str] = str) -> T:
    """What `look` returns as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)
    return found


class Marker:
    """Starts processes with a mark, finds them and all that they started, and ends them."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        self.marked = Marked(MARK, self.mark)
        self.environment = {
            **os.environ,
            MARK: self.mark,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flower"),
            "XDG_STATE_HOME": str(folder / "state"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            **(environment or {}),
        }

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        folder: Path | None = None,
        site: str = "",
        more: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start it in a session of its own; its output is added to `NAME.log`.

        Args:
            more: of its environment.
        """
        with self.log_file(name).open("ab") as log:
            return subprocess.Popen(
                command, cwd=folder or self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self.environment | {SITE_MARK: f"{self.mark}-{site}"} | dict(more or {}), start_new_session=True,
            )  # fmt: skip

    def log_file(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        return self.log_file(name).read_text(errors="replace") if self.log_file(name).exists() else ""

    def logs(self) -> str:
        """All of them, for the message of an assertion."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')}" for file in self.folder.glob("*.log")
        )

    def find(self, program: str, site: str | None = None) -> Process | None:
        """The youngest process that runs `flwr-serverapp`, `flwr-clientapp`, `clients.worker`, …"""
        marked = self.marked if site is None else Marked(SITE_MARK, f"{self.mark}-{site}")
        found = [process for process in marked.look() if program_of(process.pid) == program]
        return max(found, key=lambda process: process.started, default=None)

    def wait_for(self, program: str, site: str | None = None, seconds: float = 60.0) -> Process:
        return until(lambda: self.find(program, site), seconds, lambda: f"no {program}: {self.logs()}")

    def wait_for_line(self, name: str, text: str, seconds: float = 60.0) -> None:
        until(lambda: text in self.log(name), seconds, lambda: f"no {text!r} in {name}.log: {self.logs()}")

    def left(self) -> list[str]:
        return [f"{process.pid} {program_of(process.pid)}" for process in self.marked.look()]

    def end_all(self) -> None:
        """Without asking: for the way out of a test."""
        end_marked(self.marked)


class Deployment(Marker):
    """A SuperLink and sites.

    `secure`: with TLS and registered keys, made by the document's own commands. `supervised=False`: Flower's own
    commands instead of ours.
    """

    def __init__(
        self,
        folder: Path,
        sites: Sequence[str] = ("a", "b"),
        *,
        secure: bool = False,
        supervised: bool = True,
        site_options: Sequence[str] = (),
        superlink_options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, environment)
        self.sites, self.secure, self.supervised = list(sites), secure, supervised
        self.site_options, self.superlink_options = list(site_options), list(superlink_options)
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.server_environment: Mapping[str, str] = {}  # what the SuperLink alone has
        self.running: dict[str, subprocess.Popen[bytes]] = {}  # "superlink", and each site by its name
        self.federation = folder / "federation.yaml"
        names = "".join(f"  - {{name: {name}}}\n" for name in self.sites)
        self.federation.write_text(f"name: test\nsites:\n{names}")
        trust = f'root-certificates = "{folder}/ca.crt"' if secure else "insecure = true"
        (folder / "flower").mkdir(exist_ok=True)
        (folder / "flower/config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "{self.address}"\n{trust}\n'
        )

    def __enter__(self) -> Deployment:
        try:
            if self.secure:
                self._make_keys()
            self.start_superlink()
            for name in self.sites:
                if self.secure:
                    self.run_to_end(
                        f"register_{name}", "flwr", "supernode", "register", f"{name}.pub", "test"
                    )
                self.start_site(name)
            for name in self.sites:
                self.wait_for_line(name, "SuperNode ID: ")
        except BaseException:
            self.end_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for name in [*self.sites, "superlink"]:
                    if name in self.running:
                        self.stop(name)
                until(lambda: not self.left(), 15, lambda: f"left: {self.left()}\n{self.logs()}")
        finally:
            self.end_all()
            for process in self.running.values():
                process.wait()

    def start_superlink(self) -> None:
        """Also after it was killed: on the same port, in the same folder."""
        folder = self.folder / "superlink"
        folder.mkdir(exist_ok=True)
        first = ["fomoe", "server"] if self.supervised else ["flower-superlink"]
        trust = ["--insecure"]
        if self.secure:
            trust = ["--enable-supernode-auth", "--ssl-ca-certfile", "../ca.crt"]
            trust += ["--ssl-certfile", "../server.crt", "--ssl-keyfile", "../server.key"]
        command = [*first, *trust, "--host", "127.0.0.1", "--port", str(self.port), *self.superlink_options]
        # Where it starts again, the line of the one before is in the log already.
        before = self.log("superlink").count("Uvicorn running")
        self.running["superlink"] = self.start("superlink", command, folder, more=self.server_environment)
        until(
            lambda: self.log("superlink").count("Uvicorn running") > before,
            60,
            lambda: f"no SuperLink: {self.logs()}",
        )

    def start_site(self, name: str) -> None:
        command = ["fomoe", "site", "--name", name, "--state-dir", str(self.folder / "sites")]
        if not self.supervised:
            config = f'site="{name}" state-dir="{self.folder}/sites"'
            command = ["flower-supernode", "--port", str(free_port()), "--node-config", config]
        trust = ["--insecure"]
        if self.secure:
            key = "--key" if self.supervised else "--auth-supernode-private-key"
            trust = ["--root-certificates", "ca.crt", key, name]
        command += ["--superlink", self.address, *trust, *self.site_options]
        self.running[name] = self.start(name, command, site=name)

    def run_to_end(self, name: str, *command: str) -> None:
        assert self.start(name, command).wait(60) == 0, self.log(name)

    def _make_keys(self) -> None:
        self.environment |= {"SERVER": self.address, "FOLDER": str(self.folder)}
        for heading, text in blocks():
            if heading in ("Certificates", "Keys of the sites"):
                text = text.replace("for site in a b c;", f"for site in {' '.join(self.sites)};")
                self.run_to_end(heading.split()[0], "bash", "-e", "-c", text)

    def stop(self, name: str, seconds: float = 30.0) -> int:
        """SIGTERM to the SuperLink or a site; its exit code."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(seconds)

    def submit(self, overrides: Sequence[str], run_dir: Path, name: str = "run") -> subprocess.Popen[bytes]:
        """`fomoe submit` of a run of these sites; its output is in `NAME.log`."""
        more = [f"federation={self.federation}", f"hydra.run.dir={run_dir}"]
        return self.start(name, ["fomoe", "submit", "test", *overrides, *more])
