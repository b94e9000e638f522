"""Which device computes, with how many threads, in which precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch

from fomoe_flwr.config import DEVICE_RULE, RunConfig, is_device
from fomoe_flwr.errors import ConfigError


def resolve_device(device: str, key: str = "train.device") -> str:
    """`auto` is the GPU where there is one.

    Args:
        key: where the device was given, for the error line.

    Raises:
        ConfigError: a GPU is asked for that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if not is_device(device):
        raise ConfigError(f"{key}={device:.80}: allowed are {DEVICE_RULE}")
    if not torch.cuda.is_available():
        raise ConfigError(f"{key}={device}: PyTorch sees no GPU here; allowed are auto, cpu")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise ConfigError(
            f"{key}={device}: PyTorch sees {count} GPU{'s' * (count > 1)} here; allowed are auto, cpu, cuda, "
            f"cuda:0{f' to cuda:{count - 1}' * (count > 1)}"
        )
    return device


class Devices(NamedTuple):
    """What a site computes on."""

    device: str  # cpu, cuda or cuda:N; of several: cpu or cuda
    number: int = 1
    parallel: str = "ddp"
    domain: str = "1"


def resolve_devices(device: str, devices: str, key: str = "train.devices") -> int:
    """How many devices a site has; `auto`: all GPUs that PyTorch sees, one CPU.

    Args:
        device: as `resolve_device` gave it.
        key: where the number was given, for the error line.

    Raises:
        ConfigError: so many are not there.
    """
    # A GPU that is called by its number is one.
    single = device.startswith("cuda:")
    if devices == "auto":
        return torch.cuda.device_count() if device == "cuda" else 1
    count = int(devices)
    if single and count > 1:
        raise ConfigError(f"{key}={count}: {device} is one device; give cuda")
    if device == "cuda" and count > (there := torch.cuda.device_count()):
        raise ConfigError(f"{key}={count}: PyTorch sees {there} GPU{'s' * (there > 1)} here")
    return count


def gpus_of_a_site(config: RunConfig) -> float:
    """GPUs that Ray gives a simulated site (runtime=flower): by default as many as its devices, on a CPU none.

    Ray hides every other GPU from a site, and waits for ever for what the machine does not have.

    Raises:
        ConfigError: what is asked for is not there, or a site that needs a GPU gets none.
    """
    asked = {
        f"federation.sites: device of {site.name}" if site.device else "train.device": site.device
        or config.train.device
        for site in config.federation.sites
    }
    on_gpu = {key: device for key, device in asked.items() if resolve_device(device, key) != "cpu"}
    runtime, cores = config.runtime, os.cpu_count() or 1
    if runtime.cpus_per_site > cores:
        raise ConfigError(f"runtime.cpus_per_site={runtime.cpus_per_site}: at most this machine's {cores}")
    share = runtime.gpus_per_site
    if share is None:
        devices = [site.devices or config.train.devices for site in config.federation.sites]
        share = float(max(1 if count == "auto" else int(count) for count in devices)) if on_gpu else 0.0
    if on_gpu and share == 0:
        key, device = next(iter(on_gpu.items()))
        raise ConfigError(
            f"runtime.gpus_per_site=0: hides the GPU from the sites, which {key}={device} asks for; give a share of a "
            "GPU above 0, or train.device=cpu"
        )
    for key, device in on_gpu.items():
        if device not in ("auto", "cuda", "cuda:0") and share <= 1:
            raise ConfigError(
                f"{key}={device}: with runtime=flower a site sees only the GPU that Ray gives it, as cuda; use cuda"
            )
    if share > (count := torch.cuda.device_count()):
        raise ConfigError(f"runtime.gpus_per_site={share:g}: at most this machine's {count}")
    return share


def use_cpu(threads: int) -> None:
    """Set the number of CPU threads for this thread's operators (0 leaves it as it is), and flush denormals to zero.

    As a model becomes sure, the smallest probabilities of attention and softmax underflow into denormal numbers,
    with which x86 computes many times slower: at a site of the demo, after its 200 steps, a backward pass took
    190 ms instead of 80. A site does not restore these settings: sites may share a process, and one of the two is
    the whole process's.
    """
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def cpu_threads(threads: int) -> Iterator[None]:
    """Use so many CPU threads within the block (0: no change); the server evaluates with as many as a site has."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: str, dtype: str) -> AbstractContextManager[None]:
    """bf16 matrix products over fp32 weights, or nothing."""
    context: AbstractContextManager[None] = torch.autocast(
        torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == "bf16"
    )
    return context
