"""What a site holds and sends, against arithmetic by hand and against the shapes that really travel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.compose import compose
from fomoe_flwr.config import ModelConfig, RunConfig
from fomoe_flwr.model.spec import parameter_shapes
from fomoe_flwr.placement import draw_placement
from fomoe_flwr.plan.memory import state_bytes
from fomoe_flwr.plan.system import (
    Measured,
    PlanSite,
    down_bytes,
    held_parameters,
    peak_bytes,
    plan_sites,
    split_parameters,
    up_bytes,
    virtual_round,
)

# d = 8, two layers of four experts of width 16, vocabulary 10:
#   dense   embedding 10·8 = 80, two outer norms 16, and per layer attention 4·64 = 256, norms 4·8 = 32:
#           80 + 16 + 2·288 = 672
#   router  8 a row, 4·8 = 32 a layer: 64
#   expert  up and down 2·8·16 = 256
SIZES = ("vocab_size=10", "d_model=8", "num_layers=2", "num_heads=1", "num_experts=4", "d_expert=16")


@cache
def config(*overrides: str) -> RunConfig:
    return compose([*(f"model.{size}" for size in SIZES), *overrides]).config


@pytest.mark.parametrize(
    ("residents", "routing", "numbers"),
    [
        (2, "skip", 672 + 64 + 2 * 2 * 256),  # the whole router
        (2, "partitioned", 672 + 2 * 2 * (256 + 8)),  # the residents' rows of it
        (4, "skip", 672 + 64 + 8 * 256),
        (4, "partitioned", 672 + 64 + 8 * 256),
    ],
)
def test_a_shard_by_hand(residents: int, routing: str, numbers: int) -> None:
    made = config(f"strategy.routing={routing}", "plan.bytes_per_parameter=3")
    assert held_parameters(made, residents) == numbers
    assert state_bytes(made, residents) == 3 * numbers
    assert down_bytes(made, residents) == up_bytes(made, residents) == 2 * numbers
    wide = config(
        f"strategy.routing={routing}", "strategy.up=fp32", "strategy.down=fp32", "strategy.outer=local_adamw"
    )
    assert down_bytes(wide, residents) == up_bytes(wide, residents) == 3 * 4 * numbers


@pytest.mark.parametrize("routing", ["skip", "partitioned"])
@pytest.mark.parametrize(
    "model", [ModelConfig(), ModelConfig(num_shared_experts=1), ModelConfig(num_experts=6, num_layers=3)]
)
def test_the_formula_counts_the_shard_that_travels(model: ModelConfig, routing: str) -> None:
    residents = draw_placement(4, model.num_experts, 2, model.num_layers, seed=0).residents(1)
    shapes = parameter_shapes(model, residents, routing).values()
    held = split_parameters(model, routing).held(sum(len(layer) for layer in residents))
    assert held == sum(math.prod(shape) for shape in shapes)


def test_links_that_are_not_given_are_assumed_and_none_is_faster_than_its_share_of_the_servers() -> None:
    sites = plan_sites(config("federation=hetero", "plan.server_mbps=100", "plan.assumed_latency_ms=7"))
    assert {site.down_bytes_per_s for site in sites} == {25e6 / 8}
    bare = plan_sites(config("plan.assumed_mbps=8", "plan.assumed_latency_ms=7"))
    assert {(site.up_bytes_per_s, site.latency_s, site.memory_bytes) for site in bare} == {
        (1e6, 0.007, math.inf)
    }


def test_the_virtual_clock_by_hand() -> None:
    fast = PlanSite("fast", math.inf, 2.0, 100.0, 50.0, 0.5, 8, 80)
    slow = PlanSite("slow", math.inf, 1.0, 10.0, 10.0, 0.0, 8, 80)
    clock = virtual_round([fast, slow], {0: Measured(4.0, 200, 100), 1: Measured(4.0, 20, 10)})
    spent = {"hidden_s": 0.0, "waited_s": 0.0}
    assert clock["sites"]["fast"] == {"compute_s": 2.0, "communication_s": 5.0, **spent}
    assert clock["sites"]["slow"] == {"compute_s": 4.0, "communication_s": 3.0, **spent}
    assert (clock["round_s"], clock["slowest"]) == (7.0, "fast")
    assert clock["utilisation"] == 3 / 7


def test_who_went_ahead_takes_the_longer_of_compute_and_link() -> None:
    """By hand: 2 and 5 s at one site, 4 and 3 at the other, which in the second case began with its message."""
    sites = [
        PlanSite("fast", math.inf, 2.0, 100.0, 50.0, 0.5, 8, 80),
        PlanSite("slow", math.inf, 1.0, 10.0, 10.0, 0.0, 8, 80),
    ]
    work = {0: Measured(4.0, 200, 100, ahead=True), 1: Measured(4.0, 20, 10, ahead=True)}
    clock = virtual_round(sites, work)
    assert clock["sites"]["fast"] == {
        "compute_s": 2.0,
        "communication_s": 5.0,
        "hidden_s": 2.0,
        "waited_s": 0.0,
    }
    assert clock["sites"]["slow"] == {
        "compute_s": 4.0,
        "communication_s": 3.0,
        "hidden_s": 3.0,
        "waited_s": 1.0,
    }
    assert (clock["round_s"], clock["slowest"], clock["utilisation"]) == (5.0, "fast", 3 / 5)
    clock = virtual_round(sites, work | {1: Measured(4.0, 20, 10)})
    assert (clock["round_s"], clock["slowest"], clock["utilisation"]) == (7.0, "slow", 3 / 7)
    assert clock["sites"]["slow"]["hidden_s"] == 0.0
    assert clock["sites"]["fast"]["waited_s"] == 2.0


def last_reply_s(spans: Sequence[tuple[float, float, float]], rounds: int) -> float:
    """When the last reply of a run with strategy.delay=1 is in, event by event; spans of each site: down, compute, up.

    A site has done round r when its steps are taken and message r is there. Then its reply leaves and it begins round
    r+1. Message r+1 leaves when all replies of round r are in.
    """
    done_s = [down for down, _, _ in spans]  # where round 1 begins
    leaves_s = 0.0
    for _ in range(rounds):
        done_s = [
            max(begun + compute, leaves_s + down)
            for begun, (down, compute, _) in zip(done_s, spans, strict=True)
        ]
        leaves_s = max(done + up for done, (_, _, up) in zip(done_s, spans, strict=True))
    return leaves_s


@given(st.lists(st.tuples(*[st.floats(0.01, 9)] * 3), min_size=1, max_size=4), st.integers(1, 50))
def test_the_virtual_rounds_add_up_to_the_run(spans: list[tuple[float, float, float]], rounds: int) -> None:
    """To the second for a single site; sites that wait for each other gain or lose a part of one round in all."""
    sites = [PlanSite(str(index), math.inf, 1.0, 1.0, 1.0, 0.0, 8, 80) for index in range(len(spans))]

    def round_s(ahead: bool) -> float:
        work = {i: Measured(compute, down, up, ahead) for i, (down, compute, up) in enumerate(spans)}
        return virtual_round(sites, work)["round_s"]

    total_s = round_s(False) + (rounds - 1) * round_s(True)
    once_s = sum(max(span[part] for span in spans) for part in range(3))
    assert last_reply_s(spans, rounds) == pytest.approx(total_s, abs=1e-9 if len(spans) == 1 else 2 * once_s)


def test_a_turn_by_hand() -> None:
    """Each fragment has a layer, 288 + 32 dense; of the rest one has the embedding and the other both norms."""
    made = config("strategy.fragments=2", "strategy.sole_every=3", "strategy.overlap=1")
    first, second = 288 + 32 + 80, 288 + 32 + 16
    expert = 256
    assert up_bytes(made, 2) == 2 * (first + second + 2 * 2 * expert / 3) / 2
    assert peak_bytes(made, [2]) == 2 * (first + second + 2 * 2 * expert)
    shared = config("strategy.fragments=2", "strategy.overlap=2")
    assert up_bytes(shared, 2) == first + second + 2 * 2 * expert
