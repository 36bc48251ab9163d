"""What code allocates, told without a GPU: it runs on tensors of the meta device, and every storage leaves its mark.

Liveness is Python's own: a storage is born in the call that makes it and dies where its last reference goes, exactly as
on a GPU. Three things are put in the place of what the meta device would do: an op of `kernels` allocates its results
and nothing else (its kernels keep the rest on chip; their statistics are below a megabyte), attention allocates its
result, as the fused kernels do, and a convolution of channels-last tensors gives channels-last.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .kernels.op import Op, in_place_of_ops

Change = tuple[int, int]  # number of a storage, and its bytes when it is born, 0 when it dies


class DryRun:
    """Inside `recording`, what is allocated and let go of on the meta device becomes `changes`, in order."""

    def __init__(self):
        self.changes: list[Change] = []
        self._alive: dict[int, int] = {}
        self._born = 0
        self._quiet = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records until the end of the block; what outlives it dies unseen."""
        with in_place_of_ops(self._op), torch.no_grad(), _Dispatch(self), _Attention():
            yield
        self._quiet = True

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before as allocated now, in this order, each storage once."""
        for tensor in tensors:
            self._note(tensor, set())

    @property
    def live(self) -> int:
        """Bytes that are alive."""
        sizes: dict[int, int] = {}
        for number, size in self.changes:
            if size:
                sizes[number] = size
            else:
                del sizes[number]
        return sum(sizes.values())

    def _op(self, op: Op, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._quiet = True
        try:
            given = _storages((args, kwargs))
            made = tree_map(lambda t: t if _key(t) in given else _dense(t), op.reference(*args, **kwargs))
        finally:
            self._quiet = False
        self._note(made, given)
        return made

    def _call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        made = func(*args, **kwargs)
        if self._quiet:
            return made
        if func is torch.ops.aten.convolution.default and args[0].is_contiguous(memory_format=torch.channels_last):
            made = made.contiguous(memory_format=torch.channels_last)
        self._note(made, _storages((args, kwargs)))
        return made

    def _note(self, made: Any, given: set[int]) -> None:
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor) or _key(tensor) in given or _key(tensor) in self._alive:
                continue
            self._born += 1
            self._alive[_key(tensor)] = self._born
            self.changes.append((self._born, tensor.numel() * tensor.element_size()))
            weakref.finalize(tensor.untyped_storage(), self._died, _key(tensor), self._born).atexit = False

    def _died(self, key: int, number: int) -> None:
        if self._alive.get(key) == number:
            del self._alive[key]
        if not self._quiet:
            self.changes.append((number, 0))


class _Dispatch(TorchDispatchMode):
    def __init__(self, run: DryRun):
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run._call(func, args, kwargs or {})


class _Attention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            batch, heads, length, channels = args[0].shape
            return args[0].new_empty(batch, length, heads, channels).transpose(1, 2)
        return func(*args, **(kwargs or {}))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _storages(values: Any) -> set[int]:
    return {_key(value) for value in tree_leaves(values) if isinstance(value, Tensor)}


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
