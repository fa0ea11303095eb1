"""Which position of which axis of which tensor belongs to which channel, along a whole program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from pared.errors import ArtifactError
from pared.graph.call import Call, Size, Work
from pared.graph.ids import Ids
from pared.graph.interpret import watch
from pared.graph.operators import Ref, find
from pared.graph.program import CONSTANTS, Node, Program, leaves
from pared.graph.rules import RULES, pointwise, unknown

_SIZED: Mapping[str, str] = {
    "unflatten": "sizes", "reshape": "shape",
    **dict.fromkeys("view _unsafe_view _reshape_copy expand broadcast_to".split(), "size"),
    **dict.fromkeys("zeros ones full new_zeros new_ones new_full".split(), "size"),
}  # fmt: skip
"""Operators with the sizes of their result among their arguments."""


@final
class Axes:
    """The program's values with an id at every position of every axis that could get shorter.

    Every axis of every state starts with ids of its own. One rule per operator says which ids are the same channel and
    which label the result has. What meets a model input, an output or an operator without a rule stays whole; nothing
    fails. Normalisations and means over channels are taken over those that stay.

    Args:
        program: as traced.
        root: holds its states.
        args, kwargs: an example call, for the shapes.
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
        try:
            watch(program, root, args, kwargs, self._see, torch.device("meta"))
        except ArtifactError:
            watch(program, root, args, kwargs, self._see)
        self.batch = next((shape[0] for shape in self.shapes[: len(program.inputs)] if shape), 1)
        self._inputs()
        for k, node in enumerate(program.nodes):
            self._node(k, node)
        for leaf in leaves(program.outputs):
            if isinstance(leaf, Ref):
                self.freeze(self.labels[leaf.index], "it is an output of the model")

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
            rule = pointwise if torch.Tag.pointwise in getattr(operator.function, "tags", ()) else unknown
        found = rule(call)
        if not _fits(found, self.shapes[number]):
            found = unknown(call)
        self.labels[number] = found
        if name in _SIZED:
            argument = _SIZED[name]
            first = call.axis("dim", len(call.shape("self"))) if name == "unflatten" else 0
            for place, number_or_ref in enumerate(call.bound[argument]):
                axis = first + place
                if isinstance(number_or_ref, Ref) or (type(number_or_ref) is int and number_or_ref == call.out[axis]):
                    call.size(argument, place, found[axis], call.out[axis], isinstance(number_or_ref, Ref))

    def freeze(self, label: Any, reason: str) -> None:
        """These positions stay, and why."""
        for axis in label or ():
            if isinstance(axis, list):
                self.freeze(axis, reason)
            else:
                for array in axis:
                    self.ids.freeze(array, reason)


def _fits(label: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return len(label) == len(shape) and all(len(a) == n for axis, n in zip(label, shape) for a in axis)
    return not isinstance(shape, list) or all(s is None or each is None or _fits(each, s) for each, s in zip(label or (), shape))
