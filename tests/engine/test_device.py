"""A device that is not there is refused before anything starts; there is none here, so PyTorch is made to say so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fomoe_flwr.cli import check_job
from fomoe_flwr.engine.device import Devices, gpus_of_a_site, resolve_device, resolve_devices
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.site.devices import devices_of
from fomoe_flwr.site.identity import node_settings
from tests.clients.helpers import task_of
from tests.conftest import Compose


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.mark.parametrize(
    ("count", "device", "allowed"),
    [
        (1, "cuda:5", "PyTorch sees 1 GPU here; allowed are auto, cpu, cuda, cuda:0$"),
        (2, "cuda:2", "PyTorch sees 2 GPUs here; allowed are auto, cpu, cuda, cuda:0 to cuda:1$"),
        (0, "cuda:0", "PyTorch sees no GPU here; allowed are auto, cpu$"),
        (1, "mps", "allowed are auto, cpu, cuda, cuda:N$"),
        (1, "cuda:-1", "allowed are auto, cpu, cuda, cuda:N$"),
    ],
)
def test_a_device_that_is_not_there_is_named_with_where_it_was_given(
    gpus, count: int, device: str, allowed: str
) -> None:
    gpus(count)
    with pytest.raises(ConfigError, match=f"^node-config device={device}: {allowed}"):
        resolve_device(device, "node-config device")


@pytest.mark.parametrize("runtime", ["local", "flower"])
def test_a_simulated_sites_device_is_looked_at_before_the_start(small: Compose, gpus, runtime: str) -> None:
    gpus(1)
    composed = small(
        "federation.num_sites=null",
        "federation.sites=[{name: a}, {name: b, device: 'cuda:3'}]",
        f"runtime={runtime}",
    )
    with pytest.raises(ConfigError, match=r"device of b=cuda:3: PyTorch sees 1 GPU"):
        check_job(composed)


def test_a_site_says_where_its_device_was_given(small: Compose, gpus) -> None:
    gpus(1)
    task = task_of(small().config, 0, residents=[], run="abc")
    with pytest.raises(ConfigError, match=r"^fomoe site --device=cuda:1: PyTorch sees 1 GPU"):
        devices_of(task, node_settings({"device": "cuda:1"}))


@pytest.mark.parametrize(
    ("device", "devices", "number"),
    [("cpu", "auto", 1), ("cpu", "3", 3), ("cuda", "auto", 4), ("cuda", "2", 2), ("cuda:3", "auto", 1)],
)
def test_how_many_devices_a_site_has(gpus, device: str, devices: str, number: int) -> None:
    gpus(4)
    assert resolve_devices(device, devices) == number


@pytest.mark.parametrize(
    ("device", "devices", "line"),
    [
        ("cuda", "5", "train.devices=5: PyTorch sees 4 GPUs here"),
        ("cuda:1", "2", "train.devices=2: cuda:1 is one device; give cuda"),
    ],
)
def test_devices_that_are_not_there(gpus, device: str, devices: str, line: str) -> None:
    gpus(4)
    with pytest.raises(ConfigError, match=f"^{line}$"):
        resolve_devices(device, devices)


def test_the_node_has_the_first_word_on_its_devices(small: Compose) -> None:
    overrides = ["train.devices=2", "train.parallel=ep", "train.ep_domain=2"]
    task = task_of(small(*overrides).config, 0, residents=[], run="abc")
    assert devices_of(task, node_settings({})) == Devices("cpu", 2, "ep", "2")
    told = node_settings({"devices": 3, "parallel": "fsdp"})
    assert devices_of(task, told) == Devices("cpu", 3, "fsdp", "2")
    of_the_file = replace(task, site=replace(task.site, devices="4"))
    assert devices_of(of_the_file, node_settings({})) == Devices("cpu", 4, "ep", "2")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"devices": "0"}, "node-config devices=0: allowed are auto or a number"),
        ({"parallel": "tp"}, "node-config parallel=tp: allowed are ddp, fsdp, ep"),
    ],
)
def test_devices_that_no_node_can_have(config: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        node_settings(config)


@pytest.mark.parametrize(
    ("count", "overrides", "share"),
    [
        (0, ["train.device=auto"], 0.0),
        (1, ["train.device=auto"], 1.0),
        (1, ["train.device=cuda"], 1.0),
        (1, ["train.device=cpu"], 0.0),
        (1, ["train.device=auto", "runtime.gpus_per_site=0.25"], 0.25),
        (4, ["train.device=cuda", "train.devices=2"], 2.0),
        (4, ["train.device=cuda:3", "runtime.gpus_per_site=4"], 4.0),
    ],
)
def test_ray_gives_a_site_a_gpu_where_it_computes_on_one(
    small: Compose, gpus, count: int, overrides: list[str], share: float
) -> None:
    gpus(count)
    assert gpus_of_a_site(small("runtime=flower", *overrides).config) == share


@pytest.mark.parametrize(
    ("count", "overrides", "line"),
    [
        (1, ["train.device=auto", "runtime.gpus_per_site=0"], "runtime.gpus_per_site=0: hides.*train.device=auto"),
        (1, ["train.device=cuda", "runtime.gpus_per_site=0"], "runtime.gpus_per_site=0: hides.*train.device=cuda"),
        (2, ["train.device=cuda:1"], "train.device=cuda:1: with runtime=flower a site sees only the GPU"),
        (1, ["train.device=cuda", "runtime.gpus_per_site=2"], "runtime.gpus_per_site=2: at most this machine's 1"),
        (0, ["runtime.gpus_per_site=1"], "runtime.gpus_per_site=1: at most this machine's 0"),
        (0, ["runtime.cpus_per_site=100000"], "runtime.cpus_per_site=100000: at most this machine's"),
    ],
)  # fmt: skip
def test_what_ray_would_hide_or_wait_for_is_refused(
    small: Compose, gpus, count: int, overrides: list[str], line: str
) -> None:
    gpus(count)
    with pytest.raises(ConfigError, match=line):
        check_job(small("runtime=flower", *overrides))
