"""What is saved is loaded: every bit, with and without the class."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import pared
from pared import artifact, prune, quantize
from pared.artifact.tensors import same_bits
from pared.errors import ArtifactError, InputError
from pared.place import apply
from pared.record import Record, attach_, record_of
from pared.site import Decoded, plain
from pared.technique import Chain, Edit

CODED = [
    ("convolutional", "integer"), ("convolutional", "deep"), ("convolutional", "low rank"),
    ("convolutional", "low rank, then all"), ("recurrent", "integer"), ("recurrent", "deep"), ("attentive", "codebook"),
    ("attentive", "deep"), ("attentive", "low rank, then all"), ("upsampling", "integer"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def plain_attention():
    """Torch's fused attention rounds otherwise than the operators that it stands for, on some processors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def frozen(model: nn.Module) -> nn.Module:
    """In eval mode, without gradients: torch multiplies by weights that take gradients in another way, with other rounding."""
    return model.eval().requires_grad_(False)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {path: value for path, value in model.state_dict().items() if value.numel()}


@pytest.mark.parametrize("name", ["convolutional", "recurrent", "attentive", "odd"])
def test_any_model_comes_back_bit_for_bit_with_and_without_its_class(name, make, tmp_path, same):
    it = make(name)
    loaded, own = artifact.load(tmp_path / "a.pared"), artifact.load(tmp_path / "a.pared", it.cls())
    with torch.no_grad():
        assert same(loaded(*it.args), frozen(it.model)(*it.args))
    assert own.training
    expected, found = it.model.state_dict(), own.state_dict()
    assert list(expected) == list(found)
    assert all(same_bits(expected[path], found[path]) for path in expected)


@pytest.mark.parametrize(("name", "techniques"), CODED)
def test_coded_models_compute_the_same_bits_with_and_without_their_class(name, techniques, make, tmp_path, same):
    it = make(name, techniques)
    fresh = it.cls()
    loaded, own = artifact.load(tmp_path / "a.pared"), artifact.load(tmp_path / "a.pared", fresh)
    assert own is fresh
    with torch.no_grad():
        expected = frozen(it.model)(*it.args)
        assert same(loaded(*it.args), expected)
        assert same(frozen(own)(*it.args), expected)
    assert all(same_bits(a, b) for a, b in zip(state(it.model).values(), state(own).values(), strict=True))
    assert record_of(own).edits == record_of(loaded).edits == record_of(it.model).edits


@pytest.mark.parametrize(("name", "techniques"), CODED)
def test_saving_what_was_loaded_gives_the_same_bytes(name, techniques, make, tmp_path):
    it = make(name, techniques)
    for loaded in (artifact.load(tmp_path / "a.pared"), artifact.load(tmp_path / "a.pared", it.cls())):
        artifact.save(loaded, tmp_path / "b.pared")
        assert (tmp_path / "b.pared").read_bytes() == it.file


def test_equal_models_make_equal_files(make, tmp_path):
    it = make("convolutional", "deep")
    artifact.save(it.model, tmp_path / "b.pared")
    assert (tmp_path / "b.pared").read_bytes() == it.file


@pytest.mark.parametrize("cache", [True, False])
def test_decoding_at_every_call_computes_the_same(cache, make, tmp_path, same):
    it = make("attentive", "deep")
    loaded, own = artifact.load(tmp_path / "a.pared", cache=cache), artifact.load(tmp_path / "a.pared", it.cls(), cache=cache)
    held = [m for m in [*loaded.modules(), *own.modules()] if isinstance(m, Decoded)]
    assert held and any(m.cache for m in held) == cache
    with torch.no_grad():
        expected = frozen(it.model)(*it.args)
        assert same(loaded(*it.args), expected) and same(frozen(own)(*it.args), expected)
    assert any(m._value is not None for m in held) == cache


def test_tied_weights_are_stored_once_and_stay_tied(make, tmp_path):
    it = make("recurrent", "integer")
    cls = it.cls
    rows = {row["path"]: row for row in artifact.inspect(tmp_path / "a.pared")["tensors"]}
    assert rows["embedding.weight"]["aliases"] == ["head.weight"] and "head.weight" not in rows
    own = artifact.load(tmp_path / "a.pared", cls())
    first = own.embedding.parametrizations.weight[0]
    assert first is own.head.parametrizations.weight[0]


def test_a_model_without_program_loads_into_its_class_only(make, tmp_path):
    it = make("convolutional", "integer")
    model, cls = it.model, it.cls
    artifact.save(model, tmp_path / "a.pared", program=False)
    with pytest.raises(ArtifactError, match=r"holds no program.*MyNet\(\)"):
        artifact.load(tmp_path / "a.pared")
    artifact.load(tmp_path / "a.pared", cls())


def test_a_model_that_cannot_be_traced_is_saved_without_program_with_a_warning(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) if float(x.sum()) > 0 else -self.linear(x)

    with pytest.warns(UserWarning, match=r"saved without program.*Branching"):
        artifact.save(Branching(), tmp_path / "a.pared", example=torch.randn(2, 4))
    artifact.load(tmp_path / "a.pared", Branching())
    with pytest.warns(UserWarning, match=r"no example.*pass example="):
        artifact.save(nn.Linear(2, 2), tmp_path / "a.pared")


def test_examples_come_in_every_form(tmp_path, same):
    class Two(nn.Module):
        def forward(self, a, b):
            return a @ b

    a, b = torch.randn(3, 4), torch.randn(4, 5)
    for example in [(a, b), [a, b], {"a": a, "b": b}, ((a,), {"b": b})]:
        artifact.save(Two(), tmp_path / "a.pared", example=example)
        assert same(artifact.load(tmp_path / "a.pared")(a, b=b), a @ b)


def test_a_reparametrised_model_loads_either_way(tmp_path, same):
    def build():
        return nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 2))

    model, x = build().eval(), torch.randn(2, 5)
    artifact.save(model, tmp_path / "a.pared", example=x)
    coded = apply(model, None, quantize.Integer(bits=8))
    artifact.save(coded, tmp_path / "b.pared", example=x)
    with torch.no_grad():
        for name, expected in [("a", model(x)), ("b", coded(x))]:
            assert same(artifact.load(tmp_path / f"{name}.pared")(x), expected)
            assert same(artifact.load(tmp_path / f"{name}.pared", build()).eval()(x), expected)


def test_half_precision_weights_keep_their_type(tmp_path, same):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16().eval()
    coded, x = apply(model, None, quantize.Integer(bits=4)), torch.randn(2, 16).bfloat16()
    artifact.save(coded, tmp_path / "a.pared", example=x)
    with torch.no_grad():
        assert same(artifact.load(tmp_path / "a.pared")(x), coded(x))


def test_safetensors_opens_the_file(make, tmp_path):
    make("convolutional", "deep")
    with safe_open(tmp_path / "a.pared", "numpy") as file:
        assert list(file.keys()) == ["pared"]
        assert file.get_tensor("pared").nbytes > 0


def test_loaded_models_have_no_training_mode_and_say_what_has(make, tmp_path):
    make("convolutional")
    loaded = artifact.load(tmp_path / "a.pared")
    assert not loaded.training
    with pytest.raises(InputError, match="MyNet"):
        loaded.train()


def test_a_loaded_model_can_be_trained_and_saved_again(make, tmp_path, same):
    it = make("convolutional", "integer")
    model, args, cls = it.model, it.args, it.cls
    own = artifact.load(tmp_path / "a.pared", cls())
    optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], 0.1)
    own(*args).square().sum().backward()
    optimizer.step()
    artifact.save(own, tmp_path / "b.pared")
    with torch.no_grad():
        expected = own.eval()(*args)
        assert not same(expected, model(*args))
        assert same(artifact.load(tmp_path / "b.pared")(*args), expected)


def test_a_changed_model_is_not_saved_with_the_program_it_had(make, tmp_path):
    it = make("convolutional")
    cls = it.cls
    own = artifact.load(tmp_path / "a.pared", cls())
    own.norm = nn.Identity()
    with pytest.warns(UserWarning, match="example="):
        artifact.save(own, tmp_path / "b.pared")


def test_the_first_difference_to_the_class_is_named_and_the_model_left_alone(make, tmp_path):
    it = make("convolutional", "integer")
    cls = it.cls

    def refused(change, match):
        other = cls()
        change(other)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(InputError, match=match):
            artifact.load(tmp_path / "a.pared", other)
        assert list(before) == list(other.state_dict())
        assert all(same_bits(a, b) for a, b in zip(before.values(), other.state_dict().values(), strict=True))

    refused(lambda m: setattr(m, "head", nn.Linear(8, 5)), r"head\.\S+ is .* in the file and .* in the model")
    refused(lambda m: delattr(m, "head"), r"head")
    refused(lambda m: setattr(m, "extra", nn.Linear(2, 2)), r"the model holds extra\.weight .*the file lacks")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_no_file_can_hold_is_named(tmp_path):
    def refused(tensor, match):
        model = nn.Module()
        model.register_buffer("odd", tensor)
        with pytest.raises(InputError, match=match):
            artifact.save(model, tmp_path / "a.pared", program=False)
        assert not (tmp_path / "a.pared").exists()

    refused(torch.eye(3).to_sparse(), "odd has layout")
    refused(torch.empty(3, device="meta"), "odd is on the meta device")
    refused(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "odd has type torch.qint8")
    with pytest.raises(InputError, match="weight has no shape yet"):
        artifact.save(nn.LazyLinear(3), tmp_path / "a.pared", program=False)


def test_a_coded_tensor_that_no_edit_explains_is_named(make, tmp_path):
    model = make("convolutional", "integer").model
    with pytest.raises(InputError, match=r"stem\.weight is held in a form that its edits do not rebuild"):
        artifact.save(model, tmp_path / "a.pared", edits=[])


def test_a_technique_that_reads_more_than_shapes_to_build_is_found_out(make, tmp_path, monkeypatch):
    it = make("convolutional")
    model, args = it.model, it.args
    technique = quantize.Integer(bits=8)
    edits = [Edit(technique, ("head.weight",), technique.structure_type())]
    parts = edits[0].replay_(model)
    parts.own = True
    parts.codes.copy_(torch.arange(32).reshape(4, 8))
    monkeypatch.setattr(type(parts), "forward", lambda self: self.codes.float() * (1 if hasattr(self, "own") else 2))
    with pytest.raises(ArtifactError, match=r"head\.weight would be read as other values"):
        artifact.save(model, tmp_path / "a.pared", edits=edits, example=args)


def test_foreign_techniques_are_refused_when_saving(make, tmp_path):
    class Own(quantize.Integer):
        pass

    model = make("convolutional").model
    edits = [Edit(Own(bits=8), ("head.weight",), Own.structure_type())]
    edits[0].replay_(model)
    with pytest.raises(InputError, match="no technique|registry knows"):
        artifact.save(model, tmp_path / "a.pared", edits=edits)


def test_recipe_and_provenance_come_back(make, tmp_path):
    it = make("convolutional")
    model, args, cls = it.model, it.args, it.cls
    attach_(model, Record([], (args, {}), "steps: []\n"))
    artifact.save(model, tmp_path / "a.pared", provenance={"source": "timm:tiny", "seed": 3})
    for loaded in (artifact.load(tmp_path / "a.pared"), artifact.load(tmp_path / "a.pared", cls())):
        assert record_of(loaded).recipe == "steps: []\n"
        assert record_of(loaded).provenance == {"source": "timm:tiny", "seed": 3}
    with pytest.raises(InputError, match="provenance"):
        artifact.save(model, tmp_path / "a.pared", provenance={"when": object()})


def test_models_without_tensors_and_without_names_are_saved(tmp_path, same):
    x = torch.randn(2, 3)
    artifact.save(nn.ReLU(), tmp_path / "a.pared", example=x)
    assert same(artifact.load(tmp_path / "a.pared")(x), x.relu())
    artifact.save(nn.Linear(3, 2), tmp_path / "b.pared", example=x)
    assert artifact.load(tmp_path / "b.pared", nn.Linear(3, 2)).weight.shape == (2, 3)


def test_the_model_is_left_as_it_was(make, tmp_path):
    model = make("convolutional", "deep").model
    model.train()
    before = {path: value.clone() for path, value in model.state_dict().items()}
    artifact.save(model, tmp_path / "a.pared")
    assert model.training and all(m.training for m in model.modules())
    assert all(same_bits(before[path], value) for path, value in model.state_dict().items())


def test_inspect_accounts_for_every_byte(make, tmp_path):
    model = make("attentive", "deep").model
    path = tmp_path / "a.pared"
    found = artifact.inspect(path)
    assert found["file_bytes"] == path.stat().st_size
    assert found["file_bytes"] == found["header_bytes"] + found["manifest_bytes"] + found["data_bytes"]
    assert found["data_bytes"] == pytest.approx(sum(row["bytes"] for row in found["tensors"]), abs=0.1 * len(found["tensors"]))
    assert 0 < found["program_bytes"] < found["manifest_bytes"]
    values = dict(plain(model).state_dict())
    own = [row for row in found["tensors"] if row["role"] != "constant"]
    assert {row["path"]: tuple(row["shape"]) for row in own} == {path: tuple(v.shape) for path, v in values.items()}
    assert found["original_bytes"] == sum(v.numel() * v.element_size() for v in values.values())
    row = next(row for row in own if row["path"] == "head.out.weight")
    assert row["technique"] == "chain(prune.magnitude(sparsity=0.7), quantize.codebook(bits=3))"
    assert row["bits_per_weight"] == pytest.approx(8 * row["bytes"] / 64, abs=0.01)


def test_describe_tells_of_a_model_what_inspect_tells_of_its_file(make, tmp_path):
    model = make("attentive", "integer").model
    of_file = {row["path"]: row for row in artifact.inspect(tmp_path / "a.pared")["tensors"] if row["role"] != "constant"}
    of_model = {row["path"]: row for row in artifact.describe(model)["tensors"]}
    assert set(of_file) == set(of_model)
    for path, row in of_model.items():
        assert {k: row[k] for k in ("technique", "shape", "dtype")} == {
            k: of_file[path][k] for k in ("technique", "shape", "dtype")
        }


def test_the_overhead_of_a_small_file_is_small(tmp_path):
    class LeNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
            self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

        def forward(self, x):
            x = nn.functional.max_pool2d(self.conv2(nn.functional.max_pool2d(self.conv1(x), 2)), 2)
            return self.fc2(self.fc1(x.flatten(1)).relu())

    model = apply(LeNet().eval(), None, Chain(prune.Magnitude(sparsity=0.9), quantize.Codebook(bits=4)))
    artifact.save(model, tmp_path / "a.pared", example=torch.randn(2, 1, 28, 28))
    found = artifact.inspect(tmp_path / "a.pared")
    assert found["header_bytes"] + found["manifest_bytes"] <= 400
    assert found["program_bytes"] <= 260


def test_package_level_names(make, tmp_path):
    model = make("convolutional").model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pared.save(model, tmp_path / "a.pared")
    assert isinstance(pared.load(tmp_path / "a.pared"), nn.Module)


class Shared(nn.Module):
    """One layer known under two names; the forward reaches the other branch first."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.branch = nn.Sequential(nn.LayerNorm(8), self.shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.branch(x)
        return out


def test_a_layer_with_two_names_comes_back_whatever_the_order_in_which_it_is_used(tmp_path):
    torch.manual_seed(0)
    model, x = frozen(Shared()), torch.randn(2, 8)
    pared.save(model, tmp_path / "a.pared", example=(x,))
    assert torch.equal(pared.load(tmp_path / "a.pared")(x), model(x))
    assert torch.equal(frozen(pared.load(tmp_path / "a.pared", Shared()))(x), model(x))
