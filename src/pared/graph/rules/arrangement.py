"""Operators that move, join, repeat and take apart axes."""

from __future__ import annotations

import math

from pared.graph.call import Call, Label, rules
from pared.graph.ids import concatenated, taken
from pared.graph.rules.elementwise import unknown


def reshaped(call: Call, label: Label, old: tuple[int, ...], new: tuple[int, ...]) -> Label:
    """The label after a reshape: runs of axes are joined and taken apart where their sizes come out even."""
    if math.prod(old) == 0:
        return [call.keep(axis) for axis in label][:0] + [()] * len(new)
    sources = [i for i, size in enumerate(old) if size > 1]
    targets = [j for j, size in enumerate(new) if size > 1]
    found: Label = [()] * len(new)
    while sources:
        take, give = [sources.pop(0)], [targets.pop(0)]
        while (a := math.prod(old[i] for i in take)) != (b := math.prod(new[j] for j in give)):
            (take if a < b else give).append((sources if a < b else targets).pop(0))
        whole, size = label[take[0]], old[take[0]]
        for i in take[1:]:
            whole, size = call.ids.join(whole, size, label[i], old[i]), size * old[i]
        for j in give[:-1]:
            size //= new[j]
            found[j], whole = call.split(whole, new[j], size)
        found[give[-1]] = whole
    return found



def _reshape(call: Call) -> Label:
    first = call.first
    return reshaped(call, call.label(first), call.shape(first), call.out)


def _permute(call: Call) -> Label:
    x = call.label(call.first)
    return [x[int(d) % len(x)] for d in call.value("dims")]


def _transpose(call: Call) -> Label:
    x = call.label("self")
    rank = len(x)
    a, b = ("dim0", "dim1") if "dim0" in call.bound else ("axis0", "axis1")
    i, j = (call.axis(a, rank), call.axis(b, rank)) if a in call.bound else (-1, -2)
    if rank >= 2:
        x[i], x[j] = x[j], x[i]
    return x


def _movedim(call: Call) -> Label:
    x = call.label("self")
    source, target = call.value("source"), call.value("destination")
    source, target = ([v % len(x) for v in (s if isinstance(s, list) else [s])] for s in (source, target))
    rest = iter([axis for i, axis in enumerate(x) if i not in source])
    moved = dict(zip(target, source))
    return [x[moved[i]] if i in moved else next(rest) for i in range(len(x))]


def _unsqueeze(call: Call) -> Label:
    x = call.label("self")
    x.insert(call.axis("dim", len(x) + 1), ())
    return x


def _expand(call: Call) -> Label:
    first = call.first
    x, shape = call.label(first), call.shape(first)
    other = call.label("other") if call.name in ("expand_as", "view_as", "type_as") else None
    found: Label = []
    for axis, size in enumerate(call.out):
        own = axis - len(call.out) + len(shape)
        if own >= 0 and shape[own] == size:
            found.append(x[own])
        else:
            found.append(other[axis] if other is not None else call.free(size))
    return found


def _repeat(call: Call) -> Label:
    x, shape = call.label("self"), call.shape("self")
    x, shape = [()] * (len(call.out) - len(x)) + x, (1,) * (len(call.out) - len(shape)) + shape
    found: Label = []
    for place, (axis, size, out) in enumerate(zip(x, shape, call.out)):
        more = call.free(out // size) if size != out else ()
        found.append(call.ids.join(more, out // size, axis, size) if size != out else axis)
        call.size("repeats" if "repeats" in call.bound else "dims", place, more, out // size)
    return found


def _repeat_interleave(call: Call) -> Label:
    x, shape = call.label("self"), call.shape("self")
    if call.bound.get("dim") is None or len(shape) != len(call.out):
        return unknown(call)
    found: Label = []
    for axis, size, out in zip(x, shape, call.out):
        more = call.free(out // size) if size != out else ()
        found.append(call.ids.join(axis, size, more, out // size) if size != out else axis)
        call.size("repeats", None, more, out // size)
    return found


def _cat(call: Call) -> Label:
    parts = [(label, shape) for label, shape in call.list_of("tensors") if shape != (0,)]
    dim = call.axis("dim", len(call.out))
    found: Label = []
    for axis in range(len(call.out)):
        if axis == dim:
            found.append(concatenated([(label[axis], shape[axis]) for label, shape in parts]))
            continue
        whole = parts[0][0][axis]
        for label, _ in parts[1:]:
            whole = call.same(whole, label[axis])
        found.append(whole)
    return [call.ids.factors(*axis) for axis in found]


def _stack(call: Call) -> Label:
    parts = call.list_of("tensors")
    whole = list(parts[0][0])
    for label, _ in parts[1:]:
        whole = [call.same(a, b) for a, b in zip(whole, label)]
    whole.insert(call.axis("dim", len(call.out)), ())
    return [call.ids.factors(*axis) for axis in whole]


def _pad(call: Call) -> Label:
    x, shape = call.label(call.first), call.shape(call.first)
    pad = [int(p) for p in call.value("pad" if "pad" in call.bound else "padding")]
    constant = call.name == "constant_pad_nd" or (call.name == "pad" and call.value("mode") in ("constant", None))
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        axis = len(x) - 1 - i
        if (before or after) and x[axis]:
            if not constant or min(before, after) < 0:
                x[axis] = call.keep(x[axis])
            else:
                x[axis] = concatenated([((), before), (x[axis], shape[axis]), ((), after)])
    return x


def _flip(call: Call) -> Label:
    x = call.label("self")
    for dim in call.value("dims"):
        x[int(dim) % len(x)] = taken(x[int(dim) % len(x)], slice(None, None, -1))
    return x


def _pixel_shuffle(call: Call) -> Label:
    x, shape = call.label("self"), call.shape("self")
    square = int(call.value("upscale_factor")) ** 2
    outer, inner = call.split(x[-3], shape[-3] // square, square)
    call.keep(inner)
    return [*x[:-3], outer, call.keep(x[-2]), call.keep(x[-1])]


def _pixel_unshuffle(call: Call) -> Label:
    x, shape = call.label("self"), call.shape("self")
    square = int(call.value("downscale_factor")) ** 2
    return [*x[:-3], call.ids.join(x[-3], shape[-3], (), square), call.keep(x[-2]), call.keep(x[-1])]


def _channel_shuffle(call: Call) -> Label:
    x, n = call.label("self" if "self" in call.bound else "input"), call.out[1]
    groups = int(call.value("groups"))
    outer, inner = call.split(x[1], groups, n // groups)
    call.size("groups", None, outer, groups)
    return [x[0], call.ids.join(inner, n // groups, outer, groups), *x[2:]]


def _im2col(call: Call) -> Label:
    x, shape = call.label("self"), call.shape("self")
    window = call.out[-2] // shape[-3]
    return [*x[:-3], call.ids.join(x[-3], shape[-3], (), window), call.keep(call.keep(x[-1]) + call.keep(x[-2]))]


def _col2im(call: Call) -> Label:
    x, shape = call.label("self"), call.shape("self")
    channels = call.out[-3]
    outer, inner = call.split(x[-2], channels, shape[-2] // channels)
    call.keep(inner)
    call.keep(x[-1])
    return [*x[:-2], outer, (), ()]


def _unfold(call: Call) -> Label:
    x = call.label("self")
    dim = call.axis("dimension", len(x))
    x[dim] = call.keep(x[dim])
    return [*x, ()]


def _glu(call: Call) -> Label:
    x = call.label("self")
    dim = call.axis("dim", len(x))
    half = call.out[dim]
    x[dim] = call.same(taken(x[dim], slice(0, half)), taken(x[dim], slice(half, None)))
    return x


def _last_two(call: Call) -> Label:
    x = call.label("self")
    return [*x[:-2], *(call.keep(axis) for axis in x[-2:])]


def _squeeze(call: Call) -> Label:
    return reshaped(call, call.label("self"), call.shape("self"), call.out)


RULES = rules(
    {
        "view reshape _unsafe_view flatten unflatten _reshape_copy reshape_as view_as ravel": _reshape,
        "squeeze": _squeeze,
        "permute": _permute,
        "transpose t swapaxes swapdims numpy_T mT": _transpose,
        "movedim moveaxis": _movedim,
        "unsqueeze": _unsqueeze,
        "expand expand_as broadcast_to": _expand,
        "repeat tile": _repeat,
        "repeat_interleave": _repeat_interleave,
        "cat concat concatenate": _cat,
        "stack": _stack,
        "pad constant_pad_nd": _pad,
        "flip": _flip,
        "pixel_shuffle": _pixel_shuffle,
        "pixel_unshuffle": _pixel_unshuffle,
        "channel_shuffle native_channel_shuffle": _channel_shuffle,
        "im2col": _im2col,
        "col2im": _col2im,
        "unfold": _unfold,
        "glu": _glu,
        "tril triu": _last_two,
    }
)
