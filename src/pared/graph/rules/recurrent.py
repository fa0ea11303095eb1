"""Recurrent layers: hidden units behind all gates."""

from __future__ import annotations

from typing import Any

from pared.graph.call import Call, Label, rules
from pared.graph.ids import Factors, concatenated
from pared.graph.operators import Ref

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


RULES = rules(
    {
        "lstm gru rnn_tanh rnn_relu": _recurrent,
        "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell": _cell,
    }
)
