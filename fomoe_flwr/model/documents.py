"""Attention that does not look across the boundaries of documents (data.document_mask).

A sequence is cut from documents laid end to end, each with an end token, so the tokens themselves say where one ends:
nothing travels with a batch. An end token belongs to the document that it ends. Positions go on through a sequence:
RoPE sees differences of positions alone, and within a document these are the same.

Letters: B sequences, S positions, N heads, W width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def documents_of(tokens_BS: Tensor, end: int) -> Tensor:
    """Number of each token's document within its sequence, document_BS."""
    ends_BS = (tokens_BS == end).long()
    return ends_BS.cumsum(1) - ends_BS


def allowed(document_BS: Tensor, window: int | None = None) -> Tensor:
    """Which key (last) each query may look at, allowed_B1SS: those before it, and itself, of its own document.

    Args:
        window: only so many, itself among them.
    """
    positions_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    distance_SS = positions_S[:, None] - positions_S
    near_SS = distance_SS >= 0
    if window is not None:
        near_SS = near_SS & (distance_SS < window)
    return ((document_BS[:, :, None] == document_BS[:, None, :]) & near_SS)[:, None]


def added(allowed_B1SS: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that the others have no weight. Made once for all layers, in the dtype of the queries:
    else each layer would make one of its own, and keep it."""
    nothing = torch.zeros((), dtype=dtype, device=allowed_B1SS.device)
    return torch.where(allowed_B1SS, nothing, torch.full_like(nothing, -torch.inf))


# What `attend` takes: nothing, what is added to scores, or FlexAttention's blocks.
Mask = Any


def mask_of(tokens_BS: Tensor, end: int | None, width: int, dtype: torch.dtype) -> Mask:
    """For `attend`; None: a sequence is one document.

    On a GPU FlexAttention passes over the blocks of keys of other documents, if a head's width suits it.

    Args:
        width: of a head.
        dtype: of the queries.
    """
    if end is None:
        return None
    document_BS = documents_of(tokens_BS, end)
    if tokens_BS.is_cuda and width >= 16 and width & (width - 1) == 0:
        return _blocks(document_BS)
    return added(allowed(document_BS), dtype)


def _blocks(document_BS: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def may(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BS[b, query] == document_BS[b, key])

    batch, positions = document_BS.shape
    return create_block_mask(may, batch, None, positions, positions, device=document_BS.device)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def attend(q_BNSW: Tensor, k_BNSW: Tensor, v_BNSW: Tensor, mask: Mask) -> Tensor:
    """Causal attention, y_BNSW.

    Args:
        mask: `mask_of`.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q_BNSW, k_BNSW, v_BNSW, is_causal=True)
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q_BNSW, k_BNSW, v_BNSW, attn_mask=mask)
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        y_BNSW: Tensor = flex_attention(q_BNSW, k_BNSW, v_BNSW, block_mask=mask)
        return y_BNSW
    return _compiled()(q_BNSW, k_BNSW, v_BNSW, block_mask=mask)
