"""Bytes that are alive during a step, counted on tensors without content.

Under `FakeTensorMode` a step runs through every operation of the real one, forwards and backwards, with shapes alone:
each tensor that an operation makes is known by its storage, and a weak reference says when it is let go. What is
counted is what the program holds; a GPU's allocator rounds up, and kernels have work space of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, `now()` is the bytes of all tensors made so far that are still held; `peak` the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._outside: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._held:
                self._leave_out(tensor)  # a weight, or the batch: not made here
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        if self._bytes > self.peak:
            self.peak = max(self.peak, self.now())
        return made

    def now(self) -> int:
        """Bytes that are alive."""
        for key in [key for key, (storage, _) in self._held.items() if storage.expired()]:
            self._free(key)
        return self._bytes

    def forget(self, tensor: Tensor) -> None:
        """Count `tensor` no longer: somebody else does."""
        self._free(_key(tensor))
        self._leave_out(tensor)

    def _hold(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key not in self._held and key not in self._outside:
            storage = tensor.untyped_storage()
            self._held[key] = StorageWeakRef(storage), storage.nbytes()
            self._bytes += storage.nbytes()

    def _leave_out(self, tensor: Tensor) -> None:
        # The reference also keeps the address from being another tensor's later.
        self._outside.setdefault(_key(tensor), StorageWeakRef(tensor.untyped_storage()))

    def _free(self, key: int) -> None:
        if found := self._held.pop(key, None):
            self._bytes -= found[1]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def without_content(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give every parameter and buffer of `module` a tensor of the same shape, in place.

    To be called under `FakeTensorMode`, after `module` was built on the meta device: it then holds fake CPU tensors,
    on which operations choose the paths that they choose on real ones. Tied parameters stay tied.

    Args:
        module: whatever is to run.
        dtype: of its floats; None: as they are.
    """
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                    made[id(made[id(parameter)])] = made[id(parameter)]
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)
