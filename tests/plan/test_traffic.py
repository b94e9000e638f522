"""The traffic formula against arithmetic by hand and against the shapes that really travel."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest

from fomoe_flwr.compose import compose
from fomoe_flwr.config import ModelConfig, RunConfig
from fomoe_flwr.model.spec import parameter_shapes
from fomoe_flwr.placement import draw_placement
from fomoe_flwr.plan.traffic import compare_strategies, copies_sent, round_bytes, shard_parameters

# d = 8, two layers of four experts of width 16, vocabulary 10:
#   dense   embedding 10·8 = 80, two outer norms 16, and per layer attention 4·64 = 256, norms 4·8 = 32:
#           80 + 16 + 2·288 = 672
#   router  8 a row, 4·8 = 32 a layer: 64
#   expert  up and down 2·8·16 = 256
MODEL = ModelConfig(vocab_size=10, d_model=8, num_layers=2, num_heads=1, num_experts=4, d_expert=16)


@cache
def config(*overrides: str) -> RunConfig:
    return compose(overrides).config


def test_skip_mode_sends_the_whole_router() -> None:
    # two experts a layer: 672 + 64 + 2·2·256 = 1760 numbers, times 2 bytes, times down and up
    assert shard_parameters(MODEL, "skip", 2) == 1760
    assert round_bytes(MODEL, "skip", 2, bytes_per_number=2, copies=1) == 7040


def test_partitioned_mode_sends_the_residents_rows() -> None:
    # 672 + 2·2·(256 + 8) = 1728 numbers
    assert shard_parameters(MODEL, "partitioned", 2) == 1728
    assert round_bytes(MODEL, "partitioned", 2, bytes_per_number=4, copies=1) == 13824


def test_local_adamw_sends_three_times_as_much() -> None:
    assert round_bytes(MODEL, "skip", 2, bytes_per_number=2, copies=3) == 21120
    assert copies_sent(config("strategy.outer=local_adamw").strategy) == 3
    assert {copies_sent(config(f"strategy.outer={outer}").strategy) for outer in ("nesterov", "average")} == {
        1
    }


def test_a_full_replica_is_the_same_in_both_modes() -> None:
    # 672 + 64 + 8·256 = 2784
    assert shard_parameters(MODEL, "skip", 4) == shard_parameters(MODEL, "partitioned", 4) == 2784


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
@pytest.mark.parametrize(
    "model", [MODEL, ModelConfig(num_shared_experts=1)], ids=["by hand", "tiny, shared expert"]
)
def test_the_formula_counts_the_shard_that_travels(model: ModelConfig, routing: str) -> None:
    residents = draw_placement(4, model.num_experts, 2, model.num_layers, seed=0).residents(1)
    shapes = parameter_shapes(model, residents, routing).values()
    assert shard_parameters(model, routing, model.num_experts / 2) == sum(
        math.prod(shape) for shape in shapes
    )


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
    doubled = compare_strategies(config("strategy=local_adamw", "strategy.wire_dtype=fp32"))
    assert [row.site_bytes for row in doubled[:2]] == [2 * this_run.site_bytes, 2 * diloco.site_bytes]
