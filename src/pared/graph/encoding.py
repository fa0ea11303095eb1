"""Programs as compact JSON, and back with every element checked.

    [version, parameters, states, calls, nodes, outputs, symbols?, static_reason?]

    parameters  name, tree, name, tree, ...       name with "=" before it: by keyword only; "*args", "**kwargs"
                tensor  [dims] or [dtype, dims]   a size, or -1, -2, ... for symbol 0, 1, ...
                ["(", ...] tuple, ["[", ...] list, ["{", key, tree, ...] dict, ["=", constant], ["?"] not supplied
    states      [[names, ...], [owner, ...], [which names, ...]] in order of first use: the owner "conv1" with the
                names ["weight", "bias"]; a name with "!" before it is a buffer, with "~" a constant
    calls       the distinct calls: [operator, argument, ..., {keyword: argument}?]
    nodes       which call each node is
    outputs     value number counted back from the last; lists as in parameters

An argument is a number, true, false, null, a list, or a string: digits, the node so many before this one; "i0" an
input; "s" the next unused state, "s0" one by number; "'" a string; "$" a dtype; "@" a memory format; "^" the device;
"inf", "-inf", "nan".
Nodes that repeat, such as those of equal blocks, thus become repeated numbers, which compress well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch

from pared.errors import ArtifactError
from pared.graph.operators import DEVICE, DTYPES, MEMORY_FORMATS, Ref
from pared.graph.program import (
    LARGEST_COUNT,
    LARGEST_DEPTH,
    UNSUPPLIED,
    Dynamic,
    Input,
    Node,
    Parameter,
    Program,
    Role,
    Slot,
    State,
    Symbol,
)

VERSION = 1
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_FORMAT_CODES = {memory_format: code for code, memory_format in MEMORY_FORMATS.items()}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_ROLE_MARKS = {"parameter": "", "buffer": "!", "constant": "~"}
_LONGEST_TEXT = 10_000
_MOST_ARGUMENTS = 5 * LARGEST_COUNT


def encode(program: Program) -> list[Any]:
    """See `Program.to_json`."""
    calls: dict[str, int] = {}
    nodes: list[int] = []
    writer = _Writer(program)
    for k in range(len(program.nodes)):
        call = json.dumps(writer.call(k), separators=(",", ":"))
        nodes.append(calls.setdefault(call, len(calls)))
    symbols = [_symbol_row(s) for s in program.symbols]
    while symbols and not symbols[-1]:
        symbols.pop()
    tail: list[Any] = [symbols, program.static_reason]
    while tail and not tail[-1]:
        tail.pop()
    parameters: list[Any] = []
    for parameter in program.parameters:
        mark = {"keyword": "=", "positional": ""}.get(parameter.role, parameter.role)
        parameters += [mark + parameter.name, _input_tree(parameter.tree, program.inputs)]
    last = len(program.kinds) - 1
    outputs = _output_tree(program.outputs, last)
    states = _state_columns(program.states)
    return [VERSION, parameters, states, [json.loads(call) for call in calls], nodes, outputs, *tail]


_MARKS = {"aten": "", "operator": "=", "pared": "%"}
"""What stands before the name of an operator, by the family that it belongs to."""


@final
class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.seen_states = 0

    def call(self, k: int) -> list[Any]:
        node = self.program.nodes[k]
        args = [self.argument(value, k) for value in node.args]
        named = {name: self.argument(value, k) for name, value in node.kwargs.items()}
        family, _, name = node.op.partition(".")
        short = _MARKS[family] + (name if family == "operator" else name.removesuffix(".default"))
        return [short, *args, *([named] if named else [])]

    def argument(self, value: Any, k: int) -> Any:
        if isinstance(value, Ref):
            return self.reference(value.index, k)
        if isinstance(value, list | tuple):
            return [self.argument(v, k) for v in value]
        if isinstance(value, str):
            return "'" + value
        if isinstance(value, torch.dtype):
            return "$" + _DTYPE_CODES[value]
        if isinstance(value, torch.memory_format):
            return "@" + _FORMAT_CODES[value]
        if value is DEVICE:
            return "^"
        if isinstance(value, float) and not math.isfinite(value):
            return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        return value

    def reference(self, index: int, k: int) -> str:
        n_inputs = len(self.program.inputs)
        if index < n_inputs:
            return f"i{index}"
        if index >= self.program.first_node:
            return str(k - (index - self.program.first_node))
        if index - n_inputs == self.seen_states:
            self.seen_states += 1
            return "s"
        return f"s{index - n_inputs}"


def _symbol_row(symbol: Symbol) -> list[Any]:
    row: list[Any] = [symbol.smallest, symbol.largest, symbol.multiple, symbol.remainder]
    for default in (0, 1, None, 0):
        if row[-1] != default:
            break
        row.pop()
    return row


def _input_tree(tree: Any, inputs: tuple[Input, ...]) -> Any:
    if isinstance(tree, Slot):
        given = inputs[tree.index]
        dims = [-1 - d.symbol if isinstance(d, Dynamic) else d for d in given.shape]
        return dims if given.dtype == torch.float32 else [_DTYPE_CODES[given.dtype], *dims]
    if tree is UNSUPPLIED:
        return ["?"]
    return _branches(tree, lambda branch: _input_tree(branch, inputs))


def _output_tree(tree: Any, last: int) -> Any:
    return last - tree.index if isinstance(tree, Ref) else _branches(tree, lambda branch: _output_tree(branch, last))


def _branches(tree: Any, write: Callable[[Any], Any]) -> list[Any]:
    if isinstance(tree, tuple):
        return ["(", *map(write, tree)]
    if isinstance(tree, list):
        return ["[", *map(write, tree)]
    if isinstance(tree, dict):
        return ["{", *(item for key, branch in tree.items() for item in (key, write(branch)))]
    if isinstance(tree, float) and not math.isfinite(tree):
        return ["~", "nan" if math.isnan(tree) else ("inf" if tree > 0 else "-inf")]
    return ["=", tree]


def _state_columns(states: tuple[State, ...]) -> list[Any]:
    groups: list[tuple[str, list[str]]] = []
    for state in states:
        owner, _, name = state.path.rpartition(".")
        marked = _ROLE_MARKS[state.role] + name
        if groups and groups[-1][0] == owner:
            groups[-1][1].append(marked)
        else:
            groups.append((owner, [marked]))
    patterns: dict[tuple[str, ...], int] = {}
    which = [patterns.setdefault(tuple(names), len(patterns)) for _, names in groups]
    return [[list(names) for names in patterns], [owner for owner, _ in groups], which]


def decode(obj: Any, max_bytes: int | None) -> Program:
    """See `Program.from_json`."""
    row = _list(obj, "a program", 6, 8)
    if row[0] != VERSION or type(row[0]) is not int:
        raise ArtifactError(f"this pared reads programs of version {VERSION}, found {_show(row[0])}; load with a newer pared")
    symbols = _symbols(row[6] if len(row) > 6 else [])
    static_reason = row[7] if len(row) > 7 else None
    if static_reason is not None:
        static_reason = _text(static_reason, "the reason for a fixed batch")
    reader = _TreeReader(symbols)
    entries = _list(row[1], "parameters", 0, LARGEST_COUNT)
    if len(entries) % 2:
        raise ArtifactError("the parameters of a program must be pairs of a name and a tree")
    parameters = tuple(reader.parameter(entries[i], entries[i + 1]) for i in range(0, len(entries), 2))
    inputs = tuple(reader.inputs)
    states = _states(row[2])
    nodes = _Reader(len(inputs), len(states)).nodes(row[3], row[4])
    last = len(inputs) + len(states) + len(nodes) - 1
    outputs = _read_output(row[5], last, 0)
    return Program(
        parameters,
        inputs,
        tuple(reader.symbols),
        states,
        nodes,
        outputs,
        static_reason=static_reason,
        max_bytes=max_bytes,
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _list(value: Any, what: str, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ArtifactError(f"{what} must be a list of {least} to {most} elements, found {_show(value)}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise ArtifactError(f"{what} must be a text of at most {_LONGEST_TEXT} characters, found {_show(value)}")
    return value


def _int(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ArtifactError(f"{what} must be a whole number in [{least}, {most}], found {_show(value)}")
    return value


_LARGEST_SIZE = 2**40


def _symbols(value: Any) -> list[Symbol]:
    symbols = []
    for row in _list(value, "symbols", 0, LARGEST_COUNT):
        given = _list(row, "a symbol", 0, 4)
        smallest, largest, multiple, remainder = given + [0, None, 1, 0][len(given) :]
        if largest is not None:
            _int(largest, "the largest size", 0, _LARGEST_SIZE)
        _int(smallest, "the smallest size", 0, _LARGEST_SIZE)
        _int(multiple, "the multiple of a size", 1, _LARGEST_SIZE)
        _int(remainder, "the remainder of a size", 0, multiple - 1)
        symbols.append(Symbol(smallest, largest, multiple, remainder))
    return symbols


@final
class _TreeReader:
    """Reads parameters; gathers the input tensors and the symbols met."""

    def __init__(self, symbols: list[Symbol]) -> None:
        self.symbols = symbols
        self.inputs: list[Input] = []

    def parameter(self, name: Any, tree: Any) -> Parameter:
        text = _text(name, "the name of a parameter")
        read = self.tree(tree, text.lstrip("=*"), 0)
        if text.startswith("**"):
            if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
                raise ArtifactError(f"the parameter {text[:40]} must be a dict with names as keys")
            return Parameter(text[2:], "**", read)
        if text.startswith("*"):
            if not isinstance(read, tuple):
                raise ArtifactError(f"the parameter {text[:40]} must be a tuple")
            return Parameter(text[1:], "*", read)
        return Parameter(text[1:], "keyword", read) if text.startswith("=") else Parameter(text, "positional", read)

    def tree(self, value: Any, name: str, depth: int) -> Any:
        row = _list(value, "an input", 0, LARGEST_COUNT)
        if not row or type(row[0]) is int or (isinstance(row[0], str) and row[0] in DTYPES):
            return self.tensor(row, name)
        if row[0] == "?" and len(row) == 1:
            return UNSUPPLIED
        return _read_branches(row, lambda branch, key: self.tree(branch, f"{name}{key}", depth + 1), depth)

    def tensor(self, row: list[Any], name: str) -> Slot:
        dtype = torch.float32
        if row and isinstance(row[0], str):
            dtype, row = DTYPES[row[0]], row[1:]
        if len(row) > 64:
            raise ArtifactError(f"the input {name[:40]} must have at most 64 axes")
        shape: list[int | Dynamic] = []
        for dim in row:
            size = _int(dim, "the size of an axis", -LARGEST_COUNT, _LARGEST_SIZE)
            if size >= 0:
                shape.append(size)
                continue
            if -size > len(self.symbols) + 1 + len(self.inputs) * 64:
                raise ArtifactError("the symbols of a program must be numbered without gaps")
            while len(self.symbols) < -size:
                self.symbols.append(Symbol())
            shape.append(Dynamic(-1 - size))
        self.inputs.append(Input(name, dtype, tuple(shape)))
        return Slot(len(self.inputs) - 1)


def _read_branches(row: list[Any], read: Callable[[Any, str], Any], depth: int) -> Any:
    if depth > LARGEST_DEPTH:
        raise ArtifactError(f"inputs and outputs may be nested {LARGEST_DEPTH} deep at most")
    mark, rest = row[0], row[1:]
    if mark in ("(", "["):
        branches = [read(branch, f"[{i}]") for i, branch in enumerate(rest)]
        return tuple(branches) if mark == "(" else branches
    if mark == "{" and len(rest) % 2 == 0:
        keys = rest[::2]
        if not all(type(key) is int or (isinstance(key, str) and len(key) <= 1000) for key in keys) or len(set(keys)) != len(keys):
            raise ArtifactError("the keys of a dict of inputs or outputs must be distinct texts or whole numbers")
        return {key: read(branch, f"[{key!r}]") for key, branch in zip(keys, rest[1::2], strict=True)}
    if mark == "=" and len(rest) == 1 and (rest[0] is None or isinstance(rest[0], bool | int | float | str)):
        if isinstance(rest[0], str):
            _text(rest[0], "a constant")
        return rest[0]
    if mark == "~" and len(rest) == 1 and isinstance(rest[0], str) and rest[0] in _FLOATS:
        return _FLOATS[rest[0]]
    raise ArtifactError(f"{_show(row)} is not an input or output of a program")


def _read_output(value: Any, last: int, depth: int) -> Any:
    if type(value) is int:
        return Ref(last - _int(value, "an output", 0, last))
    row = _list(value, "an output", 1, LARGEST_COUNT)
    return _read_branches(row, lambda branch, _: _read_output(branch, last, depth + 1), depth)


def _states(value: Any) -> tuple[State, ...]:
    patterns, owners, which = _list(value, "states", 3, 3)
    roles: dict[str, Role] = {"!": "buffer", "~": "constant"}
    read: list[list[tuple[str, Role]]] = []
    for names in _list(patterns, "the names of states", 0, LARGEST_COUNT):
        pattern = []
        for name in _list(names, "the names of one owner", 1, LARGEST_COUNT):
            text = _text(name, "the name of a state")
            role: Role = roles.get(text[:1], "parameter")
            pattern.append((text if role == "parameter" else text[1:], role))
        read.append(pattern)
    owners = _list(owners, "the owners of states", 0, LARGEST_COUNT)
    which = _list(which, "the pattern of each owner", len(owners), len(owners))
    states: list[State] = []
    for owner, number in zip(owners, which, strict=True):
        prefix = _text(owner, "the owner of a state")
        pattern = read[_int(number, "the pattern of an owner", 0, len(read) - 1)]
        states += [State(f"{prefix}.{name}" if prefix else name, role) for name, role in pattern]
        if len(states) > LARGEST_COUNT:
            raise ArtifactError(f"a program may have at most {LARGEST_COUNT} states")
    return tuple(states)


@final
class _Reader:
    """Reads nodes; a call is parsed once and placed wherever it is used."""

    def __init__(self, n_inputs: int, n_states: int) -> None:
        self.n_inputs = n_inputs
        self.n_states = n_states
        self.seen_states = 0

    def nodes(self, calls: Any, which: Any) -> tuple[Node, ...]:
        parsed = [self.parse(call) for call in _list(calls, "calls", 0, LARGEST_COUNT)]
        sizes = [_count(args) + _count(list(kwargs.values())) for _, args, kwargs in parsed]
        nodes = []
        total = 0
        for k, number in enumerate(_list(which, "nodes", 0, LARGEST_COUNT)):
            op, args, kwargs = parsed[_int(number, "the call of a node", 0, len(parsed) - 1)]
            total += sizes[number]
            if total > _MOST_ARGUMENTS:
                raise ArtifactError(f"the nodes of a program may have at most {_MOST_ARGUMENTS} arguments in all")
            nodes.append(Node(op, tuple(self.place(a, k) for a in args), {name: self.place(a, k) for name, a in kwargs.items()}))
        return tuple(nodes)

    def parse(self, call: Any) -> tuple[str, list[Any], Mapping[str, Any]]:
        row = _list(call, "a call", 1, 1000)
        short = _text(row[0], "the name of an operator")
        family = next((family for family, mark in _MARKS.items() if mark and short.startswith(mark)), "aten")
        name = short.removeprefix(_MARKS[family])
        op = f"{family}.{name}" if family == "operator" or "." in name else f"{family}.{name}.default"
        named: Mapping[str, Any] = {}
        rest = row[1:]
        if rest and isinstance(rest[-1], dict):
            named = {_text(name, "a keyword"): self.token(value, 0) for name, value in rest.pop().items()}
        return op, [self.token(value, 0) for value in rest], named

    def token(self, value: Any, depth: int) -> Any:
        """An argument with references left as `_Back`, "s" and Ref, to be placed per node."""
        if isinstance(value, list):
            if depth > 2 or len(value) > LARGEST_COUNT:
                raise ArtifactError("a list in an argument is too deep or too long")
            return [self.token(v, depth + 1) for v in value]
        if not isinstance(value, str):
            if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63):
                return value
            raise ArtifactError(f"{_show(value)} is not an argument of an operator")
        mark, rest = value[:1], value[1:]
        if value.isascii() and value.isdigit() and len(value) < 8:
            return _Back(int(value))
        if mark in ("i", "s") and rest.isascii() and rest.isdigit() and len(rest) < 8:
            count = self.n_inputs if mark == "i" else self.n_states
            number = _int(int(rest), "the number of an input or state", 0, count - 1)
            return Ref(number if mark == "i" else self.n_inputs + number)
        if value == "s":
            return _NEXT_STATE
        if mark == "'" and len(rest) <= _LONGEST_TEXT:
            return rest
        if mark == "$" and rest in DTYPES:
            return DTYPES[rest]
        if mark == "@" and rest in MEMORY_FORMATS:
            return MEMORY_FORMATS[rest]
        if value == "^":
            return DEVICE
        if value in _FLOATS:
            return _FLOATS[value]
        raise ArtifactError(f"{_show(value)} is not an argument of an operator")

    def place(self, token: Any, k: int) -> Any:
        if isinstance(token, _Back):
            if not 1 <= token.distance <= k:
                raise ArtifactError(f"node {k} refers to the node {token.distance} before it, which does not exist")
            return Ref(self.n_inputs + self.n_states + k - token.distance)
        if token is _NEXT_STATE:
            if self.seen_states >= self.n_states:
                raise ArtifactError(f"node {k} reads a state, but all states of the program are read before it")
            self.seen_states += 1
            return Ref(self.n_inputs + self.seen_states - 1)
        return [self.place(t, k) for t in token] if isinstance(token, list) else token


def _count(token: Any) -> int:
    return sum(map(_count, token)) + 1 if isinstance(token, list) else 1


@final
class _Back:
    __slots__ = ("distance",)

    def __init__(self, distance: int) -> None:
        self.distance = distance


_NEXT_STATE = object()
