"""Routing health in whole runs: every figure there and in range, a sick layer named at once, and nothing forgotten."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

import strategies.health
import strategies.server
from fomoe_flwr import health
from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint
from fomoe_flwr.model.sigma_moe import build, initial_state
from fomoe_flwr.model.spec import expert_name, gate_name
from fomoe_flwr.placement import full_residents
from fomoe_flwr.task import SiteTask
from strategies.book import RoundBook
from strategies.fomoe import FoMoE
from strategies.health import Probe, drift, some_pairs
from tests.conftest import Compose
from tests.faults.injector import Faults, grid_with
from tests.strategies.helpers import answering, metrics, run, without_times

LAYERS, EXPERTS = 2, 8


@pytest.fixture
def small(small: Compose, monkeypatch: pytest.MonkeyPatch) -> Compose:
    """Without what comes after the last round: pictures and the final evaluation."""
    monkeypatch.setattr(strategies.server, "report", lambda *arguments: None)
    return lambda *overrides, **options: small("train.final_eval_batches=0", *overrides, **options)


BETWEEN_0_AND_1 = ("load_entropy", "agreement", "js_distance", "drift")


def numbers(value: Any) -> Iterable[float | None]:
    """Every number in nested figures."""
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, int | float) or value is None:
        yield value
    else:
        for item in value:
            yield from numbers(item)


def routing(composed: Any) -> list[dict[str, Any]]:
    return [line["routing"] for line in metrics(composed.run_dir)]


@pytest.mark.parametrize("mode", ["skip", "partitioned"])
def test_a_run_has_every_figure(small: Compose, mode: str) -> None:
    composed = small(f"strategy.routing={mode}", "federation.num_sites=4", "strategy.overlap=2")
    run(composed)
    start, first, second = routing(composed)
    assert start["expert_similarity"] == pytest.approx(0, abs=0.1)  # drawn independently
    assert start["load"] is None
    assert first["spike"] is None  # nothing went before
    assert second["spike"] is not None
    for figures in (first, second):
        assert all(number is not None and math.isfinite(number) for number in numbers(figures | {"spike": 0}))
        assert all(0 <= figures[name] <= 1 for name in BETWEEN_0_AND_1)
        for name, by_layer in figures["by_layer"].items():
            assert len(by_layer) == LAYERS
            total = sum(by_layer) if name == "dead_experts" else sum(by_layer) / LAYERS
            assert figures[name] == pytest.approx(total, rel=1e-4)
        assert np.array(figures["load"]).shape == (LAYERS, EXPERTS)
        assert list(figures["residents"]) == ["site-0", "site-1", "site-2", "site-3"]
        assert figures["load_max_min"] >= 1
        assert figures["router_change"] > 0


def test_load_is_that_of_the_sites_together(small: Compose) -> None:
    composed = small("federation.num_sites=4", "strategy.overlap=2")
    run(composed)
    line = metrics(composed.run_dir)[-1]
    figures, load_LE = line["routing"], np.array(line["routing"]["load"])
    tokens = sum(site["tokens"] for site in line["sites"])
    assert load_LE.sum(axis=1).tolist() == [2 * tokens] * LAYERS  # two experts a token
    expected = entropy(load_LE, axis=1) / math.log(EXPERTS)
    assert figures["by_layer"]["load_entropy"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert np.mean(figures["resident_share_by_layer"]) == pytest.approx(line["resident_share"], rel=1e-5)
    for site in line["sites"]:
        assert np.mean(figures["residents"][site["site"]]) == pytest.approx(site["resident_share"], rel=1e-5)


def test_every_choice_is_resident_in_partitioned_mode(small: Compose) -> None:
    composed = small("strategy.routing=partitioned", "federation.num_sites=4", "strategy.overlap=1")
    run(composed)
    figures = routing(composed)[-1]
    assert set(numbers(figures["residents"])) == {1.0}
    # No two sites share an expert, so there is nothing they could agree on.
    assert figures["agreement"] is figures["js_distance"] is None
    assert figures["by_layer"]["agreement"] == [None, None]
    assert figures["drift"] is not None


def test_too_few_shared_experts_are_no_agreement(small: Compose) -> None:
    composed = small(
        "strategy.routing=partitioned", "federation.num_sites=4", "strategy.overlap=2", "model.top_k=4"
    )
    run(composed)  # pairs of sites share four experts, and four of four is no choice
    assert routing(composed)[-1]["agreement"] is None


# ----- routers


EXACT = ("strategy.wire_dtype=fp32", "strategy.outer=average", "train.rounds=1", "strategy.overlap=2")


@pytest.mark.parametrize("mode", ["skip", "partitioned"])
def test_sites_that_change_nothing_agree_and_do_not_drift(small: Compose, mode: str) -> None:
    def nothing(task: SiteTask, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in shard.items()}

    composed = small(*EXACT, f"strategy.routing={mode}", "federation.num_sites=4")
    run(composed, answering(nothing))
    figures = routing(composed)[-1]
    assert (figures["agreement"], figures["js_distance"]) == (1, 0)
    assert (figures["drift"], figures["router_change"]) == (0, 0)
    # These sites say neither what their routers chose nor their first and last loss.
    assert figures["load"] is figures["load_entropy"] is figures["dead_experts"] is figures["spike"] is None


@pytest.mark.parametrize("mode", ["skip", "partitioned"])
def test_a_sites_router_is_what_it_had_before_it_was_averaged(
    small: Compose, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """It is the router that was sent minus the update; of experts that are elsewhere it is the one that was sent."""
    seen: dict[int, Tensor] = {}
    collected = RoundBook.collected

    def look(self: RoundBook, strategy: FoMoE) -> None:
        weight_ED = strategies.health.global_routers(strategy.state, strategy.config)[0]
        assert weight_ED is not None
        for site in strategy.round.results:
            router_ED = strategies.health.site_router(strategy, site, 0, weight_ED)
            rounded_ED = weight_ED.bfloat16().float()  # as the site got it
            seen[site] = rounded_ED - router_ED
        collected(self, strategy)

    monkeypatch.setattr(RoundBook, "collected", look)

    def site_number(task: SiteTask, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.full_like(tensor, 2.0**task.site) for name, tensor in shard.items()}

    composed = small(
        "strategy.overlap=2", f"strategy.routing={mode}", "federation.num_sites=4", "train.rounds=1"
    )
    run(composed, answering(site_number, dtype=torch.bfloat16))
    placement = FoMoE(composed.config).placement(1)
    for site in range(4):
        held_E = torch.tensor(placement.holds_LEM[0, :, site]) | (mode == "skip")
        expected_ED = (2.0**site * held_E.float()).unsqueeze(1).expand(-1, 32)
        torch.testing.assert_close(seen[site], expected_ED, atol=1e-5, rtol=0)


def test_gradients_move_no_site(small: Compose) -> None:
    composed = small("strategy=ddp", "federation.num_sites=2", "train.local_steps=1")
    run(composed)
    figures = routing(composed)[-1]
    assert (figures["agreement"], figures["js_distance"]) == (1, 0)
    assert figures["router_change"] > 0


def test_a_router_without_weights_cannot_differ_or_drift(small: Compose) -> None:
    composed = small("model.router=grap", "federation.num_sites=2")
    run(composed)
    for figures in routing(composed)[1:]:
        assert (figures["agreement"], figures["js_distance"]) == (1, 0)
        assert (figures["drift"], figures["router_change"]) == (0, 0)
        assert figures["load_entropy"] > 0


def test_drift_is_that_of_the_checkpoints_on_the_same_inputs(small: Compose) -> None:
    """Worked out again from the two checkpoints, by the model's own choices."""
    composed = small("train.rounds=2", "federation.num_sites=2")
    run(composed)
    config = composed.config
    before, after = (
        read_checkpoint(checkpoint_path(composed.run_dir, round_)).parameters for round_ in (1, 2)
    )
    corpus = strategies.server.open_validation(config)
    tokens_BT = strategies.health.probe_batch(corpus, config.train.seq_len)
    assert tokens_BT is not None
    module = build(config.model, full_residents(LAYERS, EXPERTS), "skip", before, "cpu").eval()
    drifts = []
    for layer, moe in enumerate(module.moe_layers):

        def compare(router: Any, arguments: tuple[Tensor], chosen: Any, layer: int = layer) -> None:
            logits_TE = arguments[0] @ after[gate_name(layer)].T
            then, now = chosen.chosen_TK.tolist(), logits_TE.topk(2).indices.tolist()
            same = sum(len(set(a) & set(b)) for a, b in zip(then, now, strict=True))
            drifts.append(1 - same / (2 * len(then)))

        moe.gate.register_forward_hook(compare)
    with torch.no_grad():
        module(tokens_BT)
    figures = routing(composed)[-1]
    assert figures["by_layer"]["drift"] == pytest.approx(drifts, abs=1e-5)
    change = [
        float((after[gate_name(layer)] - before[gate_name(layer)]).norm() / before[gate_name(layer)].norm())
        for layer in range(LAYERS)
    ]
    assert figures["by_layer"]["router_change"] == pytest.approx(change, rel=1e-4)


def test_drift_without_a_probe_knows_the_weights_alone() -> None:
    before, after = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 5.0]])]
    assert drift(None, before, after, 1) == {"router_change": [pytest.approx(0.2)]}
    assert drift(None, [], after, 1) == {}  # nobody looked before the step


def test_pairs_are_all_or_an_even_sample() -> None:
    assert some_pairs([0, 2, 3]) == [(0, 2), (0, 3), (2, 3)]
    assert some_pairs([4]) == []
    many = some_pairs(range(64))
    assert len(set(many)) == len(many) == strategies.health.MAX_PAIRS
    assert len({site for pair in many for site in pair}) > 40


# ----- experts


def test_experts_that_become_the_same_are_seen(small: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(*arguments: Any) -> dict[str, Tensor]:
        state = initial_state(*arguments)
        for expert in range(EXPERTS):
            for part in ("up_proj", "down_proj"):
                state[expert_name(1, expert, part)] = 1.5 * state[expert_name(1, 0, part)]
        return state

    monkeypatch.setattr(strategies.server, "initial_state", alike)
    composed = small("train.rounds=0")
    run(composed)
    different, same = routing(composed)[0]["by_layer"]["expert_similarity"]
    assert abs(different) < 0.1
    assert same == pytest.approx(1)


# ----- sick routers


def collapsed(*arguments: Any) -> dict[str, Tensor]:
    """A model for which all tokens are nearly the same, so that all of them choose the same experts."""
    state = initial_state(*arguments)
    name = "model.embed_tokens.weight"
    state[name] = state[name][:1] + 1e-4 * state[name]
    return state


def test_a_collapsed_router_is_named_within_one_round(
    small: Compose, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(strategies.server, "initial_state", collapsed)
    composed = small("train.rounds=1", "train.lr=0", "model.load_balance=0", "federation.num_sites=2")
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        run(composed)
    figures = routing(composed)[1]
    assert figures["load_entropy"] < 0.5
    assert figures["dead_experts"] > 0
    (line,) = [text for text in caplog.messages if "routing is sick" in text]
    assert line.startswith("round 1: routing is sick: layer 0: ")
    assert "; layer 1: " in line
    for layer, load_E in enumerate(figures["load"]):
        told = line.partition(f"layer {layer}: ")[2].partition(";")[0]
        assert re.search(r"load as if only \d\.\d of 8 experts were used", told)
        assert f"expert {int(np.argmax(load_E))} is chosen by 100% of the tokens" in told
        dead = np.flatnonzero(np.array(load_E) == 0).tolist()
        assert told.endswith(f"no token chose experts {', '.join(map(str, dead))}")


def test_a_healthy_run_is_not_called_sick(small: Compose, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fomoe"):
        run(small("train.rounds=2", "train.lr=0"))  # the routers are as they were drawn
    assert not [text for text in caplog.messages if "sick" in text]


# ----- rounds in which something is missing


def test_figures_are_of_the_sites_that_answered(small: Compose) -> None:
    faults = Faults()
    for site in ("site-0", "site-1", "site-3"):
        faults.at(site, round=2).fail()
    composed = small("federation.num_sites=4", "strategy.overlap=2", "train.rounds=3")
    run(composed, grid_type=grid_with(faults))
    lines = metrics(composed.run_dir)
    assert [line["committed"] for line in lines] == [True, True, False, True]
    figures, tokens = lines[2]["routing"], lines[2]["sites"][0]["tokens"]
    assert list(figures["residents"]) == ["site-2"]
    assert np.array(figures["load"]).sum(axis=1).tolist() == [2 * tokens] * LAYERS
    assert figures["agreement"] is None  # one site agrees with nobody
    assert (figures["drift"], figures["router_change"]) == (0, 0)  # the round was discarded
    assert figures["spike"] is not None
    assert lines[3]["routing"]["drift"] > 0


def test_a_round_without_any_answer_has_no_figures(small: Compose) -> None:
    faults = Faults.lost([(f"site-{site}", 1) for site in range(2)])
    composed = small("federation.num_sites=2", "train.rounds=2")
    run(composed, grid_type=grid_with(faults))
    figures = routing(composed)[1]
    assert figures["load"] is figures["agreement"] is figures["drift"] is figures["spike"] is None
    assert figures["residents"] == {}
    assert routing(composed)[2]["load"] is not None


def test_the_loss_before_a_spike_is_that_of_the_last_round_that_counts(small: Compose) -> None:
    """Round 2 is discarded, its only answer too: the jump of round 3 is from round 1."""
    faults = Faults.lost([("site-0", 2), ("site-1", 2), ("site-2", 2)])
    composed = small("federation.num_sites=4", "train.rounds=3")
    run(composed, grid_type=grid_with(faults))
    everybody = small("federation.num_sites=4", "train.rounds=3", run_dir=composed.run_dir.parent / "b")
    run(everybody, grid_type=grid_with(Faults.lost([(f"site-{site}", 2) for site in range(4)])))
    assert routing(composed)[3]["spike"] == routing(everybody)[3]["spike"]


def test_a_server_without_data_has_the_figures_that_need_none(small: Compose) -> None:
    composed = small("train.eval_batches=0", "federation.num_sites=2")
    run(composed)
    figures = routing(composed)[-1]
    assert figures["agreement"] is figures["js_distance"] is figures["drift"] is None
    for name in ("load_entropy", "load_cv", "dead_experts", "router_change", "expert_similarity", "spike"):
        assert figures[name] is not None


def test_large_tables_are_left_out(small: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies.health, "MAX_CELLS", LAYERS * EXPERTS - 1)
    composed = small("federation.num_sites=8")
    run(composed)
    figures = routing(composed)[-1]
    assert figures["load"] is figures["residents"] is None
    assert len(figures["by_layer"]["load_entropy"]) == LAYERS


def test_figures_do_not_depend_on_the_clock(small: Compose, tmp_path: Any) -> None:
    one, two = (small(run_dir=tmp_path / name) for name in ("a", "b"))
    assert without_times(metrics(run(one))) == without_times(metrics(run(two)))


def test_scores_are_the_modules_own(small: Compose) -> None:
    config = small().config
    everything = full_residents(LAYERS, EXPERTS)
    state = initial_state(config.model, everything, "skip", 0)
    module = build(config.model, everything, "skip", state, "cpu")
    x_TD = torch.randn(5, 32)
    expected_TE = module.moe_layers[1].gate.scores(x_TD)
    probe = Probe([x_TD, x_TD], [moe.gate for moe in module.moe_layers])
    torch.testing.assert_close(probe.scores(0, state[gate_name(1)]), expected_TE)
    assert health.agreement(health.top_k_sets(expected_TE, 2), health.top_k_sets(expected_TE, 2)) == 1
