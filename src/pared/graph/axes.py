"""Which position of which axis of which tensor belongs to which channel, along a whole program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from pared.graph.ids import NONE, Factors, Ids, concatenated, taken
from pared.graph.interpret import watch
from pared.graph.operators import Operator, Ref, find
from pared.graph.program import CONSTANTS, Node, Program, leaves

Label = list[Factors]
"""One entry per axis of a tensor."""
PLACES = "its positions are places, not channels"
"""Why the axes of kernels and images stay; nobody would ask."""


@dataclass(frozen=True)
class Work:
    """The multiply-adds per example of one operator: `constant` times the sizes of axes that channels may leave."""

    constant: float
    axes: tuple[Factors, ...]


@dataclass(frozen=True)
class Size:
    """A number in the program (and so in the model's code) that is the size of an axis.

    Args:
        node: number of the node.
        argument, place: which argument; which of its numbers, if it is a list.
        axis, size: that axis and how long it is now.
        near: the module whose tensors were read last.
        computed: the program computes the number from other sizes (of the batch).
    """

    node: int
    argument: str
    place: int | None
    axis: Factors
    size: int
    near: str
    computed: bool = False


@final
class Axes:
    """The program's values with an id at every position of every axis that could get shorter.

    Every axis of every state starts with ids of its own. One rule per operator says which ids are the same channel and
    which label the result has. What meets a model input, an output or an operator without a rule stays whole; nothing
    fails. Normalisations and means over channels are taken over those that stay.

    Args:
        program: as traced.
        root: holds its states.
        args, kwargs: an example call; it is run once, for the shapes.
    """

    def __init__(self, program: Program, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.program = program
        self.ids = Ids()
        self.shapes: list[Any] = [None] * len(program.kinds)
        self.labels: list[Any] = [None] * len(program.kinds)
        self.works: list[Work] = []
        self.sizes: list[Size] = []
        self.origins: dict[str, list[np.ndarray]] = {}
        self._near = ""
        watch(program, root, args, kwargs, self._see)
        self.batch = next((shape[0] for shape in self.shapes[: len(program.inputs)] if shape), 1)
        self._inputs()
        for k, node in enumerate(program.nodes):
            self._node(k, node)
        for leaf in leaves(program.outputs):
            if isinstance(leaf, Ref):
                self._freeze(self.labels[leaf.index], "it is an output of the model")

    def _see(self, number: int, value: Any) -> None:
        if isinstance(value, Tensor):
            self.shapes[number] = tuple(value.shape)
        elif isinstance(value, list | tuple):
            self.shapes[number] = [tuple(v.shape) if isinstance(v, Tensor) else v for v in value]
        else:
            self.shapes[number] = value

    def _inputs(self) -> None:
        for number in range(len(self.program.inputs)):
            self.labels[number] = [()] * len(self.shapes[number])
        for number, state in enumerate(self.program.states, len(self.program.inputs)):
            shape = self.shapes[number]
            if state.path.startswith(CONSTANTS):
                self.labels[number] = [()] * len(shape)
            elif state.path in self.origins:
                self.labels[number] = [(ids,) if size > 1 else () for ids, size in zip(self.origins[state.path], shape)]
            else:
                self.origins[state.path] = [self.ids.new(size) for size in shape]
                self.labels[number] = [(ids,) if size > 1 else () for ids, size in zip(self.origins[state.path], shape)]

    def _node(self, k: int, node: Node) -> None:
        number = self.program.first_node + k
        operator = find(node.op)
        if operator is None or self.program.kinds[number] == "scalar":
            return
        for ref in node.refs():
            if (state := self.program.state_of(ref)) is not None and not state.path.startswith(CONSTANTS):
                self._near = state.path.rpartition(".")[0]
        name = node.op.split(".")[1]
        call = Call(self, k, operator, operator.bind(node.args, node.kwargs), self.shapes[number], self._near)
        rule = RULES.get(name)
        if rule is None:
            rule = _pointwise if torch.Tag.pointwise in getattr(operator.function, "tags", ()) else _unknown
        found = rule(call)
        if not _fits(found, self.shapes[number]):
            found = _unknown(call)
        self.labels[number] = found
        if name in _SIZED:
            argument = _SIZED[name]
            first = call.axis("dim", len(call.shape("self"))) if name == "unflatten" else 0
            for place, number_or_ref in enumerate(call.bound[argument]):
                axis = first + place
                if isinstance(number_or_ref, Ref) or (type(number_or_ref) is int and number_or_ref == call.out[axis]):
                    call.size(argument, place, found[axis], call.out[axis], isinstance(number_or_ref, Ref))

    def _freeze(self, label: Any, reason: str) -> None:
        for axis in label or ():
            if isinstance(axis, list):
                self._freeze(axis, reason)
            else:
                for array in axis:
                    self.ids.freeze(array, reason)


@final
class Call:
    """One node as its rule sees it: labels, shapes and plain values of the arguments by name."""

    def __init__(self, axes: Axes, node: int, operator: Operator, bound: Mapping[str, Any], out: Any, near: str) -> None:
        self.axes, self.ids, self.node, self.bound, self.out, self.near = axes, axes.ids, node, bound, out, near
        self.name = name = operator.name.split(".")[1]
        self.first = operator.arguments[0].name if operator.arguments else ""
        self.reason = f"it reaches {name}{f' near {near}' if near else ''}, through which channels cannot be followed"

    def ref(self, name: str) -> Any:
        return self.bound.get(name)

    def label(self, name: str) -> Label:
        return self.label_of(self.bound.get(name))

    def label_of(self, argument: Any) -> Label:
        if not isinstance(argument, Ref):
            return []
        found = self.axes.labels[argument.index] or []
        return [self.ids.factors(*axis) if isinstance(axis, tuple) else axis for axis in found]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shape_of(self.bound.get(name))

    def shape_of(self, argument: Any) -> tuple[int, ...]:
        found = self.axes.shapes[argument.index] if isinstance(argument, Ref) else ()
        return found if isinstance(found, tuple) else ()

    def value(self, name: str) -> Any:
        return self._value(self.bound.get(name))

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [self._value(each) for each in argument]
        return self.axes.shapes[argument.index] if isinstance(argument, Ref) else argument

    def axis(self, name: str, rank: int) -> int:
        return int(self.value(name)) % max(rank, 1)

    def tensors(self) -> list[Ref]:
        """Every tensor among the arguments."""
        found = [leaf for leaf in leaves(list(self.bound.values())) if isinstance(leaf, Ref)]
        return [ref for ref in found if isinstance(self.axes.shapes[ref.index], tuple)]

    def list_of(self, name: str) -> list[tuple[Label, tuple[int, ...]]]:
        """Labels and shapes of a list of tensors."""
        given = self.bound.get(name)
        if isinstance(given, Ref):
            return list(zip(self.axes.labels[given.index], self.axes.shapes[given.index]))
        return [(self.label_of(each), self.shape_of(each)) for each in given or () if isinstance(each, Ref)]

    def same(self, a: Factors, b: Factors, reason: str | None = None) -> Factors:
        return self.ids.same(a, b, reason or self._meets())

    def _meets(self) -> str:
        where = f" near {self.near}" if self.near else ""
        return f"{self.name}{where} combines it with what no channel belongs to"

    def keep(self, axis: Factors, reason: str | None = None) -> Factors:
        """The axis stays whole from here on."""
        for array in axis:
            self.ids.freeze(array, reason or self.reason)
        return ()

    def split(self, axis: Factors, rows: int, columns: int) -> tuple[Factors, Factors]:
        return self.ids.split(axis, rows, columns, self.reason)

    def free(self, size: int) -> Factors:
        """Positions that are all alike, or made by the model's code: any of them may go."""
        return (self.ids.new(size),) if size > 1 else ()

    def size(self, argument: str, place: int | None, axis: Factors, size: int, computed: bool = False) -> None:
        """Note that a number among the arguments is the size of an axis."""
        if axis:
            self.axes.sizes.append(Size(self.node, argument, place, axis, size, self.near, computed))

    def work(self, axes: Sequence[tuple[Factors, int]]) -> None:
        fixed = math.prod(size for axis, size in axes if not axis) / self.axes.batch
        self.axes.works.append(Work(float(fixed), tuple(axis for axis, _ in axes if axis)))


Rule = Callable[[Call], Any]


def _fits(label: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return len(label) == len(shape) and all(len(a) == n for axis, n in zip(label, shape) for a in axis)
    return not isinstance(shape, list) or all(s is None or each is None or _fits(each, s) for each, s in zip(label or (), shape))


def _unknown(call: Call) -> Any:
    for ref in call.tensors():
        call.axes._freeze(call.axes.labels[ref.index], call.reason)
    return _blank(call.out)


def _blank(out: Any) -> Any:
    if isinstance(out, tuple):
        return [()] * len(out)
    return [_blank(each) for each in out] if isinstance(out, list) else None


def _pointwise(call: Call) -> Label:
    return _broadcast(call, [(call.label_of(ref), call.shape_of(ref)) for ref in call.tensors()], call.out)


def _broadcast(call: Call, given: Sequence[tuple[Label, tuple[int, ...]]], out: tuple[int, ...]) -> Label:
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


# -- products ----------------------------------------------------------------------------------------------------------


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
        return _unknown(call)
    inner = call.same(a[-1], b[-2])
    lead = _broadcast(call, [(a[:-2], sa[:-2]), (b[:-2], sb[:-2])], call.out[:-2])
    label = [*lead, a[-2], b[-1]]
    call.work([*zip(label, call.out), (inner, sa[-1])])
    if "mat1" in call.bound or "batch1" in call.bound:
        added = "self" if "self" in call.bound else "input"
        return _broadcast(call, [(label, call.out), (call.label(added), call.shape(added))], call.out)
    return label


def _convolution(call: Call) -> Label:
    x, weight = call.label("input"), call.label("weight")
    shape, groups = call.shape("weight"), int(call.value("groups"))
    if len(call.shape("input")) != len(shape):
        return _unknown(call)
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
        lead = _broadcast(call, [(q[:-2], sq[:-2]), (k[:-2], sk[:-2]), (v[:-2], sv[:-2])], call.out[:-2])
    if isinstance(call.ref("attn_mask"), Ref):
        scores = (*call.out[:-1], sk[-2])
        mask = call.label("attn_mask")
        _broadcast(call, [([*lead, q[-2], ()], scores), (mask, call.shape("attn_mask"))], scores)
    call.work([*zip(lead, call.out[:-2]), ((), call.out[-2] * sk[-2]), (inner, sq[-1])])
    call.work([*zip(lead, call.out[:-2]), ((), call.out[-2] * sk[-2]), (v[-1], sv[-1])])
    return [*lead, q[-2], v[-1]]


def _einsum(call: Call) -> Label:
    equation = str(call.value("equation")).replace(" ", "")
    given = call.list_of("tensors")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(given) or any(len(set(t)) != len(t) for t in terms):
        return _unknown(call)
    letters: dict[str, Factors] = {}
    sizes: dict[str, int] = {}
    for term, (label, shape) in zip(terms, given):
        for letter, axis, size in zip(term, label, shape):
            letters[letter] = call.same(letters[letter], axis) if letter in letters else axis
            sizes[letter] = size
    call.work([(call.ids.factors(*letters[letter]), sizes[letter]) for letter in letters])
    return [call.ids.factors(*letters[letter]) for letter in right]


# -- normalisation, reduction --------------------------------------------------------------------------------------------


def _with_vectors(call: Call, axis: Factors, names: Sequence[str]) -> Factors:
    for name in names:
        if isinstance(call.ref(name), Ref):
            axis = call.same(axis, call.label(name)[0])
    return axis


def _batch_norm(call: Call) -> Label:
    x = call.label("input")
    if len(x) < 2:
        return _unknown(call)
    return [x[0], _with_vectors(call, x[1], ("weight", "bias", "running_mean", "running_var")), *x[2:]]


def _layer_norm(call: Call) -> Any:
    x = call.label("input")
    n = len(call.value("normalized_shape"))
    for name in ("weight", "bias"):
        if isinstance(call.ref(name), Ref):
            x[-n:] = [call.same(a, b) if size > 1 else () for a, b, size in zip(x[-n:], call.label(name), call.shape("input")[-n:])]
    for place in range(n):
        call.size("normalized_shape", place, x[len(x) - n + place], call.shape("input")[-n:][place])
    return x if isinstance(call.out, tuple) else [x, *_blank(call.out[1:])]


def _group_norm(call: Call) -> Label:
    x, shape = call.label("input"), call.shape("input")
    groups = int(call.value("num_groups"))
    if groups > 1:
        rows, _ = call.split(x[1], groups, shape[1] // groups)
        call.size("num_groups", None, rows, groups)
    axis = _with_vectors(call, call.ids.factors(*x[1]), ("weight", "bias"))
    return [x[0], axis, *x[2:]]


def _reduction(call: Call) -> Any:
    if "other" in call.bound:  # the larger, the smaller of two
        return _pointwise(call)
    first = call.first
    x, rank = call.label(first), len(call.shape(first))
    dims = call.value("dim") if "dim" in call.bound else None
    if dims is None or dims == []:
        gone = set(range(rank))
    else:
        gone = {int(d) % max(rank, 1) for d in (dims if isinstance(dims, list) else [dims])}
    if call.name in ("argmax", "argmin", "cumsum", "median"):
        for axis in gone:
            call.keep(x[axis])
    keep = bool(call.value("keepdim"))
    label = [() if i in gone else axis for i, axis in enumerate(x) if keep or i not in gone]
    return label if isinstance(call.out, tuple) else [label for _ in call.out]


def _along(call: Call) -> Any:
    """Positions along one axis compete or are ordered: all of them stay."""
    x = call.label(call.first)
    if not x:
        return _blank(call.out)
    rank = len(x)
    dims = call.value("dim") if call.bound.get("dim") is not None else call.value("dims")
    for dim in dims if isinstance(dims, list) else [dims if dims is not None else -1]:
        call.keep(x[int(dim) % rank], f"it is the axis of {call.name}{f' near {call.near}' if call.near else ''}")
        x[int(dim) % rank] = ()
    return x if isinstance(call.out, tuple) else [x for _ in call.out]


def _spatial(call: Call) -> Any:
    """Channels second; what comes after is space."""
    first = call.first
    x, rank = call.label(first), len(call.shape(first))
    n_lead = max(0, rank - int(call.name[-2])) if call.name[-1:] == "d" and call.name[-2:-1].isdigit() else 2
    for axis in x[n_lead:]:
        call.keep(axis, PLACES)
    label = [*x[:n_lead], *[()] * (rank - n_lead)]
    return label if isinstance(call.out, tuple) else [label for _ in call.out]


# -- arrangement ---------------------------------------------------------------------------------------------------------


def _reshape(call: Call) -> Label:
    first = call.first
    return reshaped(call, call.label(first), call.shape(first), call.out)


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
        return _unknown(call)
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
        call.axes._freeze(call.label_of(chosen[i]), _chosen(call))
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


# -- recurrent layers ----------------------------------------------------------------------------------------------------

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _hidden(call: Call, axis: Factors, gates: int, size: int) -> Factors:
    """The hidden units behind an axis of gates * size positions."""
    outer, inner = call.split(axis, gates, size)
    call.keep(outer, "all gates of a recurrent layer stay")
    return inner


def _recurrent(call: Call) -> list[Label]:
    gates = _GATES[call.name]
    x, first = call.label("input"), call.bound["hx"]
    states = [call.label_of(h) for h in (first if isinstance(first, list) else [first])]
    shapes = [call.shape_of(h) for h in (first if isinstance(first, list) else [first])]
    parameters = call.list_of("params")
    projects = len(shapes) == 2 and shapes[0][2] != shapes[1][2]
    n_weights = 2 + 2 * bool(call.value("has_biases")) + projects
    n_directions = 2 if call.value("bidirectional") else 1
    below, width = x[2], call.shape("input")[2]
    steps = call.shape("input")[1 if call.value("batch_first") else 0]
    for layer in range(int(call.value("num_layers"))):
        outputs: list[tuple[Factors, int]] = []
        for direction in range(n_directions):
            start = (layer * n_directions + direction) * n_weights
            own = parameters[start : start + n_weights]
            (w_ih, s_ih), (w_hh, s_hh) = own[:2]
            size = s_ih[0] // gates
            below = call.same(below, w_ih[1])
            hidden = _hidden(call, w_ih[0], gates, size)
            hidden = call.same(hidden, _hidden(call, w_hh[0], gates, size))
            for label, _ in own[2:4] if call.value("has_biases") else []:
                hidden = call.same(hidden, _hidden(call, label[0], gates, size))
            hidden = call.same(hidden, states[-1][2]) if size > 1 else ()
            out, n_out = hidden, size
            if projects:
                w_hr, s_hr = own[-1]
                call.same(hidden, w_hr[1])
                out, n_out = call.same(w_hr[0], states[0][2]), s_hr[0]
            call.same(out, w_hh[1])
            call.work([((), call.axes.batch * steps * gates), (hidden, size), (below, width)])
            call.work([((), call.axes.batch * steps * gates), (hidden, size), (out, n_out)])
            outputs.append((out, n_out))
        below, width = call.ids.factors(*concatenated(outputs)), sum(size for _, size in outputs)
    finals = [[(), (), call.ids.factors(*label[2])] for label in states]
    return [[x[0], x[1], below], *finals]


def _cell(call: Call) -> Any:
    gates = _GATES[call.name.removesuffix("_cell")]
    first = call.bound["hx"]
    states = [call.label_of(h) for h in (first if isinstance(first, list) else [first])]
    call.same(call.label("input")[-1], call.label("w_ih")[1])
    size = call.shape("w_ih")[0] // gates
    hidden: Factors = states[0][-1]
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        if isinstance(call.ref(name), Ref):
            hidden = call.same(hidden, _hidden(call, call.label(name)[0], gates, size))
    for axis in (call.label("w_hh")[1], *(label[-1] for label in states[1:])):
        hidden = call.same(hidden, axis)
    call.work([((), call.axes.batch * gates), (hidden, size), (call.label("w_ih")[1], call.shape("w_ih")[1])])
    call.work([((), call.axes.batch * gates), (hidden, size), (hidden, size)])
    label = [call.label("input")[0], hidden]
    return label if isinstance(call.out, tuple) else [list(label) for _ in call.out]


def _item(call: Call) -> Any:
    whole = call.axes.labels[call.ref("value").index]
    found = whole[call.value("index")] if whole else None
    return [call.ids.factors(*axis) for axis in found] if found else _blank(call.out)


def _squeeze(call: Call) -> Label:
    return reshaped(call, call.label("self"), call.shape("self"), call.out)


def _names(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **_names("linear", _linear),
    **_names("matmul mm bmm addmm baddbmm", _matmul),
    **_names("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d", _convolution),
    **_names("scaled_dot_product_attention", _attention),
    **_names("einsum", _einsum),
    **_names("batch_norm instance_norm", _batch_norm),
    **_names("layer_norm native_layer_norm rms_norm _fused_rms_norm", _layer_norm),
    **_names("group_norm", _group_norm),
    **_names(
        "sum mean amax amin max min var std var_mean prod logsumexp linalg_vector_norm norm any all argmax argmin median",
        _reduction,
    ),
    **_names(
        "softmax log_softmax _softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp sort topk argsort roll fft_fft "
        "fft_ifft",
        _along,
    ),
    **_names(
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d upsample_nearest1d "
        "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d reflection_pad1d reflection_pad2d "
        "replication_pad2d _adaptive_avg_pool2d",
        _spatial,
    ),
    **_names("view reshape _unsafe_view flatten unflatten _reshape_copy reshape_as view_as ravel", _reshape),
    **_names("squeeze", _squeeze),
    **_names("permute", _permute),
    **_names("transpose t swapaxes swapdims numpy_T mT", _transpose),
    **_names("movedim moveaxis", _movedim),
    **_names("unsqueeze", _unsqueeze),
    **_names("expand expand_as broadcast_to", _expand),
    **_names("repeat tile", _repeat),
    **_names("repeat_interleave", _repeat_interleave),
    **_names("cat concat concatenate", _cat),
    **_names("stack", _stack),
    **_names("split split_with_sizes chunk unsafe_split unsafe_chunk unsafe_split_with_sizes tensor_split", _pieces),
    **_names("unbind", _unbind),
    **_names("select", _select),
    **_names("slice narrow", _slice),
    **_names("index", _index),
    **_names("index_select", _index_select),
    **_names("gather take_along_dim", _gather),
    **_names("embedding", _embedding),
    **_names("pad constant_pad_nd", _pad),
    **_names("flip", _flip),
    **_names("pixel_shuffle", _pixel_shuffle),
    **_names("pixel_unshuffle", _pixel_unshuffle),
    **_names("channel_shuffle native_channel_shuffle", _channel_shuffle),
    **_names("im2col", _im2col),
    **_names("col2im", _col2im),
    **_names("unfold", _unfold),
    **_names("glu", _glu),
    **_names("tril triu", _last_two),
    **_names("lstm gru rnn_tanh rnn_relu", _recurrent),
    **_names("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", _cell),
    **_names("getitem", _item),
    **_names("contiguous clone alias detach to _to_copy type_as dropout zeros_like ones_like full_like copy", _like),
    **_names("zeros ones full new_zeros new_ones new_full scalar_tensor", _made),
    **_names(
        "where masked_fill relu6 hardswish hardsigmoid hardtanh gelu silu mish softplus elu selu celu leaky_relu "
        "log_sigmoid threshold clamp clip lerp addcmul addcdiv nan_to_num hardshrink softshrink",
        _pointwise,
    ),
}
"""Operator name to rule. What is not listed and not marked point-wise by torch keeps everything it reads whole."""

_SIZED: Mapping[str, str] = {
    "unflatten": "sizes", "reshape": "shape",
    **dict.fromkeys("view _unsafe_view _reshape_copy expand broadcast_to".split(), "size"),
    **dict.fromkeys("zeros ones full new_zeros new_ones new_full".split(), "size"),
}  # fmt: skip
"""Operators with the sizes of their result among their arguments."""

__all__ = ["NONE", "Axes", "Call", "Label", "Work"]
