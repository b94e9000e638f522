"""A run directory is read as it was written, and what is wrong with it is said in one line."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from fomoe_flwr.errors import ConfigError, FomoeError, RunError
from fomoe_flwr.plan.planner import plan_for_run
from fomoe_flwr.report import load, report
from fomoe_flwr.report.load import load_run
from fomoe_flwr.report.reality import compare, notes, reality_table
from fomoe_flwr.report.tables import comparison_table, run_table, show_saved
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


def said_of(path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The one warning of the last reading."""
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: left out ")
    caplog.clear()
    return record.getMessage()


def test_damaged_lines_are_named_and_the_others_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_run(tmp_path, rounds=5) / "metrics.jsonl"
    whole = path.read_bytes().splitlines()
    whole[1], whole[3], whole[4] = whole[1][:100], b"\xff" + whole[3], b"[" * 100_000
    path.write_bytes(b"\n".join(whole) + b"\n")
    assert [record.round for record in load_run(tmp_path).rounds] == [0, 2, 5]
    assert "left out 3 of 6 lines, which cannot be read; line 2: not JSON" in said_of(path, caplog)


def test_of_two_lines_of_a_round_the_later_counts(tmp_path: Path) -> None:
    lines = metrics(compose_config(), 2)
    rounds = load_run(write_run(tmp_path, lines=[*lines, {**lines[1], "val_loss": 1.5}])).rounds
    assert [(record.round, record.val_loss == 1.5) for record in rounds] == [
        (0, False),
        (1, True),
        (2, False),
    ]


@pytest.mark.parametrize("content", [None, "", "\n", '{"round": 0, "tok', "[1, 2]\n"])
def test_metrics_without_a_round(tmp_path: Path, content: str | None) -> None:
    path = write_run(tmp_path) / "metrics.jsonl"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        load_run(tmp_path)


def test_a_line_that_lacks_a_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = compose_config()
    for key in ("tokens", "bytes_by_class", "seconds", "by_layer"):
        lines = with_routing(metrics(config, 1), config)
        lines[1].pop(key, None)
        lines[1]["routing"].pop(key, None)
        load_run(write_run(tmp_path, lines=lines))
        said = said_of(tmp_path / "metrics.jsonl", caplog)
        assert "line 2: " in said
        assert f"{key} is missing" in said


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("round",), "1", "round is '1', must be a whole number from 0"),
        (("round",), 10**6, "round 1000000 of 10"),
        (("tokens",), -1, "tokens is -1, must be a whole number from 0"),
        (("bytes_down",), 10**30, "bytes_down is a very large number, must be a whole number from 0"),
        (("val_loss",), [1.0], "val_loss is a list"),
        (("failures",), {"site-0": 3}, "failures.site-0 is 3, must be a string"),
        (("seconds", "round"), math.nan, "seconds.round is nan, must be not negative"),
        (("sites",), [None], r"sites[0] is null, must be an object"),
        (("sites", 0, "site"), "elsewhere", "site 'elsewhere' is not in config.yaml"),
        (("virtual",), {"round_s": 1.0, "sites": {}}, "virtual.sites.site-0 is missing"),
        (("virtual",), "fast", "virtual is 'fast'"),
        (("routing", "load"), [[1.0]], "routing has not 4 layers everywhere"),
        (("routing", "load", 0), [1.0], "routing.load has not 16 experts everywhere"),
        (("routing", "by_layer", "load_entropy", 2), {}, "routing.by_layer.load_entropy[2] is an object"),
        (("routing", "residents"), 7, "routing.residents is 7"),
    ],
)
def test_a_value_of_another_type_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: tuple[Any, ...], value: Any, said: str
) -> None:
    config = compose_config()
    lines = with_routing(metrics(config, 1), config)
    write_run(tmp_path, lines=lines)
    *way, last = where
    part: Any = lines[1]
    for key in way:
        part = part[key]
    part[last] = value
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record.round for record in load_run(tmp_path).rounds] == [0]
    assert said in said_of(tmp_path / "metrics.jsonl", caplog)


def test_what_a_site_says_of_itself_need_not_be_a_number_that_can_be_drawn(tmp_path: Path) -> None:
    lines = metrics(compose_config(), 1)
    lines[1]["sites"][0] |= {"tokens_per_second": math.inf, "train_loss": math.nan}
    site = load_run(write_run(tmp_path, lines=lines)).rounds[1].sites[0]
    assert site.tokens_per_second is site.train_loss is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sites": []}, "sites is a list, must be not empty"),
        ({"sites": [{}]}, r"sites[0].site is missing"),
        ({"tokens": 0}, "tokens is 0, must be positive"),
        ({"local_steps": 0}, "local_steps is 0, must be positive"),
        ({"round_s": "long"}, "round_s is 'long', must be a number"),
        ({"site": "elsewhere"}, "of other sites than config.yaml"),
    ],
)
def test_a_damaged_plan(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write_run(tmp_path)
    plan_for_run(tmp_path, compose_config())
    path = tmp_path / "plan.json"
    content = json.loads(path.read_text())
    content["plan"] |= {key: value for key, value in change.items() if key in content["plan"]}
    if change.keys() & {"local_steps", "site"}:
        content["plan"]["sites"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=re.escape(str(path))) as error:
        load_run(tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.yaml", "not UTF-8"), ("config.yaml", "deep"), ("metrics.jsonl", "deep"), ("plan.json", "a folder"),
        ("plan.json", "deep"), ("placements.jsonl", "a folder"), ("evaluation.json", "a folder"),
        ("evaluation.json", "deep"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    path = write_run(tmp_path) / name
    path.unlink(missing_ok=True)
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\n" if damage == "not UTF-8" else b"[" * 1_500 + b"\n")
    with pytest.raises(FomoeError, match=re.escape(str(path))) as error:
        report(tmp_path, Console(file=io.StringIO()))
    assert len(str(error.value)) < len(str(path)) + 450


# -- whatever is in it -----------------------------------------------------------------------------------------

SMALL = ("model.num_layers=1", "model.num_experts=4", "federation.num_sites=2", "strategy.overlap=1")
SMALL_CONFIG = compose_config(*SMALL)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    [],
    [[]],
    {},
    {"a": 1},
)


def mutated(content: bytes, jsonl: bool, data: st.DataObject) -> bytes:
    """With some bytes changed, or one value somewhere in it."""
    if not data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(max_size=3))
        return content[:at] + new + content[at + data.draw(st.integers(0, 40)) :]
    lines = [yaml.safe_load(part) for part in (content.splitlines() if jsonl else [content])]
    part: Any = lines
    while True:
        keys = sorted(part) if isinstance(part, dict) else list(range(len(part)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(part[key], dict | list) and part[key] and data.draw(st.integers(0, 4)):
            part = part[key]
            continue
        if key == "count":  # so many sites are a large run, not a wrong one
            return content
        part[key] = data.draw(st.sampled_from(VALUES))
        return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small run that has everything."""
    folder = tmp_path_factory.mktemp("whole")
    config = SMALL_CONFIG
    lines = with_routing(metrics(config, 2), config)
    clock = {"compute_s": 1.0, "communication_s": 0.5, "waited_s": 0.0}
    for line in lines[1:]:
        clocks = {site["site"]: clock for site in line["sites"]}
        line["virtual"] = {"round_s": 1.5, "slowest": "site-0", "sites": clocks}
    write_run(folder, *SMALL, lines=lines)
    plan_for_run(folder, config)
    figures = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.0, "tokens": 9}
    evaluation = {
        "checkpoint": "x",
        "text": {"name": "text", "part": "validation", "documents": 1, "tokens": 9},
        "all_experts": {**figures, "by_domain": {"a": figures, "b": figures}},
        "residents": {"site-0": figures, "site-1": None},
        "routing": {"necessity": 0.1, "necessity_by_layer": [0.1], "necessity_by_draw": [0.1], "tokens": 9},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    # JSON is YAML that loads faster.
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(tree))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


HERE = [HealthCheck.function_scoped_fixture]  # each example writes all files


@settings(max_examples=40, suppress_health_check=HERE)
@given(data=st.data())
def test_any_damage_is_read_or_said_in_one_line(
    tmp_path: Path, whole: dict[str, bytes], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(whole.keys() - {"config.yaml"})))
    # Reading the configuration takes longer than everything else.
    with patch.object(load, "read_config", lambda _: SMALL_CONFIG):
        damage(tmp_path, whole, name, data)


def damage(tmp_path: Path, whole: dict[str, bytes], name: str, data: st.DataObject) -> None:
    """Damage this file, and read the run and its tables."""
    for other, content in whole.items():
        (tmp_path / other).write_bytes(content)
    (tmp_path / name).write_bytes(mutated(whole[name], name.endswith("jsonl"), data))
    console, said = Console(file=io.StringIO(), width=200), ""
    try:
        run = load_run(tmp_path)
        for table in (run_table(run), comparison_table(run)):
            console.print(table)
        if (compared := compare(run)) is not None:
            console.print(reality_table(compared), notes(run, compared))
        show_saved(tmp_path / "evaluation.json", console)
    except FomoeError as error:
        said = str(error)
    assert not said or name in said
    assert len(said) < 1000


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
