"""What the machine refuses ends a command in one line, with exit code 1 or 2, and no traceback."""

from __future__ import annotations

import errno
import io
import os
import pwd
import sys
from pathlib import Path

import pytest

from fomoe_flwr import cli
from fomoe_flwr.compose import Composed
from fomoe_flwr.console import setup_logging
from fomoe_flwr.data import prepare
from fomoe_flwr.deploy.supernode import parse
from fomoe_flwr.errors import ConfigError
from tests.conftest import SMALL_MODEL, SMALL_TRAIN, Compose


def line_of(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == code
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    return last


def train(corpus: Path, cache: Path, run_dir: Path) -> list[str]:
    return [
        "train", *SMALL_MODEL, *SMALL_TRAIN, "data=text", f"data.path={corpus}", f"data.cache_dir={cache}",
        "runtime=local", "wandb.mode=disabled", f"hydra.run.dir={run_dir}",
    ]  # fmt: skip


@pytest.mark.parametrize("multirun", [False, True])
def test_a_run_directory_that_cannot_be_made_is_refused_before_hydra_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, corpus_dir: Path, cache_dir: Path, multirun: bool
) -> None:
    (tmp_path / "file").touch()
    command = train(corpus_dir, cache_dir, tmp_path / "file" / "run")
    if multirun:
        command += ["-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}/file/sweep"]
    line = line_of(capsys, 1, *command)
    assert f"{tmp_path}/file/" in line
    assert line.endswith("Not a directory")


def test_a_folder_in_which_no_file_can_be_made_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, corpus_dir: Path, cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/run/tmpx")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    line = line_of(capsys, 1, *train(corpus_dir, cache_dir, tmp_path / "run"))
    assert line == f"error: {tmp_path}/run: Permission denied"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["report", ""], "fomoe report: '' is empty"),
        (["train", "--config-dir", "", "--cfg", "job"], "--config-dir is empty"),
        (
            ["train", "-m", "seed=1,2", "hydra.sweep.subdir=x"],
            "hydra.sweep.subdir: the jobs of a sweep are 0/",
        ),
    ],
)
def test_what_would_look_in_another_folder_is_refused(
    capsys: pytest.CaptureFixture[str], command: list[str], named: str
) -> None:
    """An empty path is not the current one, and the table of a sweep finds its jobs."""
    assert named in line_of(capsys, 2, *command)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device", "/run/metrics.jsonl"),
    PermissionError(errno.EACCES, "Permission denied", "/run/checkpoints/round_00001/manifest.json"),
    UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory"),
])  # fmt: skip
def test_what_the_machine_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "report", fail)
    line = line_of(capsys, 1, "report", "/run")
    usual = "surrogates not allowed" if isinstance(error, UnicodeError) else "not enough memory"
    assert str(getattr(error, "filename", None) or usual) in line
    assert len(line) < 600


def test_a_full_disk_in_the_middle_of_a_run_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: Compose
) -> None:
    """Within Hydra's job, whose own way of saying it is a traceback."""

    def full(composed: Composed) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/run/x")

    monkeypatch.setattr("strategies.launch.launch", full)
    monkeypatch.setattr(sys, "argv", ["fomoe"])
    composed = small()
    line = line_of(
        capsys, 1, *train(Path(str(composed.config.data.path)), Path(str(composed.config.data.cache_dir)),
                          composed.run_dir)
    )  # fmt: skip
    assert line == "error: /run/x: No space left on device"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a random user number."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_STATE_HOME", "FOMOE_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_directory_the_line_says_which_paths_to_give(small: Compose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no home directory; set HOME.*data\.cache_dir"):
        prepare(small("data.cache_dir=null").config.data)
    site = ["--superlink", "h:1", "--name", "a"]
    with pytest.raises(ConfigError, match=r"no home directory; set HOME.*--state-dir"):
        parse(site)
    # What is given needs no home.
    assert parse([*site, "--state-dir", str(tmp_path)]).state_dir == tmp_path
    prepare(small().config.data)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_that_lacks_a_character_gets_a_question_mark(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    setup_logging()
    print("loss │ ψ \udce9")
    out.flush()
    assert out.buffer.getvalue() == b"loss ? ? ?\n"


def test_pictures_do_not_ask_for_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are files, whatever matplotlib is told in the environment."""
    monkeypatch.setenv("MPLBACKEND", "none-such")
    cli.main(["--version"])
    assert os.environ["MPLBACKEND"] == "agg"


def test_a_command_keeps_its_own_parts_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "lab")
    monkeypatch.setenv("NO_PROXY", "lab")
    cli.main(["--version"])
    assert os.environ["no_proxy"] == "lab,127.0.0.1,localhost,::1"
