"""The kernel seam: rows sorted by expert go in, each expert's output comes out. Every implementation passes one test.

Letters: P rows (token-expert pairs), E resident experts, I numbers in and O out, D d_model, H d_expert.
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


def grouped_linear(x_PI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """`W x` of every row by its expert, as one grouped matrix product.

    Args:
        x_PI: rows in the order of their experts.
        offsets_E: int32, end of each expert's rows. The last must be P: rows behind it would be left
            uninitialised by grouped_mm, in the output and in the gradient (pytorch#154557).

    Returns:
        y_PO in the compute dtype (autocast's where it is on).
    """
    dtype = _compute_dtype(x_PI)
    y_PO: Tensor = _DenseGradient.apply(  # type: ignore[no-untyped-call]
        F.grouped_mm(x_PI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), offs=offsets_E)
    )
    return y_PO


def loop_linear(x_PI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """The reference: one expert after the other.

    `unbind` and not `weight_EOI[e]`: indexing builds a gradient of all experts' size for each expert.
    """
    dtype, ends = _compute_dtype(x_PI), offsets_E.tolist()
    weights = weight_EOI.to(dtype).unbind(0)
    return torch.cat(
        [
            x_PI[start:end].to(dtype) @ weight_OI.T
            for start, end, weight_OI in zip([0, *ends[:-1]], ends, weights, strict=True)
        ]
    )


Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
LINEARS: dict[str, Linear] = {"grouped": grouped_linear, "loop": loop_linear}


def plain_experts(
    linear: Linear, x_PD: Tensor, up_EHD: Tensor, down_EDH: Tensor, offsets_E: Tensor
) -> Tensor:
    """Up-projection, SiLU, down-projection of every row by its expert (σ-MoE)."""
    return linear(F.silu(linear(x_PD, up_EHD, offsets_E)), down_EDH, offsets_E)


def rows_of(values_EO: Tensor, offsets_E: Tensor, num_rows: int) -> Tensor:
    """Each row's own of the experts' values (a bias): values_PO."""
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    return values_EO.repeat_interleave(counts_E, dim=0, output_size=num_rows)
