"""A device that is not there is refused before anything starts; there is none here, so PyTorch is made to say so."""

from __future__ import annotations

import pytest
import torch

from fomoe_flwr.cli import check_job
from fomoe_flwr.engine.device import gpus_of_a_site, resolve_device
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.site.identity import device_of, node_settings
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
        resolve_device(*device_of(task, node_settings({"device": "cuda:1"})))


@pytest.mark.parametrize(
    ("count", "overrides", "share"),
    [
        (0, ["train.device=auto"], 0.0),
        (1, ["train.device=auto"], 1.0),
        (1, ["train.device=cuda"], 1.0),
        (1, ["train.device=cpu"], 0.0),
        (1, ["train.device=auto", "runtime.gpus_per_site=0.25"], 0.25),
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
