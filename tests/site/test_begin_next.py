"""A round that is begun before its message is there has the numbers of one that waits for it (strategy.delay=1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.config import RunConfig
from fomoe_flwr.messages import AHEAD
from fomoe_flwr.site.memory import Memory
from fomoe_flwr.site.work import WORK, begin_next, may_begin_next
from tests.clients.helpers import site_task, state_files
from tests.conftest import Compose
from tests.site.test_memory import nothing, settings, work

SETTINGS = [
    (),
    ("strategy.up=topk",),
    ("strategy.outer=average", "strategy.keep_moments=false"),
    ("strategy.fragments=2",),
    ("strategy.fragments=2", "strategy.sole_every=2", "strategy.overlap=1", "strategy.up=int4"),
]


class Stopped(Exception):
    """What a beat raises."""


@pytest.fixture(params=SETTINGS, ids=",".join)
def config(small: Compose, request: pytest.FixtureRequest) -> RunConfig:
    return small("strategy.delay=1", "train.rounds=5", *request.param).config


def begin(config: RunConfig, folder: Path, memory: Memory, round_: int, beat=nothing) -> None:
    begin_next(site_task(config, round_).to_json(), settings(folder), memory, beat)


def waited(config: RunConfig, folder: Path, rounds: list[tuple[int, int]]) -> list:
    """Answers of a site that begins nothing; each round with the one that counts before it."""
    return [
        work(config, folder, Memory(), round_, counted_round=counted, run="run") for round_, counted in rounds
    ]


def test_begun_or_not_the_bits_are_the_same(config: RunConfig, tmp_path: Path) -> None:
    memory, answers = Memory(), []
    for round_ in range(1, 5):
        assert memory.has_begun(site_task(config, round_)) == (round_ > 1)
        answers.append(work(config, tmp_path / "ahead", memory, round_))
        begin(config, tmp_path / "ahead", memory, round_)
    expected = waited(config, tmp_path / "waits", [(1, 0), (2, 1), (3, 2), (4, 3)])
    assert answers == expected
    assert [answer.reply.metrics[AHEAD] for answer in answers] == [0.0, 1.0, 1.0, 1.0]
    assert state_files(tmp_path / "ahead") == state_files(tmp_path / "waits")


def test_what_was_begun_is_dropped_where_the_message_asks_for_something_else(
    config: RunConfig, tmp_path: Path
) -> None:
    """The reply to round 2 was lost, so what it was the start of never happened."""
    memory, answers = Memory(), []
    for round_, counted in [(1, 0), (2, 1), (3, 1), (4, 3)]:
        answers.append(work(config, tmp_path / "ahead", memory, round_, counted_round=counted))
        begin(config, tmp_path / "ahead", memory, round_)
    assert answers == waited(config, tmp_path / "waits", [(1, 0), (2, 1), (3, 1), (4, 3)])


def test_work_that_is_broken_off_leaves_nothing_behind(config: RunConfig, tmp_path: Path) -> None:
    memory = Memory()
    first = work(config, tmp_path / "ahead", memory, 1)
    steps = 0

    def stop(phase: str) -> None:
        nonlocal steps
        steps += phase == WORK
        if steps == 2:
            raise Stopped

    with pytest.raises(Stopped):
        begin(config, tmp_path / "ahead", memory, 1, stop)
    assert not memory.has_begun(site_task(config, 2))
    second = work(config, tmp_path / "ahead", memory, 2)
    assert [first, second] == waited(config, tmp_path / "waits", [(1, 0), (2, 1)])


def test_an_evaluation_in_between_changes_nothing(config: RunConfig, tmp_path: Path) -> None:
    memory = Memory()
    first = work(config, tmp_path / "ahead", memory, 1)
    begin(config, tmp_path / "ahead", memory, 1)
    work(config, tmp_path / "ahead", memory, 1, "evaluate")
    second = work(config, tmp_path / "ahead", memory, 2)
    assert [first, second] == waited(config, tmp_path / "waits", [(1, 0), (2, 1)])


def test_who_begins(small: Compose, tmp_path: Path) -> None:
    """Not without a delay, not after the last round, and not where a tensor must come first."""
    for overrides, round_, begins in [
        (("strategy.delay=0",), 1, False),
        (("strategy.delay=1",), 1, True),
        (("strategy.delay=1",), 2, False),
    ]:
        config = small(*overrides, "train.rounds=2").config
        assert may_begin_next(site_task(config, round_).to_json(), settings(tmp_path)) == begins
    memory = Memory()
    # Nothing is in memory: there is no round to go on from.
    begin(config, tmp_path, memory, 1)
    assert memory.begun is None
