"""Reparametrisations become plain weights and nothing else changes."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from pared.errors import InputError
from pared.quantize.integer import Integer
from pared.site import Decoded, install_, tensor_sites
from pared.statistics import Statistics
from pared.structure.bake import Bake, BakeStructure, duplicate, reparametrised
from pared.technique import Edit


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


def weight_norm(module, name="weight"):
    return parametrizations.weight_norm(module, name)


def spectral_norm(module):
    return parametrizations.spectral_norm(module)


def old_weight_norm(module, name="weight"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name)


def pruned(module):
    return prune.random_unstructured(prune.l1_unstructured(module, "weight", 0.3), "weight", 0.3)


def symmetric(module):
    parametrize.register_parametrization(module, "weight", Symmetric())
    return module


WAYS = {
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "a parametrisation of the user": symmetric,
    "old weight norm": old_weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "torch's pruning, twice": pruned,
}


class Net(nn.Module):
    """Two layers with a reparametrisation, one of them used twice under two names, and one without."""

    def __init__(self, way) -> None:
        super().__init__()
        self.body = nn.Sequential(way(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 6))
        self.head = way(nn.Linear(6, 6))
        self.again = self.head

    def forward(self, x):
        return self.again(self.head(self.body(x)))


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request):
    return request.param


@pytest.fixture
def trained(way):
    """A network whose originals have moved, as training moves them."""
    net = Net(way)
    optimiser = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(3):
        optimiser.zero_grad()
        net(torch.randn(8, 6)).pow(2).mean().backward()
        optimiser.step()
    return net.eval()


def edits_of(model):
    return [Edit(Bake(), site.paths, Bake().decide(site, Statistics())) for site in Bake().sites(model)]


def test_outputs_stay_the_same(trained):
    x = torch.randn(16, 6)
    with torch.no_grad():
        expected = trained(x)
        baked = Bake().prepare(trained, None, Statistics())
        assert baked is trained
        torch.testing.assert_close(baked(x), expected, rtol=0, atol=1e-6)


def test_only_plain_tensors_are_left_with_the_weight_first(trained):
    Bake().prepare(trained, None, Statistics())
    plain = ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "head.weight", "head.bias"]
    assert [name for name, _ in trained.named_parameters()] == plain
    assert [name for name, _ in trained.named_buffers()] == []
    assert trained.again is trained.head and type(trained.head) is nn.Linear
    assert all(not module._forward_pre_hooks for module in trained.modules())


def test_a_second_time_there_is_nothing_to_do(trained):
    Bake().prepare(trained, None, Statistics())
    assert Bake().prepare(trained, None, Statistics()) is None
    assert list(Bake().sites(trained)) == []


def test_a_copy_is_baked_without_touching_the_original(trained):
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = trained(x)
        twin = duplicate(trained)
        Bake().prepare(twin, None, Statistics())
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=1e-6)
        assert torch.equal(trained(x), expected)
        assert reparametrised(trained.head) == ("weight",)


def test_edits_replayed_on_a_fresh_instance_take_the_weights(trained, way):
    x = torch.randn(4, 6)
    edits = edits_of(trained)
    assert [edit.paths for edit in edits] == [("body.0",), ("head", "again")]
    Bake().prepare(trained, None, Statistics())
    fresh = Net(way).eval()
    for edit in edits:
        edit.replay_(fresh)
    fresh.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), trained(x))


def test_edits_replay_where_the_class_is_plain_already(trained):
    edits = edits_of(trained)
    Bake().prepare(trained, None, Statistics())
    fresh = Net(lambda module: module).eval()
    for edit in edits:
        edit.replay_(fresh)
    fresh.load_state_dict(trained.state_dict())


def test_a_structure_survives_json():
    structure = BakeStructure(names=("weight", "bias"))
    assert BakeStructure.model_validate_json(structure.model_dump_json()) == structure


def test_replaying_on_another_class_names_path_and_tensor(trained):
    fresh = Net(lambda module: nn.Tanh())
    with pytest.raises(InputError, match=r"body\.0 must have the tensor weight, but Tanh has none"):
        edits_of(trained)[0].replay_(fresh)


def test_the_root_itself_can_be_baked():
    net = weight_norm(nn.Linear(3, 2)).eval()
    x = torch.randn(5, 3)
    (edit,) = edits_of(net)
    with torch.no_grad():
        expected = net(x)
        edit.replay_(net)
        assert torch.equal(net(x), expected)
    assert sorted(net.state_dict()) == ["bias", "weight"] and list(net.children()) == []


def test_spectral_norm_is_baked_as_evaluation_sees_it_even_in_training_mode():
    net = nn.Sequential(spectral_norm(nn.Linear(8, 8)))
    net.train()(torch.randn(4, 8))
    expected = copy.deepcopy(net).eval()(torch.eye(8)).detach()
    Bake().prepare(net, None, Statistics())
    torch.testing.assert_close(net(torch.eye(8)).detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Conv2d(3, 4, 3), torch.ones(2, 3, 7, 7)),
        (nn.ConvTranspose1d(3, 4, 3), torch.ones(2, 3, 7)),
        (nn.Embedding(5, 4), torch.tensor([1, 3])),
    ],
    ids=["convolution", "transposed convolution", "embedding"],
)
def test_other_layers_are_baked_as_well(module, x):
    net = nn.Sequential(weight_norm(copy.deepcopy(module)))
    with torch.no_grad():
        net[0].parametrizations.weight.original0.mul_(1.5)
        expected = net(x)
        Bake().prepare(net, None, Statistics())
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-6)


def test_a_recurrent_weight_with_the_old_hook_is_baked():
    net = old_weight_norm(nn.LSTM(4, 5, batch_first=True), "weight_hh_l0").eval()
    x = torch.randn(2, 6, 4)
    with torch.no_grad():
        net.weight_hh_l0_g.mul_(0.7)
        expected = net(x)[0]
        Bake().prepare(net, None, Statistics())
        torch.testing.assert_close(net(x)[0], expected, rtol=0, atol=1e-6)
        net.weight_hh_l0.mul_(2.0)
        assert not torch.allclose(net(x)[0], expected), "the plain weight must be the one in use"


def test_a_baked_weight_can_be_quantized_saved_and_loaded():
    net, fresh = (nn.Sequential(weight_norm(nn.Linear(16, 16))).eval() for _ in range(2))
    edits = edits_of(net)
    Bake().prepare(net, None, Statistics())
    site = next(s for s in tensor_sites(net) if s.path == "0.weight")
    structure, parts = Integer(bits=4).solve(site, Statistics())
    install_(site, parts)
    for edit in [*edits, Edit(Integer(bits=4), ("0.weight",), structure)]:
        edit.replay_(fresh)
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(fresh.eval()(x), net.eval()(x))


def test_pareds_own_codes_are_never_baked():
    net = nn.Sequential(nn.Linear(16, 16))
    site = next(s for s in tensor_sites(net) if s.path == "0.weight")
    install_(site, Integer(bits=4).solve(site, Statistics())[1])
    assert Bake().prepare(net, None, Statistics()) is None
    assert isinstance(net[0].parametrizations.weight[0], Decoded)


def test_a_module_with_a_coded_tensor_is_refused_with_a_reason():
    net = nn.Sequential(weight_norm(nn.Linear(16, 16)))
    site = next(s for s in tensor_sites(net) if s.path == "0.bias")
    install_(site, Integer(bits=8).solve(site, Statistics())[1])
    (found,) = Bake().sites(net)
    assert "coded already" in Bake().refuse(found)
    with pytest.raises(InputError, match="coded already"):
        Bake().build(found, BakeStructure(names=("weight",)))
    assert Bake().prepare(net, None, Statistics()) is None


def test_cost_is_that_of_the_plain_layer_and_leaves_the_site_alone(trained):
    for site in Bake().sites(trained):
        assert Bake().cost(site).stored_bits == 32 * (36 + 6)
        assert reparametrised(site.module) == ("weight",)
        assert Bake().damage(site, site.module, Statistics()) == 0
