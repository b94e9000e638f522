"""Which node is which site: by name, by partition number, and never by guessing."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients.app import app
from fomoe_flwr.errors import RunError
from strategies.local_grid import LocalGrid
from strategies.nodes import SiteDirectory

NAMES = ["a", "b", "c"]


def connect(node_configs: dict[int, dict[str, str]], nodes: int = 3, minimum: int = 3) -> dict[int, int]:
    grid = LocalGrid(app, nodes, node_configs=node_configs)
    try:
        return SiteDirectory(NAMES).connected(grid, minimum, timeout=0.5)
    finally:
        grid.close()


def test_a_simulated_node_is_the_site_of_its_partition_number() -> None:
    assert connect({}) == {0: 100, 1: 101, 2: 102}


def test_a_name_goes_before_a_number() -> None:
    assert connect({0: {"site": "c"}, 2: {"site": "a"}}) == {0: 102, 1: 101, 2: 100}


@pytest.mark.parametrize(
    ("node_configs", "nodes", "reason"),
    [
        (
            {0: {"site": "b"}},
            3,
            "2 of 3 sites connected, missing a within 0.5 s; nodes 100 and 101 both say they are site b",
        ),
        ({0: {"site": "z"}}, 3, "node 100 is site 'z', which this federation does not have; it has a, b, c"),
        ({}, 2, "2 of 3 sites connected, missing c within 0.5 s"),
        (
            {1: {"colour": "red"}},
            3,
            "node 101 could not say which site it is: ConfigError: node-config colour",
        ),
    ],
)
def test_who_is_missing_and_why_is_said_when_the_wait_is_over(node_configs, nodes: int, reason: str) -> None:
    with pytest.raises(RunError, match=reason):
        connect(node_configs, nodes)


def test_a_node_that_makes_no_sense_does_not_disturb_the_others(caplog) -> None:
    assert connect({}, nodes=4) == {0: 100, 1: 101, 2: 102}
    assert "node 103 is site 3, which this federation does not have" in caplog.text


class ChangingGrid(LocalGrid):
    """Nodes come and go."""

    gone: ClassVar[set[int]] = set()

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node not in self.gone]


@pytest.mark.parametrize(
    "answer", [{"site": ["a"]}, {"site": b"a"}, {"partition-id": [0]}, {"site": 7.5}, {}]
)
def test_an_answer_of_the_wrong_type_disturbs_nobody(answer: dict, caplog) -> None:
    class OddGrid(LocalGrid):
        def _answer(self, message, context):
            if message.metadata.dst_node_id != 102:
                return super()._answer(message, context)
            return Message(RecordDict({"config": ConfigRecord(answer)}), reply_to=message)

    grid = OddGrid(app, 3)
    directory = SiteDirectory(["a", "b"])
    assert directory.connected(grid, 2, 5.0) == {0: 100, 1: 101}
    until = time.monotonic() + 5
    while 102 not in directory.problems and time.monotonic() < until:
        directory.connected(grid, 2, 5.0)
    grid.close()
    assert "node 102 is site" in caplog.text


def test_a_site_that_comes_back_under_another_node_id_is_the_same_site() -> None:
    """Node 102 is the second of site a: it stands by until node 100 is gone, or does not answer."""
    for disappears in (True, False):
        ChangingGrid.gone = {102}
        grid = ChangingGrid(app, 3, node_configs={0: {"site": "a"}, 1: {"site": "b"}, 2: {"site": "a"}})
        directory = SiteDirectory(["a", "b"])
        assert directory.connected(grid, 2, 5.0) == {0: 100, 1: 101}
        ChangingGrid.gone = set()
        deadline = time.monotonic() + 5
        while 102 not in directory.problems:
            assert directory.connected(grid, 2, 5.0) == {0: 100, 1: 101}
            assert time.monotonic() < deadline
        if disappears:
            ChangingGrid.gone = {100}
        else:
            directory.lost(0)
        assert directory.connected(grid, 2, 5.0) == {0: 102, 1: 101}
        grid.close()


def test_a_node_that_does_not_answer_holds_up_nobody() -> None:
    class DeafGrid(LocalGrid):
        def _serve(self, message, expires):
            if message.metadata.dst_node_id != 102:
                super()._serve(message, expires)

    grid = DeafGrid(app, 3)
    directory = SiteDirectory(NAMES)
    began = time.monotonic()
    assert directory.connected(grid, 2, 30.0) == {0: 100, 1: 101}
    assert time.monotonic() - began < 5
    grid.close()
