"""How values flow through a network, and at which of its modules they can be seen from outside."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import TraceError
from pared.graph.substitutes import Substitutes
from pared.graph.trace import _undisturbed
from pared.statistics import Flow, Operation, Port

_SAME = ("alias", "detach", "lift_fresh_copy", "contiguous", "clone", "dropout", "feature_dropout", "alpha_dropout")
"""Operators that give their first argument, in eval mode."""


def flow_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Flow:
    """The flow of one call of the model in eval mode.

    Raises:
        TraceError: the model has no graph.
    """
    with _undisturbed(model):
        try:
            with Substitutes():
                exported = torch.export.export(model, args, dict(kwargs or {}), strict=False)
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
            raise TraceError(f"{type(model).__name__} has no graph: {reason}") from error
    return _Reading(exported).flow()


class _Reading:
    def __init__(self, exported: Any) -> None:
        self.states: dict[Any, str] = {}
        self.numbers: dict[Any, int] = {}
        self.operations: list[Operation] = []
        self.calls: list[tuple[str, ...]] = []
        """By operation: the calls that it is within, outermost first, such as ("layer1", "layer1.0", "layer1.0.act@1")."""
        self.results: set[int] = set()
        self.shapes: dict[int, tuple[int, ...]] = {}
        named = {
            spec.arg.name: spec.target
            for spec in exported.graph_signature.input_specs
            if spec.kind.name in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR")
        }
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                if node.name in named:
                    self.states[node] = str(named[node.name])
                else:
                    self.numbers[node] = self._new(node)
            elif node.op == "call_function":
                self._read(node)
            elif node.op == "output":
                self.results |= {self.numbers[leaf] for leaf in _nodes(node.args) if leaf in self.numbers}

    def _new(self, node: Any) -> int:
        value = node.meta.get("val")
        self.shapes[len(self.shapes)] = tuple(value.shape) if isinstance(value, Tensor) else ()
        return len(self.shapes) - 1

    def _read(self, node: Any) -> None:
        kind = _kind(node.target)
        if kind in _SAME and node.args and node.args[0] in self.numbers:
            self.numbers[node] = self.numbers[node.args[0]]
            return
        inputs = tuple(self.numbers[leaf] for leaf in _nodes((node.args, node.kwargs)) if leaf in self.numbers)
        states = {place: self.states[leaf] for place, leaf in enumerate(node.args) if _hashable(leaf) and leaf in self.states}
        if not inputs and not isinstance(node.meta.get("val"), Tensor):
            return
        plain = {place: leaf for place, leaf in enumerate(node.args) if not _nodes(leaf)}
        self.numbers[node] = self._new(node)
        stack = node.meta.get("nn_module_stack") or {}
        calls = tuple(path for path, _ in stack.values())
        module = calls[-1].partition("@")[0] if calls else ""
        self.operations.append(Operation(kind, module, inputs, states, self.numbers[node], plain))
        self.calls.append(calls)

    def flow(self) -> Flow:
        inside: dict[str, set[int]] = {}
        for number, calls in enumerate(self.calls):
            for call in calls:
                inside.setdefault(call, set()).add(number)
        repeated = {call.partition("@")[0] for call in inside if "@" in call}
        ports: dict[int, list[tuple[Port, frozenset[int]]]] = {}
        readers: dict[int, set[int]] = {}
        for number, operation in enumerate(self.operations):
            for value in operation.inputs:
                readers.setdefault(value, set()).add(number)
        for call, members in inside.items():
            if call in repeated or "@" in call or not call:
                continue
            made = {self.operations[number].output for number in members}
            taken = {value for number in members for value in self.operations[number].inputs} - made
            given = {value for value in made if value in self.results or readers.get(value, set()) - members}
            if len(taken) == 1:
                (value,) = taken
                ports.setdefault(value, []).append((Port(call, "input"), frozenset(readers[value] & members)))
            if len(given) == 1:
                (value,) = given
                ports.setdefault(value, []).append((Port(call, "output"), frozenset(readers.get(value, set()) - members)))
        found = {value: tuple(at) for value, at in ports.items()}
        return Flow(tuple(self.operations), found, frozenset(self.results), self.shapes)


def _kind(target: Any) -> str:
    """conv2d of aten.conv2d.default; add of aten.add_.Tensor."""
    if target is operator.getitem:
        return "getitem"
    name = target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else str(target)
    return name.rstrip("_")


def _nodes(tree: Any) -> list[Any]:
    if isinstance(tree, torch.fx.Node):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [leaf for item in tree for leaf in _nodes(item)] if isinstance(tree, list | tuple) else []


def _hashable(leaf: Any) -> bool:
    return isinstance(leaf, torch.fx.Node)
