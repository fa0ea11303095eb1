"""Any model becomes a program that gives the same outputs bit for bit, also after a trip through JSON."""

from __future__ import annotations

import copy
import json
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pared.errors import InputError, TraceError
from pared.graph import Dynamic, Program, trace


def all_tensors(model: nn.Module, program: Program) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return named | program.constants


def reloaded(model: nn.Module, program: Program) -> nn.Module:
    read = Program.from_json(json.loads(json.dumps(program.to_json())))
    assert read.to_json() == program.to_json()
    return read.module(read.root(all_tensors(model, program)))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return type(found) is dict and list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


def expected_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return plain(model(*args, **kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def check(
    model: nn.Module, *calls: tuple[Any, ...], dynamic: Any = None, kwargs: dict[str, Any] | None = None
) -> tuple[Program, nn.Module]:
    """Trace on the first call, then compare on all calls."""
    model.eval()
    program = trace(model, calls[0], kwargs, dynamic)
    module = reloaded(model, program)
    for call in calls:
        with torch.no_grad():
            found = module(*copy.deepcopy(call), **(kwargs or {}))
        assert same(found, expected_outputs(model, copy.deepcopy(call), kwargs or {}))
    return program, module


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    """The activation writes into a tensor that the skip connection still reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        z = self.relu(self.drop(y))  # dropout gives back y itself in eval mode, so y changes too
        z = self.bn2(self.conv2(z))
        z += x
        return self.relu(z) + y


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 8, 2, **settings)
        self.out = nn.Linear(16 if settings.get("bidirectional") else 8, 3)

    def forward(self, batch, state=None):
        y, state = self.rnn(batch["x"], state)
        return {"y": self.out(y), "state": state, "loss": None}


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(4, 5), nn.GRUCell(5, 5)

    def forward(self, x, h, c):
        steps = []
        for t in range(x.shape[1]):
            h, c = self.lstm(x[:, t], (h, c))
            h = self.gru(h)
            steps.append(h)
        return torch.stack(steps, 1), (h, c)


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(50, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.rnn(self.embedding(ids))[0])


class Twice(nn.Module):
    """A module called twice, a bare parameter, buffers as weights, constants of the code, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bare = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("fixed", torch.randn(4, 4))
        self.register_buffer("scratch", torch.randn(4), persistent=False)
        self.table = torch.randn(4)

    def forward(self, x):
        x = self.linear(self.linear(x)) @ self.bare.t()
        z = F.linear(x, self.fixed) * self.scratch + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])
        z[:, 0] = 3.0
        z[:, 1:3] *= 2
        z[z < 0] = 0.5
        return z, [x, None, {"a": (z, 1, "text"), "size": x.shape[0]}]


class SamePadding(nn.Conv2d):
    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[-1:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)

    def forward(self, x):
        y = self.conv(x).flatten(2).transpose(1, 2)
        scores, where = y[..., 0].sigmoid().topk(5, 1)
        boxes = y[..., 1:5].gather(1, where.unsqueeze(-1).expand(-1, -1, 4))
        kept = scores > 0.5
        return {"boxes": boxes[kept], "scores": scores, "where": kept.nonzero()}


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x, *, mask=None, weights: bool = True, **rest):
        y, w = self.attention(x, x, x, key_padding_mask=mask, need_weights=weights)
        return (y * rest["scale"], w)


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.enable_grad():
            y = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            y = y * 2
        return torch.utils.checkpoint.checkpoint(self.linear, y, use_reentrant=False)


def states(n_batch: int, n_layers: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n_layers, n_batch, 8), torch.randn(n_layers, n_batch, 8)


class Case(NamedTuple):
    model: Any
    calls: Any
    dynamic: Any = None
    kwargs: Any = None


R = torch.randn
CASES = {
    "lenet": Case(LeNet, lambda: [(R(n, 1, 28, 28),) for n in (4, 1, 7)]),
    "residual": Case(Residual, lambda: [(R(n, 4, 8, 8),) for n in (2, 1, 5)]),
    "batch of one": Case(Residual, lambda: [(R(n, 4, 8, 8),) for n in (1, 4)]),
    "encoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        lambda: [(R(2, 7, 16),), (R(1, 3, 16),), (R(5, 9, 16),)],
        {0: {1}},
    ),
    "attention": Case(
        lambda: nn.MultiheadAttention(16, 4), lambda: [(R(7, 2, 16), R(6, 2, 16), R(6, 2, 16))], {0: {1}, 1: {1}, 2: {1}}
    ),
    "keywords": Case(
        Attend,
        lambda: [(R(2, 3, 16),)],
        None,
        {"mask": torch.tensor([[False, False, True]] * 2), "weights": True, "scale": torch.ones(2, 1, 1)},
    ),
    "lstm": Case(
        lambda: Recurrent(nn.LSTM, batch_first=True),
        lambda: [({"x": R(n, t, 6)}, states(n)) for n, t in ((2, 5), (1, 9), (4, 2))],
        {("batch", "x"): {1}},
    ),
    "lstm without state": Case(lambda: Recurrent(nn.LSTM, batch_first=True), lambda: [({"x": R(n, 5, 6)},) for n in (3, 1)]),
    "bidirectional": Case(
        lambda: Recurrent(nn.LSTM, batch_first=True, bidirectional=True),
        lambda: [({"x": R(n, 5, 6)}, states(n, 4)) for n in (1, 3)],
    ),
    "gru": Case(lambda: Recurrent(nn.GRU), lambda: [({"x": R(t, 3, 6)}, R(2, 3, 8)) for t in (5, 7)], {"batch.x": [0]}),
    "rnn": Case(lambda: Recurrent(nn.RNN, nonlinearity="relu"), lambda: [({"x": R(5, 3, 6)}, R(2, 3, 8))]),
    "cells": Case(Cells, lambda: [(R(n, 4, 4), R(n, 5), R(n, 5)) for n in (2, 1)]),
    "tied": Case(TiedLanguageModel, lambda: [(torch.randint(0, 50, s),) for s in ((2, 5), (1, 3))], {"ids": {1}}),
    "twice": Case(Twice, lambda: [(R(n, 4),) for n in (3, 1)]),
    "weight norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3)), lambda: [(R(n, 3, 9),) for n in (2, 1)]),
    "same padding": Case(lambda: SamePadding(3, 4, 3, stride=2), lambda: [(R(2, 3, 16, 16),), (R(1, 3, 20, 24),)], {0: {2, 3}}),
    "detector": Case(Detector, lambda: [(R(n, 3, 16, 16),) for n in (2, 1)]),
    "regions": Case(Regions, lambda: [(R(n, 4),) for n in (2, 1)]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_program_of_a_model_gives_its_outputs_bit_for_bit(name: str) -> None:
    case = CASES[name]
    program, _ = check(case.model(), *case.calls(), dynamic=case.dynamic, kwargs=case.kwargs)
    assert program.static_reason is None


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_the_model_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(3, 4, 3)), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.LSTM(7, 4))
    model.train(training)
    model[1].eval()
    weight = model[0].weight
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 9)
    random = torch.get_rng_state()
    trace(model, (x,))
    assert model.training is training and model[1].training is False and model[0].weight is weight
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random) and torch.backends.mha.get_fastpath_enabled()


def test_a_tied_tensor_is_one_state() -> None:
    program = trace(TiedLanguageModel(), (torch.randint(0, 50, (2, 5)),))
    paths = [state.path for state in program.states]
    assert "embedding.weight" in paths and "head.weight" not in paths
    same_memory = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    same_memory[1].weight = nn.Parameter(same_memory[0].weight.detach())
    program = trace(same_memory, (torch.randn(2, 4),))
    assert [state.path for state in program.states] == ["0.weight", "0.bias", "1.bias"]


def test_roles_of_states_and_constants_are_recorded() -> None:
    program = trace(Twice(), (torch.randn(3, 4),))
    roles = {state.path: state.role for state in program.states}
    assert roles["bare"] == "parameter" and roles["fixed"] == "buffer" and roles["scratch"] == "constant"
    assert set(program.constants) == {path for path, role in roles.items() if role == "constant"}
    root = program.root(all_tensors(Twice(), program))
    assert set(root.state_dict()) == {"linear.weight", "linear.bias", "bare", "fixed"}
    assert dict(root.named_parameters()).keys() == {"linear.weight", "linear.bias", "bare"}


def test_a_free_axis_has_a_name_and_equal_ones_share_it() -> None:
    program = trace(Recurrent(nn.LSTM, batch_first=True), ({"x": torch.randn(2, 5, 6)}, states(2)))
    assert program.inputs[0].shape == (Dynamic(0), 5, 6)
    assert program.inputs[1].shape == program.inputs[2].shape == (2, Dynamic(0), 8)


def test_the_branch_that_was_traced_bounds_the_inputs() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            x = x * 2 if x.shape[2] % 2 == 0 else x
            return self.conv(x + 1 if x.shape[3] > 6 else x)

    _, module = check(Branching(), (R(2, 1, 8, 8),), (R(1, 1, 6, 7),), dynamic={0: {2, 3}})
    with pytest.raises(InputError, match="must leave 0 when divided by 2, got 9"):
        module(R(2, 1, 9, 8))
    with pytest.raises(InputError, match="must be at least 7, got 5"):
        module(R(2, 1, 8, 5))


def test_a_fixed_batch_is_accepted_and_said() -> None:
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 6).sum(0) * torch.arange(6.0)

    program, module = check(Fixed(), (R(2, 6),))
    assert program.static_reason == "the model fixes the size of the batch"
    assert Program.from_json(program.to_json()).static_reason == program.static_reason
    with pytest.raises(InputError, match=r"must have shape \(2, 6\), got \(3, 6\)"):
        module(R(3, 6))


def test_a_batch_that_the_model_fixes_keeps_its_size():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(7, -1, 2).sum(1)

    program, module = check(Fixed(), (R(7, 6),))
    assert program.static_reason == "the model fixes the size of the batch"
    with pytest.raises(InputError, match=r"must have shape \(7, 6\), got \(2, 6\)"):
        module(R(2, 6))


class DataDependent(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        self.n += 1
        return x * self.n


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class MixedPrecision(nn.Module):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.t()


class NoTensor(nn.Module):
    def forward(self, x):
        return {"n": 3}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (DataDependent(), "data-dependent.*torch.where"),
        (Counting(), "writes into its state n"),
        (Noisy(), "random numbers in eval mode"),
        (MixedPrecision(), "wrap_with_autocast"),
        (NoTensor(), "at least one tensor"),
        (nn.Linear(3, 3), "does not run on the example"),
    ],
)
def test_a_model_without_a_graph_is_refused_in_one_line(model: nn.Module, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError, match=reason) as caught:
        trace(model, (torch.randn(2, 4),))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    if isinstance(model, Counting):
        assert model.n.item() == 0


def test_a_state_that_is_only_written_is_no_obstacle() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.last = nn.Linear(4, 4), None
            self.register_buffer("cache", torch.zeros(3, 4))

        def forward(self, x):
            self.last = self.linear(x)
            self.cache.copy_(self.last[:3] * 2)
            return self.last + self.cache.sum()

    model = Caching()
    program = trace(model, (R(3, 4),))
    assert model.last is None and torch.equal(model.cache, torch.zeros(3, 4))
    module = reloaded(model, program)
    x = R(3, 4)
    assert same(module(x), model(x))


def test_inputs_of_open_signatures_are_named_as_they_are_passed() -> None:
    class Variadic(nn.Module):
        def forward(self, first, *more, factor, **rest):
            return sum(x.sum(1) for x in more) + first * factor + rest["shift"]

    call = (R(3), R(3, 5), R(3, 6))
    rest = {"factor": R(3), "shift": R(3)}
    program, module = check(Variadic(), call, dynamic={1: {1}, ("more", 1): {1}, "shift": {0}}, kwargs=rest)
    assert [i.name for i in program.inputs] == ["first", "more[0]", "more[1]", "factor", "shift"]
    assert [len(i.shape) and isinstance(i.shape[-1], Dynamic) for i in program.inputs] == [True] * 5
    assert same(module(R(2), R(2, 1), R(2, 9), factor=R(2), shift=R(2)).shape, torch.Size([2]))
    with pytest.raises(InputError, match=r"must be a tuple of 2, got 1"):
        module(*call[:2], **rest)


@pytest.mark.parametrize(
    ("args", "kwargs", "dynamic", "reason"),
    [
        ((), {}, {}, "does not fit the forward"),
        ((3,), {}, {}, "at least one tensor"),
        ((R(2, 4),), {}, {"y": {0}}, "no input tensor is called 'y'; there are: input"),
        ((R(2, 4),), {}, {0: {2}}, "has 2 axes"),
        (({1, 2},), {}, {}, "must be made of tensors.*got set"),
    ],
)
def test_a_bad_example_is_an_input_error(args: Any, kwargs: Any, dynamic: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        trace(nn.Linear(4, 4), args, kwargs, dynamic)


def test_efficientnet_lite0_is_small_and_exact() -> None:
    import zlib

    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    program, _ = check(model, (R(2, 3, 96, 96),), (R(1, 3, 96, 96),))
    assert len(zlib.compress(json.dumps(program.to_json(), separators=(",", ":")).encode(), 9)) <= 800


def test_tiny_transformers_are_exact() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(**shape, intermediate_size=48, max_position_embeddings=64)
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    )
    gpt2.config.use_cache = False
    for model, names in ((bert, ("input_ids", "attention_mask")), (gpt2, ("input_ids",))):
        model.eval()
        ids = {name: torch.ones(2, 9, dtype=torch.long) for name in names}
        program = trace(model, (), ids, {name: {1} for name in names})
        module = reloaded(model, program)
        for size in ((2, 9), (1, 5), (3, 12)):
            call = {name: torch.randint(0, 99, size) if name == "input_ids" else torch.ones(size).long() for name in names}
            with torch.no_grad():
                assert same(module(**call), plain(dict(model(**call))))
