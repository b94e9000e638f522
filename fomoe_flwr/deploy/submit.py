"""`fomoe submit`: `flwr run --stream`, which then asks what became of the run.

Flower's command ends with exit code 0 also when the run failed.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override

import fomoe_flwr
from fomoe_flwr.compose import compose
from fomoe_flwr.config import schema
from fomoe_flwr.deploy.flower import flower_environment, program, toml_string
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.overrides import DIRECTORIES, last_value, read_overrides, texts

_STATUS_PAUSE_S = 2.0
_STATUS_TRIES = 5  # of asking a SuperLink that does not answer
# As Flower 1.41 prints it.
STARTED = re.compile(r"Successfully started run (\d+)")
_SERVER_PATHS = (*DIRECTORIES, *(key for key, field in schema() if field.metadata.get("kind") == "path"))


def submit(arguments: Sequence[str]) -> None:
    """`fomoe submit CONNECTION [OVERRIDE ...]`: start a run, show its log, and fail if the run failed.

    Ctrl-C stops the run itself, not only the log.

    Raises:
        ConfigError: no connection, a path that the server would look for elsewhere, no source tree.
        RunError: the run was not started, or did not complete.
    """
    match arguments:
        case [connection, *items] if not connection.startswith("-") and "=" not in connection:
            pass
        case _:
            raise ConfigError("fomoe submit: the first argument is the name of a connection in config.toml")
    for item in items:
        if item.startswith("-"):
            raise ConfigError(
                f"fomoe submit: {item} is not an override; it takes a connection and overrides only"
            )
    overrides = read_overrides(items)
    check_absolute(overrides)
    _check_here(overrides)
    environment = flower_environment() | {"PYTHONUNBUFFERED": "1"}
    flwr = program("flwr", environment)
    config = f"hydra-overrides={toml_string(shlex.join(texts(overrides)))}"
    command = [flwr, "run", str(app_folder()), connection, "--stream", "--run-config", config]
    run = None
    # In a session of its own: at Ctrl-C it is we who stop the run.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        with _ends_at_term():
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if run is None and (found := STARTED.search(line)):
                    run = found[1]
            process.wait()
            if run is None:
                raise RunError(f"the run was not started ({connection}, see above)")
            status = _final_status(run, connection, environment)
    except KeyboardInterrupt:
        if run is not None:
            subprocess.run(
                [flwr, "stop", run, connection], env=environment, start_new_session=True, check=False
            )
        raise
    finally:
        process.kill()
        process.wait()
    if status != "finished:completed":
        raise RunError(f"run {run} did not complete: {status}")


def check_absolute(overrides: Sequence[Override]) -> None:
    """Refuse a relative path in the overrides of a run that the server composes.

    Raises:
        ConfigError: naming the override.
    """
    for override in overrides:
        value = override.value()
        sites = value if override.key_or_group == "federation.sites" and isinstance(value, list) else []
        paths = [site.get("data_path") for site in sites if isinstance(site, dict)]
        if override.key_or_group in _SERVER_PATHS and (override.key_or_group, value) != (
            "data.tokenizer",
            "bytes",
        ):
            paths.append(value)
        for path in paths:
            if path not in ("", None) and not str(path).startswith(("/", "~")):
                raise ConfigError(
                    f"{override.input_line}: must be an absolute path; the server looks for it, in a folder of its "
                    "own"
                )


def _check_here(overrides: Sequence[Override]) -> None:
    """Refuse a wrong key or value before anything starts, where this machine can know.

    Raises:
        ConfigError: of `compose`.
    """
    file = last_value(overrides, "federation.path")
    # Only the server has the run, or the file.
    elsewhere = any(last_value(overrides, key) is not None for key in ("resume", "init_from"))
    if elsewhere or not (file is None or Path(str(file)).is_file()):
        return
    compose(overrides)


def app_folder() -> Path:
    """The source tree that `flwr run` bundles.

    Raises:
        ConfigError: the package was installed without it.
    """
    folder = Path(fomoe_flwr.__file__).resolve().parents[1]
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError):
        project = tomllib.loads((folder / "pyproject.toml").read_text())
        if "app" in project.get("tool", {}).get("flwr", {}):
            return folder
    raise ConfigError(
        f"fomoe submit: no pyproject.toml with [tool.flwr.app] in {folder}; run it from a clone of the repository "
        "that is installed by `pip install -e .`"
    )


def _final_status(run: str, connection: str, environment: Mapping[str, str]) -> str:
    """`finished:completed` or another end; waits for it, for the log may have been cut off before the run.

    Raises:
        RunError: the SuperLink does not say.
    """
    command = [program("flwr", environment), "ls", connection, "--run-id", run, "--format", "json"]
    failures = 0
    while failures < _STATUS_TRIES:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        try:
            status = str(json.loads(done.stdout)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError, TypeError):
            failures += 1
        else:
            failures = 0
            if status.startswith("finished"):
                return status
        time.sleep(_STATUS_PAUSE_S)
    raise RunError(f"run {run}: the SuperLink does not say what became of it; ask `flwr ls {connection}`")


@contextlib.contextmanager
def _ends_at_term() -> Iterator[None]:
    """Leave by way of `finally` at SIGTERM too; the run itself goes on then."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
