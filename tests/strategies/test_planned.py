"""Sites that differ: planned shares, steps of their own, the virtual clock, and what the report says of it."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fomoe_flwr.checkpoint import checkpoint_path, compose_run, read_checkpoint
from fomoe_flwr.codecs import LOSSY
from fomoe_flwr.errors import ConfigError, RunError
from fomoe_flwr.messages import Task
from fomoe_flwr.placement import Placement
from fomoe_flwr.plan.planner import make_plan, plan_for_run
from fomoe_flwr.plan.record import load_plan
from fomoe_flwr.plan.system import BYTES_A_GIB, edge_bytes, peak_bytes, round_bytes, run_bytes, token_cost
from fomoe_flwr.policies import POLICIES
from fomoe_flwr.report.load import load_run
from fomoe_flwr.report.reality import compare, notes
from strategies.fomoe import FoMoE
from strategies.local_grid import LocalGrid
from tests.conftest import Compose
from tests.strategies.helpers import answering, composed_anew, copy_of, finished, metrics, run, without_times

# Three sites that differ in memory, speed and link; the small model's step needs 0.9 MB whole.
SITES = (
    "federation.sites=["
    "{name:big,memory_gib:0.01,speed:4,up_mbps:100,down_mbps:100},"
    "{name:lab,memory_gib:0.00075,up_mbps:20,down_mbps:50,latency_ms:20},"
    "{name:desk,memory_gib:0.0006,speed:0.5,up_mbps:5,down_mbps:20,batch_size:1}]"
)
PLANNED = (
    SITES,
    "federation.num_sites=3",
    "strategy.placement=planned",
    "plan.tflops=0.002",
    "train.local_steps=6",
)

EXACT = ("strategy.outer=average", "strategy.up=fp32", "strategy.down=fp32", "strategy.norm_bound=0")


@pytest.fixture
def planned(small: Compose, tmp_path: Path) -> Path:
    """The directory of a planned run of three rounds."""
    return finished(small, tmp_path, *PLANNED, "train.rounds=3")


def test_the_mean_of_unequal_steps_is_weighted_by_tokens(small: Compose) -> None:
    """A pseudo-gradient of exactly its K everywhere."""
    composed = small(*PLANNED, *EXACT, "train.rounds=1", "train.eval_batches=0")
    steps = FoMoE(composed.config).server.policy.intended(1).steps_M
    assert len(set(steps)) > 1

    def one_a_step(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        assert task.train.local_steps == steps[task.deal.place]
        assert task.lr_stride == 6 / steps[task.deal.place]
        return {
            name: torch.full_like(tensor, float(task.train.local_steps)) for name, tensor in shard.items()
        }

    weight = [3, 1, 2]
    run(composed, answering(one_a_step, examples=lambda task: weight[task.deal.place]))
    before = read_checkpoint(checkpoint_path(composed.run_dir, 1)).parameters["model.norm.weight"]
    moved = sum(w * k for w, k in zip(weight, steps, strict=True)) / 6
    # A norm's weight begins at 1.
    assert torch.allclose(before, torch.full_like(before, 1.0 - moved))


def test_a_planned_run_keeps_to_its_plan(planned: Path) -> None:
    plan = load_plan(planned)
    assert plan is not None
    held = [site.experts_per_layer for site in plan.sites]
    assert held[0] > held[2]
    lines, sites = metrics(planned), load_run(planned).config.federation.sites
    for line in lines[1:]:
        assert line["failures"] == {}
        payload = line["bytes_by_class"]["dense"] + line["bytes_by_class"]["expert"]
        assert payload == sum(site.bytes_down + site.bytes_up for site in plan.sites)  # to the byte
        for site, part, given in zip(line["sites"], plan.sites, sites, strict=True):
            assert site["tokens"] == part.tokens
            # fp32 weights, gradients and moments, and the shard in bf16: 18 bytes a parameter. A CPU measures no more.
            assert site["memory_bytes"] == part.state_bytes
            assert part.memory_bytes <= given.memory_gib * BYTES_A_GIB
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]


@pytest.mark.parametrize("up", ["bf16", *LOSSY])
def test_shares_that_do_not_divide_cost_what_was_planned(small: Compose, tmp_path: Path, up: str) -> None:
    """8 experts x 2 at three sites: 6, 5 and 5; to the byte, whatever an update travels as."""
    folder = finished(
        small,
        tmp_path,
        f"strategy.up={up}",
        "federation.num_sites=3",
        "strategy.overlap=2",
        "train.rounds=1",
        "train.eval_batches=0",
    )
    plan, line = load_plan(folder), metrics(folder)[1]
    assert plan is not None
    assert [site.experts_per_layer for site in plan.sites] == [6, 5, 5]
    payload = line["bytes_by_class"]["dense"] + line["bytes_by_class"]["expert"]
    assert payload == sum(site.bytes_down + site.bytes_up for site in plan.sites)
    assert (plan.sites[0].bytes_up < plan.sites[0].bytes_down) == (up != "bf16")
    assert [site["memory_bytes"] for site in line["sites"]] == [site.state_bytes for site in plan.sites]


@pytest.mark.parametrize(("down", "up"), [("int8", "bf16"), ("int4", "int4"), ("topk", "topk")])
def test_differences_cost_what_was_planned_once_the_sites_hold_what_they_are_of(
    small: Compose, tmp_path: Path, down: str, up: str
) -> None:
    keys = (f"strategy.up={up}", "train.rounds=2", "train.eval_batches=0", "strategy.routing=partitioned")
    if down == "topk":
        keys += ("strategy.outer=average",)
    folder = finished(small, tmp_path, *keys, f"strategy.down={down}")
    plan, lines = load_plan(folder), metrics(folder)[1:]
    assert plan is not None
    payload = [line["bytes_by_class"]["dense"] + line["bytes_by_class"]["expert"] for line in lines]
    assert payload[1] == sum(site.bytes_down + site.bytes_up for site in plan.sites)
    whole = make_plan(small(*keys).config)
    assert payload[0] == sum(site.bytes_down + site.bytes_up for site in whole.sites)
    assert [line["failures"] for line in lines] == [{}] * 2


def test_a_delay_changes_no_payload_and_hides_what_the_steps_are_long_enough_for(
    small: Compose, tmp_path: Path
) -> None:
    folder = finished(
        small,
        tmp_path,
        SITES,
        "federation.num_sites=3",
        "strategy.placement=equal",
        "strategy.overlap=2",
        "strategy.delay=1",
        "train.rounds=3",
    )
    plan, lines, loaded = load_plan(folder), metrics(folder)[1:], load_run(folder)
    assert plan is not None
    for line in lines:
        payload = line["bytes_by_class"]["dense"] + line["bytes_by_class"]["expert"]
        assert payload == sum(site.bytes_down + site.bytes_up for site in plan.sites)
        # fp32 weights, gradients, moments and start; in round 1 the start is the shard, in bf16.
        memory = [site.state_bytes * (18 / 20 if line["round"] == 1 else 1) for site in plan.sites]
        assert [site["memory_bytes"] for site in line["sites"]] == memory
        figures = line["virtual"]["sites"].values()
        for site in figures:
            # Round 1 begins with its message.
            hidden = min(site["compute_s"], site["communication_s"]) if line["round"] > 1 else 0.0
            assert site["hidden_s"] == hidden
        round_s = max(site["compute_s"] + site["communication_s"] - site["hidden_s"] for site in figures)
        assert line["virtual"]["round_s"] == round_s
        assert line["virtual"]["utilisation"] == pytest.approx(
            statistics.mean(site["compute_s"] for site in figures) / round_s
        )
    reality = compare(loaded)
    assert reality is not None
    assert reality.utilisation.planned == plan.utilisation
    assert reality.utilisation.measured == statistics.median(
        line["virtual"]["utilisation"] for line in lines[1:]
    )
    for site, name in zip(reality.sites, ("big", "lab", "desk"), strict=True):
        clocks = [line["virtual"]["sites"][name] for line in lines[1:]]
        assert site.round_s.measured == pytest.approx(
            statistics.median(max(clock["compute_s"], clock["communication_s"]) for clock in clocks)
        )


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy.fragments=2",),
        ("strategy.fragments=3", "strategy.down=int8", "strategy.up=topk", "strategy.routing=partitioned"),
        ("strategy.fragments=2", "strategy.down=int4", "strategy.placement=random", "strategy.reshuffle_every=3"),
        ("strategy.overlap=1", "strategy.sole_every=2", "strategy.delay=1"),
        ("strategy.overlap=1", "strategy.fragments=2", "strategy.sole_every=2"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_parts_in_turn_cost_what_was_planned_in_every_round(
    small: Compose, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """To the byte, for each site. Its plan has the mean of a round, but for the first and the last."""
    keys = (
        "federation.num_sites=4",
        "model.num_layers=3",
        "train.rounds=9",
        "train.eval_batches=0",
        *overrides,
    )
    folder = finished(small, tmp_path, *keys)
    config, plan, lines = small(*keys).config, load_plan(folder), metrics(folder)[1:]
    assert plan is not None
    policy = POLICIES[config.strategy.placement](config)

    def placement(round_: int) -> Placement:
        return policy.intended(round_).placement

    payload = []
    for line in lines:
        assert line["failures"] == {}
        payload.append(line["bytes_by_class"]["dense"] + line["bytes_by_class"]["expert"])
        assert payload[-1] == sum(map(sum, round_bytes(config, line["round"], placement)))
    memory = [site["memory_bytes"] for line in lines for site in line["sites"]]
    assert max(memory) <= plan.sites[0].state_bytes < 1.3 * max(memory)
    reality = compare(load_run(folder))
    assert reality is not None
    assert reality.payload_bytes.planned == payload[-1] == reality.payload_bytes.measured
    if config.strategy.placement == "fixed":
        cycle = config.strategy.fragments * config.strategy.sole_every
        planned = sum(site.bytes_down + site.bytes_up for site in plan.sites)
        assert statistics.mean(payload[1 : 1 + cycle]) == pytest.approx(planned, abs=8)
        peak = peak_bytes(config, [site.experts_per_layer for site in plan.sites])
        assert max(payload[1 : 1 + cycle]) == peak < payload[0] + payload[-1]
        held = [site.experts_per_layer for site in plan.sites]
        assert edge_bytes(config, held) == (payload[0], payload[-1])
        # Whole turns between the first and the last make their mean exact.
        assert run_bytes(config, held, planned) == pytest.approx(
            sum(payload), rel=(7 % cycle != 0) * 0.1 + 1e-6
        )


def test_the_virtual_clock_charges_speed_and_link(planned: Path) -> None:
    line = metrics(planned)[1]
    virtual, sites = line["virtual"], {site["site"]: site for site in line["sites"]}
    speed = {"big": 4.0, "lab": 1.0, "desk": 0.5}
    for name, figures in virtual["sites"].items():
        site = sites[name]
        assert figures["compute_s"] == pytest.approx(site["tokens"] / site["tokens_per_second"] / speed[name])
    lab = sites["lab"]
    by_hand = lab["bytes_down"] * 8 / 50e6 + lab["bytes_up"] * 8 / 20e6 + 2 * 0.02
    assert virtual["sites"]["lab"]["communication_s"] == pytest.approx(by_hand)
    done = {n: f["compute_s"] + f["communication_s"] for n, f in virtual["sites"].items()}
    assert virtual["round_s"] == max(done.values()) == done[virtual["slowest"]]
    assert virtual["sites"][virtual["slowest"]]["waited_s"] == 0


def test_the_report_sets_planned_beside_measured(planned: Path) -> None:
    loaded = load_run(planned)
    reality = compare(loaded)
    assert reality is not None
    assert reality.payload_bytes.planned == reality.payload_bytes.measured
    assert all(site.memory_bytes.planned == site.memory_bytes.measured for site in reality.sites)
    # The first round, in which sites get ready, does not count.
    assert reality.round_s.measured == statistics.median(
        line.virtual["round_s"] for line in loaded.rounds[-2:]
    )
    said = " ".join(notes(loaded, reality))
    assert "plan.tflops=0.002" in said  # which no machine's speed is
    assert "memory" not in said


def test_speeds_of_a_run_make_the_next_plan(small: Compose, planned: Path) -> None:
    again = small(*PLANNED, f"plan.measured={planned}").config
    cost = token_cost(again)
    lines = metrics(planned)[1:]
    for index, given in enumerate(again.federation.sites):
        # A very small model on a busy machine, where one round may take ten times another: the order of magnitude,
        # which the modelled cost misses by far.
        off = [
            cost.seconds(again.model, "skip", 8, site["resident_share"]) * site["tokens_per_second"]
            for site in (line["sites"][index] for line in lines)
        ]
        assert any(0.2 < factor < 5 for factor in off), off
        assert given.speed
    with pytest.raises(ConfigError, match=r"plan\.measured=.*model\.num_experts is 8, here it is 16"):
        token_cost(small(*PLANNED, f"plan.measured={planned}", "model.num_experts=16").config)


def test_a_resumed_run_keeps_its_plan_even_if_what_it_was_measured_by_is_gone(
    small: Compose, tmp_path: Path, planned: Path
) -> None:
    measured = copy_of(planned)
    settings = (*PLANNED, f"plan.measured={measured}")
    whole = run(composed_anew(small, tmp_path, *settings, "train.rounds=2"))
    parts = run(composed_anew(small, tmp_path, *settings, "train.rounds=1"))
    for file in measured.glob("*.jsonl"):
        file.unlink()
    run(compose_run([f"resume={parts}", "train.rounds=2"]))
    assert without_times(metrics(parts))[1:] == without_times(metrics(whole))[1:]


def test_a_run_says_that_its_plan_is_off_and_plans_anew_when_it_is_asked_to(
    small: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By itself it does not: shares that went by the clock would differ between two equal runs."""
    settings = [item for item in PLANNED if not item.startswith("plan.tflops")]  # an H100
    folder = run(composed_anew(small, tmp_path, *settings, "train.rounds=2"))
    (said,) = [text for text in caplog.messages if "what was planned from" in text]
    assert said.startswith("round 1: steps take ")
    assert said.endswith(f"resume={folder} plan.measured={folder} plans the rest of the run anew")
    before = load_plan(folder)
    assert before is not None
    run(compose_run([f"resume={folder}", f"plan.measured={folder}", "train.rounds=3"]))
    after = load_plan(folder)
    assert after is not None
    assert before.token_cost_s is not None
    assert after.token_cost_s is not None
    assert after.token_cost_s["dense_s"] > 100 * before.token_cost_s["dense_s"]
    shares = [[(site.experts_per_layer, site.local_steps) for site in plan.sites] for plan in (before, after)]
    assert shares[0] != shares[1]
    kept = read_checkpoint(checkpoint_path(folder, 3)).manifest["memory"]["plan"]["plan"]
    assert kept["token_cost_s"] == after.token_cost_s


def test_another_request_makes_another_plan(small: Compose, tmp_path: Path) -> None:
    config = small(*PLANNED).config
    before = plan_for_run(tmp_path, config)
    assert plan_for_run(tmp_path, config) == before
    config.train.local_steps = 12
    assert plan_for_run(tmp_path, config) != before
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(RunError, match=r"plan\.json: damaged"):
        load_plan(tmp_path)


def test_plan_json_says_what_it_rests_on(small: Compose, tmp_path: Path) -> None:
    plan_for_run(tmp_path, small(*PLANNED).config)
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["token_cost_s"]["dense_s"] > 0
    assert math.isclose(content["request"]["plan"]["tflops"], 0.002)


class BigReturns(LocalGrid):
    """The first node is away in rounds 3 and 4; when it is back, the plan has no part for it yet."""

    gone = False

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        rounds = {message.metadata.group_id for message in messages} & {"1", "2", "3", "4", "5"}
        if rounds:
            self.gone = rounds <= {"2", "3"}
        return ids

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if not (self.gone and node == 100)]


def test_when_a_site_leaves_the_others_take_its_experts(small: Compose) -> None:
    """And a site without a part in the round is not asked to evaluate."""
    sites = SITES.replace("0.0007", "0.002").replace("0.0005", "0.002")
    composed = small(
        *PLANNED, sites, "train.rounds=5", "plan.skip_price=0", "checkpoint.keep=5", "strategy.fraction_evaluate=1.0"
    )  # fmt: skip
    run(composed, grid_type=BigReturns)
    lines = metrics(composed.run_dir)
    assert [len(line["sites"]) for line in lines[1:]] == [3, 3, 2, 2, 2]
    assert all("val_loss" in site for line in lines[3:] for site in line["sites"])
    assert lines[-1]["failures"] == {}
    assert lines[-1]["committed"]
    assert lines[-1]["experts"]["num_orphaned"] == 0
    ledger = json.loads((composed.run_dir / "experts.json").read_text())
    assert np.array(ledger["rounds_since_update"]).max() == 0  # all experts learn again
    before, after = (
        read_checkpoint(checkpoint_path(composed.run_dir, number)).manifest["placement"] for number in (2, 5)
    )
    assert before["big"][0]
    assert not any(after["big"])
    assert {expert for name in ("lab", "desk") for expert in after[name][0]} == set(range(8))
