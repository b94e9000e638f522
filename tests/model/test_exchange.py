"""Experts that are spread over devices: every domain size gives the same numbers, and sends what HybridEP's model says.

Four processes on the CPU; each compares with all experts computed where the tokens are, in fp64.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from fomoe_flwr.engine.several import shares
from fomoe_flwr.engine.team import LOOPBACK, join
from fomoe_flwr.model.exchange import Domains, Gathering, domains_of, exchanged
from fomoe_flwr.model.experts import loop_linear, plain_experts
from fomoe_flwr.plan.hybridep import ExchangeCase, all_gather_s, all_to_all_s, share_of_domain

DEVICES = 4
D, H = 6, 5
SIZES = [1, 2, 4]


def stacks(num_experts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(num_experts, *shape, dtype=torch.float64, generator=generator)
        for shape in ((H, D), (D, H))
    )  # type: ignore[return-value]


def rows_of(rank: int, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows x_PD, the ends of each expert's, and by what the outputs are multiplied to make a loss."""
    generator = torch.Generator().manual_seed(10 + rank)
    ends_E = torch.tensor(counts).cumsum(0).to(torch.int32)
    x_PD, factor_PD = (
        torch.randn(sum(counts), D, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return x_PD.requires_grad_(), ends_E, factor_PD


def through_devices(
    domains: Domains, rank: int, counts: list[int]
) -> tuple[Tensor, Tensor, list[Tensor], slice]:
    """Outputs, the gradient of the rows and those of the weights here, and which slots these are."""
    num_experts = len(counts)
    ends = shares(num_experts, DEVICES)
    own = slice(ends[rank - 1] if rank else 0, ends[rank])
    up_EHD, down_EDH = (nn.Parameter(stack[own].clone()) for stack in stacks(num_experts))
    gathering = Gathering(domains, [up_EHD, down_EDH], ends)

    def experts(x_PD: Tensor, offsets_E: Tensor) -> Tensor:
        if domains.size == 1:
            return plain_experts(loop_linear, x_PD, up_EHD, down_EDH, offsets_E)
        return plain_experts(loop_linear, x_PD, gathering(up_EHD), gathering(down_EDH), offsets_E)

    x_PD, ends_E, factor_PD = rows_of(rank, counts)
    if domains.size > 1:
        gathering.begin()
    y_PD = (
        experts(x_PD, ends_E)
        if domains.size == DEVICES
        else exchanged(experts, x_PD, ends_E, domains=domains, ends=ends)
    )
    (y_PD * factor_PD).sum().backward()
    gathering.finish(1)
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in (up_EHD, down_EDH)]
    assert x_PD.grad is not None
    return y_PD.detach(), x_PD.grad, gradients, own


def check_numbers(domains: Domains, rank: int, by_rank: list[list[int]]) -> None:
    y_PD, grad_PD, gradients, own = through_devices(domains, rank, by_rank[rank])
    wanted = [torch.zeros_like(stack) for stack in stacks(len(by_rank[0]))]
    for other, counts in enumerate(by_rank):
        weights = [stack.requires_grad_() for stack in stacks(len(counts))]
        x_PD, ends_E, factor_PD = rows_of(other, counts)
        there_PD = plain_experts(loop_linear, x_PD, *weights, ends_E)
        (there_PD * factor_PD).sum().backward()
        for total, weight in zip(wanted, weights, strict=True):
            if weight.grad is not None:
                total += weight.grad
        if other == rank:
            torch.testing.assert_close(y_PD, there_PD.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad_PD, x_PD.grad, rtol=1e-12, atol=1e-12)
    for gradient, total in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, total[own], rtol=1e-12, atol=1e-12)


def check_bytes(rank: int, size: int) -> None:
    """With as many rows for each expert; HybridEP's formulas are for one layer and one direction."""
    per_expert, experts_here = 3, 2
    counts = [per_expert] * experts_here * DEVICES
    domains = domains_of(rank, DEVICES, size)
    through_devices(domains, rank, counts)
    traffic = domains.traffic
    assert traffic.dispatched == (0 if size == DEVICES else sum(counts) * D * 8)
    case = ExchangeCase(
        dispatch_bytes=sum(counts) * D * 8,
        expert_bytes=experts_here * 2 * D * H * 8,
        bandwidth_bytes_per_s=1.0,
        workers=DEVICES,
        pre_expert_s=0.0,
    )
    share = share_of_domain(DEVICES, size)
    # There and back, forward and backward; weights there, gradients back.
    assert traffic.tokens == pytest.approx(4 * all_to_all_s(case, share), abs=1e-6)
    assert traffic.experts == pytest.approx(2 * all_gather_s(case, share), abs=1e-6)


def work(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    join(rank, DEVICES, "cpu", file)
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        domains = domains_of(rank, DEVICES, size)
        for num_experts in (8, 4, 5, 3, 1):
            by_rank = [
                torch.randint(0, 4, (num_experts,), generator=generator).tolist() for _ in range(DEVICES)
            ]
            check_numbers(domains, rank, by_rank)
        # Nobody has a token for anybody, and everybody for one.
        check_numbers(domains, rank, [[0] * 4] * DEVICES)
        check_numbers(domains, rank, [[0, 0, 7, 0]] * DEVICES)
        check_bytes(rank, size)
    dist.barrier()
    dist.destroy_process_group()


def test_every_domain_size_gives_the_same_numbers_and_the_model_s_bytes(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=DEVICES)
