"""Parts of the model in turn, in whole runs: against a simulation of the rule that knows no wire, codecs or files."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_flwr import wire
from fomoe_flwr.checkpoint import checkpoint_path, compose_run, read_checkpoint
from fomoe_flwr.codecs import of_part
from fomoe_flwr.compose import Composed
from fomoe_flwr.config import RunConfig
from fomoe_flwr.engine import Engine
from fomoe_flwr.messages import Task
from fomoe_flwr.model.base import named_views
from fomoe_flwr.model.build import initial_state
from fomoe_flwr.model.spec import expert_of, parameter_shapes
from fomoe_flwr.placement import Placement, full_residents
from fomoe_flwr.policies import POLICIES
from fomoe_flwr.site import work as site_module
from strategies.local_grid import LocalGrid
from tests.conftest import Compose
from tests.faults.injector import Faults, grid_with
from tests.strategies.helpers import copy_of, metrics, run

SITES = [f"site-{index}" for index in range(4)]
# Three layers: two in fragment 0, and with them both norms of no layer; in fragment 1 one, and the embedding.
TURNS = (
    "federation.num_sites=4",
    "model.num_layers=3",
    "train.eval_batches=0",
    "train.final_eval_batches=0",
    "train.local_steps=2",
    "train.rounds=8",
    "checkpoint.keep=8",
    "strategy.norm_bound=0",
    "strategy.clip=0",
    "strategy.fragments=2",
)
EXACT = ("strategy.outer=average", "strategy.up=fp32", "strategy.down=fp32")


def moved(value: Tensor, site: str, round_: int, name: str) -> Tensor:
    """A local step that is easily done again: towards a point of its own for each site, round and tensor."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{site} {round_} {name}".encode()))
    return 0.9 * value + 0.1 * torch.randn(value.shape, generator=generator)


@dataclass
class Diary:
    """Names by site and round."""

    came: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    sent: dict[tuple[str, int], set[str]] = field(default_factory=dict)


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Diary:
    """What travels. Sites take simple steps instead of training."""
    kept, real_round = Diary(), site_module.train_round

    def backward(self: Engine, module: Any, tokens_BT: Tensor, losses: Any) -> None:
        losses.add(torch.ones(()))

    @torch.no_grad()
    def step(self: Engine, *_: Any) -> None:
        for view in named_views(self.module):
            value = view.of(view.parameter.data)
            value.copy_(moved(value, self._task.name, self._task.round, view.name))

    def train_round(task: Task, parts: dict[str, Tensor], *rest: Any) -> Any:
        kept.came[task.name, task.round] = {of_part(part)[0] for part in parts}
        blobs, reply = real_round(task, parts, *rest)
        kept.sent[task.name, task.round] = {of_part(part)[0] for part in wire.from_blobs(blobs.values())}
        return blobs, reply

    monkeypatch.setattr(Engine, "_backward", backward)
    monkeypatch.setattr(Engine, "_step", step)
    monkeypatch.setattr(site_module, "train_round", train_round)
    return kept


def layer_of(name: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def is_due(config: RunConfig, name: str, round_: int, placements: dict[int, Placement]) -> bool:
    """The rule, once more."""
    parts, every = config.strategy.fragments, config.strategy.sole_every
    if round_ == config.train.rounds:
        return True
    layer, expert = layer_of(name), expert_of(name)
    holders = None if expert is None else placements[round_].holders(*expert)
    if expert is not None and holders != placements[round_ + 1].holders(*expert):
        return True
    if layer is None:
        layer = 1 if "embed_tokens" in name else 0
    if layer % parts != (round_ - 1) % parts:
        return False
    turn = 1 + (round_ - 1) // parts
    return holders is None or len(holders) > 1 or turn % every == 0


@dataclass
class SimulatedSite:
    """What a site has after the last round that counts; nothing, where the server does not know it."""

    ends: dict[str, Tensor] = field(default_factory=dict)
    # What came last, what was learnt since, and what of it was sent in that round.
    came: dict[str, Tensor] = field(default_factory=dict)
    learnt: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, Tensor] = field(default_factory=dict)
    round: int = 0


def simulated(
    config: RunConfig, lost: Collection[tuple[str, int]], discarded: Collection[int]
) -> tuple[dict[int, dict[str, Tensor]], Diary]:
    """The model after each round; what each site is sent, and what it answers with."""
    strategy, everything = config.strategy, full_residents(config.model.num_layers, config.model.num_experts)
    model = initial_state(config.model, everything, strategy.routing, config.seed)
    policy, rounds = POLICIES[strategy.placement](config), config.train.rounds
    placements = {round_: policy.intended(round_).placement for round_ in range(1, rounds + 2)}
    sites = {site: SimulatedSite() for site in SITES}
    due_last: set[str] = set()
    models, diary = {}, Diary()

    def share(name: str, round_: int) -> float:
        expert = expert_of(name)
        return 1 / math.sqrt(len(SITES if expert is None else placements[round_].holders(*expert)))

    for round_ in range(1, rounds + 1):
        due = {name for name in model if is_due(config, name, round_, placements)}
        after: dict[str, SimulatedSite] = {}
        for index, site in enumerate(SITES):
            names = parameter_shapes(config.model, placements[round_].residents(index), strategy.routing)
            old, new = sites[site], SimulatedSite(round=round_)
            coming = {name for name in names if name in due_last or name not in old.ends}
            diary.came[site, round_], diary.sent[site, round_] = coming, set(names) & due
            for name in names:
                new.came[name] = model[name] if name in coming else old.came[name]
                start, before = new.came[name], torch.zeros(())
                if name not in coming:
                    start, before = old.ends[name], old.learnt[name]
                elif strategy.delay and name in old.sent and old.round == round_ - 1:
                    start = old.came[name] - share(name, old.round) * old.sent[name]
                end = start
                for _ in range(config.train.local_steps):
                    end = moved(end, site, round_, name)
                new.ends[name], new.learnt[name] = end, before + (start - end)
            new.sent = {name: learnt for name, learnt in new.learnt.items() if name in due}
            after[site] = new
        good = [site for site in SITES if (site, round_) not in lost]
        if round_ in discarded:
            sites |= {site: SimulatedSite() for site in SITES if site not in good}
        else:
            for name in due:
                if updates := [after[site].sent[name] for site in good if name in after[site].sent]:
                    model = model | {name: model[name] - torch.stack(updates).mean(0)}
            sites = {site: after[site] if site in good else SimulatedSite() for site in SITES}
            due_last = due
        models[round_] = model
    return models, diary


def faulty(lost: Collection[tuple[str, int]]) -> Any:
    faults = Faults()
    for site, round_ in lost:
        faults.at(site, round=round_).lose()
    return grid_with(faults)


LOST = [("site-1", 3), ("site-0", 5), ("site-1", 5), ("site-2", 5), ("site-3", 6)]
CASES = [
    (),
    ("strategy.placement=random", "strategy.reshuffle_every=3"),
    ("strategy.overlap=1", "strategy.sole_every=2"),
    ("strategy.overlap=1", "strategy.sole_every=3", "strategy.fragments=1"),
    (
        "strategy.overlap=1",
        "strategy.sole_every=2",
        "strategy.placement=random",
        "strategy.reshuffle_every=3",
        "strategy.routing=partitioned",
    ),
]


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("overrides", CASES, ids=lambda overrides: " ".join(overrides) or "default")
def test_a_run_is_the_simulation(
    small: Compose, diary: Diary, overrides: tuple[str, ...], delay: int
) -> None:
    """Round 3 lacks one reply, round 5 is discarded, and in round 6 another one is lost."""
    composed = small(
        *TURNS,
        *EXACT,
        "strategy.overlap=2",
        "strategy.expert_quorum=0",
        f"strategy.delay={delay}",
        *overrides,
    )
    run(composed, grid_type=faulty(LOST))
    assert [line["committed"] for line in metrics(composed.run_dir)] == [True] * 5 + [False] + [True] * 3
    models, expected = simulated(composed.config, LOST, [5])
    assert diary == expected
    assert_models(composed, models)


def assert_models(composed: Composed, models: dict[int, dict[str, Tensor]]) -> None:
    for round_, expected in models.items():
        found = read_checkpoint(checkpoint_path(composed.run_dir, round_)).parameters
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=f"round {round_}: {name}")


def test_a_site_that_has_lost_its_disk_says_so_once_and_is_sent_everything(
    small: Compose, diary: Diary
) -> None:
    """What came in round 3 lacks the half that it was to go on with."""

    class Wiping(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            if any(message.metadata.group_id == "3" for message in messages):
                for file in composed.run_dir.glob("sites/site-1/*"):
                    file.unlink()
            return super().push_messages(messages)

    composed = small(*TURNS, *EXACT, "train.rounds=5")
    lines = metrics(run(composed, grid_type=Wiping))
    assert [list(line["failures"]) for line in lines[1:]] == [[], [], ["site-1"], [], []]
    failure = lines[3]["failures"]["site-1"]
    assert (
        "cannot go on from what it was sent in round 2, which is lost here; the next message will be whole"
        in failure
    )
    assert diary.came["site-1", 4] == diary.came["site-1", 1] > diary.came["site-1", 5]
    states = {site["site"]: "state_lost" in site for site in lines[4]["sites"]}
    assert states == {site: site == "site-1" for site in SITES}


def test_experts_of_one_site_travel_seldom(small: Compose, diary: Diary) -> None:
    """In rounds 3 and 6 up and in the rounds after them down; the last round has everything."""
    composed = small(*TURNS, "strategy.fragments=1", "strategy.sole_every=3", "strategy.overlap=1")
    lines = metrics(run(composed))
    with_experts = [line["round"] for line in lines if line["bytes_by_class"]["expert"]]
    assert with_experts == [1, 3, 4, 6, 7, 8]
    sent = {round_ for (_, round_), names in diary.sent.items() if any(map(expert_of, names))}
    assert sent == {3, 6, 8}
    # The rounds since each was updated last.
    assert [line["experts"]["rounds_since_update_max"] for line in lines[1:]] == [1, 2, 0, 1, 2, 0, 1, 0]


def test_a_run_that_goes_on_may_take_other_turns(small: Compose, diary: Diary) -> None:
    """The next message brings what was due then; all of it, where it would be a difference to what no site has."""
    folder = run(small(*TURNS, *EXACT))
    whole = diary.came["site-0", 1]
    due_then = diary.came["site-0", 4]
    assert due_then < whole
    for given, expected in (
        ("strategy.fragments=3", due_then),
        ("strategy.delay=1", due_then),
        ("strategy.down=int8", whole),
        ("strategy.fragments=1", whole),
    ):
        copy = copy_of(folder)
        run(compose_run([f"resume={checkpoint_path(copy, 3)}", f"hydra.run.dir={copy}", given]))
        assert diary.came["site-0", 4] == expected
        assert all(not line["failures"] for line in metrics(copy))


def test_a_run_may_begin_to_take_turns(small: Compose, diary: Diary) -> None:
    folder = run(small(*TURNS, *EXACT, "strategy.fragments=1", "train.rounds=2"))
    run(compose_run([f"resume={folder}", "train.rounds=5", "strategy.fragments=2"]))
    whole = diary.came["site-0", 1]
    assert [diary.came["site-0", round_] == whole for round_ in range(1, 6)] == [True] * 3 + [False] * 2
