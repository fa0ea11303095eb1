"""Every use of every parameter is seen, with its input, its output and how it was rearranged on the way."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pared.errors import ArtifactError
from pared.graph import Operand, Program, interpret, trace, watch


def rooted(model: nn.Module, *args: Any) -> tuple[Program, nn.Module]:
    program = trace(model.eval(), args)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | program.constants
    return program, program.root(tensors)


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for element in value for tensor in flat(element)]


def through(index: int, node: Any, op: str, inputs: Any, run: Any) -> Any:
    return run()


def seen_by(model: nn.Module, *args: Any) -> tuple[list[tuple[str, list[str]]], Any]:
    program, root = rooted(model, *args)
    seen: list[tuple[str, list[str]]] = []

    def observe(index: int, node: Any, op: str, inputs: Any, run: Any) -> Any:
        assert program.nodes[index] is node
        seen.append((op, [o.lineage.path for o in inputs if isinstance(o, Operand) and o.lineage is not None]))
        return run()

    return seen, interpret(program, root, args, {}, observe)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(12, 4))
        self.square = nn.Parameter(torch.randn(4, 4))
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        q, k, v = self.qkv.chunk(3)
        a = F.linear(x, q) * 0.1 + x @ k.t()
        b = F.linear(x, self.qkv.view(3, 4, 4).unbind(0)[2]) + x @ self.square.permute(1, 0)
        return F.linear(a, v.to(torch.float64).to(torch.float32)) + b, self.conv(x[..., None])


def test_lineage_follows_views_and_casts_to_the_state() -> None:
    model = Fused()
    x = torch.randn(3, 4)
    program, root = rooted(model, x)
    found: dict[str, list[str]] = {}

    def observe(index: int, node: Any, op: str, inputs: Any, run: Any) -> Any:
        for operand in inputs:
            if isinstance(operand, Operand) and operand.lineage is not None:
                state = dict(model.named_parameters())[operand.lineage.path]
                assert torch.equal(operand.lineage.apply(state), operand.value)
                found.setdefault(operand.lineage.path, []).append(op)
        return run()

    interpret(program, root, (x,), {}, observe)
    linear, matmul = "aten.linear.default", "aten.matmul.default"
    assert sorted(found["qkv"]) == [linear, linear, linear, matmul]
    assert found["square"] == [matmul] and found["conv.weight"] == found["conv.bias"] == ["aten.conv1d.default"]


def test_outputs_and_gradients_are_those_of_the_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5), nn.LayerNorm(5)
    )
    x = torch.randn(3, 2, 8, 8)
    program, root = rooted(model, x)
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    found = interpret(program, root, (x,), {}, through)
    assert torch.equal(found, expected)
    for gradient, reference in zip(torch.autograd.grad(found.square().sum(), list(model.parameters())), gradients, strict=True):
        assert torch.equal(gradient, reference)


def test_an_output_can_be_replaced_and_recomputed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    program, root = rooted(model, x)
    outputs = []

    def observe(index: int, node: Any, op: str, inputs: Any, run: Any) -> Any:
        values = [operand.value for operand in inputs]
        y = run(values[0], values[1] * 2, values[2])
        outputs.append(y.detach().requires_grad_())
        return outputs[-1]

    result = interpret(program, root, (x,), {}, observe)
    hidden = F.linear(x, model[0].weight * 2, model[0].bias)
    assert torch.equal(outputs[0], hidden)
    assert torch.equal(result, F.linear(hidden, model[1].weight * 2, model[1].bias))
    (gradient,) = torch.autograd.grad(result.sum(), outputs[1])
    assert torch.equal(gradient, torch.ones(3, 4))


def test_a_module_called_twice_and_a_tied_weight_are_seen_at_each_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.mix(self.mix(self.embedding(ids))))

    seen, _ = seen_by(Tied(), torch.randint(0, 9, (2, 3)))
    mix = ("aten.linear.default", ["mix.weight", "mix.bias"])
    tied = ["embedding.weight"]
    assert seen == [("aten.embedding.default", tied), mix, mix, ("aten.linear.default", tied)]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("settings", [
    {}, {"bidirectional": True}, {"batch_first": True}, {"bias": False},
    {"bidirectional": True, "batch_first": True, "bias": False},
])  # fmt: skip
def test_unrolled_recurrent_layers_equal_torch(kind: type[nn.RNNBase], settings: dict[str, bool]) -> None:
    model = kind(4, 5, 2, **settings)
    x = torch.randn(3, 6, 4)
    seen, found = seen_by(model, x)
    for unrolled, reference in zip(flat(found), flat(model(x)), strict=True):
        assert torch.allclose(unrolled, reference, atol=1e-5)
    weights = {path for _, paths in seen for path in paths}
    assert weights == {name for name, _ in model.named_parameters()}
    n_steps, n_directions = (6 if settings.get("batch_first") else 3), 2 if settings.get("bidirectional") else 1
    assert len(seen) == 2 * n_directions * (1 + n_steps) and {op for op, _ in seen} == {"aten.linear.default"}


def test_projections_states_and_relu_cells_equal_torch() -> None:
    x = torch.randn(3, 6, 4)
    lstm = nn.LSTM(4, 6, 2, proj_size=3, bidirectional=True)
    relu = nn.RNN(4, 6, nonlinearity="relu")
    states = (torch.randn(4, 6, 3), torch.randn(4, 6, 6))
    for model, args in ((lstm, (x, states)), (relu, (x, torch.randn(1, 6, 6)))):
        program, root = rooted(model, *args)
        found = interpret(program, root, args, {}, through)
        for unrolled, reference in zip(flat(found), flat(model(*args)), strict=True):
            assert torch.allclose(unrolled, reference, atol=1e-5)


def test_unrolled_cells_equal_torch() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 4), nn.GRUCell(4, 4, bias=False), nn.RNNCell(4, 4)

        def forward(self, x):
            h, c = self.lstm(x, (x, x))
            return self.rnn(self.gru(h, c), x)

    model = Cells()
    x = torch.randn(3, 4)
    seen, found = seen_by(model, x)
    assert torch.allclose(found, model(x), atol=1e-5)
    assert ("aten.linear.default", ["gru.weight_hh"]) in seen and len(seen) == 6


def test_the_input_of_a_recurrent_weight_has_the_batch_first() -> None:
    program, root = rooted(nn.LSTM(4, 5), torch.randn(7, 3, 4))
    shapes = []

    def observe(index: int, node: Any, op: str, inputs: Any, run: Any) -> Any:
        y = run()
        shapes.append((tuple(inputs[0].value.shape), tuple(y.shape)))
        return y

    interpret(program, root, (torch.randn(7, 3, 4),), {}, observe)
    assert shapes == [((3, 7, 4), (3, 7, 20))] + [((3, 5), (3, 20))] * 7


def test_errors_of_the_observer_pass_and_those_of_operators_are_named() -> None:
    program, root = rooted(nn.Linear(4, 4), torch.randn(3, 4))

    def broken(*_: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        interpret(program, root, (torch.randn(3, 4),), {}, broken)
    root.weight = nn.Parameter(torch.randn(4, 5))
    with pytest.raises(ArtifactError, match=r"node 0 \(aten.linear.default\) failed"):
        watch(program, root, (torch.randn(3, 4),), {}, lambda number, value: None)


def test_watch_shows_every_value_once() -> None:
    program, root = rooted(Fused(), torch.randn(3, 4))
    shapes: dict[int, Any] = {}

    def see(number: int, value: Any) -> None:
        assert number not in shapes
        shapes[number] = [tuple(t.shape) for t in flat(value)]

    watch(program, root, (torch.randn(3, 4),), {}, see)
    assert set(shapes) == set(range(len(program.kinds)))
    assert shapes[0] == [(3, 4)]


def test_values_are_freed_without_the_garbage_collector() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    program, root = rooted(model, torch.randn(2, 4))
    values: list[weakref.ref[torch.Tensor]] = []

    def observe(index: int, node: Any, op: str, inputs: Any, run: Any) -> Any:
        output = run()
        values.append(weakref.ref(output))
        return output

    gc.collect()
    gc.disable()
    try:
        outputs = interpret(program, root, (torch.randn(2, 4),), {}, observe)
        del outputs
        assert [value() for value in values] == [None, None]
    finally:
        gc.enable()
