"""Which node is which site: by name, by partition number, and never by guessing."""

from __future__ import annotations

import pytest

from clients.app import app
from fomoe_flwr.errors import RunError
from strategies.directory import SiteDirectory
from strategies.local_grid import LocalGrid

NAMES = ["a", "b", "c"]


def connect(node_configs: dict[int, dict[str, str]], nodes: int = 3, minimum: int = 3) -> dict[int, int]:
    grid = LocalGrid(app, nodes, node_configs=node_configs)
    try:
        return SiteDirectory(NAMES).connected(grid, minimum, timeout=1.0)
    finally:
        grid.close()


def test_a_simulated_node_is_the_site_of_its_partition_number() -> None:
    assert connect({}) == {0: 100, 1: 101, 2: 102}


def test_a_name_goes_before_a_number() -> None:
    assert connect({0: {"site": "c"}, 2: {"site": "a"}}) == {0: 102, 1: 101, 2: 100}


@pytest.mark.parametrize(
    ("node_configs", "nodes", "reason"),
    [
        ({0: {"site": "b"}}, 3, "both say they are site b"),
        ({0: {"site": "z"}}, 3, "node 100 is site 'z', which this federation does not have; it has a, b, c"),
        ({}, 4, "node 103 is site 3, which"),
        ({}, 2, "2 of 3 sites connected within 1 s"),
        (
            {1: {"colour": "red"}},
            3,
            "node 101 could not say which site it is: ConfigError: node-config colour",
        ),
    ],
)
def test_what_cannot_be_told_apart_stops_the_run(node_configs, nodes: int, reason: str) -> None:
    with pytest.raises(RunError, match=reason):
        connect(node_configs, nodes)
