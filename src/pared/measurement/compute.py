"""Multiply-adds and activation memory of one call, counted on the operators that really run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pared.graph.module import ProgramModule
from pared.measurement.mode import evaluating, without_fused_attention_layers
from pared.site import Decoded, plain

aten = torch.ops.aten


@dataclass(frozen=True)
class Compute:
    """What one call of a model computes.

    Args:
        macs: multiply-adds (one MAC = one multiplication and one addition) of convolutions, matrix products,
            attention and recurrent layers; element-wise operators are not counted.
        macs_by_path: the same, by path of the module whose weight takes part; for products of activations, the module
            that computes them. A model without modules of its own has them under the paths of its weights.
        peak_activation_bytes: the largest sum of activations alive at one time when the operators run one by one in
            the order of the call and each result is freed after its last use; inputs and outputs count.
    """

    macs: int
    macs_by_path: dict[str, int]
    peak_activation_bytes: int


def compute(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    call: Callable[[nn.Module], Any] | None = None,
) -> Compute:
    """MACs and activation memory of one call, with coded weights decoded beforehand.

    Args:
        args, kwargs: the arguments of the call.
        call: `(model) -> outputs`, where calling `model(*args, **kwargs)` is not right.
    """
    if any(isinstance(module, Decoded) for module in model.modules()):
        model = plain(model)
    run = call or (lambda network: network(*args, **(kwargs or {})))
    recorder = _Recorder(model)
    with evaluating(model), without_fused_attention_layers(), recorder.following(model), torch.no_grad(), recorder:
        outputs = run(model)
    recorder.keep_to_the_end(outputs)
    # a model loaded without its class keeps its tensors under `root`, at the paths of the original
    prefix = "root." if isinstance(model, ProgramModule) else ""
    by_path = {path.removeprefix(prefix): count for path, count in recorder.macs.items() if count}
    return Compute(sum(by_path.values()), by_path, recorder.peak_bytes())


def macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of `model(*args, **kwargs)`; divide by the batch for those of one example.

    >>> macs(nn.Linear(8, 4), torch.zeros(3, 8))
    96
    """
    return compute(model, args, kwargs).macs


def _product(left: Any, right: Any) -> int:
    """(…, n, k) · (…, k, m); k and the batch are read from the left, m from the right."""
    return left.numel() * (right.shape[-1] if right.ndim > 1 else 1)


def _convolution(result: Any, x: Tensor, weight: Tensor, transposed: bool) -> int:
    per_position = prod(weight.shape[1:])  # channels of one group * kernel
    return (x.numel() if transposed else result.numel()) * per_position


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """(batch, heads, length, width) each; scores and weighted sum."""
    return prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(x: Tensor, weights: list[Tensor]) -> int:
    """(steps, batch, n), either order: every weight matrix is applied once per step and example."""
    return prod(x.shape[:-1]) * sum(w.numel() for w in weights if w.ndim == 2)


_Count = Callable[[Any, tuple[Any, ...]], int]

_COUNTS: dict[str, _Count] = {
    "mm": lambda r, a: _product(a[0], a[1]),
    "mv": lambda r, a: a[0].numel(),
    "dot": lambda r, a: a[0].numel(),
    "vdot": lambda r, a: a[0].numel(),
    "bmm": lambda r, a: _product(a[0], a[1]),
    "_int_mm": lambda r, a: _product(a[0], a[1]),
    "_scaled_mm": lambda r, a: _product(a[0], a[1]),
    "addmm": lambda r, a: _product(a[1], a[2]),
    "_addmm_activation": lambda r, a: _product(a[1], a[2]),
    "addmv": lambda r, a: a[1].numel(),
    "baddbmm": lambda r, a: _product(a[1], a[2]),
    "addbmm": lambda r, a: _product(a[1], a[2]),
    "linear": lambda r, a: a[0].numel() * a[1].shape[0],
    "mkldnn_linear": lambda r, a: a[0].numel() * a[1].shape[0],
    "_trilinear": lambda r, a: prod(torch.broadcast_shapes(*(_expanded(a[i], a[3 + i]) for i in range(3)))),
    "convolution": lambda r, a: _convolution(r, a[0], a[1], a[6]),
    "_convolution": lambda r, a: _convolution(r, a[0], a[1], a[6]),
    "mkldnn_convolution": lambda r, a: _convolution(r, a[0], a[1], False),
    "cudnn_convolution": lambda r, a: _convolution(r, a[0], a[1], False),
    "_scaled_dot_product_flash_attention": lambda r, a: _attention(*a[:3]),
    "_scaled_dot_product_flash_attention_for_cpu": lambda r, a: _attention(*a[:3]),
    "_scaled_dot_product_efficient_attention": lambda r, a: _attention(*a[:3]),
    "_scaled_dot_product_cudnn_attention": lambda r, a: _attention(*a[:3]),
    "_scaled_dot_product_fused_attention_overrideable": lambda r, a: _attention(*a[:3]),
    "_scaled_dot_product_attention_math_for_mps": lambda r, a: _attention(*a[:3]),
    "mkldnn_rnn_layer": lambda r, a: _recurrent(a[0], [a[1], a[2]]),
    "_cudnn_rnn": lambda r, a: _recurrent(a[0], a[1]),
    "miopen_rnn": lambda r, a: _recurrent(a[0], a[1]),
    "_lstm_mps": lambda r, a: _recurrent(a[0], a[2]),
}


def _expanded(tensor: Tensor, new_axes: list[int]) -> tuple[int, ...]:
    shape = list(tensor.shape)
    for axis in new_axes:
        shape.insert(axis, 1)
    return tuple(shape)


def _key(tensor: Tensor) -> int | None:
    """The identity of the memory behind a tensor, None where there is no one memory (sparse layouts)."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


class _Recorder(TorchDispatchMode):
    """Counts the MACs of every operator, and notes which storages it makes and uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: dict[str, int] = defaultdict(int)
        self._owner: dict[int, str] = {}
        for path, module in model.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and (key := _key(tensor)) is not None:
                    self._owner.setdefault(key, path)
        self._calling = [""]
        self._step = 0
        self._bytes: dict[int, int] = {}
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}
        # a storage's address is not given away again while a weak reference to it lives
        self._references: list[StorageWeakRef] = []

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Know which module is being called."""
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: self._calling.append(path)))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self, *_: Any) -> None:
        self._calling.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name not in _COUNTS:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._step += 1
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in _COUNTS:
            owners = (self._owner.get(key) for t in tensors if (key := _key(t)) is not None)
            path = next((owner for owner in owners if owner is not None), self._calling[-1])
            self.macs[path] += _COUNTS[name](result, (*args, *kwargs.values()))
        for tensor in tensors:
            self._used(tensor, 0)  # what nobody has made so far is an input: there from the start
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._used(tensor, self._step)
        return result

    def _used(self, tensor: Tensor, first: int) -> None:
        key = _key(tensor)
        if key is None or key in self._owner:
            return
        storage = tensor.untyped_storage()
        if key not in self._bytes:
            self._references.append(StorageWeakRef(storage))
            self._first[key] = first
        self._bytes[key] = storage.nbytes()
        self._last[key] = self._step

    def keep_to_the_end(self, outputs: Any) -> None:
        for tensor in pytree.tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) in self._last:
                self._last[key] = self._step

    def peak_bytes(self) -> int:
        change = [0] * (self._step + 2)
        for key, size in self._bytes.items():
            change[self._first[key]] += size
            change[self._last[key] + 1] -= size
        alive = peak = 0
        for difference in change:
            alive += difference
            peak = max(peak, alive)
        return peak
