"""On another device: what is fitted there does what is fitted on the processor, and files move between the two.

Where there is no GPU, the processor plays one: see elsewhere.py.
"""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import pared
from pared import quantize, registry
from pared.errors import InputError
from pared.testing import declarations, net

SPEC = importlib.util.spec_from_file_location("elsewhere", Path(__file__).with_name("elsewhere.py"))
PLAYED = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PLAYED)

TECHNIQUES = [cls(**dict(cls.ladder[len(cls.ladder) // 2] if cls.ladder else {})) for cls in map(registry.get, registry.names())]
REPLACING = [technique for technique in TECHNIQUES if declarations.replaces(type(technique))]
REPLACING += [quantize.Integer(bits=4, scheme="affine", rounding=rounding) for rounding in ("learned", "compensated")]


def elsewhere():
    return contextlib.nullcontext() if torch.cuda.is_available() else PLAYED.elsewhere()


def likeness(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(first.flatten().double(), second.flatten().double(), 0))


def test_what_would_fail_on_a_gpu_fails():
    weight, x = torch.randn(3, 4), torch.randn(2, 4)
    with elsewhere():
        there = weight.cuda()
        assert there.is_cuda and there.device.type == "cuda" and not weight.is_cuda and (there @ x.T.cuda()).is_cuda
        assert torch.equal(there.cpu(), weight) and torch.zeros(2, device=there.device).is_cuda
        for wrong in (lambda: x @ there.T, lambda: there + weight, lambda: torch.eye(3) @ there):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="convert cuda"):
            there.numpy()
        assert nn.Linear(4, 3).cuda()(x.to(there)).is_cuda


@pytest.mark.parametrize("technique", REPLACING, ids=str)
def test_it_does_there_what_it_does_here(technique):
    trained = net("convolution")
    try:
        here = pared.apply(trained.copy(), trained.task, technique)
    except InputError as error:  # it has no place in this network
        pytest.skip(str(error))
    with torch.no_grad():
        original, expected = trained.model(trained.inputs), here(trained.inputs)
    with elsewhere(), torch.no_grad():
        there = pared.apply(trained.copy().cuda(), trained.task, technique)
        output = there(trained.inputs.cuda())
        assert output.is_cuda
        found = output.cpu()
    lost, lost_there = 1 - likeness(original, expected), 1 - likeness(original, found)
    assert lost_there < 1.5 * lost + 1e-3, (lost, lost_there)


@pytest.mark.parametrize("ending", ["onnx", "xml"])
def test_a_network_there_is_exported_and_stays_there(ending, tmp_path):
    pytest.importorskip("onnxscript")
    if ending == "xml":
        pytest.importorskip("openvino")
    trained = net("convolution")
    with elsewhere():
        model = trained.copy().cuda()
        pared.export(model, tmp_path / f"net.{ending}", to="openvino" if ending == "xml" else "onnx", example=trained.inputs.cuda())
        assert next(model.parameters()).is_cuda
    with torch.no_grad():
        expected = trained.model(trained.inputs)
    assert likeness(torch.from_numpy(pared.run(tmp_path / f"net.{ending}", trained.inputs.numpy())), expected) > 0.9999


SMALL = {"any_of": [{"quantize.integer": {"bits": [4, 8], "tensors": "matrices"}}], "train": {"epochs": 1}}
GATES = {"prune.l0_channels": {"keep": 0.6}, "train": {"epochs": 1}}
RUNS = {
    "trained": ({"steps": [SMALL]}, {"size": "5x"}),
    "smallest": ("smallest", {"size": "8x", "train": False}),
    "int8": ("int8", {"size": "3x"}),
    "latency": ("int8", {"latency": "1.01x", "train": False}),
    "channels": ({"steps": [{"prune.channels": {"keep": [0.5, 0.7]}, "train": {"epochs": 1}}]}, {"macs": "1.5x"}),
    "gates": ({"steps": [GATES]}, {"macs": "1.2x"}),
    "entropy": ({"steps": [{"quantize.entropy_constrained": {"bits": [2.0]}, "train": {"epochs": 1}}]}, {"size": "5x"}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_there_gives_a_file_for_here(run, tmp_path):
    trained = net("convolution")
    recipe, asked = RUNS[run]
    with elsewhere():
        result = pared.compress(trained.copy().cuda(), trained.task, recipe, out=tmp_path, **asked)
        with torch.no_grad():
            expected = result.model(trained.inputs.cuda()).cpu()
            moved = pared.load(tmp_path / "model.pared").cuda()(trained.inputs.cuda()).cpu()
    with torch.no_grad():
        found = pared.load(tmp_path / "model.pared")(trained.inputs)
    assert likeness(found, expected) > 0.999 and likeness(moved, expected) > 0.999  # a rounded activation may fall elsewhere
    assert result.met or run == "latency", result.data["warnings"]  # whether it is faster, the machine decides
