"""Sizes of channel axes in a model's code: which axes they make alike, and which attributes change with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import final

import numpy as np
from torch import nn

from pared.cut import Group, Mend, sizes_of
from pared.graph.axes import Axes
from pared.graph.call import Size
from pared.graph.ids import Factors
from pared.graph.load import Axis
from pared.graph.provenance import Attribute, Combined, Extent, Origin, Provenance

_DIVIDED = "the code divides by its size"


@final
class Sizes:
    """What is known of the numbers in the code of a model.

    `kept`: axes whose size an attribute was seen to be; `read`: attributes that some call was given.
    """

    def __init__(self, model: nn.Module, axes: Axes) -> None:
        self.model, self.axes = model, axes
        self.kept: dict[Attribute, list[Factors]] = {}
        self.read: set[Attribute] = set()

    def relate(self, provenance: Provenance) -> None:
        """Numbers that the code takes from attributes and shapes: axes whose sizes come from one number are cut alike."""
        told: dict[int, list[tuple[int, Origin]]] = {}
        for node, numbers in provenance.numbers():
            told.setdefault(node, numbers)
            self.read |= {found for _, origin in numbers for found in _attributes(origin)}
        relations: list[tuple[Factors, int, Combined | Extent]] = []
        for size in self.axes.sizes:
            origin = _origin_of(size, told.get(size.node, []))
            if isinstance(origin, Attribute):
                self._keeps(origin, size.axis)
            elif isinstance(origin, Combined | Extent):
                relations.append((size.axis, size.size, origin))
            elif isinstance(origin, int) and not size.computed and not self._guesses(size):
                for array in size.axis:
                    self.axes.ids.freeze(array, f"its size is the number {size.size} in the code near {size.near}")
        for axis, n, origin in relations:
            if isinstance(origin, Combined):
                self._relate(self.axes.ids.factors(*axis), n, origin)
        for axis, _, origin in relations:
            if isinstance(origin, Extent):
                whole = self._axis(origin) or ()
                if not self._as_long(axis, whole):
                    self.axes.ids.same(axis, whole, "the code takes its size from that of what stays")
        for attribute, origin in provenance.equal():
            if equal := self._axis(origin):
                self._keeps(attribute, equal)

    def _guesses(self, size: Size) -> bool:
        """Whether an attribute that no call was seen to be given could be this size."""
        modules = dict(self.model.named_modules())
        return any(
            value == size.size and Attribute(path, name, place) not in self.read
            for path in _around(size.near)
            if path in modules
            for name, place, value in _numbers(modules[path], set())
        )

    def _keeps(self, attribute: Attribute, axis: Factors) -> None:
        """The attribute is the size of the axis; axes whose sizes are one attribute are one."""
        held = self.kept.setdefault(attribute, [])
        if held and not self._as_long(held[0], axis):
            self.axes.ids.same(held[0], axis, f"its size is also that of something else, {attribute.name} of {attribute.module}")
        held.append(axis)

    def _as_long(self, a: Factors, b: Factors) -> bool:
        """Whether as many positions of both stay, whatever goes: they belong to the same channels, in some order."""
        found = []
        for axis in (a, b):
            arrays = self.axes.ids.factors(*axis)
            rows = np.sort(np.stack(arrays, 1), 1) if arrays else np.zeros((0, 0), np.int64)
            found.append(rows[np.lexsort(rows.T)] if len(rows) else rows)
        return np.array_equal(found[0], found[1])

    def _axis(self, origin: Origin) -> Factors | None:
        """The axis whose size a number is; (): one that stays; None: not known."""
        ids = self.axes.ids
        if isinstance(origin, int):
            return ()
        if isinstance(origin, Extent):
            label = self.axes.labels[origin.value]
            label = label[origin.item] if label and origin.item is not None else label
            return ids.factors(*label[origin.axis]) if label else ()
        if isinstance(origin, Attribute):
            return ids.factors(*self.kept[origin][0]) if origin in self.kept else None
        left, right = self._axis(origin.left), self._axis(origin.right)
        if left is None or right is None:
            return None
        a, b = origin.sizes
        if origin.op == "mul":
            return ids.join(left, a, right, b)
        if not left or right:
            return None
        outer, inner = ids.split(left, b, a // b, _DIVIDED)
        for array in outer:
            ids.freeze(array, _DIVIDED)
        return ids.factors(*inner)

    def _relate(self, axis: Factors, n: int, origin: Combined) -> None:
        """The axis, of n positions, is as long as two other sizes multiplied or divided."""
        ids, (a, b) = self.axes.ids, origin.sizes
        left, right = self._axis(origin.left), self._axis(origin.right)
        if origin.op == "mul":
            if (left is None or right is None) and a * b == n:
                outer, inner = ids.split(axis, a, b, _DIVIDED)
                for part, known, source in ((outer, left, origin.left), (inner, right, origin.right)):
                    if known is None and isinstance(source, Attribute):
                        self._keeps(source, part)
            return
        if a != b * n:
            return
        if left and not right:  # by a fixed number, or by one of which nothing is known yet
            swapped = _rows_and_columns(left, n, b)
            if swapped is not None and self._as_long(swapped[0], axis):
                outer, inner = swapped[1], swapped[0]
            else:
                outer, inner = ids.split(left, b, n, _DIVIDED)
            ids.same(inner, axis, _DIVIDED)
            if right is None and isinstance(origin.right, Attribute):
                self._keeps(origin.right, outer)
                return
            for array in outer:
                ids.freeze(array, _DIVIDED)
            return
        whole = ids.join(right or (), b, axis, n)
        if left is None:
            if isinstance(origin.left, Attribute):
                self._keeps(origin.left, whole)
        elif not self._as_long(left, whole):
            ids.same(left, whole, _DIVIDED)

    def mends(self, terms: Callable[[Factors], Axis], groups: Sequence[Group]) -> dict[int, tuple[Mend, ...]]:
        """Attributes that are the size of an axis, by the number of the group that changes it: those seen to be, and others by
        name and value next to where it is read.

        Args:
            terms: an axis as counts of positions by the groups that they belong to.
        """
        found: dict[int, list[Mend]] = {}

        def mend(attribute: Attribute, axis: Axis) -> None:
            for n, numbers in axis:
                for number in numbers:
                    per = None if len(axis) == 1 else n // groups[number].n
                    found.setdefault(number, []).append(Mend(attribute.module, attribute.name, attribute.place, per))

        for attribute, axes in self.kept.items():
            if self.axes.ids.factors(*axes[0]):
                mend(attribute, terms(axes[0]))
        modules = dict(self.model.named_modules())
        facts: dict[str, dict[int, list[Factors]]] = {}
        for size in self.axes.sizes:
            if size.computed:
                continue
            for owner in _around(size.near):
                facts.setdefault(owner, {}).setdefault(size.size, []).append(size.axis)
        for path, origin in self.axes.origins.items():
            for ids in origin:
                if len(ids) > 1:
                    for owner in _around(path.rpartition(".")[0]):
                        facts.setdefault(owner, {}).setdefault(len(ids), []).append((ids,))
        for path, by_size in facts.items():
            module = modules.get(path)
            if module is None:
                continue
            follows = {name for name, _ in sizes_of(module)}
            for name, place, value in _numbers(module, follows):
                attribute = Attribute(path, name, place)
                if attribute in self.read or attribute in self.kept:
                    continue
                likely = list(dict.fromkeys(terms(axis) for axis in by_size.get(value, ())))
                likely = [axis for axis in likely if any(numbers for _, numbers in axis)]
                if len(likely) > 1:  # what is read in the module itself comes before what is read around it
                    read = [ids for p, o in self.axes.origins.items() if p.startswith(f"{path}.") for ids in o]
                    own = {terms((ids,)) for ids in read if len(ids) == value}
                    likely = [axis for axis in likely if axis in own] or likely
                if likely:
                    mend(attribute, likely[0])
        return {number: tuple(dict.fromkeys(several)) for number, several in found.items()}


def _rows_and_columns(axis: Factors, rows: int, columns: int) -> tuple[Factors, Factors] | None:
    """The axis as whole rows and whole columns, if it is that already."""
    outer, inner = [], []
    for array in axis:
        grid = array.reshape(rows, columns)
        if (grid == grid[:, :1]).all():
            outer.append(grid[:, 0])
        elif (grid == grid[:1]).all():
            inner.append(grid[0])
        else:
            return None
    return tuple(outer), tuple(inner)


def _attributes(origin: Origin) -> set[Attribute]:
    if isinstance(origin, Combined):
        return _attributes(origin.left) | _attributes(origin.right)
    return {origin} if isinstance(origin, Attribute) else set()


def _origin_of(size: Size, numbers: list[tuple[int, Origin]]) -> Origin | None:
    """Where a number of a node comes from, among the numbers that its call was given."""
    if size.place is not None and size.place < len(numbers) and numbers[size.place][0] == size.size:
        return numbers[size.place][1]
    equal = [origin for n, origin in numbers if n == size.size]
    named = [origin for origin in equal if isinstance(origin, Attribute) and origin.name == size.argument]
    return next(iter(named or equal), None)


def _around(path: str) -> list[str]:
    """A module and the two around it."""
    found = [path]
    for _ in range(2):
        if not path:
            break
        path = path.rpartition(".")[0]
        found.append(path)
    return found


_SIZES = re.compile(
    r"dim|head|chan|chs|feat|hidden|embed|group|width|planes|inner|expan|split|units|^[cCdDnmhk]$|in_|out_|qk|kv|_c$|size$|rank"
)
_NOT_SIZES = re.compile(
    r"window|shift|kernel|stride|pad|patch|grid|img|image|input_size|resol|seq|token|depth|layer|block|stage|level|pos|max|class|"
    r"dilation|scale_factor|vocab|area|spatial|feat_size|map|sr_ratio|prefix"
)
"""Names of attributes that are sizes of channel axes, and of those that are not, whatever their value."""


def _numbers(module: nn.Module, follows: set[str]) -> Iterable[tuple[str, int | None, int]]:
    """Whole numbers above 1 among the attributes, and in tuples and lists of them."""
    for name, value in vars(module).items():
        if name.startswith("_") or not _SIZES.search(name) or _NOT_SIZES.search(name) or name in follows:
            continue
        if type(value) is int and value > 1:
            yield name, None, value
        elif isinstance(value, tuple | list) and 0 < len(value) <= 8 and all(type(v) is int for v in value):
            yield from ((name, place, v) for place, v in enumerate(value) if v > 1)
