"""The kernel seam: rows sorted by expert go in, each expert's output comes out. Every implementation passes one test.

Letters: P rows (token-expert pairs), E resident experts, D d_model, H d_expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm's backward refuses the zero-stride one of a plain sum()."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # contiguous() takes the strides of an empty tensor for good, grouped_mm does not.
        return grad.contiguous() if grad.numel() else grad.new_zeros(grad.shape)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast does not reach grouped_mm, so the seam asks it for the dtype and casts by itself."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_experts(x_PD: Tensor, up_EHD: Tensor, down_EDH: Tensor, offsets_E: Tensor) -> Tensor:
    """Up-projection, SiLU, down-projection of every row by its expert, as two grouped matrix products.

    Args:
        x_PD: rows in the order of their experts.
        offsets_E: int32, end of each expert's rows. The last must be P: rows behind it would be left
            uninitialised by grouped_mm, in the output and in the gradient (pytorch#154557).

    Returns:
        y_PD in the compute dtype (autocast's where it is on).
    """
    dtype = _compute_dtype(x_PD)
    up_EDH, down_EHD = up_EHD.to(dtype).transpose(1, 2), down_EDH.to(dtype).transpose(1, 2)
    hidden_PH = F.silu(F.grouped_mm(x_PD.to(dtype), up_EDH, offs=offsets_E))
    y_PD: Tensor = _DenseGradient.apply(  # type: ignore[no-untyped-call]
        F.grouped_mm(hidden_PH, down_EHD, offs=offsets_E)
    )
    return y_PD


def loop_experts(x_PD: Tensor, up_EHD: Tensor, down_EDH: Tensor, offsets_E: Tensor) -> Tensor:
    """The reference: one expert after the other.

    `unbind` and not `up_EHD[e]`: indexing builds a gradient of all experts' size for each expert.
    """
    dtype = _compute_dtype(x_PD)
    ups, downs = up_EHD.to(dtype).unbind(0), down_EDH.to(dtype).unbind(0)
    ends = offsets_E.tolist()
    parts = [
        F.silu(x_PD[start:end].to(dtype) @ up_HD.T) @ down_DH.T
        for start, end, up_HD, down_DH in zip([0, *ends[:-1]], ends, ups, downs, strict=True)
    ]
    return torch.cat(parts)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "grouped": grouped_experts,
    "loop": loop_experts,
}
