"""What a run writes down: one line a round, whole after a resume, the same figures for wandb."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from fomoe_flwr.telemetry import Telemetry, figures
from tests.conftest import Compose


def line(number: int) -> dict:
    return {
        "round": number,
        "tokens": 100 * number,
        "train_loss": 2.0,
        "val_loss": 3.0,
        "val_bpb": 4.0,
        "bytes_down": 1_500_000,
        "bytes_up": 10,
        "resident_share": 0.5,
        "seconds": {"round": 2.0},
        "sites": [{"site": "a", "tokens": 100, "train_loss": 2.0}],
        "committed": True,
        "failures": {},
    }


def written(run_dir: Path) -> list[int]:
    return [json.loads(text)["round"] for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_round_in_the_file_and_on_the_console(
    small: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    composed = small()
    telemetry = Telemetry(composed.config, composed.run_dir, "run")
    with caplog.at_level(logging.INFO, logger="fomoe"):
        for number in (1, 2):
            telemetry.begin_round(number, sites=4)
            telemetry.site_answered()
            telemetry.end_round(line(number))
    telemetry.close()
    assert written(composed.run_dir) == [1, 2]
    text = caplog.messages[-1]
    for part in (
        "round 2/2",
        "train 2.000",
        "bpb 4.000",
        "50 tokens/s",
        "down 1.50 MB",
        "resident 50%",
        "left 0.0 s",
    ):
        assert part in text


def test_a_resumed_run_drops_the_lines_of_a_future_it_does_not_have(small: Compose) -> None:
    composed = small()
    telemetry = Telemetry(composed.config, composed.run_dir, "run")
    for number in (0, 1, 2, 3):
        telemetry.end_round(line(number))
    with telemetry.path.open("a") as file:
        file.write('{"round": 4, "tok')
    before = telemetry.path.read_text()
    resumed = Telemetry(composed.config, composed.run_dir, "run", last=line(2))
    # Nothing is lost before the first round that takes its place is over.
    assert telemetry.path.read_text() == before
    resumed.end_round(line(3) | {"tokens": 7})
    assert written(composed.run_dir) == [0, 1, 2, 3]
    assert '"tokens": 7' in telemetry.path.read_text()


def test_one_damaged_line_does_not_drop_the_later_ones(
    small: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    composed = small()
    telemetry = Telemetry(composed.config, composed.run_dir, "run")
    for number in (0, 1, 2, 3):
        telemetry.end_round(line(number))
    whole = telemetry.path.read_bytes().splitlines(keepends=True)
    telemetry.path.write_bytes(b"".join([whole[0], whole[1][:50] + b"\xff\n", b"null\n", *whole[2:]]))
    caplog.clear()
    Telemetry(composed.config, composed.run_dir, "run", last=line(3)).close()
    assert written(composed.run_dir) == [0, 2, 3]
    (record,) = caplog.records
    assert "left out 2 of 5 lines, which cannot be read; line 2: " in record.getMessage()


def test_a_line_that_only_the_checkpoint_has_is_written_down(small: Compose) -> None:
    """The run was killed between the two."""
    composed = small()
    telemetry = Telemetry(composed.config, composed.run_dir, "run")
    telemetry.end_round(line(0))
    Telemetry(composed.config, composed.run_dir, "run", last=line(1)).close()
    assert written(composed.run_dir) == [0, 1]


def test_a_line_of_before_the_run_was_resumed_gives_way_to_the_checkpoints(small: Compose) -> None:
    """The run was killed after it had saved a round for the second time, and before it had written its line."""
    composed = small()
    telemetry = Telemetry(composed.config, composed.run_dir, "run")
    for number in (0, 1, 2):
        telemetry.end_round(line(number) | {"tokens": 7})
    Telemetry(composed.config, composed.run_dir, "run", last=line(1)).close()
    lines = [json.loads(text) for text in telemetry.path.read_text().splitlines()]
    assert [(each["round"], each["tokens"]) for each in lines] == [(0, 7), (1, 100)]


def test_wandb_offline_writes_into_the_run_directory(small: Compose) -> None:
    composed = small("wandb.mode=offline")
    telemetry = Telemetry(composed.config, composed.run_dir, "abcdef")
    telemetry.end_round(line(1))
    telemetry.close()
    assert list((composed.run_dir / "wandb").glob("offline-run-*-abcdef/run-abcdef.wandb"))


def test_nested_figures_are_flat_for_wandb() -> None:
    flat = figures(line(1))
    assert flat["seconds/round"] == 2.0
    assert flat["sites/a/train_loss"] == 2.0
    assert "sites/a/site" not in flat


def test_figures_by_layer_are_curves_in_wandb_and_large_tables_are_not() -> None:
    routing = {
        "load_entropy": 0.9,
        "drift": None,
        "by_layer": {"load_entropy": [0.95, None, 0.85], "drift": [0.1] * 65},
        "load": [[1, 2], [3, 4]],
        "residents": {"a": [0.5, 0.25]},
    }
    assert figures({"routing": routing}) == {
        "routing/load_entropy": 0.9,
        "routing/by_layer/load_entropy/0": 0.95,
        "routing/by_layer/load_entropy/2": 0.85,
        "routing/residents/a/0": 0.5,
        "routing/residents/a/1": 0.25,
    }


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_may_fail_and_the_figures_are_written_all_the_same(
    small: Compose, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{where}: the service is gone\nwith a second line")

    run = SimpleNamespace(summary={}, log=lambda *_, **__: None, finish=lambda **_: None)
    if where != "init":
        setattr(run, where, fail)
    monkeypatch.setattr("wandb.init", fail if where == "init" else lambda **_: run)
    composed = small("wandb.mode=offline")
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        telemetry = Telemetry(composed.config, composed.run_dir, "run")
        for number in (1, 2):
            telemetry.end_round(line(number))
        telemetry.end_run({"loss": 1.0})
        telemetry.close()
    assert written(composed.run_dir) == [1, 2]
    (said,) = [message for message in caplog.messages if "wandb" in message]
    assert "the service is gone with a second line" in said


def test_a_progress_bar_may_fail(small: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no terminal any more")

    monkeypatch.setattr("fomoe_flwr.telemetry.tqdm", fail)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    composed = small()
    telemetry = Telemetry(composed.config, composed.run_dir, "run")
    telemetry.begin_round(1, sites=2)
    telemetry.site_answered()
    telemetry.end_round(line(1))
    telemetry.close()
    assert written(composed.run_dir) == [1]
