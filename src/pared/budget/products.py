"""Which operators are a matrix product with a tensor of the model, and what its inputs and gradients are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.graph import Lineage, Node, Operand
from pared.graph.operators import find
from pared.statistics import Layout

Rows = Tensor | None
"""Numbers of the positions to take, or None for all."""

_CASTS = ("to", "_to_copy", "type_as")


@dataclass(frozen=True)
class Product:
    """An operator seen as y = W x at `n_positions` positions (rows, pixels, time steps) of a batch.

    Args:
        operand: the weight.
        as_matrix: views the weight as (groups, m, n).
        n_positions: over the whole batch.
        inputs: x at chosen positions, (groups, positions, n); for an embedding, how often each row was looked up, (n,).
        gradients: d loss / d y at chosen positions, (groups, positions, m), from the gradient of the operator's output.
        alone: whether the operator's output at a position is y and `added`, so that `gradients` of the output are that: no
            sum of several positions' y (transposed convolutions), and `added` neither scaled nor along another axis.
        added: what the operator adds to y: a bias most often, an operand, a tensor or None.
    """

    operand: Operand
    as_matrix: Callable[[Tensor], Tensor]
    n_positions: int
    inputs: Callable[[Rows], Tensor]
    gradients: Callable[[Tensor, Rows], Tensor]
    counts_macs: bool = True
    alone: bool = True
    added: Any = None

    def layout(self, shape: torch.Size) -> Layout | None:
        """Where the matrix lies in the whole tensor, of shape `shape`; None if it is not a view of it."""
        lineage = self.operand.lineage
        if lineage is None:
            return None
        views = tuple(view for view in lineage.views if view.op.split(".")[1] not in _CASTS)
        whole = torch.empty(shape, device="meta")
        try:
            matrix = self.as_matrix(Lineage(lineage.path, views).apply(whole))
        except RuntimeError:  # torch cannot express it as a view
            return None
        repeats = any(size > 1 and step == 0 for size, step in zip(matrix.shape, matrix.stride()))
        if matrix._base is not whole or repeats:
            return None
        groups, m, n = matrix.shape
        return Layout((groups, m, n), tuple(matrix.stride()), int(matrix.storage_offset()))  # type: ignore[arg-type]


def product_of(op: str, node: Node, inputs: list[Any]) -> Product | None:
    """The operator as a product with a tensor of the model, or None."""
    rule = _RULES.get(op.split(".")[1])
    operator = find(op)
    if rule is None or operator is None:
        return None
    bound = operator.bind(inputs, node.kwargs if op == node.op else {})
    product = rule(bound)
    return product and replace(product, added=bound.get("self") if rule is _addmm else bound.get("bias"))


def _value(thing: Any) -> Any:
    if isinstance(thing, list):
        return [_value(each) for each in thing]
    return thing.value if isinstance(thing, Operand) else thing


def _is_weight(thing: Any, n_axes: int | None = None) -> bool:
    return (
        isinstance(thing, Operand)
        and thing.lineage is not None
        and isinstance(thing.value, Tensor)
        and thing.value.is_floating_point()
        and thing.value.ndim >= 2
        and (n_axes is None or thing.value.ndim == n_axes)
    )


def _first_matrix(t: Tensor) -> Tensor:
    while t.ndim > 2:
        t = t[0]
    return t


def _taken(rows: Tensor, index: Rows) -> Tensor:
    """(groups, positions, n), only the chosen positions."""
    return rows if index is None else rows[:, index]


def _linear(bound: Mapping[str, Any]) -> Product | None:
    x, weight = _value(bound["input"]), bound["weight"]
    if not _is_weight(weight, 2):
        return None
    m, n = weight.value.shape
    return Product(
        weight,
        lambda w: w[None],
        x.numel() // n,
        lambda index: _taken(x.reshape(1, -1, n), index),
        lambda g, index: _taken(g.reshape(1, -1, m), index),
    )


def _product(left: Any, right: Any) -> Product | None:
    """left @ right, one of them a tensor of the model."""
    if _is_weight(right):
        return _from_right(_value(left), right)
    if _is_weight(left):
        return _from_left(left, _value(right))
    return None


def _from_right(x: Tensor, weight: Operand) -> Product | None:
    """x @ W: the matrix is W transposed."""
    w = weight.value
    n, m = w.shape[-2:]
    if x.ndim < 2:
        return None
    if w.shape[:-2].numel() == 1 and x.ndim >= w.ndim:
        return Product(
            weight,
            lambda t: _first_matrix(t).T[None],
            x.numel() // n,
            lambda index: _taken(x.reshape(1, -1, n), index),
            lambda g, index: _taken(g.reshape(1, -1, m), index),
        )
    if w.ndim != 3:
        return None
    groups = w.shape[0]
    x = x.expand(*torch.broadcast_shapes(x.shape[:-2], (groups,)), *x.shape[-2:])
    if w.stride(0) == 0:  # one matrix, expanded over the batch
        return Product(
            weight,
            lambda t: _first_matrix(t).T[None],
            x.numel() // n,
            lambda index: _taken(x.reshape(1, -1, n), index),
            lambda g, index: _taken(g.reshape(1, -1, m), index),
        )
    return Product(
        weight,
        lambda t: t.transpose(1, 2),
        x.numel() // (n * groups),
        lambda index: _taken(x.movedim(-3, 0).reshape(groups, -1, n), index),
        lambda g, index: _taken(g.movedim(-3, 0).reshape(groups, -1, m), index),
    )


def _from_left(weight: Operand, x: Tensor) -> Product | None:
    """W @ x: positions are the columns of x."""
    w = weight.value
    if x.ndim < 2 or (w.ndim > 2 and not (w.ndim == 3 and w.stride(0) == 0)):
        return None
    m, n = w.shape[-2:]
    return Product(
        weight,
        lambda t: _first_matrix(t)[None],
        x.numel() // n,
        lambda index: _taken(x.transpose(-1, -2).reshape(1, -1, n), index),
        lambda g, index: _taken(g.transpose(-1, -2).reshape(1, -1, m), index),
    )


def _addmm(bound: Mapping[str, Any]) -> Product | None:
    if bound.get("alpha", 1) != 1:
        return None
    names = ("batch1", "batch2") if "batch1" in bound else ("mat1", "mat2")
    product = _product(bound[names[0]], bound[names[1]])
    return product and replace(product, alone=bound.get("beta", 1) == 1 and product.operand is bound[names[1]])


def _embedding(bound: Mapping[str, Any]) -> Product | None:
    weight, indices = bound["weight"], _value(bound["indices"])
    if not _is_weight(weight, 2):
        return None
    n, m = weight.value.shape
    return Product(
        weight,
        lambda w: w.T[None],
        indices.numel(),
        lambda index: torch.bincount(indices.flatten(), minlength=n).float()[None],
        lambda g, index: _taken(g.reshape(1, -1, m), index),
        counts_macs=False,
    )


def _convolution(bound: Mapping[str, Any]) -> Product | None:
    if bound.get("transposed"):
        return _transposed(bound)
    weight, x = bound["weight"], _value(bound["input"])
    if not _is_weight(weight):
        return None
    kernel = weight.value.shape[2:]
    axes = len(kernel)
    if x.ndim != axes + 2:
        return None
    stride, dilation = _each(bound["stride"], axes), _each(bound["dilation"], axes)
    groups = int(_value(bound["groups"]))
    padding = _value(bound["padding"])
    if isinstance(padding, str):
        both = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel)]
        before = [total // 2 for total in both]
        after = [total - first for total, first in zip(both, before)]
    else:
        before = after = _each(padding, axes)
    padded = _padded(x, before, after)
    window = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    count = [(size - w) // s + 1 for size, w, s in zip(padded.shape[2:], window, stride)]
    m, n = weight.value.shape[0] // groups, weight.value.shape[1] * math.prod(kernel)
    batch = x.shape[0]
    return Product(
        weight,
        lambda w: w.unflatten(0, (groups, -1)).flatten(2),
        batch * math.prod(count),
        lambda index: _patches(padded, count, kernel, stride, dilation, groups, index).reshape(groups, -1, n),
        lambda g, index: _pixels(g, groups, m, index),
    )


def _transposed(bound: Mapping[str, Any]) -> Product | None:
    """A transposed convolution: each input pixel is mapped to a patch of outputs, and patches are added."""
    weight, x = bound["weight"], _value(bound["input"])
    if not _is_weight(weight):
        return None
    kernel = weight.value.shape[2:]
    axes = len(kernel)
    if x.ndim != axes + 2:
        return None
    stride, dilation = _each(bound["stride"], axes), _each(bound["dilation"], axes)
    padding, groups = _each(bound["padding"], axes), int(_value(bound["groups"]))
    count = list(x.shape[2:])
    reach = [(size - 1) * s + d * (k - 1) + 1 for size, s, d, k in zip(count, stride, dilation, kernel)]
    n, m = weight.value.shape[0] // groups, weight.value.shape[1] * math.prod(kernel)

    def gradients(g: Tensor, index: Rows) -> Tensor:
        after = [max(0, r - size - p) for r, size, p in zip(reach, g.shape[2:], padding)]
        padded = _padded(g, padding, after)
        return _patches(padded, count, kernel, stride, dilation, groups, index).reshape(groups, -1, m)

    return Product(
        weight,
        lambda w: w.unflatten(0, (groups, -1)).flatten(2).transpose(1, 2),
        x.shape[0] * math.prod(count),
        lambda index: _pixels(x, groups, n, index),
        gradients,
        alone=math.prod(kernel) == 1,
    )


def _each(value: Any, n: int) -> list[int]:
    """One number for each axis."""
    value = _value(value)
    numbers = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return numbers if len(numbers) == n else numbers[:1] * n


def _padded(x: Tensor, before: list[int], after: list[int]) -> Tensor:
    x = x.detach()
    border = [side for pair in zip(reversed(before), reversed(after)) for side in pair]
    return F.pad(x, border) if any(border) else x


def _pixels(x: Tensor, groups: int, n: int, index: Rows) -> Tensor:
    """(batch, channels, *space) as (groups, positions, channels of a group)."""
    flat = x.flatten(2)
    if index is None:
        rows = flat.transpose(1, 2)
    else:
        length = flat.shape[2]
        rows = flat[index // length, :, index % length]
    return rows.reshape(-1, groups, n).transpose(0, 1)


def _patches(
    padded: Tensor,
    count: list[int],
    kernel: torch.Size,
    stride: list[int],
    dilation: list[int],
    groups: int,
    index: Rows,
) -> Tensor:
    """What the filter sees at each position: (groups, positions, channels of a group, *kernel)."""
    steps = padded.stride()[2:]
    size = (padded.shape[0], *count, padded.shape[1], *kernel)
    strides = (
        padded.stride(0),
        *(step * s for step, s in zip(steps, stride)),
        padded.stride(1),
        *(step * d for step, d in zip(steps, dilation)),
    )
    windows = padded.as_strided(size, strides, padded.storage_offset())
    axes = len(kernel)
    if index is None:
        rows = windows.reshape(-1, padded.shape[1], *kernel)
    else:
        rows = windows[_unravelled(index, size[: 1 + axes])]
    return rows.unflatten(1, (groups, -1)).transpose(0, 1)


def _unravelled(index: Tensor, size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Numbers of elements as one coordinate for each axis."""
    coordinates = []
    for length in reversed(size):
        coordinates.append(index % length)
        index = index // length
    return tuple(reversed(coordinates))


_RULES: Mapping[str, Callable[[Mapping[str, Any]], Product | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "mm": lambda bound: _product(bound["self"], bound["mat2"]),
    "bmm": lambda bound: _product(bound["self"], bound["mat2"]),
    "matmul": lambda bound: _product(bound["self"], bound["other"]),
    "embedding": _embedding,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
}
