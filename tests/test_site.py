"""Coded tensors in real modules: tied, cached, copied, moved, traced; recurrent nets, attention, subclasses."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.errors import InputError
from pared.quantize import Integer
from pared.site import Decoded, Site, duplicate, hold_, install_, module_sites, plain, tensor_sites
from pared.statistics import Statistics


class Padded(nn.Conv2d):
    """Pads for itself, as in networks that came from other frameworks."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)))


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("table", torch.randn(8, 8))
        self.register_buffer("scratch", torch.randn(8, 8), persistent=False)
        self.register_buffer("count", torch.zeros(8, 8, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scale + x @ self.table


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class Nested(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"recurrent": recurrent})
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body["recurrent"](x)[0])


class Attention(nn.Module):
    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        keys = x[..., :6] if self.attention.kdim == 6 else x
        return self.attention(x, keys, keys)[0]


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), floats(3, 8)),
    "padded": (lambda: nn.Sequential(Padded(4, 8, 2), nn.BatchNorm2d(8)), floats(2, 4, 6, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2)), floats(2, 4, 5, 5)),
    "tied": (Tied, lambda: torch.randint(0, 20, (2, 5))),
    "buffered": (Buffered, floats(3, 8)),
    "twice": (Twice, floats(3, 8)),
    "lstm": (lambda: Nested(nn.LSTM(8, 12, batch_first=True)), floats(2, 5, 8)),
    "deep lstm": (lambda: Nested(nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)), floats(2, 5, 8)),
    "projected lstm": (lambda: Nested(nn.LSTM(8, 16, proj_size=12, batch_first=True)), floats(2, 5, 8)),
    "gru": (lambda: Nested(nn.GRU(8, 12, batch_first=True)), floats(2, 5, 8)),
    "rnn": (lambda: Nested(nn.RNN(8, 12, batch_first=True)), floats(2, 5, 8)),
    "lstm cell": (lambda: Nested(nn.LSTMCell(8, 12)), floats(2, 8)),
    "attention": (Attention, floats(2, 5, 8)),
    "attention with other keys": (lambda: Attention(kdim=6, vdim=6), floats(2, 5, 8)),
    "encoder": (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), floats(2, 5, 8)),
}


def coded(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The original, a copy whose tensors are all held as 8-bit integers, and inputs."""
    make, inputs = MODELS[name]
    original = make().eval()
    return original, code(original), inputs()


def code(original: nn.Module, bits: int = 8) -> nn.Module:
    model, technique = copy.deepcopy(original), Integer(bits=bits)
    for site in list(technique.sites(model)):
        install_(site, technique.solve(site, Statistics())[1])
    return model


def close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() < 0.05 * right.abs().max() + 1e-3)


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_works_with_coded_weights_and_keeps_its_classes(self, name: str) -> None:
        original, model, x = coded(name)
        assert close(model(x), original(x)) and not torch.equal(model(x), original(x))
        for before, after in zip(original.modules(), (m for m in model.modules() if not _is_coding(m, model)), strict=True):
            assert isinstance(after, type(before))

    def test_computes_the_same_in_train_mode_where_there_is_no_batch_norm_or_dropout(self, name: str) -> None:
        _, model, x = coded(name)
        expected = model(x)
        model.train()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
                module.eval()
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        assert torch.allclose(model(x), expected, atol=1e-6)

    def test_plain_gives_the_same_function_without_any_code(self, name: str) -> None:
        original, model, x = coded(name)
        decoded = plain(model)
        with torch.no_grad():  # torch chooses kernels by requires_grad even here
            assert torch.equal(copy.deepcopy(decoded).requires_grad_(False)(x), model(x))
        assert {type(m) for m in decoded.modules()} == {type(m) for m in original.modules()}
        assert decoded.state_dict().keys() == original.state_dict().keys()
        assert sum(p.numel() for p in decoded.parameters()) == sum(p.numel() for p in original.parameters())

    def test_can_be_copied(self, name: str) -> None:
        _, model, x = coded(name)
        twin = copy.deepcopy(model)
        expected = model(x)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.zero_()
        assert torch.equal(twin(x), expected)

    def test_loads_a_state_dict_bit_for_bit(self, name: str) -> None:
        _, model, x = coded(name)
        other = code(MODELS[name][0]().eval())
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))

    def test_follows_half_and_double(self, name: str) -> None:
        _, model, x = coded(name)
        expected = model(x)
        for dtype in (torch.float64, torch.float16):
            inputs = x.to(dtype) if x.is_floating_point() else x
            got = model.to(dtype)(inputs)
            assert got.dtype == dtype
            assert torch.allclose(got.float(), expected, atol=0.02)


def _is_coding(module: nn.Module, model: nn.Module) -> bool:
    path = next(path for path, m in model.named_modules() if m is module)
    return "parametrizations" in path


def test_tied_weights_are_one_site_with_one_decoder() -> None:
    _, model, x = coded("tied")
    assert [s.paths for s in tensor_sites(Tied()) if "embedding" in s.path] == [("embedding.weight", "head.weight")]
    holders = [m for m in model.modules() if isinstance(m, Decoded)]
    assert len(holders) == 3
    assert model.embedding.parametrizations.weight[0] is model.head.parametrizations.weight[0]


def test_tied_weights_stay_tied_in_copies_and_when_plain() -> None:
    _, model, _ = coded("tied")
    twin, decoded = copy.deepcopy(model), plain(model)
    assert twin.embedding.parametrizations.weight[0] is twin.head.parametrizations.weight[0]
    assert twin.embedding.parametrizations.weight[0] is not model.embedding.parametrizations.weight[0]
    assert decoded.embedding.weight is decoded.head.weight


def test_a_plain_copy_leaves_the_coded_model_and_its_copies_as_they_are() -> None:
    for name in ("tied", "lstm"):
        _, model, x = coded(name)
        twin, expected = copy.deepcopy(model), model(x)
        plain(model)
        plain(twin)
        assert torch.equal(model(x), expected) and torch.equal(twin(x), expected)


def test_buffers_are_sites_unless_they_are_transient_or_integers() -> None:
    assert [s.path for s in tensor_sites(Buffered())] == ["scale", "table"]
    assert [s.is_buffer for s in tensor_sites(Buffered())] == [False, True]
    assert isinstance(plain(code(Buffered())).table, Tensor)
    assert "table" in dict(plain(code(Buffered())).named_buffers())


@pytest.mark.parametrize("name", ["keys", "values", "items", "pop", "forward"])
def test_names_that_torch_cannot_parametrise_are_left_alone(name: str) -> None:
    model = nn.Module()
    model._parameters[name] = nn.Parameter(torch.randn(8, 8))
    model.weight = nn.Parameter(torch.randn(8, 8))
    assert [s.path for s in tensor_sites(model)] == ["weight"]


def test_holding_what_is_no_tensor_of_the_module_is_an_error() -> None:
    with pytest.raises(InputError, match="weigth must be a parameter or a buffer of Linear"):
        hold_(nn.Linear(2, 2), "weigth", Decoded(nn.Identity()), torch.zeros(1))


def test_a_module_found_at_two_paths_is_one_site() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    (site,) = module_sites(model, (nn.Linear,))
    assert site.paths == ("0", "2")
    assert site.covers == ("0.weight", "0.bias")
    install_(site, nn.Identity())
    assert isinstance(model[0], nn.Identity) and model[0] is model[2]


def test_a_module_with_two_names_in_one_parent_is_coded_once() -> None:
    model = nn.Module()
    model.first = nn.Linear(8, 8)
    model.again = model.first
    small = code(model)
    assert small.first is small.again and isinstance(small.first.parametrizations.weight[0], Decoded)
    assert len(small.first.parametrizations.weight) == 1


def test_a_module_site_on_meta_covers_what_it_covers() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    (site,) = module_sites(model, (nn.Linear,))
    narrow = Site(model, site.paths, "module", ("0.weight",))
    assert narrow.on_meta().covers == ("site.weight",)
    assert all(p.is_meta for p in narrow.on_meta().module.parameters())
    assert not any(p.is_meta for p in model.parameters())


def test_a_tensor_on_meta_keeps_the_class_and_attributes_of_its_owner() -> None:
    site = next(iter(tensor_sites(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2)))))
    shell = site.on_meta()
    assert isinstance(shell.owner, nn.ConvTranspose2d) and shell.owner.stride == (2, 2)
    assert shell.tensor.is_meta and shell.tensor.shape == site.tensor.shape
    assert list(shell.owner.state_dict()) == ["weight"]


def test_asking_a_site_for_the_wrong_thing_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"0\.weight is a tensor"):
        _ = next(iter(tensor_sites(model))).module
    with pytest.raises(TypeError, match="0 is a module"):
        _ = next(iter(module_sites(model, (nn.Linear,)))).tensor


# The cache.


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(2, 2))
        self.calls = 0

    def forward(self) -> Tensor:
        self.calls += 1
        return self.value * 2


@pytest.fixture
def held() -> tuple[nn.Linear, Counting]:
    layer, decoder = nn.Linear(2, 2).eval(), Counting()
    install_(Site.of(layer, "weight"), decoder)
    decoder.calls = 0
    return layer, decoder


def test_in_eval_mode_the_weight_is_decoded_once(held: tuple[nn.Linear, Counting]) -> None:
    layer, decoder = held
    for _ in range(3):
        layer(torch.ones(1, 2))
    assert decoder.calls == 1


def test_in_train_mode_it_is_decoded_at_every_call_and_gradients_arrive(held: tuple[nn.Linear, Counting]) -> None:
    layer, decoder = held
    layer.train()
    for _ in range(3):
        layer(torch.ones(1, 2)).sum().backward()
    assert decoder.calls == 3
    assert torch.equal(decoder.value.grad, torch.full((2, 2), 6.0))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train().eval(),
        lambda layer: layer.half().float(),
        lambda layer: layer.to("cpu", torch.float64).float(),
        lambda layer: layer.load_state_dict(layer.state_dict()),
    ],
    ids=["train", "half", "to", "load_state_dict"],
)
def test_the_held_value_is_dropped(held: tuple[nn.Linear, Counting], change: Callable[[nn.Module], object]) -> None:
    layer, decoder = held
    before = layer.weight.clone()
    decoder.value.data.mul_(3)
    assert torch.equal(layer.weight, before)
    change(layer)
    assert torch.equal(layer.weight, 3 * before)


def test_without_a_cache_changes_show_at_once() -> None:
    layer, decoder = nn.Linear(2, 2).eval(), Counting()
    install_(Site.of(layer, "weight"), decoder, cache=False)
    before = layer.weight.detach().clone()
    decoder.value.data.mul_(3)
    assert torch.equal(layer.weight, 3 * before)


def test_a_value_made_in_inference_mode_serves_a_later_backward_pass(held: tuple[nn.Linear, Counting]) -> None:
    layer, _ = held
    with torch.inference_mode():
        layer(torch.ones(1, 2))
    x = torch.ones(1, 2, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 2), 4.0))


def test_a_copy_decodes_for_itself(held: tuple[nn.Linear, Counting]) -> None:
    layer, decoder = held
    layer(torch.ones(1, 2))
    twin = copy.deepcopy(layer)
    decoder.value.data.zero_()
    assert torch.equal(twin.weight, torch.full((2, 2), 2.0))


@pytest.mark.parametrize("name", ["linear", "tied", "buffered"])
def test_compiled_it_computes_the_same(name: str) -> None:
    _, model, x = coded(name)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("name", ["linear", "padded", "tied", "lstm", "attention"])
def test_plain_can_be_exported(name: str) -> None:
    _, model, x = coded(name)
    with torch.no_grad():
        program = torch.export.export(plain(model), (x,))
        assert torch.allclose(program.module()(x), model(x), atol=1e-5)
    assert not any("parametrizations" in path for path in program.state_dict)


def test_a_model_that_keeps_computed_tensors_is_copied():
    model = nn.Linear(3, 2)
    model.kept = {"cpu": model.weight * 2}
    twin = duplicate(model)
    assert torch.equal(twin.kept["cpu"], model.kept["cpu"]) and twin.kept["cpu"].is_leaf
    assert twin.weight is not model.weight
