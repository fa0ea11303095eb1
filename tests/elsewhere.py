"""A device that is not the processor, played by the processor: what would fail on a GPU fails here, where there is none.

Tensors that were moved to `cuda` lie in ordinary memory, but say that they are there; operators that mix them with others,
and conversions to NumPy, are refused as torch refuses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

THERE = torch.device("cuda", 0)
_aten = torch.ops.aten
_MAY_MIX = {_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_MAY_MIX |= {_aten._index_put_impl_.default}


class _Memory:
    """Which storages are there; they are kept, so that no other takes the place of one."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}

    def has(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage()._cdata in self.held

    def put(self, tensor: Tensor, there: bool) -> None:
        storage = tensor.untyped_storage()
        if there:
            self.held[storage._cdata] = storage
        else:
            self.held.pop(storage._cdata, None)


class _Mixes(TorchDispatchMode):
    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [self.memory.has(tensor) for tensor in tensors]
        alone = any(not place and tensor.ndim > 0 for tensor, place in zip(tensors, there, strict=True))
        if any(there) and alone and func not in _MAY_MIX:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        result = func(*args, **(kwargs or {}))
        if func is _aten.copy_.default:
            return result
        if func in _MAY_MIX:
            there = there[:1]
        if any(there):
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.memory.put(leaf, True)
        return result


class _Places(TorchFunctionMode):
    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor) else None
        if first is not None:
            there = self.memory.has(first)
            if func == Tensor.device.__get__:
                return THERE if there else func(*args)
            if func == Tensor.is_cuda.__get__:
                return there
            if func in (Tensor.numpy, Tensor.__array__) and there:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            if func in (Tensor.cpu, Tensor.cuda, Tensor.to):
                return self._moved(func, args, kwargs, there)
            if func is Tensor.__deepcopy__:
                result = func(*args, **kwargs)
                self.memory.put(result, there)
                return result
        if (device := kwargs.get("device")) is not None:
            wanted = torch.device(device).type == "cuda"
            if wanted and isinstance(kwargs.get("generator"), torch.Generator):
                raise RuntimeError("expected a 'cuda' device type for generator but found 'cpu'")
            result = func(*args, **{**kwargs, "device": torch.device("cpu") if wanted else device})
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
                    self.memory.put(leaf, wanted)
            return result
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any], there: bool) -> Tensor:
        self_, *rest = args
        wanted = {Tensor.cpu: False, Tensor.cuda: True}.get(func)
        if wanted is None:
            place = kwargs.pop("device", None)
            for k, value in enumerate(rest):
                if isinstance(value, Tensor):
                    wanted, rest[k] = self.memory.has(value), value.dtype
                elif isinstance(value, (str, torch.device)):
                    place, rest[k] = value, None
            rest = [value for value in rest if isinstance(value, torch.dtype)]  # and not whether to wait, or to copy
            if place is not None:
                wanted = torch.device(place).type == "cuda"
            result = self_.to(*rest, **kwargs) if rest or kwargs else self_
        else:
            result = self_
        if wanted is None or wanted == there:
            if result is not self_:
                self.memory.put(result, there)
            return result
        if result.untyped_storage()._cdata == self_.untyped_storage()._cdata:
            result = self_.clone()
        self.memory.put(result, wanted)
        return result


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """While it is open, `cuda` is a device. Graphs are traced without it."""
    memory = _Memory()
    export = torch.export.export

    def quietly(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return export(*args, **kwargs)

    with mock.patch("torch.export.export", quietly), mock.patch("torch.cuda.synchronize"), _Mixes(memory), _Places(memory):
        yield
