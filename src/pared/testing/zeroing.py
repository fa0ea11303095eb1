"""What a network gives when channels are silenced one operator at a time: the slow, plain truth about removing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pared.graph.channels import Channels
from pared.graph.cutting import left
from pared.graph.module import flatten_arguments, rebuild, resolve
from pared.graph.operators import Ref, find

_OVER = frozenset("mean amax amin max min var std var_mean prod logsumexp".split())
_NORMS = frozenset("layer_norm rms_norm".split())


def zeroed(graph: Channels, masks: Mapping[int, np.ndarray]) -> Any:
    """The outputs of the original program, run op by op with the removed positions of every value set to zero.

    Means, extremes and normalisations are taken over the positions that stay. Nothing gets shorter, no number in the
    program changes.

    Args:
        graph: the analysed network with its example.
        masks: number of a group: which of its channels are removed.
    """
    program, axes, going = graph.program, graph.axes, graph.going(masks)
    held = dict([*graph.model.named_parameters(remove_duplicate=False), *graph.model.named_buffers(remove_duplicate=False)])
    inputs = flatten_arguments(program, graph.args, graph.kwargs)
    states = [held[s.path] if s.path in held else program.constants[s.path] for s in program.states]

    def stays(number: int, item: int | None = None) -> list[np.ndarray]:
        label, shape = axes.labels[number], axes.shapes[number]
        if item is not None:
            label, shape = label[item] if label else None, shape[item]
        return [left(axes, axis, n, going) for axis, n in zip(label or [()] * len(shape), shape)]

    def silenced(value: Any, number: int) -> Any:
        if isinstance(value, Tensor):
            return _silence(value, stays(number))
        if isinstance(value, tuple | list):
            return [_silence(v, stays(number, i)) if isinstance(v, Tensor) else v for i, v in enumerate(value)]
        return value

    with torch.no_grad():
        values = [silenced(v, number) for number, v in enumerate([*inputs, *states])]
        for node in program.nodes:
            number = len(values)
            operator = find(node.op)
            if operator is None:
                raise ValueError(f"{node.op} is not an operator of pared programs")
            name = node.op.split(".")[1]
            bound = operator.bind(node.args, node.kwargs)
            first = bound.get(operator.arguments[0].name)
            whole = isinstance(first, Ref) and isinstance(values[first.index], Tensor)
            kept = stays(first.index) if whole and isinstance(first, Ref) else []
            plain = {key: resolve(value, values, torch.device("cpu")) for key, value in bound.items()}
            if name == "scaled_dot_product_attention" and plain.get("scale") is None:
                plain["scale"] = plain["query"].shape[-1] ** -0.5
            if name in _NORMS and not all(k.all() for k in kept):
                result: Any = _normalised(operator.function, plain, kept)
            elif name == "batch_norm" and plain["training"] and not all(k.all() for i, k in enumerate(kept) if i != 1):
                result = _standardised(operator.function, plain, kept)
            elif name == "group_norm" and not kept[1].all():
                result = _grouped(operator.function, plain, kept[1])
            else:
                if name in _OVER and "other" not in bound and whole:
                    plain[operator.arguments[0].name] = _narrowed(plain[operator.arguments[0].name], kept, plain.get("dim"))
                positional = [plain[a.name] for a in operator.arguments if not a.keyword_only]
                result = operator.function(*positional, **{a.name: plain[a.name] for a in operator.arguments if a.keyword_only})
            values.append(silenced(result, number))
    return rebuild(program.outputs, values)


def _silence(value: Tensor, stays: list[np.ndarray]) -> Tensor:
    for axis, mask in enumerate(stays):
        if not mask.all():
            shape = [-1 if i == axis else 1 for i in range(value.ndim)]
            value = value.masked_fill(torch.as_tensor(~mask).reshape(shape), 0)
    return value


def _narrowed(value: Tensor, kept: list[np.ndarray], dims: Any) -> Tensor:
    """Without the removed positions of the axes that are reduced; other axes are as they were."""
    every = list(range(value.ndim)) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    for dim in every:
        mask = kept[dim % value.ndim]
        if not mask.all():
            value = value.index_select(dim, torch.as_tensor(np.flatnonzero(mask)))
    return value


def _normalised(function: Any, plain: dict[str, Any], kept: list[np.ndarray]) -> Tensor:
    x = plain["input"]
    n = len(plain["normalized_shape"])
    own = [torch.as_tensor(np.flatnonzero(mask)) for mask in kept[-n:]]
    narrow = dict(plain, normalized_shape=[len(index) for index in own], input=_narrowed(x, kept, list(range(-n, 0))))
    for name in ("weight", "bias"):
        if isinstance(plain.get(name), Tensor):
            for axis, index in enumerate(own):
                narrow[name] = narrow[name].index_select(axis, index)
    result = function(**narrow)
    for axis, index in zip(range(-n, 0), own):
        shape = list(result.shape)
        shape[axis] = x.shape[axis]
        result = result.new_zeros(shape).index_copy(axis, index, result)
    return result


def _standardised(function: Any, plain: dict[str, Any], kept: list[np.ndarray]) -> Tensor:
    """Batch norm over what it is given, as weights are standardised: over the positions that stay."""
    x = plain["input"]
    others = [axis for axis in range(x.ndim) if axis != 1]
    result: Tensor = function(**dict(plain, input=_narrowed(x, kept, others)))
    for axis in others:
        if not kept[axis].all():
            shape = [*result.shape[:axis], x.shape[axis], *result.shape[axis + 1 :]]
            result = result.new_zeros(shape).index_copy(axis, torch.as_tensor(np.flatnonzero(kept[axis])), result)
    return result


def _grouped(function: Any, plain: dict[str, Any], mask: np.ndarray) -> Tensor:
    groups = int(mask.reshape(plain["num_groups"], -1).any(1).sum())
    index = torch.as_tensor(np.flatnonzero(mask))
    narrow = dict(plain, input=plain["input"].index_select(1, index), num_groups=groups)
    for name in ("weight", "bias"):
        if isinstance(plain.get(name), Tensor):
            narrow[name] = narrow[name][index]
    return plain["input"].new_zeros(plain["input"].shape).index_copy(1, index, function(**narrow))
