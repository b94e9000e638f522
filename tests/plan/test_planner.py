"""Plans of whole federations: feasible, never worse than equal shares, and refused in one line where there is none."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig, SiteConfig
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.plan.planner import clock_note, make_plan, plan_for_run, plan_placement, replan
from fomoe_flwr.plan.record import Plan
from fomoe_flwr.plan.rivals import with_strategy
from fomoe_flwr.plan.system import BYTES_A_GIB, held_share, split_parameters
from tests.report.runs import write_run

SLOW = "plan.tflops=0.05"  # a laptop's, so that tiny models compute as long as they communicate


@cache
def _composed(*overrides: str) -> RunConfig:
    return compose([SLOW, *overrides]).config


def config(*overrides: str) -> RunConfig:
    return copy.deepcopy(_composed(*overrides))


PLANNED = ("federation=hetero", "strategy.placement=planned")


@pytest.mark.parametrize(
    ("overrides", "hides"),
    [
        ((), True),
        (("strategy.placement=random", "strategy.reshuffle_every=2"), True),
        # Experts that are new to a site come with the message.
        (("strategy.placement=random",), False),
        (("strategy.placement=random", "strategy.overlap=null"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_with_a_delay_a_site_is_done_after_the_longer_of_compute_and_link(
    overrides: tuple[str, ...], hides: bool
) -> None:
    waits, delayed = (
        make_plan(config("federation=hetero", *overrides, f"strategy.delay={delay}")) for delay in (0, 1)
    )
    for before, after in zip(waits.sites, delayed.sites, strict=True):
        assert (after.compute_s, after.communication_s) == pytest.approx(
            (before.compute_s, before.communication_s)
        )
        assert before.hidden_s == 0.0
        assert after.hidden_s == (
            pytest.approx(min(before.compute_s, before.communication_s)) if hides else 0.0
        )
        assert after.round_s == pytest.approx(before.round_s - after.hidden_s)
        assert after.state_bytes == pytest.approx(before.state_bytes * 20 / 18)
    for plan in (waits, delayed):
        computing = [site.compute_s for site in plan.sites]
        assert plan.utilisation == pytest.approx(
            sum(computing) / 4 / max(site.round_s for site in plan.sites)
        )
    assert (delayed.utilisation > waits.utilisation) == hides


def test_a_planned_round_with_a_delay_lets_slow_links_take_more_steps() -> None:
    links = ("plan.assumed_mbps=3", "federation.num_sites=4", "strategy.placement=planned")
    waits, delayed = (make_plan(config(*links, f"strategy.delay={delay}")) for delay in (0, 1))
    assert delayed.useful_tokens_per_second > 1.2 * waits.useful_tokens_per_second


@st.composite
def federations(draw: st.DrawFn) -> RunConfig:
    """Three to six sites that differ in everything, on four layers of 16 experts."""
    sites = [
        SiteConfig(
            name=f"site-{index}",
            memory_gib=draw(st.sampled_from([None, 0.077, 0.083, 0.09, 0.12])),
            up_mbps=draw(st.sampled_from([None, 10, 100, 1000])),
            down_mbps=draw(st.sampled_from([None, 50, 500])),
            latency_ms=draw(st.sampled_from([None, 0, 100])),
            speed=draw(st.sampled_from([0.25, 1.0, 4.0])),
            batch_size=draw(st.sampled_from([None, 4, 16])),
        )
        for index in range(draw(st.integers(3, 6)))
    ]
    made = config("federation.num_sites=2", "strategy.placement=planned")
    made.plan.holders = draw(st.integers(1, 2))
    made.plan.skip_price = draw(st.sampled_from([0.0, 0.5, 1.0]))
    made.strategy.routing = draw(st.sampled_from(["skip", "partitioned"]))
    made.federation.sites, made.federation.num_sites = sites, len(sites)
    return made


def plan_or_reason(made: RunConfig) -> Plan | str:
    try:
        return make_plan(made)
    except ConfigError as error:
        return str(error)


@settings(max_examples=40, deadline=None)
@given(federations())
def test_every_plan_is_feasible_or_says_what_is_not(made: RunConfig) -> None:
    plan = plan_or_reason(made)
    if isinstance(plan, str):
        assert "plan." in plan or "memory_gib" in plan
        return
    for site, planned in zip(made.federation.sites, plan.sites, strict=True):
        if site.memory_gib is not None:
            assert planned.memory_bytes <= site.memory_gib * BYTES_A_GIB
        assert 1 <= planned.local_steps <= made.plan.max_steps_ratio * made.train.local_steps
        assert planned.tokens == planned.local_steps * planned.batch_size * made.train.seq_len
        assert planned.round_s <= plan.round_s * (1 + 1e-12)
    placement = plan_placement(made, plan)
    assert placement.holds_LEM.sum(axis=2).min() >= made.plan.holders
    held_M = [site.experts_per_layer for site in plan.sites]
    assert (placement.holds_LEM.sum(axis=1) == held_M).all()


@settings(max_examples=40, deadline=None)
@given(federations())
def test_never_worse_than_equal_overlap(made: RunConfig) -> None:
    """Where equal shares fit into every site's memory and cover the holders, the solver could have chosen them."""
    num_sites = len(made.federation.sites)
    made.strategy.overlap = 2 if 16 * 2 % num_sites == 0 else num_sites
    made.plan.holders = min(made.plan.holders, made.overlap)
    try:
        equal = make_plan(with_strategy(made, placement="equal"))
        fits = all(
            site.memory_gib is None or planned.memory_bytes <= site.memory_gib * BYTES_A_GIB
            for site, planned in zip(made.federation.sites, equal.sites, strict=True)
        )
        if not fits:
            return
    except ConfigError:
        return  # not even one expert fits somewhere
    best = make_plan(made)
    assert best.useful_tokens_per_second >= equal.useful_tokens_per_second * (1 - 1e-9)


def test_hetero_beats_equal_shares_by_letting_nobody_wait() -> None:
    made = config(*PLANNED)
    planned, equal = make_plan(made), make_plan(with_strategy(made, placement="equal"))
    assert planned.tokens_per_second > 2 * equal.tokens_per_second
    assert min(site.round_s for site in planned.sites) > 0.85 * planned.round_s
    assert min(site.round_s for site in equal.sites) < 0.2 * equal.round_s


def test_bytes_are_those_of_the_tensors() -> None:
    made = config(*PLANNED, "strategy.outer=local_adamw", "strategy.up=fp32", "strategy.down=fp32")
    split = split_parameters(made.model, "skip")
    for site in make_plan(made).sites:
        held = split.held(made.model.num_layers * site.experts_per_layer)
        assert site.bytes_down == site.bytes_up == 3 * 4 * held


def test_memory_policy_gives_more_to_those_with_more() -> None:
    made = config(*PLANNED, "strategy.placement=memory")
    held = [site.experts_per_layer for site in make_plan(made).sites]
    assert held[0] > held[1] == held[2] > held[3]
    assert sum(held) >= 16 * made.overlap


def test_the_affine_policy_begins_with_equal_shares() -> None:
    equal, affine = (config(*PLANNED[1:], f"strategy.placement={policy}") for policy in ("equal", "affine"))
    plans = [make_plan(made) for made in (equal, affine)]
    assert plans[0].sites == plans[1].sites
    np.testing.assert_array_equal(
        plan_placement(equal, plans[0]).holds_LEM, plan_placement(affine, plans[1]).holds_LEM
    )


def test_locality_sends_the_same_part_less_to_ghosts_at_every_site() -> None:
    made = config("federation.num_sites=4", "strategy.overlap=2")
    assert [held_share(made, residents) for residents in (4, 8, 16)] == [0.25, 0.5, 1.0]
    made = config(
        "federation.num_sites=4", "strategy.overlap=2", "model.locality=bias", "model.locality_target=0.8"
    )
    # half of the choices would go to ghosts, with the target a fifth: two fifths of them are left
    assert held_share(made, 8) == pytest.approx(0.8)
    assert held_share(made, 12) == pytest.approx(1 - 0.4 * 0.25)
    assert held_share(made, 16) == 1.0
    assert held_share(made, 1) == pytest.approx(
        1 / made.model.top_k
    )  # one resident is no more than one choice
    assert make_plan(made).sites[0].resident_share == pytest.approx(0.8)
    made = config("model.locality=bias", "model.locality_target=1", "strategy.overlap=null")
    assert held_share(made, 16) == 1.0  # full replicas have no ghosts


def test_a_price_for_skipping_gives_more_experts() -> None:
    few, many = (
        sum(site.experts_per_layer for site in make_plan(config(*PLANNED, f"plan.skip_price={price}")).sites)
        for price in (0, 1)
    )
    assert few < many


def test_a_price_that_is_not_given_is_the_one_measured_for_the_routing() -> None:
    for routing, price in (("skip", 0.9), ("partitioned", 0.2)):
        plan = make_plan(
            config("federation.num_sites=4", "strategy.overlap=2", f"strategy.routing={routing}")
        )
        assert plan.useful_tokens_per_second == pytest.approx(plan.tokens_per_second * (1 - price / 2))


def test_the_servers_link_is_shared() -> None:
    free, capped = (
        make_plan(config("federation.num_sites=4", *more)) for more in ((), ("plan.server_mbps=100",))
    )
    # 25 Mbit/s each instead of 1000
    assert capped.sites[0].communication_s - 0.1 == pytest.approx(40 * (free.sites[0].communication_s - 0.1))


def test_a_plan_survives_json() -> None:
    plan = make_plan(config(*PLANNED))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_batch_sizes_may_differ() -> None:
    made = config("federation.num_sites=2")
    made.federation.sites[1].batch_size = 2
    big, small = make_plan(made).sites
    assert (big.tokens, small.tokens) == (20 * 8 * 256, 20 * 2 * 256)
    assert small.compute_s == pytest.approx(big.compute_s / 4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("federation.num_sites=4", "strategy.overlap=5"), r"strategy\.overlap=5"),
        ((*PLANNED, "strategy.overlap=5"), r"strategy\.overlap=5: at most the number of sites, 4"),
        ((*PLANNED, "plan.holders=5"), r"plan\.holders=5: at most the number of sites, 4"),
        ((*PLANNED, "plan.holders=4"), r"plan\.holders=4: 64 experts a layer .* room for"),
        (
            (*PLANNED, "strategy.placement=affine", "strategy.routing=partitioned"),
            r"strategy\.placement=affine: needs strategy\.routing=skip",
        ),
        ((*PLANNED, "plan.assumed_mbps=0"), r"plan\.assumed_mbps=0.*: must be above 0"),
        ((*PLANNED, "plan.skip_price=1.5"), r"plan\.skip_price=1\.5: a share, at most 1"),
        ((*PLANNED, "model=medium"), r"site datacentre has memory_gib=0\.12, .* need"),
        ((*PLANNED, "plan.max_steps_ratio=1", "strategy.overlap=4"), r"plan\.max_steps_ratio: with 20 local"),
        ((*PLANNED, "plan.measured=/nowhere"), r"plan\.measured=/nowhere: "),
        (
            ("federation.sites=[{name:a,up_mbps:0},{name:b}]",),
            r"federation\.sites\[0\]\.up_mbps=0.*: must be above 0",
        ),
        (
            ("federation.sites=[{name:a,memory_gib:-1},{name:b}]",),
            r"federation\.sites\[0\]\.memory_gib=-1.*: must be above 0",
        ),
    ],
)
def test_what_cannot_be_is_one_line(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(config(*overrides))


def test_holder_sets_stay_few() -> None:
    """The wire sends a bundle for each set of holders: with differing shares at most two for each site."""
    made = config(*PLANNED)
    placement = plan_placement(made, make_plan(made))
    sets = {tuple(np.flatnonzero(row)) for layer in placement.holds_LEM for row in layer}
    assert len(sets) <= 2 * len(made.federation.sites)


def test_a_plan_of_an_earlier_version_is_read_and_kept(tmp_path: Path) -> None:
    made = config(*PLANNED[:1], "strategy.placement=memory")
    plan = plan_for_run(tmp_path, made)
    path = tmp_path / "plan.json"
    content = json.loads(path.read_text())
    content["plan"]["policy"] = content["plan"].pop("placement")
    content["request"]["plan"]["policy"], content["request"]["strategy"][0] = "memory", "planned"
    content["plan"]["round_s"] = 1.5
    path.write_text(json.dumps(content))
    kept = plan_for_run(tmp_path, made)
    assert (kept.placement, kept.round_s, kept.sites) == ("memory", 1.5, plan.sites)
    assert plan_for_run(tmp_path, config(*PLANNED)).placement == "planned"


# ----- a new plan in the middle of a run


def for_sites(*overrides: str) -> RunConfig:
    return config(*PLANNED, *overrides)


def demand_for(preferred: list[int], layers: int, experts: int) -> np.ndarray:
    """Each site's tokens go to half of the experts, from its own one on."""
    demand_MLE = np.full((len(preferred), layers, experts), 1e-6)
    for site, first in enumerate(preferred):
        chosen = (first + np.arange(experts // 2)) % experts
        demand_MLE[site, :, chosen] = 1.0
    return demand_MLE / demand_MLE.sum(axis=2, keepdims=True)


def test_nothing_has_changed_nothing_moves() -> None:
    made = for_sites()
    plan = make_plan(made)
    assert replan(made, plan, plan_placement(made, plan), [0, 1, 2, 3], 100) is None


@pytest.mark.parametrize("away", [0, 1, 3])
def test_a_site_leaves_and_the_others_hold_everything(away: int) -> None:
    made = for_sites()
    plan = make_plan(made)
    before = plan_placement(made, plan)
    present = [site for site in range(4) if site != away]
    new = replan(made, plan, before, present, rounds_left=5)
    orphaned = int((before.holds_LEM[:, :, present].sum(axis=2) == 0).sum())
    if new is None:
        assert orphaned == 0  # the others were doing well as they were
        return
    assert new.placement.holds_LEM[:, :, present].sum(axis=2).min() >= 1
    assert not new.placement.holds_LEM[:, :, away].any()
    assert new.plan.sites[away].experts_per_layer == new.plan.sites[away].tokens == 0
    for site in present:
        planned, given = new.plan.sites[site], made.federation.sites[site]
        assert planned.site == given.name
        assert given.memory_gib is not None
        assert planned.memory_bytes <= given.memory_gib * BYTES_A_GIB
        assert (new.placement.holds_LEM[:, :, site].sum(axis=1) == planned.experts_per_layer).all()
    # What a site keeps, it keeps: moves are no more than what it holds more, and what had no holder.
    more = sum(
        max(0, new.plan.sites[site].experts_per_layer - plan.sites[site].experts_per_layer)
        for site in present
    )
    assert orphaned <= new.moved <= made.model.num_layers * more + orphaned


def test_a_site_comes_back() -> None:
    made = for_sites()
    plan = make_plan(made)
    before = plan_placement(made, plan)
    without = replan(made, plan, before, [1, 2, 3], rounds_left=50)
    assert without is not None
    again = replan(made, without.plan, without.placement, [0, 1, 2, 3], rounds_left=50)
    assert again is not None
    assert [site.experts_per_layer for site in again.plan.sites] == [s.experts_per_layer for s in plan.sites]


def test_what_is_left_may_be_too_little() -> None:
    made = for_sites()
    plan = make_plan(made)
    with pytest.raises(ConfigError, match=r"plan\.holders=1: 16 experts a layer .* room for"):
        replan(made, plan, plan_placement(made, plan), [3], rounds_left=5)


def test_demand_is_followed_only_if_there_is_time_for_it_to_pay() -> None:
    made = for_sites("train.expert_warmup_steps=400")
    plan = make_plan(made)
    before = plan_placement(made, plan)
    demand = demand_for([0, 4, 8, 12], made.model.num_layers, made.model.num_experts)
    assert replan(made, plan, before, [0, 1, 2, 3], 1, demand) is None
    new = replan(made, plan, before, [0, 1, 2, 3], 10_000, demand)
    assert new is not None
    assert new.moved > 0

    def hits(holds_LEM: np.ndarray) -> np.ndarray:
        return np.einsum("mle,lem->m", demand, holds_LEM.astype(float)) / made.model.num_layers

    assert (hits(new.placement.holds_LEM) >= hits(before.holds_LEM) - 1e-9).all()
    assert hits(new.placement.holds_LEM).sum() > hits(before.holds_LEM).sum() + 0.1


@pytest.mark.parametrize("policy", ["equal", "affine"])
def test_equal_shares_stay_equal_when_a_site_leaves(policy: str) -> None:
    made = for_sites("strategy.overlap=2", f"strategy.placement={policy}")
    plan = make_plan(made)
    new = replan(made, plan, plan_placement(made, plan), [0, 1, 2], rounds_left=50)
    assert new is not None
    assert [site.experts_per_layer for site in new.plan.sites] == [11, 11, 11, 0]
    assert {site.local_steps for site in new.plan.sites[:3]} == {made.train.local_steps}
    assert new.placement.holds_LEM[:, :, :3].sum(axis=2).min() >= 1


def test_the_affine_policy_gives_each_site_what_its_tokens_ask_for() -> None:
    made = for_sites("strategy.overlap=2", "strategy.placement=affine", "train.expert_warmup_steps=0")
    plan = make_plan(made)
    demand = demand_for([0, 4, 8, 12], made.model.num_layers, made.model.num_experts)
    new = replan(made, plan, plan_placement(made, plan), [0, 1, 2, 3], 100, demand)
    assert new is not None
    for site, first in enumerate([0, 4, 8, 12]):
        wanted = sorted((first + expert) % 16 for expert in range(8))
        assert new.placement.residents(site) == [wanted] * made.model.num_layers
        assert new.plan.sites[site].resident_share == pytest.approx(1, abs=1e-4)
    # And once they have it, they keep it.
    assert replan(made, new.plan, new.placement, [0, 1, 2, 3], 100, demand) is None


# ----- measured times


def test_a_new_plan_in_the_middle_goes_by_what_the_first_one_was_made_from(tmp_path: Path) -> None:
    """What was measured may be gone by then, or be the run itself, whose figures grow."""
    measured = write_run(tmp_path / "run", "federation=hetero")
    run = config(*PLANNED, "plan.holders=2", f"plan.measured={measured}")
    plan = make_plan(run)
    shutil.rmtree(measured)
    kept = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))  # as in a checkpoint
    new = replan(run, kept, plan_placement(run, kept), [0, 1, 3], 10)
    assert new is not None
    assert new.plan.token_cost_s == plan.token_cost_s


@pytest.mark.parametrize("times", [0.6, 1.0, 1.9])
def test_times_that_are_near_enough_are_not_mentioned(tmp_path: Path, times: float) -> None:
    plan = make_plan(config())
    assert (
        clock_note(config(), plan, {site.site: times * site.compute_s for site in plan.sites}, tmp_path)
        is None
    )
    assert clock_note(config(), plan, {}, tmp_path) is None


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [((), "plan.measured={run} plans by"), (PLANNED, "resume={run} plan.measured={run} plans the rest")],
)
def test_times_that_are_far_off_are_said_with_what_to_do(
    tmp_path: Path, overrides: tuple[str, ...], remedy: str
) -> None:
    run = config(*overrides)
    plan = make_plan(run)
    note = clock_note(run, plan, {site.site: 26_000 * site.compute_s for site in plan.sites}, tmp_path)
    assert note is not None
    assert note.startswith(
        "steps take 26,000 times what was planned from plan.tflops=0.05, plan.mfu=0.4, so a round "
    )
    assert remedy.format(run=tmp_path) in note
