"""A network as data: inputs, states, a list of operators, outputs. Nothing in it is code or evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn

from pared.errors import ArtifactError
from pared.graph.operators import Operator, Ref, check_size, find

if TYPE_CHECKING:
    from pared.graph.module import ProgramModule

LARGEST_COUNT = 1_000_000
LARGEST_DEPTH = 32
DEFAULT_MAX_BYTES = 2**34
CONSTANTS = "pared_constants"
"""Reserved first component of the paths of tensors that the code of a model makes and no module owns."""

Tree = Any
"""Nested tuple, list, dict (keys str or int) of None, bool, int, float, str, and `Slot` (inputs) or `Ref` (outputs)."""


@final
@dataclass(frozen=True, slots=True)
class Slot:
    """The place of input tensor number `index` in the arguments of a call."""

    index: int


@final
class _Unsupplied:
    def __repr__(self) -> str:
        return "UNSUPPLIED"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unsupplied:
        return self

    def __reduce__(self) -> str:
        return "UNSUPPLIED"


UNSUPPLIED = _Unsupplied()
"""The tree of a parameter that the traced call left at a default which is not a plain constant."""


@final
@dataclass(frozen=True, slots=True)
class Symbol:
    """What must hold for a dynamic axis: smallest <= size <= largest and size % multiple == remainder."""

    smallest: int = 0
    largest: int | None = None
    multiple: int = 1
    remainder: int = 0


@final
@dataclass(frozen=True, slots=True)
class Dynamic:
    """An axis whose size is free: number `symbol` of the program's symbols; axes with the same symbol are equal."""

    symbol: int


@final
@dataclass(frozen=True, slots=True)
class Input:
    """One input tensor: how errors call it, its dtype, and each axis a fixed size or `Dynamic`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | Dynamic, ...]


@final
@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the traced forward. `role`: "positional" (also by keyword), "keyword", "*" or "**"."""

    name: str
    role: Literal["positional", "keyword", "*", "**"]
    tree: Tree


Role = Literal["parameter", "buffer", "constant"]


@final
@dataclass(frozen=True, slots=True)
class State:
    """A tensor that the program reads: its path in the original model's state and what the model holds it as.

    "constant" is a buffer that state_dict() leaves out, or a tensor that the model's code makes.
    """

    path: str
    role: Role


@final
@dataclass(frozen=True, slots=True)
class Node:
    """One call: `op` is "aten.conv2d.default", "operator.add" (of sizes) or "operator.getitem".

    args and kwargs hold Ref, int, float, bool, None, str, torch.dtype, torch.memory_format, DEVICE and lists of these;
    arguments equal to the schema's default are left out.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def arguments(self) -> dict[str, Any]:
        """Every argument by its name in torch's schema, defaults filled in: {"input": Ref(0), "stride": [1, 1]}."""
        return operator_of(self).bind(self.args, self.kwargs)

    def refs(self) -> Iterator[Ref]:
        """The values it reads, in order of the arguments."""
        for leaf in leaves([self.args, *self.kwargs.values()]):
            if isinstance(leaf, Ref):
                yield leaf


def leaves(tree: Tree) -> Iterator[Any]:
    """The leaves of a tree, in order."""
    if isinstance(tree, list | tuple):
        for branch in tree:
            yield from leaves(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from leaves(branch)
    else:
        yield tree


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Any:
    """A tree of the same structure with each leaf replaced by what `function` gives for it."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, branch) for key, branch in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(function, branch) for branch in tree)
    return function(tree)


@final
class Program:
    """The graph of a network in eval mode. Values are numbered: inputs, then states, then results of nodes in order.

    Made by `pared.graph.trace`, or by `from_json` from a file. Valid by construction: every operator is of the closed
    list, every reference is to an earlier value of the right kind, constants ask for at most `max_bytes` elements;
    otherwise ArtifactError.

    constants       tensors of the states with role "constant", by path; empty after `from_json`, the file holds them
    static_reason   why the batch axis is fixed, or None when it is free or there is none
    kinds           for every value "tensor", "scalar" (a size), "list" (of tensors), or a tuple of these
    """

    __slots__ = (
        "__weakref__", "constants", "inputs", "kinds", "nodes", "outputs", "parameters", "states", "static_reason",
        "symbols",
    )  # fmt: skip

    def __init__(
        self,
        parameters: tuple[Parameter, ...],
        inputs: tuple[Input, ...],
        symbols: tuple[Symbol, ...],
        states: tuple[State, ...],
        nodes: tuple[Node, ...],
        outputs: Tree,
        constants: Mapping[str, Tensor] | None = None,
        static_reason: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.parameters = parameters
        self.inputs = inputs
        self.symbols = symbols
        self.states = states
        self.nodes = nodes
        self.outputs = outputs
        self.constants = dict(constants or {})
        self.static_reason = static_reason
        self.kinds: tuple[str | tuple[str, ...], ...] = self._check(DEFAULT_MAX_BYTES if max_bytes is None else max_bytes)

    def _check(self, max_bytes: int) -> tuple[str | tuple[str, ...], ...]:
        for what, count in (("inputs", len(self.inputs)), ("states", len(self.states)), ("nodes", len(self.nodes))):
            if count > LARGEST_COUNT:
                raise ArtifactError(f"a program may have at most {LARGEST_COUNT} {what}, this one has {count}")
        check_paths([state.path for state in self.states])
        for i, given in enumerate(self.inputs):
            if any(isinstance(d, Dynamic) and not 0 <= d.symbol < len(self.symbols) for d in given.shape):
                raise ArtifactError(f"input {i} names a symbol that the program does not have")
        slots = [leaf.index for p in self.parameters for leaf in leaves(p.tree) if isinstance(leaf, Slot)]
        if slots != list(range(len(self.inputs))):
            raise ArtifactError("the parameters of a program must name every input tensor once, in order")
        kinds: list[str | tuple[str, ...]] = ["tensor"] * (len(self.inputs) + len(self.states))

        def kind_of(ref: Ref) -> str | tuple[str, ...]:
            return kinds[ref.index]

        for k, node in enumerate(self.nodes):
            operator = find(node.op)
            if operator is None:
                raise ArtifactError(f"node {k}: {node.op} is not an operator of pared programs; load with a newer pared")
            if any(not 0 <= ref.index < len(kinds) for ref in node.refs()):
                raise ArtifactError(f"node {k} ({node.op}) refers to a value that does not come before it")
            if node.op == "operator.getitem":
                kinds.append(_item_kind(k, node, kind_of))
                continue
            wrong = operator.check(node.args, node.kwargs, kind_of)
            if wrong is not None:
                raise ArtifactError(f"node {k} ({node.op}) {wrong}")
            check_size(node.op, operator.bind(node.args, node.kwargs), max_bytes)
            kinds.append(operator.kind)
        for leaf in leaves(self.outputs):
            if isinstance(leaf, Ref) and not (0 <= leaf.index < len(kinds) and kinds[leaf.index] in ("tensor", "scalar")):
                raise ArtifactError("an output of the program is not a tensor or a size that the program computes")
        return tuple(kinds)

    @property
    def first_node(self) -> int:
        """The value number of the result of node 0."""
        return len(self.inputs) + len(self.states)

    def state_of(self, ref: Ref) -> State | None:
        """The state that a reference reads, or None if it reads an input or the result of a node."""
        return self.states[ref.index - len(self.inputs)] if self.is_state(ref.index) else None

    def is_state(self, index: int) -> bool:
        """Whether the value number `index` is a state."""
        return len(self.inputs) <= index < self.first_node

    def node_of(self, ref: Ref) -> int | None:
        """The number of the node whose result a reference reads, or None if it reads an input or a state."""
        return ref.index - self.first_node if ref.index >= self.first_node else None

    def users(self) -> list[list[int]]:
        """For every value, the numbers of the nodes that read it."""
        users: list[list[int]] = [[] for _ in self.kinds]
        for k, node in enumerate(self.nodes):
            for index in dict.fromkeys(ref.index for ref in node.refs()):
                users[index].append(k)
        return users

    def to_json(self) -> list[Any]:
        """The program as compact lists of numbers and strings; see `pared.graph.encoding` for the layout."""
        from pared.graph.encoding import encode

        return encode(self)

    @classmethod
    def from_json(cls, obj: Any, max_bytes: int | None = None) -> Program:
        """The program that `to_json` gave. Everything is checked; ArtifactError says what is wrong."""
        from pared.graph.encoding import decode

        return decode(obj, max_bytes)

    def root(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A tree of plain modules that holds every state at its path, from `tensors`, then from `constants`.

        Further tensors are left aside. Raises ArtifactError for a missing tensor.
        """
        from pared.graph.module import build_root

        return build_root(self, tensors)

    def module(self, root: nn.Module) -> ProgramModule:
        """A module that runs the program on the states found at their paths below `root`."""
        from pared.graph.module import ProgramModule

        return ProgramModule(self, root)


def operator_of(node: Node) -> Operator:
    """The operator of a node of a valid program."""
    operator = find(node.op)
    if operator is None:
        raise ArtifactError(f"{node.op} is not an operator of pared programs")
    return operator


def _item_kind(k: int, node: Node, kind_of: Any) -> str:
    if len(node.args) == 2 and not node.kwargs and isinstance(node.args[0], Ref) and type(node.args[1]) is int:
        kind, index = kind_of(node.args[0]), node.args[1]
        if kind == "list" and 0 <= index < LARGEST_COUNT:
            return "tensor"
        if isinstance(kind, tuple) and 0 <= index < len(kind):
            return kind[index]
    raise ArtifactError(f"node {k} (operator.getitem) must take one result of a node that has several")


@functools.cache
def _reserved_names() -> frozenset[str]:
    return frozenset(dir(nn.Module()))


def check_paths(paths: list[str]) -> None:
    """Raise ArtifactError unless a tree of plain modules can hold a tensor at each of these paths."""
    owners: set[str] = set()
    for path in paths:
        parts = path.split(".")
        if len(parts) > LARGEST_DEPTH or len(path) > 1000:
            raise ArtifactError(f"the path {path[:60]}... is too long")
        for part in parts:
            if not part or part.startswith("__") or part in _reserved_names():
                raise ArtifactError(f"no tensor can be stored at {path!r}: {part!r} is not free as a name in a module")
        owners.update(".".join(parts[:i]) for i in range(1, len(parts)))
    both = owners.intersection(paths)
    if both or len(set(paths)) != len(paths):
        raise ArtifactError(f"the path {min(both or paths)!r} is used twice")
