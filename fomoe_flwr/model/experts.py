"""The kernel seam: rows sorted by expert go in, each expert's output comes out. Every implementation passes one test.

And a layer's whole way from tokens to tokens as one function, `experts_of_tokens`, for experts of the usual form.

Letters: T tokens, K experts a token, Q = T·K pairs, P rows (the pairs that stay), E resident experts, I numbers in and
O out, D d_model, H d_expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's where it is on. It does not reach grouped_mm, nor what an autograd function does inside."""
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
    dtype = compute_dtype(x_PI)
    y_PO: Tensor = _DenseGradient.apply(  # type: ignore[no-untyped-call]
        F.grouped_mm(x_PI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), offs=offsets_E)
    )
    return y_PO


def loop_linear(x_PI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """The reference: one expert after the other.

    `unbind` and not `weight_EOI[e]`: indexing builds a gradient of all experts' size for each expert.
    """
    dtype, ends = compute_dtype(x_PI), offsets_E.tolist()
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


# ----- the way of a token through its experts, as one function


class Dispatch(NamedTuple):
    """The pairs whose expert is here, sorted by expert; with `padded`, behind them those of ghosts."""

    pairs_P: Tensor  # which of the Q pairs
    offsets_E: Tensor  # int32, end of each expert's pairs
    padded: bool


class Activation(NamedTuple):
    """What experts make of their projections, element by element."""

    forward: Callable[[Sequence[Tensor]], Tensor]
    backward: Callable[
        [Tensor, Sequence[Tensor]], list[Tensor]
    ]  # gradients of the projections from the output's


def _silu_backward(grad: Tensor, projected: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ops.aten.silu_backward(grad, projected[0])]


def _swiglu_backward(grad: Tensor, projected: Sequence[Tensor]) -> list[Tensor]:
    gate, up = projected
    return [torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)]


SILU = Activation(lambda projected: F.silu(projected[0]), _silu_backward)
SWIGLU = Activation(lambda projected: F.silu(projected[0]) * projected[1], _swiglu_backward)


class Projections(NamedTuple):
    """Experts of the usual form: `down · activation(in_1 x, ...)`, without biases."""

    activation: Activation
    down_EDH: Tensor
    ins_EHD: Sequence[Tensor]


def experts_of_tokens(x_TD: Tensor, weights_TK: Tensor, pairs: Dispatch, experts: Projections) -> Tensor:
    """`y_T = Σ_k w_k · down(activation(in x_T))` over the pairs that stay, y_TD.

    The same numbers as gathering, `grouped_linear`, weighing and adding up, but what is kept for the backward pass is
    the projections alone, beside what is there anyway: rows are gathered again, and weights are multiplied with the
    hidden numbers and not with the outputs, of which none is kept (so has SonicMoE it, arXiv 2512.14080).

    What is behind the last offset is never computed: grouped_mm leaves it as it was. Such rows go nowhere.
    """
    dtype = compute_dtype(x_TD)
    y_TD: Tensor = _ExpertsOfTokens.apply(  # type: ignore[no-untyped-call]
        x_TD, weights_TK, pairs, experts.activation, dtype, experts.down_EDH, *experts.ins_EHD
    )
    return y_TD


class _ExpertsOfTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        pairs: Dispatch,
        activation: Activation,
        dtype: torch.dtype,
        down_EDH: Tensor,
        *ins_EHD: Tensor,
    ) -> Tensor:
        weights = [weight.to(dtype) for weight in (down_EDH, *ins_EHD)]
        x_PD = x_TD.to(dtype).index_select(0, _tokens(pairs, weights_TK))
        projected = [_rows(x_PD, weight_EHD.transpose(1, 2), pairs.offsets_E) for weight_EHD in weights[1:]]
        weights_P1 = weights_TK.flatten().index_select(0, pairs.pairs_P).unsqueeze(1)
        hidden_PH = (activation.forward(projected) * weights_P1).to(dtype)
        y_PD = _rows(hidden_PH, weights[0].transpose(1, 2), pairs.offsets_E)
        ctx.save_for_backward(x_TD, weights_TK, pairs.pairs_P, pairs.offsets_E, *projected, *weights)
        ctx.of = pairs.padded, activation, dtype, [down_EDH.dtype, *(tensor.dtype for tensor in ins_EHD)]
        return _added_up(y_PD.to(x_TD.dtype), pairs, weights_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        padded, activation, dtype, dtypes = ctx.of
        x_TD, weights_TK, pairs_P, offsets_E, *rest = ctx.saved_tensors
        projections = len(dtypes) - 1
        projected, (down_EDH, *ins_EHD) = rest[:projections], rest[projections:]
        pairs = Dispatch(pairs_P, offsets_E, padded)
        tokens_P = _tokens(pairs, weights_TK)
        weights_P1 = weights_TK.flatten().index_select(0, pairs_P).unsqueeze(1)
        grad_PD = grad_TD.to(dtype).index_select(0, tokens_P)
        hidden_PH = activation.forward(projected)
        gradients: list[Tensor] = []
        gradients.append(_matrices(grad_PD, (hidden_PH * weights_P1).to(dtype), offsets_E))
        grad_PH = _rows(grad_PD, down_EDH, offsets_E)
        del grad_PD
        weight_P = (grad_PH * hidden_PH).sum(1, dtype=weights_TK.dtype)
        if padded:
            weight_P = torch.where(_stays(pairs), weight_P, 0.0)
        weight_TK = (
            weights_TK.new_zeros(weights_TK.numel()).index_copy(0, pairs_P, weight_P).view_as(weights_TK)
        )
        of_projections = activation.backward((grad_PH * weights_P1).to(dtype), projected)
        del hidden_PH, grad_PH
        x_PD = x_TD.to(dtype).index_select(0, tokens_P)
        of_x_PD = None
        for grad_PH, weight_EHD in zip(of_projections, ins_EHD, strict=True):
            gradients.append(_matrices(grad_PH, x_PD, offsets_E))
            rows_PD = _rows(grad_PH, weight_EHD, offsets_E)
            of_x_PD = rows_PD if of_x_PD is None else of_x_PD + rows_PD
        assert of_x_PD is not None
        cast = [gradient.to(own) for gradient, own in zip(gradients, dtypes, strict=True)]
        x_grad_TD = _added_up(of_x_PD.to(x_TD.dtype), pairs, weights_TK)
        return x_grad_TD, weight_TK, None, None, None, *cast


def _tokens(pairs: Dispatch, weights_TK: Tensor) -> Tensor:
    return pairs.pairs_P // weights_TK.shape[1]


def _stays(pairs: Dispatch) -> Tensor:
    """Which of the rows are of experts that are here."""
    return torch.arange(len(pairs.pairs_P), device=pairs.pairs_P.device) < pairs.offsets_E[-1]


def _added_up(rows_PD: Tensor, pairs: Dispatch, weights_TK: Tensor) -> Tensor:
    """Sums of the rows of each token, [T, D]. Rows of ghosts, which nobody computed, go to one more that is dropped."""
    tokens, (count, width) = _tokens(pairs, weights_TK), (len(weights_TK), rows_PD.shape[1])
    if not pairs.padded:
        return rows_PD.new_zeros(count, width).index_add(0, tokens, rows_PD)
    tokens = torch.where(_stays(pairs), tokens, count)
    return rows_PD.new_zeros(count + 1, width).index_add(0, tokens, rows_PD)[:count]


def _rows(x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """Each row times its expert's matrix, [P, O]; what is behind the last offset is whatever the memory held."""
    return F.grouped_mm(x_PI, weight_EIO, offs=offsets_E)


def _matrices(left_PO: Tensor, right_PI: Tensor, offsets_E: Tensor) -> Tensor:
    """`leftᵀ · right` over each expert's rows, [E, O, I]; zeros for an expert without rows."""
    return F.grouped_mm(left_PO.T, right_PI, offs=offsets_E)
