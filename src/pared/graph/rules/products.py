"""Matrix products, convolutions, attention."""

from __future__ import annotations

import math
from typing import Any

from pared.graph.call import PLACES, Call, Label, rules
from pared.graph.ids import Factors
from pared.graph.operators import Ref
from pared.graph.rules.elementwise import broadcast, unknown


def _linear(call: Call) -> Label:
    x, weight = call.label("input"), call.label("weight")
    inner = call.same(x[-1], weight[-1])
    outer = weight[0] if len(weight) > 1 else ()
    if isinstance(call.ref("bias"), Ref):
        outer = call.same(outer, call.label("bias")[0])
    label = [*x[:-1], *([outer] if len(weight) > 1 else [])]
    call.work([*zip(label, call.out), (inner, call.shape("weight")[-1])])
    return label


def _matmul(call: Call) -> Label:
    names = [name for name in ("self", "batch1", "mat1", "input") if isinstance(call.ref(name), Ref)]
    others = [name for name in ("other", "mat2", "batch2") if isinstance(call.ref(name), Ref)]
    if "mat1" in call.bound or "batch1" in call.bound:
        names = [name for name in names if name != "self" and name != "input"]
    a, b, sa, sb = call.label(names[0]), call.label(others[0]), call.shape(names[0]), call.shape(others[0])
    if len(sa) < 2 or len(sb) < 2:
        return unknown(call)
    inner = call.same(a[-1], b[-2])
    lead = broadcast(call, [(a[:-2], sa[:-2]), (b[:-2], sb[:-2])], call.out[:-2])
    label = [*lead, a[-2], b[-1]]
    call.work([*zip(label, call.out), (inner, sa[-1])])
    if "mat1" in call.bound or "batch1" in call.bound:
        added = "self" if "self" in call.bound else "input"
        return broadcast(call, [(label, call.out), (call.label(added), call.shape(added))], call.out)
    return label


def _convolution(call: Call) -> Label:
    x, weight = call.label("input"), call.label("weight")
    shape, groups = call.shape("weight"), int(call.value("groups"))
    if len(call.shape("input")) != len(shape):
        return unknown(call)
    space: Label = []
    for place, axis in enumerate(x[2:]):
        call.keep(weight[2 + place], PLACES)
        alone = shape[2 + place] == 1 and _at(call, "stride", place) == 1 and _at(call, "padding", place) in (0, "valid")
        space.append(axis if alone else call.keep(axis, PLACES))
    turned = call.name.startswith("conv_transpose") or bool(call.bound.get("transposed"))
    if groups == 1:
        inner = call.same(x[1], weight[0 if turned else 1])
        outer = weight[1 if turned else 0]
    else:
        n_in = call.shape("input")[1] // groups
        rows, inside = call.split(x[1], groups, n_in)
        if turned:
            own, inner = call.split(weight[0], groups, n_in)
            inner, rows = call.same(inside, inner) if n_in > 1 else (), call.same(rows, own)
            outer = call.ids.join(rows, groups, weight[1], shape[1])
        else:
            inner = call.same(inside, weight[1]) if n_in > 1 else ()
            own, _ = call.split(weight[0], groups, shape[0] // groups)
            call.same(rows, own)
            outer = call.ids.factors(*weight[0])
        call.size("groups", None, rows, groups)
    if isinstance(call.ref("bias"), Ref):
        outer = call.same(outer, call.label("bias")[0])
    n_inner = call.shape("input")[1] // groups
    pixels = call.shape("input")[2:] if turned else call.out[2:]
    call.work([((), call.out[0] * math.prod(shape[2:])), *zip(space, pixels), (outer, call.out[1]), (inner, n_inner)])
    return [x[0], outer, *space]


def _at(call: Call, name: str, place: int) -> Any:
    """One of the numbers of an argument that may be a single one for all axes."""
    value = call.value(name)
    return value[place if len(value) > 1 else 0] if isinstance(value, list) else value


def _attention(call: Call) -> Label:
    q, k, v = (call.label(name) for name in ("query", "key", "value"))
    sq, sk, sv = (call.shape(name) for name in ("query", "key", "value"))
    inner = call.same(q[-1], k[-1])
    call.same(k[-2], v[-2])
    call.keep(k[-2])
    if call.bound.get("enable_gqa") and sq[-3] != sk[-3]:
        rows, _ = call.split(q[-3], sk[-3], sq[-3] // sk[-3])
        call.same(rows, call.same(k[-3], v[-3]))
        lead = [*q[:-3], *call.label("query")[-3:-2]]
    else:
        lead = broadcast(call, [(q[:-2], sq[:-2]), (k[:-2], sk[:-2]), (v[:-2], sv[:-2])], call.out[:-2])
    if isinstance(call.ref("attn_mask"), Ref):
        scores = (*call.out[:-1], sk[-2])
        mask = call.label("attn_mask")
        broadcast(call, [([*lead, q[-2], ()], scores), (mask, call.shape("attn_mask"))], scores)
    call.work([*zip(lead, call.out[:-2]), ((), call.out[-2] * sk[-2]), (inner, sq[-1])])
    call.work([*zip(lead, call.out[:-2]), ((), call.out[-2] * sk[-2]), (v[-1], sv[-1])])
    return [*lead, q[-2], v[-1]]


def _einsum(call: Call) -> Label:
    equation = str(call.value("equation")).replace(" ", "")
    given = call.list_of("tensors")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(given) or any(len(set(t)) != len(t) for t in terms):
        return unknown(call)
    letters: dict[str, Factors] = {}
    sizes: dict[str, int] = {}
    for term, (label, shape) in zip(terms, given):
        for letter, axis, size in zip(term, label, shape):
            letters[letter] = call.same(letters[letter], axis) if letter in letters else axis
            sizes[letter] = size
    call.work([(call.ids.factors(*letters[letter]), sizes[letter]) for letter in letters])
    return [call.ids.factors(*letters[letter]) for letter in right]


RULES = rules(
    {
        "linear": _linear,
        "matmul mm bmm addmm baddbmm": _matmul,
        "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d": _convolution,
        "scaled_dot_product_attention": _attention,
        "einsum": _einsum,
    }
)
