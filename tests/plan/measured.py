"""What is alive in the memory of a step, tensor by tensor: not computed from shapes, but seen."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operators make, from when they are made until nobody holds them.

    What an operator takes inside of itself is not seen.

    Args:
        known: tensors that were there before, which do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        # A storage that dies gives its number back, for another one to have.
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self._seen:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._seen[number]

        self._seen[number] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
