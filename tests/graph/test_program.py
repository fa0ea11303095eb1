"""Programs from hostile files are refused in one line; good ones are small, quick to rebuild and checked when called."""

from __future__ import annotations

import copy
import json
import random
import time
import zlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pared.errors import ArtifactError, InputError, ParedError
from pared.graph import Program, trace
from pared.graph.operators import find, listed


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.Linear(576, 10)

    def forward(self, x, scale=None):
        x = F.max_pool2d(torch.relu(self.bn(self.conv(x))), 2)
        x = F.avg_pool2d(F.interpolate(x, scale_factor=2.0, mode="bilinear"), 2)
        x = F.pad(x, [1, 1, 1, 1])[:, :, 1:-1, 1:-1]
        return {"y": self.out(x.flatten(1)).softmax(-1), "n": [x.shape[0], None]}


class Sequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 4, 3, padding=1))
        self.gru = nn.GRU(5, 5)

    def forward(self, ids):
        x, (h, _) = self.lstm(self.embedding(ids))
        x, _ = self.gru(self.conv(self.encoder(x).transpose(1, 2)))
        best, where = x.topk(2, 1)
        x = torch.cat([best, x.gather(1, where)], 1).cumsum(1)
        x = torch.where(x > 0, x, torch.arange(x.shape[-1]).to(x.dtype))
        return torch.einsum("abc,abd->acd", x, x).sort(1)[0], h, x.roll(1, 0).repeat(1, 2, 1), F.one_hot(ids, 20)


def tensors_of(model: nn.Module, program: Program) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers()) | program.constants


@pytest.fixture(scope="module")
def cases() -> list[tuple[Any, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]]:
    made = []
    for model, call in ((Convolutional(), torch.randn(2, 1, 28, 28)), (Sequential(), torch.randint(0, 20, (2, 5)))):
        program = trace(model.eval(), (call,))
        made.append((json.loads(json.dumps(program.to_json())), tensors_of(model, program), (call,)))
    return made


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def test_a_lenet_program_takes_less_than_200_bytes() -> None:
    text = json.dumps(trace(LeNet(), (torch.randn(2, 1, 28, 28),)).to_json(), separators=(",", ":"))
    assert len(zlib.compress(text.encode(), 9)) <= 200


def test_repeated_blocks_cost_almost_nothing() -> None:
    def size(depth: int) -> int:
        blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(depth)]
        text = json.dumps(trace(nn.Sequential(*blocks), (torch.randn(2, 4, 8, 8),)).to_json(), separators=(",", ":"))
        return len(zlib.compress(text.encode(), 9))

    assert size(22) - size(2) <= 20 * 12


def test_a_program_is_rebuilt_in_milliseconds(cases: Any) -> None:
    for data, _, _ in cases:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            Program.from_json(data)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.03


JUNK: list[Any] = [
    0, 1, -1, 2, 7, 2**31, 2**62, 2**63, 2**70, -(2**40), 1.5, float("inf"), None, True, False, "", "s", "s0", "s9", "i0",
    "i9", "1", "2", "9", "99", "'", "'x", "$f32", "$i64", "@contiguous", "^", "inf", "nan", [], [1], [[1]], {}, {"a": 1},
    "__class__", "a.b", "!", [0, 0], [-1, -1], [10**6, 10**6], ["(", 0], ["=", 3], ["?"], "٣",
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    for key, branch in enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ():
        yield from _places(branch, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated(data: Any, choose: random.Random, operators: list[str]) -> Any:
    data = copy.deepcopy(data)
    for _ in range(choose.choice([1, 1, 1, 2, 4])):
        places = [path for path in _places(data) if path]
        path = choose.choice(places)
        parent, key = _at(data, path[:-1]), path[-1]
        kind = choose.random()
        if kind < 0.35:
            parent[key] = copy.deepcopy(choose.choice(JUNK))
        elif kind < 0.55:
            parent[key] = copy.deepcopy(_at(data, choose.choice(places)))
        elif kind < 0.65 and isinstance(parent, list):
            del parent[key]
        elif kind < 0.75 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(choose.choice(JUNK)))
        elif isinstance(parent[key], str):
            parent[key] = choose.choice(operators)
        elif type(parent[key]) is int:
            parent[key] += choose.choice([-2, -1, 1, 2, 100])
    return data


def test_mutated_programs_are_refused_or_run_or_fail_with_our_errors(cases: Any) -> None:
    choose = random.Random(0)
    names = [n.removeprefix("aten.").removesuffix(".default").replace("operator.", "=") for n in listed()]
    refused = ran = failed = 0
    for _ in range(1500):
        data, tensors, call = choose.choice(cases)
        try:
            program = Program.from_json(mutated(data, choose, names), max_bytes=10**5)
            module = program.module(program.root(tensors))
        except ArtifactError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        try:
            with torch.no_grad():
                module(*call)
            ran += 1
        except ParedError as error:
            assert "\n" not in str(error)
            failed += 1
    assert refused > 500 and ran > 20 and failed > 50


@pytest.mark.parametrize("data", [None, 3, "x", [], {}, [1], [1] * 6, [2, [], [[], [], []], [], [], 0]])
def test_what_is_no_program_is_refused(data: Any) -> None:
    with pytest.raises(ArtifactError):
        Program.from_json(data)


def program_of(calls: list[Any], nodes: list[int], states: list[str] | None = None, outputs: Any = 0) -> list[Any]:
    return [1, ["x", [-1, 4]], [[["w"]], states or [], [0] * len(states or [])], calls, nodes, outputs]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (program_of([["set_", "i0"]], [0]), "is not an operator"),
        (program_of([["relu_", "i0"]], [0]), "is not an operator"),
        (program_of([["as_strided", "i0", [4], [10**9]]], [0]), "is not an operator"),
        (program_of([["from_file", "'/etc/passwd"]], [0]), "is not an operator"),
        (program_of([["empty.memory_format", [4]]], [0]), "is not an operator"),
        (program_of([["rand", [4]]], [0]), "is not an operator"),
        (program_of([["=__import__", "'os"]], [0]), "is not an operator"),
        (program_of([["relu.__class__", "i0"]], [0]), "is not an operator"),
        (program_of([["__class__", "i0"]], [0]), "is not an operator"),
        (program_of([["relu", "1"]], [0]), "does not exist"),
        (program_of([["relu", "i1"]], [0]), "number of an input"),
        (program_of([["relu"]], [0]), "needs its argument"),
        (program_of([["relu", "i0", 1]], [0]), "takes 1 arguments"),
        (program_of([["relu", "'text"]], [0]), "cannot take 'text'"),
        (program_of([["relu", ["i0"]]], [0]), "cannot take"),
        (program_of([["softmax.int", "i0", 1, {"evil": 1}]], [0]), "has no free argument"),
        (program_of([["split.Tensor", "i0", 2], ["relu", "1"]], [0, 1]), "cannot take"),
        (program_of([["split.Tensor", "i0", 2]], [0]), "output of the program"),
        (program_of([["full", [2**20, 2**20], 1.0]], [0]), "max_bytes"),
        (program_of([["arange", 10**13]], [0]), "max_bytes"),
        (program_of([["arange.start_step", 0, 1.0, 1e-13]], [0]), "max_bytes"),
        (program_of([["repeat", "i0", [2**20, 2**20]]], [0]), "max_bytes"),
        (program_of([["constant_pad_nd", "i0", [0, 2**40]]], [0]), "max_bytes"),
        (program_of([["eye.m", 2**20, 2**20]], [0]), "max_bytes"),
        (program_of([["relu", "s"]], [0], ["__class__"]), "not free as a name"),
        (program_of([["relu", "s"]], [0], ["forward"]), "not free as a name"),
        (program_of([["relu", "s"]], [0], ["a.train"]), "not free as a name"),
        (program_of([["relu", "s"]], [0], ["a..b"]), "not free as a name"),
        (program_of([["add.Tensor", "s", "s"]], [0], ["a", "a"]), "used twice"),
        (program_of([["add.Tensor", "s", "s"]], [0], ["a", "a.w"]), "used twice"),
        (program_of([["relu", "s"]], [0]), "all states of the program are read"),
        (program_of([["lstm.input", "i0", ["i0", "i0"], ["i0"], False, 1, 0.5, True, False, False]], [0]), "at random"),
        (program_of([["batch_norm", "i0", None, None, "i0", "i0", True, 0.1, 0.1, True]], [0]), "running mean"),
        (program_of([["scaled_dot_product_attention", "i0", "i0", "i0", None, 0.5]], [0]), "at random"),
    ],
)
def test_what_a_file_may_not_do_is_refused(data: Any, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason) as caught:
        Program.from_json(data)
    assert "\n" not in str(caught.value)


def test_a_deep_or_endless_structure_is_refused() -> None:
    deep: Any = 0
    for _ in range(500):
        deep = ["(", deep]
    with pytest.raises(ArtifactError, match="deep"):
        Program.from_json(program_of([], [], outputs=deep))
    wide = [["cat", ["i0"] * 50_000], ["relu", "1"]]
    with pytest.raises(ArtifactError, match="arguments in all"):
        Program.from_json(program_of(wide, [0] * 1000))


def test_sizes_cannot_grow_without_bound() -> None:
    calls = [["sym_size.int", "i0", 1], ["=mul", "1", "1"], ["mul.Tensor", "i0", "1"]]
    program = Program.from_json(program_of(calls, [0] + [1] * 100 + [2]))
    with pytest.raises(ArtifactError, match="64 bits"):
        program.module(nn.Module())(torch.ones(2, 4))


def test_no_listed_operator_writes_draws_or_leaks() -> None:
    names = listed()
    assert len(names) > 600
    for name in names:
        operator = find(name)
        assert operator is not None and operator.kind
        if name.startswith("aten."):
            packet = getattr(torch.ops.aten, name.split(".")[1])
            schema = getattr(packet, name.split(".")[2])._schema
            assert not schema.is_mutable
    forbidden = "empty empty_like as_strided set_ resize_ rand randn bernoulli multinomial from_file save _print dropout"
    assert not {n.split(".")[1] for n in names} & set(forbidden.split())


def test_calls_that_do_not_fit_say_what_fits(cases: Any) -> None:
    data, tensors, (x,) = cases[0]
    program = Program.from_json(data)
    module = program.module(program.root(tensors))
    with torch.no_grad():
        assert torch.equal(module(x)["y"], module(x=x)["y"]) and module(x[:1])["n"] == [1, None]
    for call, kwargs, reason in (
        ((), {}, "input x is missing"),
        ((x, 1), {}, "takes 1 positional inputs, got 2"),
        ((x,), {"x": x}, "has no input 'x'|given twice"),
        ((x,), {"mask": x}, "has no input 'mask'"),
        ((3,), {}, "must be a tensor, got int"),
        ((x.double(),), {}, "must be torch.float32, got torch.float64"),
        ((x[0],), {}, r"must have shape \(N, 1, 28, 28\), got \(1, 28, 28\)"),
        ((x[:, :, :5],), {}, r"must have shape \(N, 1, 28, 28\)"),
    ):
        with pytest.raises(InputError, match=reason):
            module(*call, **kwargs)


def test_a_constant_input_cannot_change() -> None:
    class Flagged(nn.Module):
        def forward(self, x, double=False, *, shift: float = 1.0):
            return (x * 2 if double else x) + shift

    program = trace(Flagged(), (torch.ones(2, 3), True), {"shift": 2.0})
    module = Program.from_json(program.to_json()).module(nn.Module())
    x = torch.ones(4, 3)
    assert torch.equal(module(x, True, shift=2.0), module(x)) and torch.equal(module(x), x * 2 + 2)
    with pytest.raises(InputError, match="double was True when the model was traced"):
        module(x, False)
    with pytest.raises(InputError, match="shift was 2.0"):
        module(x, shift=3.0)


def test_there_is_no_training_mode(cases: Any) -> None:
    data, tensors, _ = cases[0]
    program = Program.from_json(data)
    module = program.module(program.root(tensors))
    assert module.eval() is module and module.train(False) is module and not module.training
    with pytest.raises(InputError, match=r"pared.load\(path, MyNet\(\)\)"):
        module.train()


def test_a_parametrized_state_is_decoded_at_every_call(cases: Any) -> None:
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    data, tensors, (x,) = cases[0]
    program = Program.from_json(data)
    root = program.root({path: tensor.detach() for path, tensor in tensors.items()})
    module = program.module(root)
    with torch.no_grad():
        before = module(x)["y"]
        nn.utils.parametrize.register_parametrization(root.get_submodule("out"), "weight", Double())
        assert not torch.equal(module(x)["y"], before)
        root.get_submodule("out").parametrizations.weight.original.div_(2)
        assert torch.equal(module(x)["y"], before)


def test_a_missing_tensor_is_named(cases: Any) -> None:
    data, tensors, (x,) = cases[0]
    program = Program.from_json(data)
    with pytest.raises(ArtifactError, match="reads out.bias"):
        program.root({path: tensor for path, tensor in tensors.items() if path != "out.bias"})
    root = program.root(tensors)
    del root.get_submodule("out").bias
    with pytest.raises(ArtifactError, match="reads out.bias"):
        program.module(root)(x)


def test_a_failing_operator_is_named() -> None:
    program = Program.from_json(program_of([["relu", "i0"], ["view", "1", [3, 5]]], [0, 1]))
    with pytest.raises(ArtifactError, match=r"node 1 \(aten.view.default\) failed: shape") as caught:
        program.module(nn.Module())(torch.ones(2, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("grad", [False, True])
def test_writing_in_place_is_never_visible(grad: bool) -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = torch.relu(x)
            y = self.a(x)
            z = torch.relu(y)
            shared = self.b(z)
            view = shared.view(-1)
            return torch.relu(torch.relu(x)), y, torch.relu(shared), view, torch.relu(self.a(z) + z), z

    model = Sharing().eval()
    program = trace(model, (torch.randn(2, 4),))
    module = program.module(program.root(tensors_of(model, program)))
    x = torch.randn(3, 4)
    kept = x.clone()
    with torch.set_grad_enabled(grad):
        for found, expected in zip(module(x), model(x), strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(x, kept)


def test_the_module_can_be_copied_exported_and_traced_again(cases: Any) -> None:
    data, tensors, (x,) = cases[0]
    program = Program.from_json(data)
    module = program.module(program.root({path: tensor.detach().clone() for path, tensor in tensors.items()}))
    with torch.no_grad():
        expected = module(x)["y"]
        assert torch.equal(copy.deepcopy(module)(x)["y"], expected)
        assert torch.equal(torch.export.export(module, (x,), strict=False).module()(x)["y"], expected)
        again = trace(module, (x,))
        assert torch.equal(again.module(module)(x)["y"], expected)
        assert copy.deepcopy(module).double()(x.double())["y"].dtype == torch.float64


def test_a_strided_input_gives_the_same(cases: Any) -> None:
    data, tensors, (x,) = cases[0]
    program = Program.from_json(data)
    module = program.module(program.root(tensors))
    with torch.no_grad():
        assert torch.equal(module(x.transpose(2, 3).contiguous().transpose(2, 3))["y"], module(x)["y"])


def test_arguments_are_named_with_defaults() -> None:
    program = trace(LeNet(), (torch.randn(2, 1, 28, 28),))
    arguments = program.nodes[0].arguments()
    assert program.nodes[0].op == "aten.conv2d.default"
    assert arguments["stride"] == [1, 1] and arguments["groups"] == 1
    state = program.state_of(arguments["weight"])
    assert state is not None and state.path == "conv1.weight" and state.role == "parameter"
    assert program.node_of(program.nodes[1].args[0]) == 0
    assert program.users()[program.first_node] == [1]
