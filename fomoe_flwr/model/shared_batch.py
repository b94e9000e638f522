"""A batch that the devices of a site share: what a router reckons over the tokens of all of them.

Each device has as many tokens as every other. Without a group a device has the batch to itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the devices, without a gradient."""
    if group is None:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def averaged(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over the devices, with the gradient of this device's own.

    For gradients are averaged over the devices afterwards, and then what a function of the mean adds to them is its
    gradient at the mean.
    """
    if group is None:
        return x
    return x + (summed(x, group) / group.size() - x).detach()


@torch.no_grad()
def collected(x_TK: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all devices, one device's after the other's, without a gradient."""
    if group is None:
        return x_TK.detach()
    rows = [torch.empty_like(x_TK) for _ in range(group.size())]
    dist.all_gather(rows, x_TK.detach().contiguous(), group=group)
    return torch.cat(rows)
