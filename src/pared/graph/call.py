"""One operator's call as the rules of channels see it, and what they note of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from pared.graph.ids import Factors
from pared.graph.operators import Operator, Ref
from pared.graph.program import leaves

if TYPE_CHECKING:
    from pared.graph.axes import Axes

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


def rules(table: Mapping[str, Rule]) -> dict[str, Rule]:
    """Operator name to rule, from the names of operators, separated by spaces, to rule."""
    return {name: rule for names, rule in table.items() for name in names.split()}
