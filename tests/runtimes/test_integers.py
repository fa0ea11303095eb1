"""Integers in exported files: what is stored, and what a runtime makes of it."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import quantize
from pared.errors import InputError
from pared.lowered import dequantize, lookup, through_integers
from pared.lowered import quantize as to_codes
from pared.runtimes.lower import lowered

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def initializers(path):
    return {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6)).eval()


def test_a_weight_is_stored_as_the_codes_that_the_file_holds(model, tmp_path):
    x = torch.randn(2, 1, 6, 6)
    small = pared.apply(model, None, quantize.Integer(tensors="matrices"))
    pared.export(small, tmp_path / "net.onnx", example=x)
    held = initializers(tmp_path / "net.onnx")
    assert held["0.weight_codes"].dtype == np.int8 and held["3.weight_codes"].dtype == np.int8
    assert not any(array.dtype == np.float32 and array.size >= 72 for array in held.values())
    np.testing.assert_allclose(pared.run(tmp_path / "net.onnx", x.numpy()), small(x).detach(), atol=1e-5)
    # nothing multiplies with them as integers: they are folded when the file is opened
    assert "DequantizeLinear" not in kinds(tmp_path / "net.onnx") and "Cast" in kinds(tmp_path / "net.onnx")


def test_groups_of_four_bits_are_stored_as_half_bytes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64)).eval()
    x = torch.randn(3, 128)
    small = pared.apply(model, None, quantize.Integer(bits=4, group=32, tensors="matrices"))
    written = pared.export(small, tmp_path / "net.onnx", example=x)
    types = {item.name: item.data_type for item in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert onnx.TensorProto.INT4 in types.values()
    assert written.file_bytes < 0.3 * 4 * 128 * 64
    np.testing.assert_allclose(pared.run(tmp_path / "net.onnx", x.numpy()), small(x).detach(), atol=1e-3)


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("settings", [{"bits": 4, "group": 32}, {"bits": 8}, {"bits": 8, "group": "tensor"}], ids=str)
def test_zero_points_of_weights_reach_the_runtime(settings, activations, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64)).eval()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight += layer.weight.std()
    x = torch.randn(3, 2, 6, 6)
    small = pared.apply(model, None, quantize.Integer(tensors="matrices", scheme="affine", **settings))
    if activations:
        data = [(x, torch.zeros(3, dtype=torch.long))]
        small = pared.apply(small, pared.Task(data, data), quantize.Activations())
    pared.export(small, tmp_path / "net.onnx", example=x)
    held = initializers(tmp_path / "net.onnx")
    assert not any(array.dtype == np.float32 and array.size >= 1024 for array in held.values())
    np.testing.assert_allclose(pared.run(tmp_path / "net.onnx", x.numpy()), small(x).detach(), atol=2e-2 if activations else 1e-3)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_groups_in_products_of_three_axes_are_exported_as_they_compute(scheme, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x = torch.randn(3, 5, 64)
    small = pared.apply(model, None, quantize.Integer(bits=4, group=32, tensors="matrices", scheme=scheme))
    pared.export(small, tmp_path / "net.onnx", example=x)
    np.testing.assert_allclose(pared.run(tmp_path / "net.onnx", x.numpy()), small(x).detach(), atol=1e-4)


@pytest.mark.parametrize("kept", ["a", "b"])
def test_layers_that_share_zero_points_may_be_stored_in_different_types(kept, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(a=nn.Linear(64, 64), b=nn.Linear(64, 64))).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.abs_()  # so that all zero points are the least code
    x = torch.rand(8, 64)
    data = [(x, torch.zeros(8, dtype=torch.long))]
    small = pared.apply(model, None, quantize.Integer(bits=4, group=16, tensors="matrices", scheme="affine"))
    small = pared.apply(small, pared.Task(data, data), quantize.Activations(keep=kept))
    pared.export(small, tmp_path / "net.onnx", example=x)
    expected = small(x).detach().numpy()
    assert np.abs(pared.run(tmp_path / "net.onnx", x.numpy()) - expected).max() < 0.02 * np.abs(expected).max()


def test_a_codebook_is_a_table_and_indices(model, tmp_path):
    x = torch.randn(2, 1, 6, 6)
    small = pared.apply(model, None, quantize.Codebook(bits=4))
    pared.export(small, tmp_path / "net.onnx", example=x)
    assert kinds(tmp_path / "net.onnx").count("Gather") >= 2
    assert any(array.dtype == np.uint8 and array.size == 128 * 6 for array in initializers(tmp_path / "net.onnx").values())
    np.testing.assert_allclose(pared.run(tmp_path / "net.onnx", x.numpy()), small(x).detach(), atol=1e-5)


def test_scales_below_zero_do_not_reach_the_file(model):
    small = pared.apply(model, None, quantize.Integer(bits=4, tensors="matrices"))
    for module in lowered(small).modules():
        scale = getattr(module, "scale", None)
        assert scale is None or bool((scale > 0).all())
    assert all(torch.equal(a, b) for a, b in zip(lowered(small)(torch.ones(1, 1, 6, 6)), small(torch.ones(1, 1, 6, 6))))


def test_an_opset_that_lacks_scales_per_channel_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="opset 13 or newer, got 11"):
        pared.export(model, tmp_path / "net.onnx", example=torch.randn(2, 1, 6, 6), opset=11)


def test_the_operators_compute_their_formulas():
    x, scale, zero = torch.tensor([-1.0, -0.26, 0.0, 0.24, 9.0]), torch.tensor(0.5), torch.tensor(2, dtype=torch.uint8)
    assert to_codes(x, scale, zero, 2).tolist() == [0, 1, 2, 2, 3]
    assert through_integers(x, scale, zero, 2).tolist() == [-1.0, -0.5, 0.0, 0.0, 0.5]
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
    assert dequantize(codes, torch.tensor([1.0, 10.0]), axis=0).tolist() == [[1, 2, 3], [40, 50, 60]]
    grouped = dequantize(codes, torch.tensor([[1.0, 10.0], [2.0, 20.0]]), axis=1, group=2)
    assert grouped.tolist() == [[1, 2, 30], [8, 10, 120]]
    assert lookup(torch.tensor([0.5, -1.0]), codes.remainder(2).byte()).tolist() == [[-1.0, 0.5, -1.0], [0.5, -1.0, 0.5]]
