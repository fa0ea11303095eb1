"""Operators that work element by element, and those without a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pared.graph.call import Call, Label, rules
from pared.graph.ids import Factors


def unknown(call: Call) -> Any:
    for ref in call.tensors():
        call.axes.freeze(call.axes.labels[ref.index], call.reason)
    return blank(call.out)


def blank(out: Any) -> Any:
    if isinstance(out, tuple):
        return [()] * len(out)
    return [blank(each) for each in out] if isinstance(out, list) else None


def pointwise(call: Call) -> Label:
    return broadcast(call, [(call.label_of(ref), call.shape_of(ref)) for ref in call.tensors()], call.out)


def broadcast(call: Call, given: Sequence[tuple[Label, tuple[int, ...]]], out: tuple[int, ...]) -> Label:
    label: Label = []
    for axis, size in enumerate(out):
        met: list[Factors] = []
        for each, shape in given:
            own = axis - len(out) + len(shape)
            if own >= 0 and shape[own] == size and size > 1:
                met.append(each[own])
        whole: Factors = met[0] if met else ()
        for other in met[1:]:
            whole = call.same(whole, other)
        label.append(whole)
    return label


def _made(call: Call) -> Label:
    """What the model's code makes: its size is a number in the code, which has to follow the channels."""
    return [call.free(size) for size in call.out]


def _like(call: Call) -> Label:
    return call.label(call.first)


RULES = rules(
    {
        "contiguous clone alias detach to _to_copy type_as dropout zeros_like ones_like full_like copy": _like,
        "zeros ones full new_zeros new_ones new_full scalar_tensor": _made,
        "where masked_fill relu6 hardswish hardsigmoid hardtanh gelu silu mish softplus elu selu celu leaky_relu "
        "log_sigmoid threshold clamp clip lerp addcmul addcdiv nan_to_num hardshrink softshrink": pointwise,
    }
)
