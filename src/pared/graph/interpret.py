"""A program run op by op with gradients, so that every use of every parameter can be seen and changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from pared.errors import ParedError
from pared.graph.module import (
    device_of,
    flatten_arguments,
    operator_failed,
    plan,
    read_state,
    rebuild,
    resolve,
    start,
)
from pared.graph.operators import Ref, find
from pared.graph.program import Node, Program

_VIEWS = frozenset(
    """view reshape view_as reshape_as flatten unflatten ravel squeeze unsqueeze transpose t numpy_T mT permute movedim
    moveaxis swapaxes swapdims expand expand_as broadcast_to contiguous clone alias detach select slice narrow unbind
    split split_with_sizes chunk tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split unsafe_split_with_sizes
    diagonal _unsafe_view to _to_copy type_as getitem""".split()
)


@final
@dataclass(frozen=True, slots=True)
class View:
    """One rearrangement: an operator, its arguments after the first (values, not references), its keyword arguments."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Lineage:
    """Where an operand comes from: the state `path`, then views and casts only. No views: it is the state itself."""

    path: str
    views: tuple[View, ...] = ()

    def apply(self, tensor: Tensor) -> Any:
        """The operand that a tensor in place of the state would give."""
        value: Any = tensor
        for view in self.views:
            operator = find(view.op)
            if operator is None:
                raise ValueError(f"{view.op} is not an operator of pared programs")
            value = operator.function(value, *view.args, **view.kwargs)
        return value

    def then(self, view: View) -> Lineage:
        return Lineage(self.path, (*self.views, view))


@final
@dataclass(frozen=True, slots=True)
class Operand:
    """One argument of an operator: its value, and its lineage if it is a view of a state."""

    value: Any
    lineage: Lineage | None = None


Inputs = list[Any]
"""The positional arguments in the order of torch's schema, each an Operand, or a list of Operand for a list."""

Observe = Callable[[int, Node, str, Inputs, Callable[..., Any]], Any]
"""observe(index, node, op_name, inputs, run) -> output to go on with; run() computes it, run(*values) with others."""


def interpret(program: Program, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, observe: Observe) -> Any:
    """The outputs of the program; `observe` stands around every operator that reads a state or a view of one.

    Views and casts of states are not shown themselves: what reads them is shown, with their lineage. LSTM, GRU and
    plain recurrent layers and cells are unrolled into "aten.linear.default": one for the input-to-hidden weights of a
    layer and direction over all time steps, shape (batch, time, features), and one per step for the hidden-to-hidden
    weights; `index` and `node` are those of the recurrent node. Gradients flow, the operators are those of eval mode.
    """
    tensors = flatten_arguments(program, args, dict(kwargs or {}))
    device = device_of(tensors, root)
    ready = plan(program)
    with torch.enable_grad():
        values = start(program, ready.late_reads, tensors, root)
        lineages: list[Lineage | None] = [None] * len(values)
        for k, step in enumerate(ready.steps):
            node = step.node
            for index in step.reads:
                path = program.states[index - len(program.inputs)].path
                values[index] = read_state(root, path)
                lineages[index] = Lineage(path)
            try:
                result, lineage = _execute(k, node, step.function, values, lineages, device, observe)
            except ParedError:
                raise
            except _ObserverFailed as failure:
                raise failure.error from None
            except Exception as error:
                raise operator_failed(k, node, error) from error
            values[program.first_node + k] = result
            lineages[program.first_node + k] = lineage
            for index in step.forgets:
                values[index] = None
        return rebuild(program.outputs, values)


@final
class Interpreted(nn.Module):
    """Runs a program op by op in the place of its model, for whoever calls models; see `interpret`."""

    def __init__(self, program: Program, root: nn.Module, observe: Observe) -> None:
        super().__init__()
        self.program, self.root, self.observe = program, root, observe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return interpret(self.program, self.root, args, kwargs, self.observe)


def watch(
    program: Program,
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    see: Callable[[int, Any], None],
    device: torch.device | None = None,
) -> Any:
    """The outputs of the program, without gradients; `see(number, value)` is called for every value as it appears.

    Values are tensors, sizes, or lists and tuples of tensors; keep their shapes, not the tensors. `device`, if given, is
    where it runs: on "meta" it takes no time, but not every operator tells there what it would give.
    """
    tensors = flatten_arguments(program, args, dict(kwargs or {}))
    device = device or device_of(tensors, root)
    tensors = [tensor.to(device) for tensor in tensors]
    ready = plan(program)
    with torch.no_grad():
        values = start(program, ready.late_reads, tensors, root)
        for index in (*range(len(tensors)), *ready.late_reads):
            see(index, values[index])
        for k, step in enumerate(ready.steps):
            for index in step.reads:
                values[index] = read_state(root, program.states[index - len(program.inputs)].path).to(device)
                see(index, values[index])
            operands, named = step.arguments(values, device)
            try:
                result = step.function(*operands, **named)
            except Exception as error:
                raise operator_failed(k, step.node, error) from error
            values[program.first_node + k] = result
            see(program.first_node + k, result)
            for index in step.forgets:
                values[index] = None
        return rebuild(program.outputs, values)


class _ObserverFailed(Exception):
    """Carries an error of `observe` past the handling of failed operators."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _execute(
    k: int, node: Node, function: Callable[..., Any], values: list[Any], lineages: list[Lineage | None],
    device: torch.device, observe: Observe,
) -> tuple[Any, Lineage | None]:  # fmt: skip
    inputs = [_operand(a, values, lineages, device) for a in node.args]
    named = {name: resolve(a, values, device) for name, a in node.kwargs.items()}
    base = node.op.split(".")[1]
    first = inputs[0] if inputs else None
    if isinstance(first, Operand) and first.lineage is not None and base in _VIEWS:
        rest = tuple(_value(i) for i in inputs[1:])
        return function(first.value, *rest, **named), first.lineage.then(View(node.op, rest, named))
    if not any(o.lineage is not None for o in _flat(inputs)):
        return function(*map(_value, inputs), **named), None

    def shown(op: str, operands: Inputs, compute: Callable[..., Any]) -> Any:
        def run(*replaced: Any) -> Any:
            return compute(*(replaced or map(_value, operands)))

        try:
            return observe(k, node, op, operands, run)
        except Exception as error:
            raise _ObserverFailed(error) from error

    unrolled = RECURRENT.get(node.op)
    if unrolled is not None:
        bound = operator_arguments(node.op, inputs)
        return unrolled(Linears(shown), bound), None
    return shown(node.op, inputs, lambda *operands: function(*operands, **named)), None


def _operand(argument: Any, values: list[Any], lineages: list[Lineage | None], device: torch.device) -> Any:
    """A function of its own: one that called itself from within `_execute` would keep every value until a collection."""
    if isinstance(argument, list):
        return [_operand(a, values, lineages, device) for a in argument]
    return Operand(resolve(argument, values, device), lineages[argument.index] if isinstance(argument, Ref) else None)


def operator_arguments(op: str, inputs: Inputs) -> dict[str, Any]:
    """The operands by name."""
    operator = find(op)
    return operator.bind(inputs, {}) if operator is not None else {}


def _value(operand: Any) -> Any:
    return [_value(o) for o in operand] if isinstance(operand, list) else operand.value


def _flat(operands: Sequence[Any]) -> list[Operand]:
    return [o for operand in operands for o in (_flat(operand) if isinstance(operand, list) else [operand])]


@final
class Linears:
    """Linear maps that are shown to the observer."""

    def __init__(self, shown: Callable[..., Any]) -> None:
        self.shown = shown

    def __call__(self, x: Tensor, weight: Operand, bias: Operand | None) -> Tensor:
        linear = torch.ops.aten.linear.default
        operands = [Operand(x), weight, *([] if bias is None or bias.value is None else [bias])]
        if all(o.lineage is None for o in operands):
            return linear(*map(_value, operands))
        return self.shown("aten.linear.default", operands, linear)


Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""(what the input adds to the gates, what the hidden state adds, states before) -> states after, hidden first."""


def _lstm_cell(from_input: Tensor, from_hidden: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (from_input + from_hidden).chunk(4, 1)
    cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_cell(from_input: Tensor, from_hidden: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    r_input, z_input, n_input = from_input.chunk(3, 1)
    r_hidden, z_hidden, n_hidden = from_hidden.chunk(3, 1)
    update = (z_input + z_hidden).sigmoid()
    new = (n_input + (r_input + r_hidden).sigmoid() * n_hidden).tanh()
    return ((1 - update) * new + update * states[0],)


def _tanh_cell(from_input: Tensor, from_hidden: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((from_input + from_hidden).tanh(),)


def _relu_cell(from_input: Tensor, from_hidden: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((from_input + from_hidden).relu(),)


def _layers(cell: Cell) -> Callable[[Linears, dict[str, Any]], tuple[Tensor, ...]]:
    """A stack of recurrent layers, as torch computes it, from linear maps and one cell."""

    def unroll(linear: Linears, bound: dict[str, Any]) -> tuple[Tensor, ...]:
        batch_first, biases = bound["batch_first"].value, bound["has_biases"].value
        given = bound["hx"]
        hx = [h.value for h in given] if isinstance(given, list) else [given.value]
        x = bound["input"].value if batch_first else bound["input"].value.transpose(0, 1)
        projects = len(hx) == 2 and hx[0].shape[2] != hx[1].shape[2]
        n_weights = 2 + 2 * biases + projects
        n_directions = 2 if bound["bidirectional"].value else 1
        finals: list[list[Tensor]] = [[] for _ in hx]
        for layer in range(bound["num_layers"].value):
            outputs = []
            for direction in range(n_directions):
                position = layer * n_directions + direction
                weights = bound["params"][position * n_weights : (position + 1) * n_weights]
                out, last = _one_layer(linear, cell, x, [h[position] for h in hx], weights, biases, projects, direction == 1)
                outputs.append(out)
                for gathered, state in zip(finals, last, strict=True):
                    gathered.append(state)
            x = torch.cat(outputs, 2)
        return (x if batch_first else x.transpose(0, 1), *map(torch.stack, finals))

    return unroll


def _one_layer(
    linear: Linears, cell: Cell, x: Tensor, hx: Sequence[Tensor], weights: Sequence[Operand], biases: bool,
    projects: bool, backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Output (batch, time, features) and last states of one layer in one direction; x is (batch, time, features)."""
    bias_input, bias_hidden = (weights[2], weights[3]) if biases else (None, None)
    from_input = linear(x, weights[0], bias_input)
    states = tuple(hx)
    steps: list[Tensor] = []
    for t in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
        states = cell(from_input[:, t], linear(states[0], weights[1], bias_hidden), states)
        if projects:
            states = (linear(states[0], weights[-1], None), *states[1:])
        steps.append(states[0])
    return torch.stack(steps[::-1] if backwards else steps, 1), states


def _single(cell: Cell) -> Callable[[Linears, dict[str, Any]], Any]:
    """One step of a recurrent cell."""

    def step(linear: Linears, bound: dict[str, Any]) -> Any:
        given = bound["hx"]
        hx = tuple(h.value for h in given) if isinstance(given, list) else (given.value,)
        bias_input, bias_hidden = (b if isinstance(b, Operand) else None for b in (bound["b_ih"], bound["b_hh"]))
        from_input = linear(bound["input"].value, bound["w_ih"], bias_input)
        states = cell(from_input, linear(hx[0], bound["w_hh"], bias_hidden), hx)
        return states if len(states) > 1 else states[0]

    return step


RECURRENT: Mapping[str, Callable[[Linears, dict[str, Any]], Any]] = {
    "aten.lstm.input": _layers(_lstm_cell),
    "aten.gru.input": _layers(_gru_cell),
    "aten.rnn_tanh.input": _layers(_tanh_cell),
    "aten.rnn_relu.input": _layers(_relu_cell),
    "aten.lstm_cell.default": _single(_lstm_cell),
    "aten.gru_cell.default": _single(_gru_cell),
    "aten.rnn_tanh_cell.default": _single(_tanh_cell),
    "aten.rnn_relu_cell.default": _single(_relu_cell),
}
