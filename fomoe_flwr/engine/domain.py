"""How large the domains of expert parallelism should be: HybridEP's stream model with what is measured here.

The model (`plan.hybridep`) wants four numbers of a layer: the bytes of tokens that a device sends to experts, the bytes
of its experts, its bandwidth, and the time before the experts, behind which they are gathered. All are measured in one
pass forward over made-up tokens of the run's shape.
"""

from __future__ import annotations

import logging
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_flwr.engine.device import autocast
from fomoe_flwr.messages import Task
from fomoe_flwr.model.base import LanguageModel
from fomoe_flwr.model.exchange import Domains
from fomoe_flwr.plan.hybridep import ExchangeCase, latency_s, share_of_domain

log = logging.getLogger("fomoe.site")

_PASSES = 3


def best_size(case: ExchangeCase) -> int:
    """Of the sizes that divide the devices, the one with the least time of a layer, forward and backward."""
    sizes = [size for size in range(1, case.workers + 1) if case.workers % size == 0]
    return min(sizes, key=lambda size: layer_s(case, size))


def layer_s(case: ExchangeCase, size: int) -> float:
    """Seconds of a layer without its experts' work, by the model."""
    return latency_s(case, share_of_domain(case.workers, size), backward=True)


def measured(module: LanguageModel, task: Task, domains: Domains, device: str, experts: int) -> ExchangeCase:
    """The case of this model on these devices, the same at each of them.

    Args:
        domains: of one device each.
        experts: parameters of the experts here, of all layers.
    """
    devices, layers = domains.across.size(), module.moe_layers
    rows = task.train.batch_size // task.train.micro_batches // devices
    tokens_BT = torch.randint(task.model.vocab_size, (rows, task.train.seq_len), device=device)
    waits: list[float] = []
    entered = 0.0

    def enter(*_: Any) -> None:
        nonlocal entered
        entered = _now(device)

    def reach(exchange: Any) -> Any:
        def timed(*arguments: Tensor) -> Tensor:
            waits.append(_now(device) - entered)
            result: Tensor = exchange(*arguments)
            return result

        return timed

    before = [moe.reach.exchange for moe in layers]
    hooks = [block.register_forward_pre_hook(enter) for block in module.blocks]
    module.eval()
    try:
        for moe in layers:
            moe.reach.exchange = reach(moe.reach.exchange)
        with torch.no_grad(), autocast(device, task.train.dtype):
            for _ in range(_PASSES):
                module(tokens_BT)
    finally:
        for moe, exchange in zip(layers, before, strict=True):
            moe.reach.exchange = exchange
        for hook in hooks:
            hook.remove()
    passed = _PASSES * len(layers)
    dispatched = domains.traffic.dispatched / passed
    own = experts * (2 if task.train.dtype == "bf16" else 4) / len(layers)
    sent, of_experts, pre_expert_s = _mean([dispatched, own, median(waits)], device)
    (bandwidth,) = _mean([_bandwidth(int(sent + of_experts), domains, device)], device)
    return ExchangeCase(sent, max(of_experts, 1.0), bandwidth, devices, pre_expert_s)


def _mean(numbers: list[float], device: str) -> list[float]:
    """Over the devices."""
    total = torch.tensor(numbers, device=device, dtype=torch.float32)
    dist.all_reduce(total)
    means: list[float] = (total / dist.get_world_size()).tolist()
    return means


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bandwidth(size: int, domains: Domains, device: str) -> float:
    """Bytes a second that a device can send to the others while they send to it, in messages of this size."""
    devices = domains.across.size()
    share = max(size // devices, 1)
    buffer = torch.zeros(share * devices, dtype=torch.uint8, device=device)
    into, seconds = torch.empty_like(buffer), []
    for _ in range(_PASSES):
        dist.barrier()
        began = _now(device)
        dist.all_to_all_single(into, buffer, group=domains.across)
        seconds.append(_now(device) - began)
    return share * (devices - 1) / median(seconds)
