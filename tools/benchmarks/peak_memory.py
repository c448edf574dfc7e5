"""Peak memory of anything PyTorch runs, counted at the dispatcher: on real tensors, or on fake ones of any size.

What is counted is what the operators return: the bytes of every storage that is alive. A kernel's private scratch
memory and an allocator's rounding are not seen.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within it, `live` is the bytes of all tensors that were tracked or made since and are still alive, `peak` the
    most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def track(self, *tensors: torch.Tensor) -> None:
        """Count the storages of `tensors`, each once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                continue
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.track(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result
