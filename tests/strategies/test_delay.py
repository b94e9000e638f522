"""strategy.delay=1 in whole runs: what each site began each round from, against the rule, whatever happened."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.checkpoint import checkpoint_path, compose_run, read_checkpoint
from fomoe_flwr.codecs import decode, up_codec
from fomoe_flwr.compose import Composed
from fomoe_flwr.engine import Engine
from fomoe_flwr.messages import Task
from fomoe_flwr.model.spec import expert_of
from fomoe_flwr.policies import POLICIES
from fomoe_flwr.site import work as site_module
from fomoe_flwr.wire import digests
from strategies.local_grid import LocalGrid
from tests.conftest import Compose
from tests.faults.injector import Faults, grid_with
from tests.strategies.helpers import metrics, run

Moment = tuple[str, int]  # a site in a round


@dataclass
class Diary:
    """What the sites of a run were sent, began from and answered."""

    arrived: dict[Moment, dict[str, Tensor]] = field(default_factory=dict)
    began: dict[Moment, dict[str, Tensor]] = field(default_factory=dict)
    sent: dict[Moment, dict[str, Tensor]] = field(default_factory=dict)  # as the server reads it
    attested: dict[Moment, bytes] = field(default_factory=dict)


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Diary:
    kept = Diary()
    real_shard, real_load, real_round = site_module._shard, Engine.load, site_module.train_round

    def shard(task: Task, *rest: Any) -> dict[str, Tensor]:
        arrived = real_shard(task, *rest)
        kept.arrived[task.name, task.round] = {name: tensor.clone() for name, tensor in arrived.items()}
        return arrived

    def load(self: Engine, task: Task, shard: dict[str, Tensor], *rest: Any) -> None:
        kept.began[task.name, task.round] = {name: tensor.clone() for name, tensor in shard.items()}
        real_load(self, task, shard, *rest)

    def train_round(task: Task, *rest: Any) -> Any:
        blobs, reply = real_round(task, *rest)
        moment = task.name, task.round
        shapes = {name: tensor.shape for name, tensor in kept.arrived[moment].items()}
        sent = decode(up_codec(task.strategy), wire.from_blobs(blobs.values()), shapes)
        kept.sent[moment] = {name: tensor.clone() for name, tensor in sent.items()}
        kept.attested[moment] = reply.start_digests
        return blobs, reply

    monkeypatch.setattr(site_module, "_shard", shard)
    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr(site_module, "train_round", train_round)
    return kept


def check(
    diary: Diary, composed: Composed, moved: float, asked: dict[int, list[int]] | None = None
) -> set[str]:
    """Hold every start against the rule; which of its cases there were.

    Args:
        moved: the gain of an outer step.
        asked: the sites by round, where that are not all.
    """
    config, lines = composed.config, metrics(composed.run_dir)
    policy, names = POLICIES[config.strategy.placement](config), [s.name for s in config.federation.sites]
    counted = {(s["site"], line["round"]) for line in lines if line["committed"] for s in line["sites"]}
    cases = set()
    for (site, round_), began in diary.began.items():
        before, arrived = (site, round_ - 1), diary.arrived[site, round_]
        assert began.keys() == arrived.keys()
        placement = policy.intended(round_ - 1).placement
        there = set(range(len(names)) if asked is None else asked.get(round_ - 1, []))
        for name, tensor in began.items():
            if before not in counted:
                assert tensor.equal(arrived[name])
                cases.add("no reply that counts" if round_ > 1 else "first round")
            elif name not in diary.sent[before]:
                assert tensor.equal(arrived[name])
                cases.add("new to the site")
            else:
                expert = expert_of(name)
                sharers = len(there if expert is None else there & set(placement.holders(*expert)))
                update = torch.tensor(moved / math.sqrt(sharers)) * diary.sent[before][name].float()
                assert tensor.equal(diary.arrived[before][name].float() - update)
                cases.add("dense" if expert is None else f"with {sharers} holders")
        # The server knows the next start's half of the bits, not this one's.
        codec = site_module.down_codec(config.strategy)
        assert diary.attested.get((site, round_), digests(arrived, codec)) == digests(arrived, codec)
    return cases


TWO = ("federation.num_sites=2", "strategy.overlap=1")
FOUR = ("federation.num_sites=4", "strategy.overlap=2", "strategy.delay=1", "train.rounds=6")


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy.up=fp32", "strategy.down=fp32", "strategy.outer=average"),
        ("strategy.placement=random", "strategy.reshuffle_every=2"),
        (
            "strategy.up=topk",
            "strategy.down=int4",
            "strategy.placement=random",
            "strategy.reshuffle_every=3",
            "strategy.routing=partitioned",
        ),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_start_follows_the_rule(small: Compose, diary: Diary, overrides: tuple[str, ...]) -> None:
    """A reply is lost in round 2, one is refused in round 4, and round 5 is discarded."""
    composed = small(*FOUR, *overrides)
    faults = Faults().at("site-1", round=2).lose().at("site-2", round=4).corrupt("another start")
    for site in ("site-0", "site-1", "site-3"):
        faults.at(site, round=5).lose()
    run(composed, grid_type=grid_with(faults))
    lines = metrics(composed.run_dir)
    assert [line["committed"] for line in lines] == [True] * 5 + [False, True]
    assert lines[4]["refused"] == {"site-2": "attestation"}
    cases = check(diary, composed, 1.0 if "strategy.outer=average" in overrides else 0.7 * 1.9)
    moves = {"new to the site"} if "strategy.placement=random" in overrides else set()
    assert cases == {"first round", "no reply that counts", "dense", "with 2 holders"} | moves
    ahead = {(site["site"], line["round"]) for line in lines for site in line["sites"] if site["ahead"]}
    assert ("site-0", 2) in ahead
    # After what was lost, refused or discarded; and nobody in round 1, or in a round with experts that are new to it.
    late = {("site-1", 3), ("site-2", 5), *((f"site-{s}", r) for s in range(4) for r in (1, 6))}
    assert not ahead & late


def test_only_the_sites_that_are_asked_share_a_tensor(small: Compose, diary: Diary) -> None:
    """Three of four: some experts have one holder that is asked."""
    composed = small(*FOUR, "strategy.fraction_train=0.75")
    run(composed)
    asked: dict[int, list[int]] = {}
    for site, round_ in diary.began:
        asked.setdefault(round_, []).append(int(site[-1]))
    assert {len(sites) for sites in asked.values()} == {3}
    cases = check(diary, composed, 0.7 * 1.9, asked)
    assert cases == {"first round", "no reply that counts", "dense", "with 1 holders", "with 2 holders"}


def test_two_sites_by_hand(small: Compose, diary: Diary) -> None:
    """outer=average: W(2) = W(1) - mean D(2), and D(2) is of a start that has the site's own part of D(1) alone."""
    composed = small(
        "federation.num_sites=2", "strategy.overlap=2", "strategy.outer=average", "strategy.up=fp32",
        "strategy.down=fp32", "strategy.delay=1", "train.rounds=2",
    )  # fmt: skip
    run(composed)
    (a, b), name = ("site-0", "site-1"), "model.layers.0.self_attn.q_proj.weight"
    W0 = diary.arrived[a, 1][name]
    W1, W2 = (read_checkpoint(checkpoint_path(composed.run_dir, r)).parameters[name] for r in (1, 2))
    D1, D2 = ((diary.sent[a, r][name], diary.sent[b, r][name]) for r in (1, 2))
    torch.testing.assert_close(W1, W0 - (D1[0] + D1[1]) / 2)
    torch.testing.assert_close(W2, W1 - (D2[0] + D2[1]) / 2)
    for site, own in ((a, D1[0]), (b, D1[1])):
        torch.testing.assert_close(diary.began[site, 2][name], W0 - own / math.sqrt(2))


def test_two_runs_have_equal_bits_and_not_those_of_a_run_without_a_delay(
    small: Compose, tmp_path: Path
) -> None:
    models = []
    for number, delay in enumerate((1, 1, 0)):
        folder = run(
            small(*TWO, "train.rounds=2", f"strategy.delay={delay}", run_dir=tmp_path / f"run{number}")
        )
        models.append([read_checkpoint(checkpoint_path(folder, round_)).parameters for round_ in (1, 2)])
    for once, again, without in zip(*models, strict=True):
        assert all(tensor.equal(again[name]) for name, tensor in once.items())
        # In round 1 there is nothing to wait for.
        same = all(tensor.equal(without[name]) for name, tensor in once.items())
        assert same == (once is models[0][0])


def test_a_site_that_has_lost_its_disk_begins_as_it_comes(small: Compose, diary: Diary) -> None:
    class Wiping(LocalGrid):
        def push_messages(self, messages):
            messages = list(messages)
            if any(message.metadata.group_id == "3" for message in messages):
                for file in composed.run_dir.glob("sites/site-1/*"):
                    file.unlink()
            return super().push_messages(messages)

    composed = small(*FOUR, "train.rounds=4")
    lines = metrics(run(composed, grid_type=Wiping))
    began, arrived = (kept["site-1", 3] for kept in (diary.began, diary.arrived))
    assert all(tensor.equal(arrived[name]) for name, tensor in began.items())
    ahead = [[site["ahead"] for site in line["sites"]] for line in lines[1:]]
    assert ahead == [[0.0] * 4, [1.0] * 4, [1.0, 0.0, 1.0, 1.0], [1.0] * 4]


def test_a_run_may_begin_and_end_to_wait(small: Compose, diary: Diary) -> None:
    """The state of a run without a delay has no update; one that goes on without does not look at it."""
    folder = run(small(*TWO, "strategy.delay=0", "strategy.down=int8", "train.rounds=1"))
    for rounds, given in ((3, "strategy.delay=1"), (4, "strategy.up=int4"), (5, "strategy.delay=0")):
        run(compose_run([f"resume={folder}", f"train.rounds={rounds}", given]))
    for round_ in (1, 2, 5):
        began, arrived = diary.began["site-0", round_], diary.arrived["site-0", round_]
        assert all(tensor.equal(arrived[name]) for name, tensor in began.items())
    for round_ in (3, 4):
        before = diary.sent["site-0", round_ - 1]
        assert before.keys() == diary.began["site-0", round_].keys()
        assert metrics(folder)[round_]["sites"][0]["ahead"] == 1.0
