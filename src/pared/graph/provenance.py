"""Where the numbers in a program come from: from attributes of modules, from shapes of tensors, or out of thin air."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pared.graph.operators import Ref
from pared.graph.program import Program
from pared.site import meta_copy


@dataclass(frozen=True)
class Attribute:
    """A whole number that a module keeps; `place` counts in a tuple or list of them."""

    module: str
    name: str
    place: int | None


@dataclass(frozen=True)
class Extent:
    """The size of an axis of a value of the program; `item` counts among several results."""

    value: int
    item: int | None
    axis: int


@dataclass(frozen=True)
class Combined:
    """Two numbers multiplied ("mul") or divided ("floordiv"); a plain int stands for itself."""

    op: str
    left: Origin
    right: Origin
    sizes: tuple[int, int]


Origin = Attribute | Extent | Combined | int
"""Where a number comes from; an int came without one."""


@dataclass(frozen=True)
class _Seen:
    """An axis of the result of call number `call`, before it is known which value of the program that is."""

    call: int
    item: int | None
    axis: int


class Number(int):
    """An int that knows where it comes from."""

    origin: Any
    compared: ClassVar[list[tuple[Any, Any]]] = []

    @classmethod
    def of(cls, value: int, origin: Any) -> Number:
        made = cls(value)
        made.origin = origin
        return made

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Number) and int(self) == int(other):
            self.compared.append((self.origin, other.origin))
        return int.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> Number:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _combining(name: str, turned: bool) -> Any:
    function = getattr(operator, name)

    def combine(self: Number, other: Any) -> Any:
        a, b = (other, self) if turned else (self, other)
        if not isinstance(other, int) or isinstance(other, bool):
            plain = (other, int(self)) if turned else (int(self), other)
            return function(*plain)
        value = function(int(a), int(b))
        origins = [n.origin if isinstance(n, Number) else int(n) for n in (a, b)]
        return Number.of(value, Combined(name, origins[0], origins[1], (int(a), int(b))))

    return combine


for _name in ("mul", "floordiv"):
    setattr(Number, f"__{_name}__", _combining(_name, False))
    setattr(Number, f"__r{_name}__", _combining(_name, True))


@final
class Provenance:
    """The numbers of a program with their origins, from one run of the model with numbers that remember, on the meta device
    where that goes.

    The run is aligned with the program by the kinds and the shapes of what is computed, in order.

    Args:
        program, shapes: as traced; the shape of every value.
        model: in eval mode.
        args, kwargs: the example call.
    """

    def __init__(
        self, program: Program, shapes: list[Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.program, self.shapes = program, shapes
        self.calls = _calls_on_meta(model, args, kwargs) or _calls(model, _clones(args), _clones(kwargs))
        self._compared = list(Number.compared)
        self.values = self._align()

    def _align(self) -> list[int | None]:
        """For every call of the run the value of the program that it gave."""
        first = self.program.first_node
        theirs = [
            (_kind(node.op.split(".")[1]), _shapes_of(self.shapes[first + k])) for k, node in enumerate(self.program.nodes)
        ]
        numbers = [k for k, (kind, _) in enumerate(theirs) if kind != "item"]
        ours = [(call.kind, call.shapes) for call in self.calls]
        found: list[int | None] = [None] * len(ours)
        for i, j in _common(ours, [theirs[k] for k in numbers]):
            found[i] = first + numbers[j]
        return found

    def numbers(self) -> Iterator[tuple[int, list[tuple[int, Origin]]]]:
        """Node by node: the numbers among the arguments (value, origin), in order."""
        for call, value in zip(self.calls, self.values):
            if value is not None and call.numbers:
                found = [(int(n), self._resolved(n.origin) if isinstance(n, Number) else int(n)) for n in call.numbers]
                node: int | None = value - self.program.first_node
                yield node, found  # type: ignore[misc]
                while call.kind == "slice" and node is not None:
                    above = self.program.nodes[node].args[0]
                    node = self.program.node_of(above) if isinstance(above, Ref) else None
                    if node is None or _kind(self.program.nodes[node].op.split(".")[1]) != "slice":
                        break
                    yield node, found

    def equal(self) -> Iterator[tuple[Attribute, Origin]]:
        """What the code compared with an attribute and found equal."""
        for a, b in self._compared:
            for one, other in ((a, b), (b, a)):
                if isinstance(one, Attribute):
                    yield one, self._resolved(other)

    def _resolved(self, origin: Any) -> Origin:
        if isinstance(origin, _Seen):
            value = self.values[origin.call]
            return Extent(value, origin.item, origin.axis) if value is not None else -1
        if isinstance(origin, Combined):
            return Combined(origin.op, self._resolved(origin.left), self._resolved(origin.right), origin.sizes)
        found: Origin = origin
        return found


def _calls_on_meta(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[_Called]:
    """The same without computing anything; none where the model's code asks for values, or somebody's hooks would see none."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return []
    try:
        return _calls(meta_copy(model), _on_meta(args), _on_meta(kwargs))
    except Exception:  # whatever the model's code does with its values
        return []


def _calls(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[_Called]:
    watch = _Watch()
    Number.compared.clear()
    with _remembering(model), torch.no_grad(), _transparent(), watch:
        model(*args, **kwargs)
    return watch.calls


def _common(a: list[Any], b: list[Any]) -> list[tuple[int, int]]:
    """The pairs of the longest common subsequence."""
    known: dict[Any, int] = {}
    x, y = (np.array([known.setdefault(key, len(known)) for key in keys], np.int64) for keys in (a, b))
    best = np.zeros((len(x) + 1, len(y) + 1), np.int32)
    for i, key in enumerate(x):
        best[i + 1, 1:] = np.maximum.accumulate(np.maximum(best[i, 1:], best[i, :-1] + (y == key)))
    pairs = []
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1] and best[i, j] == best[i - 1, j - 1] + 1:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif best[i - 1, j] >= best[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


@dataclass(frozen=True)
class _Called:
    kind: str
    shapes: Any
    numbers: list[int]


_KINDS: Mapping[str, str] = {
    name: kind
    for kind, names in {
        "view": "view reshape _unsafe_view flatten unflatten ravel view_as reshape_as",
        "turn": "permute transpose t mT swapaxes swapdims movedim moveaxis",
        "pieces": "split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split unbind",
        "product": "linear matmul mm bmm addmm baddbmm einsum",
        "conv": "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
        "slice": "slice select narrow index getitem",
        "spread": "expand expand_as broadcast_to repeat tile repeat_interleave",
        "norm": "layer_norm group_norm batch_norm rms_norm instance_norm",
        "join": "cat concat concatenate stack",
        "item": "operator.getitem",
    }.items()
    for name in names.split()
}


def _kind(name: str) -> str:
    return _KINDS.get(name, "")


def _shapes_of(shape: Any) -> Any:
    return tuple(_shapes_of(s) for s in shape) if isinstance(shape, list) else shape


@final
class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Called] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" and func == torch.Tensor.shape.__get__:  # type: ignore[attr-defined]
            return torch.Size(self._sizes(args[0]))
        if func is torch.Tensor.size:
            sizes = self._sizes(args[0])
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
            return torch.Size(sizes) if dim is None else sizes[dim]
        found: list[int] = []

        def plain(leaf: Any) -> Any:
            if type(leaf) in (int, Number):
                found.append(leaf)
                return int(leaf)
            if isinstance(leaf, slice):
                return slice(*map(plain, (leaf.start, leaf.stop, leaf.step)))
            return leaf

        args, kwargs = pytree.tree_map(plain, (args, dict(kwargs or {})))
        result = func(*args, **kwargs)
        number = len(self.calls)
        if isinstance(result, Tensor):
            result._pared_call = number, None  # type: ignore[attr-defined]
            shapes: Any = tuple(result.shape)
        elif isinstance(result, tuple | list) and any(isinstance(r, Tensor) for r in result):
            for item, each in enumerate(result):
                if isinstance(each, Tensor):
                    each._pared_call = number, item  # type: ignore[attr-defined]
            shapes = tuple(tuple(r.shape) if isinstance(r, Tensor) else r for r in result)
        else:
            return result
        kind = "slice" if name == "__getitem__" else "turn" if name == "__get__" else _kind(name.strip("_"))
        self.calls.append(_Called(kind, shapes, found))
        return result

    def _sizes(self, tensor: Tensor) -> list[int]:
        with torch._C.DisableTorchFunction():
            shape = tuple(tensor.shape)
            call = getattr(tensor, "_pared_call", None)
        if call is None:
            return list(shape)
        number, item = call
        return [Number.of(n, _Seen(number, item, axis)) for axis, n in enumerate(shape)]


@contextmanager
def _transparent() -> Iterator[None]:
    """Functions of torch that are written in Python are looked into, not seen as one call; without fused attention."""
    names = [name for name in vars(F) if name.startswith("has_torch_function")]
    before = {name: getattr(F, name) for name in names}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for name in names:
            setattr(F, name, lambda *_: False)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _remembering(model: nn.Module) -> Iterator[None]:
    """Every whole number that a module keeps knows its name."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for path, module in model.named_modules():
        held = vars(module)
        for name, value in list(held.items()):
            if name.startswith("_"):
                continue
            if type(value) is int and value > 1:
                told: Any = Number.of(value, Attribute(path, name, None))
            elif type(value) in (tuple, list) and 0 < len(value) <= 16 and all(type(v) is int for v in value):
                told = type(value)(Number.of(v, Attribute(path, name, place)) for place, v in enumerate(value))
            else:
                continue
            before.append((held, name, value))
            held[name] = told
    try:
        yield
    finally:
        for held, name, value in before:
            held[name] = value


def _on_meta(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, tree)


def _clones(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
