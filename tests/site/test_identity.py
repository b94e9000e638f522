"""Which site a node is, and what its operator may override."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.errors import ConfigError
from fomoe_flwr.messages import Task
from fomoe_flwr.site.devices import devices_of
from fomoe_flwr.site.identity import data_of, node_settings, state_folder
from tests.clients.helpers import task_of
from tests.conftest import Compose


@pytest.fixture
def task(small: Compose) -> Task:
    config = small("federation=labs", "strategy.overlap=2").config
    return task_of(config, 0, residents=[[0, 1], [2, 3]], run="abc", run_dir="/server/run")


def test_the_nodes_word_goes_before_the_files_and_the_files_before_the_defaults(small: Compose) -> None:
    config = small(
        "federation.num_sites=null", "federation.sites=[{name: a, device: cuda}, {name: b}]"
    ).config
    first, second = (task_of(config, site, residents=[], run="abc") for site in (0, 1))
    for task, told, line in (
        (first, {"device": "cuda:1"}, "fomoe site --device=cuda:1"),
        (first, {}, "federation.sites: device of a=cuda"),
    ):
        with pytest.raises(ConfigError, match=f"^{line}: PyTorch sees no GPU here"):
            devices_of(task, node_settings(told))
    assert devices_of(second, node_settings({})).device == "cpu"


def test_a_node_may_keep_its_data_and_cache_elsewhere(task: Task) -> None:
    settings = node_settings({"site": "datacentre", "data-path": "/mnt/text", "cache-dir": "/mnt/cache"})
    data = data_of(task, settings)
    assert (data.path, data.cache_dir) == ("/mnt/text", "/mnt/cache")
    assert data_of(task, node_settings({})) == task.data
    assert node_settings({"store-dir": "/mnt/moe"}).store_dir == "/mnt/moe"
    assert node_settings({}).store_dir is None


def test_state_lives_with_the_run_in_a_simulation_and_with_the_site_in_a_deployment(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/home/x/state")
    assert state_folder(task, node_settings({"partition-id": 0})) == Path("/server/run/sites/datacentre")
    assert state_folder(task, node_settings({})) == Path("/home/x/state/fomoe-flwr/abc/datacentre")
    assert state_folder(task, node_settings({"state-dir": "/mnt"})) == Path("/mnt/abc/datacentre")


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"node-config sight: unknown key; allowed are site, device"):
        node_settings({"sight": "a"})


def test_how_long_a_worker_may_be_silent_can_be_set() -> None:
    assert node_settings({}).stall_s == 600.0
    assert node_settings({"stall-s": 30}).stall_s == 30.0
    for wrong in (0, -1.0, "soon", True, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"node-config stall-s=.*: must be a number of seconds above 0"):
            node_settings({"stall-s": wrong})
