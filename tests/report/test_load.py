"""A run directory is read as it was written, and what is wrong with it is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.report.load import load_run
from tests.report.runs import compose_config, metrics, with_routing, write_run


def test_a_run_reads_as_written(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "federation=labs", "strategy.overlap=1", rounds=2))
    assert [record.round for record in run.rounds] == [0, 1, 2]
    assert run.config == compose_config("federation=labs", "strategy.overlap=1")
    before, first, _ = run.rounds
    assert (before.train_loss, before.sites, before.site_bytes) == (None, (), None)
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
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", [None, "", "\n", '{"round": 0, "tok', "[1, 2]\n"])
def test_metrics_without_a_round(tmp_path: Path, content: str | None) -> None:
    path = write_run(tmp_path) / "metrics.jsonl"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        load_run(tmp_path)


def test_a_line_that_lacks_a_key(tmp_path: Path) -> None:
    config = compose_config()
    for key in ("tokens", "bytes_by_class", "seconds", "by_layer"):
        lines = with_routing(metrics(config, 1), config)
        lines[1].pop(key, None)
        lines[1]["routing"].pop(key, None)
        with pytest.raises(RunError, match=f"line 2.*'{key}'"):
            load_run(write_run(tmp_path, lines=lines))


def test_a_site_that_is_not_in_the_configuration(tmp_path: Path) -> None:
    lines = metrics(compose_config(), rounds=1)
    lines[1]["sites"][0]["site"] = "elsewhere"
    with pytest.raises(RunError, match="elsewhere"):
        load_run(write_run(tmp_path, lines=lines))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, r"config\.yaml"),
        ("", "empty"),
        ("[1, 2]", "mapping"),
        ("model: {name: [", "YAML"),
        ("model: {widht: 3}", r"model\.widht"),
        ("train: {rounds: many}", r"train\.rounds"),
    ],
)
def test_a_damaged_configuration(tmp_path: Path, content: str | None, named: str) -> None:
    path = write_run(tmp_path) / "config.yaml"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ConfigError, match=named) as error:
        load_run(tmp_path)
    assert "\n" not in str(error.value)
