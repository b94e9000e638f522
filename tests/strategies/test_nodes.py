"""Which node is which site: by name, by partition number, and never by guessing."""

from __future__ import annotations

import hashlib
import time
from typing import ClassVar

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from clients.app import app
from fomoe_flwr.config import DataConfig
from fomoe_flwr.errors import RunError
from strategies.local_grid import LocalGrid
from strategies.nodes import SiteDirectory, error_line

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


@pytest.mark.parametrize("source", ["stdlib", "huggingface"])
def test_a_site_whose_own_text_the_run_cannot_read_ends_it_before_the_first_round(source: str) -> None:
    """What is wrong is the run's, so nobody is waited for; with data=text the same node is a site like any other."""
    grid = LocalGrid(app, 3, node_configs={1: {"site": "b", "data-path": "/text"}})
    with pytest.raises(
        RunError, match=rf"--data-path of site b: needs data.source=text.*={source} reads no files"
    ):
        SiteDirectory(NAMES, data=DataConfig(source=source)).connected(grid, 3, timeout=1000.0)
    assert len(SiteDirectory(NAMES, data=DataConfig(source="text")).connected(grid, 3, timeout=1.0)) == 3
    # Later a quorum is enough, and such a site just takes no part.
    assert len(SiteDirectory(NAMES, data=DataConfig(source=source)).connected(grid, 2, timeout=1.0)) == 2
    grid.close()


def test_a_node_that_makes_no_sense_does_not_disturb_the_others(caplog) -> None:
    assert connect({}, nodes=4) == {0: 100, 1: 101, 2: 102}
    assert "node 103 is site 3, which this federation does not have" in caplog.text


class ChangingGrid(LocalGrid):
    """Nodes come and go."""

    gone: ClassVar[set[int]] = set()

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node not in self.gone]


@pytest.mark.parametrize(
    "answer",
    [{"site": ["a"]}, {"site": b"a"}, {"partition-id": [0]}, {"partition-id": True}, {"site": 7.5}, {}],
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


# -- whether a node is the site that it says it is ------------------------------------------------------------


class KeyedGrid(LocalGrid):
    """Nodes as a SuperLink knows them: by node id, name and key."""

    def __init__(self, known: dict[int, tuple[str, bytes]], sites: dict[int, str]) -> None:
        super().__init__(app, len(sites), node_configs={node: {"site": site} for node, site in sites.items()})
        self.known = known

    def get_nodes(self):
        return [
            NodeInfo(node_id=node, name=self.known[node - 100][0], public_key=self.known[node - 100][1])
            for node in self.get_node_ids()
        ]


def sites_of(grid: KeyedGrid, directory: SiteDirectory, timeout: float = 1.0) -> dict[int, int]:
    """Until all nodes have been heard."""
    until = time.monotonic() + timeout
    while len(directory._answered) < len(grid.known) and time.monotonic() < until:
        directory.connected(grid, 0, 0.0)
    grid.close()
    return directory.node_of_site


def test_a_key_that_is_registered_under_a_name_serves_that_site_only() -> None:
    grid = KeyedGrid({0: ("a", b"1"), 1: ("a", b"2")}, {0: "a", 1: "b"})
    directory = SiteDirectory(NAMES)
    assert sites_of(grid, directory) == {0: 100}
    assert directory.problems == {101: "node 101 says it is site b, but its key is registered as 'a'"}


@pytest.mark.parametrize(("registered", "expected"), [(True, {}), (False, {0: 100})])
def test_another_key_is_no_site_that_has_had_one(registered: bool, expected: dict[int, int]) -> None:
    """After a resume too: a checkpoint keeps `keys`. Where no key is registered, a SuperNode has another each time."""
    before = SiteDirectory(NAMES, registered)
    assert sites_of(KeyedGrid({0: ("", b"first")}, {0: "a"}), before) == {0: 100}
    after = SiteDirectory(NAMES, registered)
    after.keys = dict(before.keys)
    assert sites_of(KeyedGrid({0: ("", b"second")}, {0: "a"}), after) == expected
    assert registered == ("another key than the site has had" in after.problems.get(100, ""))


def test_a_key_that_was_registered_under_the_sites_name_takes_its_place() -> None:
    """The way back for a site that has lost its key; whoever sat in its place has to go."""
    grid = KeyedGrid({0: ("", b"imposter"), 1: ("a", b"new")}, {0: "a", 1: "a"})
    directory = SiteDirectory(NAMES, registered=True)
    directory.keys = {"a": hashlib.sha256(b"imposter").hexdigest()}
    assert sites_of(grid, directory) == {0: 101}
    assert directory.keys == {"a": hashlib.sha256(b"new").hexdigest()}


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_error_is_read_in_time_that_its_length_bounds(wrapped: bool) -> None:
    """And shown as one line."""
    reason = (
        f"<class 'X'>:<'… Message: {'x' if wrapped else ''}{' >' * 10**6}y\x1b[2J'>"
        if wrapped
        else "\x1b[2J" * 10**6
    )
    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    line = error_line(Message(Error(code=2, reason=reason), reply_to=message))
    assert line.isprintable()
    assert len(line) <= 500


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


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (
            "<class 'fomoe_flwr.errors.ConfigError'>:<'data.path=x: no such file'>",
            "ConfigError: data.path=x: no such file",
        ),
        ("<class 'X'>:<'… Message: text'>", "text"),
        ("<class 'odd", "<class 'odd"),
    ],
)
def test_what_flower_wraps_around_an_error_is_taken_off(reason: str, line: str) -> None:
    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    assert error_line(Message(Error(code=2, reason=reason), reply_to=message)) == line
