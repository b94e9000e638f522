"""Activations that are computed once more in the backward pass instead of being kept (train.recompute)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def kept_or_again(again: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives. With `again` its arguments alone are kept, and it is called again in the backward pass.

    Args:
        function: changes nothing but what it returns, and draws no random numbers.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not (again and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
