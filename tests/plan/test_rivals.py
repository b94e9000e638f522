"""The rows side by side: each against arithmetic by hand, and against planning that strategy as the run itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.placement import check_overlap
from fomoe_flwr.plan.planner import make_plan
from fomoe_flwr.plan.rivals import (
    Row,
    compare,
    compare_strategies,
    fomoe_overlap,
    possible_overlaps,
    some,
    too_small,
)
from fomoe_flwr.plan.system import modelled_cost, plan_sites

HETERO = ("federation=hetero", "plan.tflops=0.05")
NAMES = [
    "DDP",
    "full-replica DiLoCo",
    "LocalAdamW",
    "FoMoE, equal, partitioned",
    "FoMoE, equal, skip",
    "FoMoE, planned, skip",
]


@cache
def config(*overrides: str) -> RunConfig:
    return compose(overrides).config


@cache
def rows(*overrides: str) -> list[Row]:
    run = config(*overrides)
    return compare(run, make_plan(run), plan_sites(run))


def row(name: str, *overrides: str) -> Row:
    return next(row for row in rows(*overrides) if row.name == name)


def test_who_holds_every_expert_has_no_stand_ins() -> None:
    """Nor has who chooses among residents; a run with stand-ins is held against them as they would be."""
    more = {
        name: row(name, "model.standins=8").bytes_per_round != row(name).bytes_per_round for name in NAMES
    }
    assert more == {name: name.endswith(", skip") for name in NAMES}
    ours, *plain = compare_strategies(config())
    mine, *others = compare_strategies(config("model.standins=8"))
    assert mine.site_bytes > ours.site_bytes
    assert [other.site_bytes for other in others] == [other.site_bytes for other in plain]


def test_who_exchanges_gradients_or_moments_waits_for_them() -> None:
    """With strategy.delay=1, which the others take over from the run."""
    faster = {}
    for name in NAMES:
        waits, delayed = (row(name, *HETERO, f"strategy.delay={delay}").plan for delay in (0, 1))
        assert waits is not None
        assert delayed is not None
        faster[name] = delayed.tokens_per_second > waits.tokens_per_second
    assert faster == {name: name not in ("DDP", "LocalAdamW") for name in NAMES}


def test_ddp_is_k_exchanges_of_everything_each_waiting_for_the_slowest() -> None:
    # tiny has 2,403,584 parameters, 4,807,168 bytes in bf16. The workstation's links are 100 and 50 Mbit/s with 50 ms
    # each way, its speed is a half; 8 x 256 tokens a step.
    exchange_s = 4_807_168 * 8 / 100e6 + 4_807_168 * 8 / 50e6 + 2 * 0.05
    step_s = sum(modelled_cost(config(*HETERO))) * 8 * 256 / 0.5
    ddp = row("DDP", *HETERO)
    assert ddp.plan is not None
    assert ddp.plan.round_s == pytest.approx(20 * (exchange_s + step_s))
    assert ddp.bytes_per_round == 20 * 2 * 4_807_168
    # Weights, gradients and the shard in bf16: who sends gradients has no moments.
    assert {site.state_bytes for site in ddp.plan.sites} == {10 * 2_403_584}
    assert ddp.plan.tokens == 4 * 20 * 8 * 256
    assert ddp.plan.tokens_per_second == pytest.approx(ddp.plan.tokens / ddp.plan.round_s)
    assert [site.local_steps for site in ddp.plan.sites] == [20] * 4


def test_a_replica_is_too_much_for_three_of_the_four() -> None:
    # 43.3 MB of state, 106 MB at the peak of a step; 0.12, 0.0905, 0.0905 and 0.085 GiB are 129, 97, 97 and 91 MB
    assert row("full-replica DiLoCo", *HETERO).too_small == ("lab-0", "lab-1", "workstation")
    assert row("FoMoE, equal, skip", *HETERO).too_small == ()


def test_all_six_are_there_in_one_order() -> None:
    assert [row.name for row in rows(*HETERO)] == NAMES


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (("strategy=ddp",), "DDP"),
        (("strategy=diloco",), "full-replica DiLoCo"),
        (("strategy=diloco", "strategy.routing=partitioned"), "full-replica DiLoCo"),
        (("strategy=fomoe", "strategy.overlap=4"), "full-replica DiLoCo"),
        (("strategy=local_adamw",), "LocalAdamW"),
        (("strategy.routing=partitioned",), "FoMoE, equal, partitioned"),
        ((), "FoMoE, equal, skip"),
        (("strategy.placement=random",), "FoMoE, equal, skip"),
        (("strategy.overlap=1",), "FoMoE, equal, skip"),
        (("strategy.placement=planned",), "FoMoE, planned, skip"),
        (("strategy.placement=planned", "strategy.routing=partitioned"), "FoMoE, planned, partitioned"),
        (("strategy.outer=local_adamw",), "FoMoE, equal, skip, LocalAdamW"),
        (("strategy=fedavg",), "this run: fedavg"),
        (("strategy=ddp", "train.local_steps=3"), "this run: ddp"),
        (("strategy.placement=memory",), "this run: fomoe, memory placement"),
        (("strategy.placement=equal",), "FoMoE, equal, skip"),
    ],
)
def test_this_run_is_marked_once_and_has_its_own_plan(overrides: tuple[str, ...], name: str) -> None:
    marked = [row for row in rows(*HETERO, *overrides) if row.this_run]
    assert [row.name for row in marked] == [name]
    assert marked[0].plan == make_plan(config(*HETERO, *overrides))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("full-replica DiLoCo", ("strategy=diloco",)),
        ("LocalAdamW", ("strategy=local_adamw",)),
        ("FoMoE, equal, partitioned", ("strategy.routing=partitioned",)),
        ("FoMoE, planned, skip", ("strategy.placement=planned",)),
    ],
)
def test_each_rival_costs_what_it_would_cost_as_the_run(name: str, overrides: tuple[str, ...]) -> None:
    assert row(name, *HETERO).plan == make_plan(config(*HETERO, *overrides))


def test_the_planned_round_does_as_much_useful_work_in_less_time() -> None:
    equal, planned = row("FoMoE, equal, skip", *HETERO).plan, row("FoMoE, planned, skip", *HETERO).plan
    assert equal is not None
    assert planned is not None
    assert planned.round_s < equal.round_s / 3
    useful = [plan.useful_tokens_per_second * plan.round_s for plan in (equal, planned)]
    assert useful[1] == pytest.approx(useful[0], rel=0.05)
    assert useful[1] >= useful[0] * (1 - 1e-9)


def test_the_possible_overlaps_are_those_that_placement_takes() -> None:
    for num_sites in range(1, 13):
        for num_experts in (1, 4, 6, 16):
            possible = []
            for overlap in range(1, num_sites + 1):
                try:
                    check_overlap(num_sites, num_experts, overlap)
                except ConfigError:
                    continue
                possible.append(overlap)
            assert possible_overlaps(num_sites, num_experts) == possible


@pytest.mark.parametrize(
    ("overrides", "overlap"),
    [
        (("strategy.overlap=1",), 1),
        (("strategy=diloco",), 2),  # half of the sites
        (("strategy=diloco", "federation.num_sites=6"), 3),
        (("strategy=diloco", "federation.num_sites=12"), 6),
        # 16 experts x 5 do not divide by 12
        (("strategy.placement=planned", "strategy.overlap=5", "federation.num_sites=12"), 5),
        (("strategy.placement=planned", "strategy.overlap=1", "federation.num_sites=20"), 2),  # one for each
        (("federation.num_sites=1", "strategy.overlap=1"), 1),
    ],
)
def test_the_overlap_of_equal_shares(overrides: tuple[str, ...], overlap: int) -> None:
    assert fomoe_overlap(config(*overrides)) == overlap


def test_what_cannot_be_keeps_its_row_and_says_why() -> None:
    made = rows("strategy=diloco", "federation.num_sites=7", "model.num_experts=1", "model.top_k=1")
    impossible = [row for row in made if row.plan is None]
    assert [row.name for row in impossible] == ["FoMoE, equal, partitioned", "FoMoE, equal, skip"]
    assert all("overlap must be at least 7" in row.reason for row in impossible)
    assert {(row.bytes_per_round, row.memory_bytes) for row in impossible} == {(None, None)}
    assert made[-1].plan is not None


def test_a_planned_run_with_an_overlap_that_does_not_divide() -> None:
    overrides = ("strategy.placement=planned", "strategy.overlap=5", "federation.num_sites=12")
    made = {row.name: row for row in rows(*overrides)}
    assert {name: row.overlap for name, row in made.items()} == dict(
        zip(NAMES, (12, 12, 12, 5, 5, 5), strict=True)
    )
    equal = made["FoMoE, equal, skip"].plan  # 80 copies: 7 at the first eight, 6 at the last four
    assert equal is not None
    assert [site.experts_per_layer for site in equal.sites] == [7] * 8 + [6] * 4


def test_a_planned_run_fits_everywhere() -> None:
    run = config(*HETERO, "strategy.placement=planned")
    assert too_small(make_plan(run), plan_sites(run)) == ()


def test_names_in_a_sentence() -> None:
    assert some(["a"]) == "a"
    assert some(["a", "b"]) == "a and b"
    assert some(["a", "b", "c"]) == "a and 2 more"


# ----- bytes by formula


def test_comparison_by_hand() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 10,
        "d_model": 8,
        "num_layers": 2,
        "num_heads": 1,
        "num_experts": 4,
    }
    overrides = [f"model.{key}={value}" for key, value in sizes.items()] + ["model.d_expert=16"]
    steps = ["train.local_steps=5", "train.batch_size=2", "train.seq_len=16"]  # 160 tokens a site and round
    this_run, diloco, ddp = compare_strategies(config(*overrides, *steps, "strategy.overlap=2"))
    assert this_run == ("this run", 7040, 44, 1, pytest.approx(1760 / 2784))
    assert diloco == ("full-replica DiLoCo", 11136, pytest.approx(69.6), pytest.approx(2784 / 1760), 1)
    assert ddp == ("DDP", 55680, 348, pytest.approx(5 * 2784 / 1760), 1)


def test_the_papers_headline_of_45_times_fewer_bytes_than_ddp_is_k_times_the_replica() -> None:
    _, diloco, ddp = compare_strategies(config("model=large", "strategy.overlap=1", "train.local_steps=32"))
    assert ddp.ratio == pytest.approx(32 * diloco.ratio)


def test_each_rival_run_as_this_run_costs_what_the_formula_says_of_it() -> None:
    fomoe = compare_strategies(config("train.local_steps=7"))
    as_diloco = compare_strategies(config("strategy=diloco", "train.local_steps=7"))
    as_ddp = compare_strategies(config("strategy=ddp"))
    assert as_diloco[0].site_bytes == fomoe[1].site_bytes
    assert as_ddp[0].site_bytes * 7 == fomoe[2].site_bytes
    assert as_diloco[0].model_share == as_diloco[0].ratio == 1
    assert {row.site_bytes for row in as_ddp} == {as_diloco[0].site_bytes}


def test_local_adamw_on_a_full_replica_sends_three_times_diloco_and_fp32_doubles_all() -> None:
    this_run, diloco, _ = compare_strategies(config("strategy=local_adamw"))
    assert this_run.site_bytes == 3 * diloco.site_bytes
    doubled = compare_strategies(config("strategy=local_adamw", "strategy.up=fp32", "strategy.down=fp32"))
    assert [row.site_bytes for row in doubled[:2]] == [2 * this_run.site_bytes, 2 * diloco.site_bytes]
