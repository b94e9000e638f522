"""Which device computes, with how many threads, in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from fomoe_flwr.errors import ConfigError


def resolve_device(device: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"train.device={device}: PyTorch sees no GPU here; allowed are auto, cpu")
    return device


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
