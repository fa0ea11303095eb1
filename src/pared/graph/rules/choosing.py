"""Operators that take parts of an axis: split, slice, index, look up."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from pared.graph.call import Call, Label, rules
from pared.graph.ids import taken
from pared.graph.operators import Ref
from pared.graph.rules.elementwise import blank


def _pieces(call: Call) -> list[Label]:
    """split, chunk: pieces of equal size stay of equal size, position by position; of other sizes, each for itself."""
    first = call.first
    x = call.label(first)
    dim = call.axis("dim", len(x))
    sizes = [shape[dim] for shape in call.out]
    starts = np.cumsum([0, *sizes])
    parts = [taken(x[dim], slice(a, b)) for a, b in itertools.pairwise(starts)]
    if len(set(sizes)) == 1 and call.name not in ("split_with_sizes", "unsafe_split_with_sizes"):
        for part in parts[1:]:
            call.same(parts[0], part)
    elif call.name in ("chunk", "split", "unsafe_chunk", "unsafe_split", "tensor_split"):
        parts = [call.keep(part) for part in parts]
    if "split_size" in call.bound:
        call.size("split_size", None, parts[0], sizes[0])
    for place, (part, size) in enumerate(zip(parts, sizes)):
        if size == 1:
            parts[place] = call.keep(part, _chosen(call))
        if "split_sizes" in call.bound:
            call.size("split_sizes", place, part, size)
    return [[call.ids.factors(*(part if i == dim else axis)) for i, axis in enumerate(x)] for part in parts]


def _unbind(call: Call) -> list[Label]:
    return [_select(call) for _ in call.out]


def _chosen(call: Call) -> str:
    return f"{call.name}{f' near {call.near}' if call.near else ''} picks positions of it by number"


def _select(call: Call) -> Label:
    x = call.label("self")
    call.keep(x.pop(call.axis("dim", len(x))), _chosen(call))
    return x


def _slice(call: Call) -> Label:
    x, shape = call.label("self"), call.shape("self")
    dim = call.axis("dim", len(x))
    size = shape[dim]
    if call.name == "narrow":
        start = int(call.value("start"))
        where = slice(start, start + call.out[dim])
    else:
        start, end = call.value("start"), call.value("end")
        where = slice(None if start is None else int(start), None if end is None else int(end), int(call.value("step") or 1))
    reach = where.indices(size)
    if reach[2] != 1:
        x[dim] = call.keep(x[dim])
    elif reach[:2] != (0, size) and x[dim]:
        call.size("start", None, taken(x[dim], slice(0, reach[0])), reach[0])
        if call.name == "narrow":
            call.size("length", None, taken(x[dim], where), call.out[dim])
        elif call.value("end") is not None and reach[1] < size:
            call.size("end", None, taken(x[dim], slice(0, reach[1])), reach[1])
        x[dim] = taken(x[dim], where) if call.out[dim] > 1 else call.keep(taken(x[dim], where), _chosen(call))
    return x


def _index(call: Call) -> Label:
    x = call.label("self")
    chosen = call.bound.get("indices") or []
    axes = [i for i, index in enumerate(chosen) if isinstance(index, Ref)]
    for i in axes:
        call.keep(x[i], _chosen(call))
        call.axes.freeze(call.label_of(chosen[i]), _chosen(call))
    if not axes:
        return x
    n_new = len(call.out) - (len(x) - len(axes))
    rest = [axis for i, axis in enumerate(x) if i not in axes]
    together = axes == list(range(axes[0], axes[-1] + 1))
    at = axes[0] if together else 0
    return [*rest[:at], *[()] * n_new, *rest[at:]]


def _index_select(call: Call) -> Label:
    x = call.label("self")
    dim = call.axis("dim", len(x))
    call.keep(x[dim], _chosen(call))
    x[dim] = ()
    return x


def _gather(call: Call) -> Label:
    x, index = call.label("self"), call.label("index")
    dim = call.axis("dim", len(x))
    call.keep(x[dim], _chosen(call))
    pairs = zip(x, index, call.shape("self"), call.shape("index"))
    return [b if i == dim else call.same(a, b) if n == m and n > 1 else () for i, (a, b, n, m) in enumerate(pairs)]


def _embedding(call: Call) -> Label:
    weight = call.label("weight")
    call.keep(weight[0], "its rows are looked up by number")
    return [*[call.keep(axis) for axis in call.label("indices")], weight[1]]


def _item(call: Call) -> Any:
    whole = call.axes.labels[call.ref("value").index]
    found = whole[call.value("index")] if whole else None
    return [call.ids.factors(*axis) for axis in found] if found else blank(call.out)


RULES = rules(
    {
        "split split_with_sizes chunk unsafe_split unsafe_chunk unsafe_split_with_sizes tensor_split": _pieces,
        "unbind": _unbind,
        "select": _select,
        "slice narrow": _slice,
        "index": _index,
        "index_select": _index_select,
        "gather take_along_dim": _gather,
        "embedding": _embedding,
        "getitem": _item,
    }
)
