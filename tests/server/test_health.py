"""The figures of routing, round by round: each there and in range, a sick layer named at once, nothing remembered."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from fomoe_flwr import health
from fomoe_flwr.config import RunConfig
from fomoe_flwr.messages import Task
from fomoe_flwr.model.build import build, initial_state
from fomoe_flwr.model.spec import expert_name, gate_name
from fomoe_flwr.placement import full_residents
from fomoe_flwr.server import health as server_health
from fomoe_flwr.server.health import Probe, RoutingHealth, SiteRouters, drift, probe_batch, some_pairs
from fomoe_flwr.server.replies import Inbox
from fomoe_flwr.server.rounds import Round, RoundObserver
from fomoe_flwr.server.state import ServerState
from tests.server.federation import Answer, config_of, constant, nothing, play, server_of

LAYERS, EXPERTS = 2, 8
EVERYTHING = full_residents(LAYERS, EXPERTS)
PROBE_BT = torch.randint(264, (8, 33), generator=torch.Generator().manual_seed(0))
BETWEEN_0_AND_1 = ("load_entropy", "agreement", "js_distance", "drift")
Figures = dict[str, Any]


class Watched(RoundObserver):
    """A server whose rounds are looked at."""

    def __init__(self, config: RunConfig, folder: Path, probe_BT: Tensor | None = PROBE_BT) -> None:
        self.server = server_of(config, folder)
        self.health = RoutingHealth(config, probe_BT)

    def collected(self, current: Round, state: ServerState, inbox: Inbox) -> None:
        self.health.collected(current, state, inbox)

    def play(self, number: int, answer: Answer | None = None, **options: Any) -> Figures:
        """By default the sites train."""
        play(self.server, number, answer, observer=self, **options)
        return self.figures()

    def figures(self) -> Figures:
        return self.health.finished(self.server.round, self.server.state)


def numbers(value: Any) -> Iterable[float | None]:
    """Every number in nested figures."""
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, int | float) or value is None:
        yield value
    else:
        for item in value:
            yield from numbers(item)


@pytest.mark.parametrize("mode", ["skip", "partitioned"])
def test_every_figure_is_there_and_in_range(tmp_path: Path, mode: str) -> None:
    """And the load is that of the sites together."""
    watched = Watched(
        config_of(f"strategy.routing={mode}", "federation.num_sites=4", "strategy.overlap=2"), tmp_path
    )
    start = watched.figures()
    assert start["expert_similarity"] == pytest.approx(0, abs=0.1)  # drawn independently
    assert start["load"] is None
    for number in (1, 2):
        figures = watched.play(number)
        assert (figures["spike"] is None) == (number == 1)  # nothing went before
        assert all(value is not None and math.isfinite(value) for value in numbers(figures | {"spike": 0}))
        assert all(0 <= figures[name] <= 1 for name in BETWEEN_0_AND_1)
        assert figures["load_max_min"] >= 1
        assert figures["router_change"] > 0
        for name, by_layer in figures["by_layer"].items():
            assert len(by_layer) == LAYERS
            total = sum(by_layer) if name == "dead_experts" else sum(by_layer) / LAYERS
            assert figures[name] == pytest.approx(total, rel=1e-4)
        replies = watched.server.round.replies.values()
        load_LE, tokens = np.array(figures["load"]), sum(reply.num_examples for reply in replies)
        assert load_LE.sum(axis=1).tolist() == [2 * tokens] * LAYERS  # two experts a token
        if mode == "skip":
            expected = entropy(load_LE, axis=1) / math.log(EXPERTS)
            assert figures["by_layer"]["load_entropy"] == pytest.approx(expected.tolist(), rel=1e-5)
        assert list(figures["residents"]) == ["site-0", "site-1", "site-2", "site-3"]
        shares = [reply.metrics["resident_share"] for reply in replies]
        assert [np.mean(share_L) for share_L in figures["residents"].values()] == pytest.approx(
            shares, rel=1e-5
        )
        assert np.mean(figures["resident_share_by_layer"]) == pytest.approx(np.mean(shares), rel=1e-5)


def test_sites_that_share_no_expert_can_agree_on_nothing(tmp_path: Path) -> None:
    config = config_of("strategy.routing=partitioned", "federation.num_sites=4", "strategy.overlap=1")
    figures = Watched(config, tmp_path).play(1)
    assert set(numbers(figures["residents"])) == {1.0}  # every choice is resident in this mode
    assert figures["agreement"] is figures["js_distance"] is None
    assert figures["by_layer"]["agreement"] == [None, None]
    assert figures["drift"] is not None


def test_too_few_shared_experts_are_no_agreement(tmp_path: Path) -> None:
    """Pairs of sites share four experts, and four of four is no choice."""
    overrides = ("federation.num_sites=4", "strategy.overlap=2", "model.top_k=4")
    config = config_of("strategy.routing=partitioned", *overrides)
    assert Watched(config, tmp_path).play(1, nothing)["agreement"] is None


# ----- routers


@pytest.mark.parametrize("mode", ["skip", "partitioned"])
def test_sites_that_change_nothing_agree_and_do_not_drift(tmp_path: Path, mode: str) -> None:
    config = config_of(
        "strategy.up=fp32", "strategy.down=fp32", "strategy.outer=average", f"strategy.routing={mode}",
        "strategy.overlap=2", "federation.num_sites=4",
    )  # fmt: skip
    figures = Watched(config, tmp_path).play(1, nothing, metrics={})
    assert (figures["agreement"], figures["js_distance"]) == (1, 0)
    assert (figures["drift"], figures["router_change"]) == (0, 0)
    # These sites say neither what their routers chose nor their first and last loss.
    assert figures["load"] is figures["load_entropy"] is figures["dead_experts"] is figures["spike"] is None


@pytest.mark.parametrize("mode", ["skip", "partitioned"])
def test_a_sites_router_is_what_it_had_before_it_was_averaged(tmp_path: Path, mode: str) -> None:
    """It is the router that was sent minus the update; of experts that are elsewhere it is the one that was sent."""
    config = config_of("strategy.overlap=2", f"strategy.routing={mode}", "federation.num_sites=4")
    seen: dict[int, Tensor] = {}

    class Looking(RoundObserver):
        def collected(self, current: Round, state: ServerState, inbox: Inbox) -> None:
            weight_ED = server_health.global_routers(state.tensors, config)[0]
            assert weight_ED is not None
            for site in current.replies:
                router_ED = SiteRouters(config, current, inbox).weight(site, 0, weight_ED)
                seen[site] = weight_ED.bfloat16().float() - router_ED  # rounded, as the site got it

    def site_number(task: Task, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        return constant(2.0 ** int(task.name[-1]))(task, shard)

    server = server_of(config, tmp_path)
    play(server, 1, site_number, observer=Looking())
    assert seen.keys() == set(range(4))
    for site, update_ED in seen.items():
        held_E = torch.tensor(server.round.placement.holds_LEM[0, :, site]) | (mode == "skip")
        expected_ED = (2.0**site * held_E.float()).unsqueeze(1).expand(-1, 32)
        torch.testing.assert_close(update_ED, expected_ED, atol=1e-5, rtol=0)


def test_gradients_move_no_site(tmp_path: Path) -> None:
    config = config_of(
        "strategy.inner=gradient", "strategy.outer=adamw", "federation.num_sites=2", "train.local_steps=1"
    )
    figures = Watched(config, tmp_path).play(1)
    assert (figures["agreement"], figures["js_distance"]) == (1, 0)
    assert figures["router_change"] > 0


def test_a_router_without_weights_cannot_differ_or_drift(tmp_path: Path) -> None:
    figures = Watched(config_of("model.router=grap", "federation.num_sites=2"), tmp_path).play(1)
    assert (figures["agreement"], figures["js_distance"]) == (1, 0)
    assert (figures["drift"], figures["router_change"]) == (0, 0)
    assert figures["load_entropy"] > 0


def test_drift_is_that_of_the_routers_before_and_after_on_the_same_inputs(tmp_path: Path) -> None:
    """Worked out again from the two models, by the model's own choices."""
    watched = Watched(config_of("federation.num_sites=2"), tmp_path)
    before = {name: value.clone() for name, value in watched.server.state.tensors.items()}
    figures = watched.play(1)
    after = watched.server.state.tensors
    module = build(watched.server.config.model, EVERYTHING, "skip", before, "cpu").eval()
    drifts = []
    for layer, moe in enumerate(module.moe_layers):

        def compare(router: Any, arguments: tuple[Tensor], chosen: Any, layer: int = layer) -> None:
            logits_TE = arguments[0] @ after[gate_name(layer)].T
            then, now = chosen.chosen_TK.tolist(), logits_TE.topk(2).indices.tolist()
            same = sum(len(set(a) & set(b)) for a, b in zip(then, now, strict=True))
            drifts.append(1 - same / (2 * len(then)))

        moe.gate.register_forward_hook(compare)
    with torch.no_grad():
        module(PROBE_BT)
    assert any(drifts)
    assert figures["by_layer"]["drift"] == pytest.approx(drifts, abs=1e-5)
    gates = [gate_name(layer) for layer in range(LAYERS)]
    change = [float((after[gate] - before[gate]).norm() / before[gate].norm()) for gate in gates]
    assert figures["by_layer"]["router_change"] == pytest.approx(change, rel=1e-4)


def test_drift_without_a_probe_knows_the_weights_alone() -> None:
    before, after = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 5.0]])]
    assert drift(None, before, after, 1) == {"router_change": [pytest.approx(0.2)]}
    assert drift(None, [], after, 1) == {}  # nobody looked before the step


def test_pairs_are_all_or_an_even_sample() -> None:
    assert some_pairs([0, 2, 3]) == [(0, 2), (0, 3), (2, 3)]
    assert some_pairs([4]) == []
    many = some_pairs(range(64))
    assert len(set(many)) == len(many) == server_health.MAX_PAIRS
    assert len({site for pair in many for site in pair}) > 40


def test_scores_are_the_modules_own() -> None:
    config = config_of()
    state = initial_state(config.model, EVERYTHING, "skip", 0)
    module = build(config.model, EVERYTHING, "skip", state, "cpu")
    x_TD = torch.randn(5, 32)
    expected_TE = module.moe_layers[1].gate.scores(x_TD)
    probe = Probe([x_TD, x_TD], [moe.gate for moe in module.moe_layers])
    torch.testing.assert_close(probe.scores(0, state[gate_name(1)]), expected_TE)
    assert health.agreement(health.top_k_sets(expected_TE, 2), health.top_k_sets(expected_TE, 2)) == 1


# ----- experts, and sick routers


def test_experts_that_become_the_same_are_seen(tmp_path: Path) -> None:
    watched = Watched(config_of("federation.num_sites=2"), tmp_path)
    state = watched.server.state.tensors
    for expert in range(EXPERTS):
        for part in ("up_proj", "down_proj"):
            state[expert_name(1, expert, part)] = 1.5 * state[expert_name(1, 0, part)]
    different, same = watched.figures()["by_layer"]["expert_similarity"]
    assert abs(different) < 0.1
    assert same == pytest.approx(1)


def test_a_collapsed_router_is_named_within_one_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All tokens are nearly the same, so that all of them choose the same experts. A healthy one is not named."""
    config = config_of("train.lr=0", "model.load_balance=0", "federation.num_sites=2")
    for sick in (False, True):
        watched = Watched(config, tmp_path / str(sick))
        if sick:
            embedding = watched.server.state.tensors["model.embed_tokens.weight"]
            embedding.copy_(embedding[:1] + 1e-4 * embedding)
        caplog.clear()
        figures = watched.play(1)
        lines = [text for text in caplog.messages if "routing is sick" in text]
        assert len(lines) == sick
        assert (figures["load_entropy"] < 0.5) == sick
    (line,) = lines
    assert line.startswith("round 1: ")
    assert figures["dead_experts"] > 0
    for layer, load_E in enumerate(figures["load"]):
        told = line.partition(f"layer {layer}: ")[2].partition(";")[0]
        assert re.search(r"load as if only \d\.\d of 8 experts were used", told)
        assert f"expert {int(np.argmax(load_E))} is chosen by 100% of the tokens" in told
        dead = np.flatnonzero(np.array(load_E) == 0).tolist()
        assert told.endswith(f"no token chose experts {', '.join(map(str, dead))}")


# ----- rounds in which something is missing


def test_figures_are_of_the_sites_that_answered(tmp_path: Path) -> None:
    """Round 2 is discarded with its one answer, round 3 has none at all; the loss before a spike is round 1's."""
    config = config_of("federation.num_sites=4", "strategy.overlap=2")
    watched, other = (Watched(config, tmp_path / name) for name in ("a", "b"))
    watched.play(1)
    figures = watched.play(2, answering=[2], needed=2)
    assert not watched.server.round.committed
    tokens = watched.server.round.replies[2].num_examples
    assert list(figures["residents"]) == ["site-2"]
    assert np.array(figures["load"]).sum(axis=1).tolist() == [2 * tokens] * LAYERS
    assert figures["agreement"] is None  # one site agrees with nobody
    assert (figures["drift"], figures["router_change"]) == (0, 0)
    assert figures["spike"] is not None
    figures = watched.play(3, answering=[])
    assert figures["load"] is figures["agreement"] is figures["drift"] is figures["spike"] is None
    assert figures["residents"] == {}
    last = watched.play(4)
    assert last["drift"] > 0

    other.play(1)
    for number in (2, 3):
        other.play(number, answering=[], needed=1)
    assert other.play(4) == last  # nothing is remembered of what was discarded


def test_a_server_without_data_has_the_figures_that_need_none(tmp_path: Path) -> None:
    watched = Watched(config_of("federation.num_sites=2"), tmp_path, probe_BT=None)
    watched.play(1)
    figures = watched.play(2)
    assert figures["agreement"] is figures["js_distance"] is figures["drift"] is None
    for name in ("load_entropy", "load_cv", "dead_experts", "router_change", "expert_similarity", "spike"):
        assert figures[name] is not None
    assert probe_batch(None, 32) is None


def test_large_tables_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_health, "MAX_CELLS", LAYERS * EXPERTS - 1)
    figures = Watched(config_of("federation.num_sites=8", "strategy.overlap=2"), tmp_path).play(1)
    assert figures["load"] is figures["residents"] is None
    assert len(figures["by_layer"]["load_entropy"]) == LAYERS
