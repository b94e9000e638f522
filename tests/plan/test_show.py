"""What is printed is what was planned, and the JSON is JSON."""

from __future__ import annotations

import io
import json
import math
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from fomoe_flwr.compose import compose
from fomoe_flwr.model.spec import parameter_counts
from fomoe_flwr.plan.command import look_ahead
from fomoe_flwr.plan.show import (
    Outlook,
    alike,
    as_json,
    assumptions_in_words,
    facts_table,
    finite,
    group_sites,
    show,
    site_table,
    strategy_table,
)
from fomoe_flwr.units import count, in_bits, in_bytes, percent, time_span

HETERO = ("federation=hetero", "plan.tflops=0.05")
ONE_EXPERT = ("strategy=diloco", "federation.num_sites=7", "model.num_experts=1", "model.top_k=1")


@cache
def outlook(*overrides: str) -> Outlook:
    return look_ahead(compose(overrides).config)


def printed(renderable: RenderableType) -> list[list[str]]:
    """Line by line, cut where two spaces or more part the cells."""
    console = Console(file=io.StringIO(), width=250)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def sites_of(ahead: Outlook) -> list[list[str]]:
    return printed(site_table(ahead.plan, ahead.sites, ahead.config.model.num_experts))


def test_a_line_a_site() -> None:
    ahead = outlook(*HETERO)
    lines = {line[0]: line for line in sites_of(ahead) if line}
    planned = ahead.plan.sites[3]
    assert lines["workstation"] == [
        "workstation",
        "8",
        "20",
        "8",
        f"{in_bytes(planned.memory_bytes)} of 91.3 MB",
        in_bytes(planned.bytes_down),
        in_bytes(planned.bytes_up),
        time_span(planned.compute_s),
        time_span(planned.communication_s),
        time_span(planned.round_s),
        "slowest",
        "50.0 %",
    ]
    assert lines["datacentre"][10] == time_span(ahead.plan.round_s - ahead.plan.sites[0].round_s)


def test_what_is_hidden_has_a_column_where_there_is_any() -> None:
    ahead = outlook(*HETERO, "strategy.delay=1")
    lines = {line[0]: line for line in sites_of(ahead) if line}
    planned = ahead.plan.sites[3]
    times = (planned.compute_s, planned.communication_s, planned.hidden_s, planned.round_s)
    assert lines["workstation"][7:11] == [time_span(seconds) for seconds in times]
    facts = " ".join(" ".join(line) for line in printed(facts_table(ahead)))
    assert f"sites train {percent(ahead.plan.utilisation)} of the time" in facts
    said = assumptions_in_words(ahead)
    assert "nothing hides communication" not in said[0]
    assert said[1].startswith(
        "memory: 4 + 4 + 8 + 4 bytes a parameter (weights, gradients, moments, shard as sent); "
    )
    content = as_json(ahead)
    assert content["assumptions"]["computing_hides_communication"]
    assert content["plan"]["utilisation"] == ahead.plan.utilisation > outlook(*HETERO).plan.utilisation
    assert content["sites"][3]["hidden_s"] == planned.hidden_s > 0
    assert "nothing hides communication" in assumptions_in_words(outlook(*HETERO))[0]
    assert not as_json(outlook(*HETERO))["assumptions"]["computing_hides_communication"]


def test_parts_in_turn_have_their_mean_and_their_peak() -> None:
    once, turns = outlook(*HETERO), outlook(*HETERO, "strategy.fragments=2")
    facts = " ".join(" ".join(line) for line in printed(facts_table(turns)))
    mean, whole = (sum(s.bytes_down + s.bytes_up for s in o.plan.sites) for o in (turns, once))
    peak = as_json(turns)["plan"]["peak_bytes"]
    assert "2 parts in turn" in facts
    assert f"{in_bytes(mean)} down and up, all sites, in the mean; at most {in_bytes(peak)}." in facts
    content = as_json(turns)["plan"]
    first, last = (content[f"{which}_round_bytes"] for which in ("first", "last"))
    assert f"Round 1, which brings everything whole: {in_bytes(first)}" in facts
    assert f"the last, which sends everything: {in_bytes(last)}" in facts
    # Everything one way, half the other: that with the embedding is a little larger.
    assert first == pytest.approx(0.75 * whole, rel=0.02)
    rounds = turns.config.train.rounds
    assert content["run_bytes"] == pytest.approx(first + last + (rounds - 2) * mean)
    # What a round has less is what half of the model has.
    assert mean == pytest.approx(whole / 2, rel=1e-3)
    # With two, one comes down while the other goes up.
    assert mean == peak
    assert as_json(once)["plan"]["peak_bytes"] == whole
    most = as_json(outlook(*HETERO, "strategy.fragments=3"))["plan"]
    assert whole / 3 < most["peak_bytes"] < whole / 1.9
    assert "its bytes" not in " ".join(" ".join(line) for line in printed(facts_table(once)))
    assert assumptions_in_words(turns)[1].startswith("memory: 4 + 4 + 8 + 8 bytes a parameter")


def test_too_small_is_said_in_the_line() -> None:
    lines = {line[0]: line for line in sites_of(outlook(*HETERO, "strategy.overlap=3")) if line}
    assert lines["workstation"][4].endswith("of 91.3 MB, too small")
    assert not lines["datacentre"][4].endswith("too small")


def test_memory_that_is_not_given_is_not_printed() -> None:
    lines = {line[0]: line for line in sites_of(outlook()) if line}
    assert lines["site-0"][4] == in_bytes(outlook().plan.sites[0].memory_bytes)


def test_a_thousand_equal_sites_are_one_line() -> None:
    ahead = outlook("federation.num_sites=1000", "strategy.overlap=125", "model.num_experts=128")
    lines = [line for line in sites_of(ahead) if line and line[0].startswith("site-")]
    assert [line[0] for line in lines] == ["site-0 and 999 more like it"]


def test_many_different_sites_are_twenty_lines_the_slowest_first(tmp_path: Path) -> None:
    file = tmp_path / "many.yaml"
    entries = ", ".join(f"{{name: s{index}, speed: {1 + index}}}" for index in range(30))
    file.write_text(f"sites: [{entries}, {{name: alike, count: 5, speed: 0.5}}]")
    ahead = outlook(f"federation={file}", "strategy.overlap=35", *HETERO[1:])
    lines = [line for line in sites_of(ahead) if line]
    assert [line[0] for line in lines[-21:-1]] == [
        "alike-0 and 4 more like it",
        *(f"s{i}" for i in range(19)),
    ]
    assert lines[-1] == ["… and 11 more, faster than these"]
    assert len(group_sites(ahead.plan, ahead.sites)) == 31


def test_names_of_sites_that_are_alike() -> None:
    assert alike(["a"]) == "a"
    assert alike(["a", "b"]) == "a and 1 more like it"


def test_strategies_side_by_side() -> None:
    ahead = outlook(*HETERO)
    lines = [line for line in printed(strategy_table(ahead.rows, 4)) if line and len(line) == 9]
    for row, line in zip(ahead.rows, lines[-6:], strict=True):
        assert row.plan is not None
        assert line[0] == f"▸ {row.name}" if row.this_run else row.name
        worth = row.plan.useful_tokens_per_second / row.plan.tokens_per_second
        assert line[1:8] == [
            str(row.overlap),
            in_bytes(row.bytes_per_round),
            time_span(row.plan.round_s),
            count(row.plan.tokens_per_second),
            percent(worth),
            count(row.plan.useful_tokens_per_second),
            in_bytes(row.memory_bytes),
        ]
    assert [line[8] for line in lines[-6:]] == ["none"] + ["lab-0 and 2 more"] * 2 + ["none"] * 3


def test_a_strategy_that_cannot_be_and_the_reason() -> None:
    lines = printed(strategy_table(outlook(*ONE_EXPERT).rows, 7))
    assert sum(line[-1:] == ["not possible"] for line in lines) == 2
    assert "overlap must be at least 7" in " ".join(" ".join(line) for line in lines)


@pytest.mark.parametrize("overrides", [(), HETERO, ("federation.num_sites=1", "strategy.overlap=1")])
def test_everything_is_printed(overrides: tuple[str, ...]) -> None:
    console = Console(file=io.StringIO(), width=80)
    ahead = outlook(*overrides)
    show(ahead, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for sentence in ahead.advice:
        assert f"  - {sentence}\n" in text
    assert "plan.tflops, plan.mfu" in text
    assert count(ahead.plan.tokens_per_second) in text
    for row in ahead.rows:
        assert row.name in text  # 80 columns cut nothing off


# ----- JSON


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_the_object_has_what_is_promised_and_survives_the_way_through_text() -> None:
    ahead = outlook(*HETERO)
    content = json.loads(json.dumps(as_json(ahead), allow_nan=False), parse_constant=refuse)
    counts = parameter_counts(ahead.config.model)
    assert content["model"] == {
        "name": "tiny",
        "params_total": counts.total,
        "params_dense": counts.dense,
        "params_expert": counts.experts,
        "params_router": counts.router,
        "params_standin": 0,
    }
    assert counts.total == counts.dense + counts.experts + counts.router
    assert [site["site"] for site in content["sites"]] == ["datacentre", "lab-0", "lab-1", "workstation"]
    for site, planned in zip(content["sites"], ahead.plan.sites, strict=True):
        assert set(site) >= {
            "site", "experts_per_layer", "memory_bytes", "bytes_down", "bytes_up", "compute_s", "communication_s",
            "round_s", "local_steps", "batch_size", "tokens", "resident_share",
        }  # fmt: skip
        assert (
            site["round_s"] == planned.round_s == pytest.approx(site["compute_s"] + site["communication_s"])
        )
    for strategy in content["strategies"]:
        assert set(strategy) >= {
            "name", "bytes_per_round", "round_s", "tokens_per_second", "useful_tokens_per_second", "memory_bytes",
            "sites_too_small",
        }  # fmt: skip
    assert sum(strategy["this_run"] for strategy in content["strategies"]) == 1
    assert content["plan"]["placement"] == "equal"
    assert content["plan"]["round_s"] == max(site["round_s"] for site in content["sites"])
    assert content["plan"]["tokens"] == sum(site["tokens"] for site in content["sites"])
    assert content["assumptions"]["tflops"] == 0.05
    assert content["advice"] == ahead.advice


def test_infinite_memory_is_null() -> None:
    content = as_json(outlook())
    assert {site["memory_available_bytes"] for site in content["sites"]} == {None}
    assert content["assumptions"]["sites_with_unknown_memory"] == 4
    assert finite([math.inf, {"a": (math.nan, 1.5)}]) == [None, {"a": [None, 1.5]}]


def test_a_strategy_that_cannot_be_is_null() -> None:
    content = as_json(outlook(*ONE_EXPERT))
    (skip,) = [row for row in content["strategies"] if row["name"] == "FoMoE, equal, skip"]
    assert skip["round_s"] is skip["tokens_per_second"] is skip["bytes_per_round"] is None
    assert "at least 7" in skip["impossible"]
    json.dumps(content, allow_nan=False)


def test_units() -> None:
    assert [time_span(s) for s in (0, 3.5e-6, 0.0129, 3.7, 59.94, 60, 5025)] == [
        "0 µs", "3.50 µs", "12.9 ms", "3.70 s", "59.9 s", "1 min 00 s", "1 h 23 min",
    ]  # fmt: skip
    assert [in_bits(rate) for rate in (6_250_000, 125e9, 1, 0)] == [
        "50.0 Mbit/s",
        "1.00 Tbit/s",
        "8.00 bit/s",
        "0 bit/s",
    ]
    assert percent(0.5) == "50.0 %"
