"""A run directory is read as it was written, and what is wrong with it is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.report.load import load_run
from tests.report.runs import compose_config, metrics, write_run


def test_a_run_reads_as_written(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "federation=labs", "strategy.overlap=1", rounds=2))
    assert [record.round for record in run.rounds] == [0, 1, 2]
    assert run.config == compose_config("federation=labs", "strategy.overlap=1")
    before, first, _ = run.rounds
    assert (before.train_loss, before.resident_share, before.sites, before.site_bytes) == (
        None,
        None,
        (),
        None,
    )
    assert [site.site for site in first.sites] == ["datacentre", "lab-0", "lab-1", "workstation"]
    assert first.seconds == 10.0
    assert first.site_bytes == first.sites[0].bytes_down + first.sites[0].bytes_up


def test_a_half_written_last_line_does_not_count(tmp_path: Path) -> None:
    path = write_run(tmp_path, rounds=2) / "metrics.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:2]) + "\n" + whole[2][:100])
    assert [record.round for record in load_run(tmp_path).rounds] == [0, 1]


def test_a_broken_line_in_the_middle_does(tmp_path: Path) -> None:
    path = write_run(tmp_path, rounds=2) / "metrics.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join([whole[0], whole[1][:100], whole[2]]) + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: not JSON"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", '{"round": 0, "tok'], ids=["empty", "blank", "half a line"])
def test_metrics_without_a_round(tmp_path: Path, content: str) -> None:
    (write_run(tmp_path) / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match="no complete round"):
        load_run(tmp_path)


def test_no_metrics(tmp_path: Path) -> None:
    (write_run(tmp_path) / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"metrics\.jsonl: no such file"):
        load_run(tmp_path)


@pytest.mark.parametrize("key", ["tokens", "bytes_by_class", "seconds"])
def test_a_line_that_lacks_a_key(tmp_path: Path, key: str) -> None:
    lines = metrics(compose_config(), rounds=1)
    del lines[1][key]
    with pytest.raises(RunError, match=f"line 2: not the metrics of a round: '{key}' is missing"):
        load_run(write_run(tmp_path, lines=lines))


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    (write_run(tmp_path) / "metrics.jsonl").write_text(json.dumps([1, 2]) + "\n")
    with pytest.raises(RunError, match="line 1: not the metrics of a round"):
        load_run(tmp_path)


def test_a_site_that_is_not_in_the_configuration(tmp_path: Path) -> None:
    lines = metrics(compose_config(), rounds=1)
    lines[1]["sites"][0]["site"] = "elsewhere"
    with pytest.raises(RunError, match=r"site 'elsewhere' is not in config\.yaml"):
        load_run(write_run(tmp_path, lines=lines))


def test_no_configuration(tmp_path: Path) -> None:
    (write_run(tmp_path) / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty or not a mapping"),
        ("[1, 2]", "empty or not a mapping"),
        ("model: {name: [", "not YAML"),
        ("model: {widht: 3}", "model.widht"),
        ("train: {rounds: many}", "train.rounds"),
    ],
)
def test_a_damaged_configuration(tmp_path: Path, content: str, message: str) -> None:
    (write_run(tmp_path) / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_run(tmp_path)
    assert "\n" not in str(error.value)
