import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import pared
from pared import structure
from pared.errors import InputError
from pared.graph.flow import flow_of
from pared.record import record_of
from pared.site import network_site
from pared.statistics import Statistics


def random_norms(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def fold(model, x):
    structured, _ = structure.FoldBatchNorm().solve(network_site(model), Statistics(flow=flow_of(model, (x,))))
    return structured.pairs


def test_the_folded_convolution_is_torchs():
    model = random_norms(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)))
    expected = fuse_conv_bn_eval(model[0], model[1])
    assert fold(model, torch.randn(2, 3, 8, 8)) == (("0", "1"),)
    torch.testing.assert_close(model[0].weight, expected.weight)
    torch.testing.assert_close(model[0].bias, expected.bias)
    assert isinstance(model[1], nn.Identity)


@pytest.mark.parametrize(
    "layer, norm, shape",
    [
        (nn.Linear(6, 4), nn.BatchNorm1d(4), (3, 6)),
        (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 5, 5)),
        (nn.Conv1d(4, 4, 3, groups=4), nn.BatchNorm1d(4, affine=False), (2, 4, 9)),
    ],
)
def test_every_layer_with_output_channels_is_folded(layer, norm, shape):
    if not norm.affine:
        norm.running_mean.normal_()
        model = nn.Sequential(layer, norm).eval()
    else:
        model = random_norms(nn.Sequential(layer, norm))
    x = torch.randn(shape)
    expected = model(x)
    assert len(fold(model, x)) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_output_is_read_twice_is_left_alone():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert fold(random_norms(Split()), torch.randn(2, 3, 4, 4)) == ()


def test_a_convolution_that_pads_for_itself_and_a_norm_that_holds_an_activation_are_folded():
    class Same(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)

    class NormAct(nn.BatchNorm2d):
        def __init__(self, n):
            super().__init__(n)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    model = random_norms(nn.Sequential(Same(3, 4, 2), NormAct(4)))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    assert len(fold(model, x)) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_folded_file_loads_into_the_class(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    model, x = random_norms(build()), torch.randn(4, 1, 8, 8)
    task = pared.Task([(x, torch.zeros(4, dtype=torch.int64))], [(x, torch.zeros(4, dtype=torch.int64))])
    folded = pared.apply(model, task, structure.FoldBatchNorm())
    pared.save(folded, tmp_path / "net.pared")
    for loaded in (pared.load(tmp_path / "net.pared"), pared.load(tmp_path / "net.pared", build())):
        assert torch.equal(loaded.eval()(x), folded(x))
    assert [edit.paths for edit in record_of(folded).edits] == [("",)]


def test_a_network_without_batch_norms_is_said_to_have_none():
    with pytest.raises(InputError, match="there is no batch-norm in it"):
        pared.apply(nn.Sequential(nn.Linear(3, 2)), None, structure.FoldBatchNorm())
