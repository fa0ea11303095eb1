"""OpenVINO's two files: what they compute, how large they are, what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import prune, quantize
from pared.errors import InputError
from pared.runtimes import export, run

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

STEPS = {
    "float": [],
    "int8": [quantize.Integer(bits=8, tensors="matrices")],
    "affine": [quantize.Integer(bits=8, tensors="matrices", scheme="affine")],
    "int4 groups": [quantize.Integer(bits=4, group=32, tensors="matrices")],
    "activations": [quantize.Integer(bits=8, tensors="matrices"), quantize.Activations()],
    "per token": [quantize.Integer(bits=8, tensors="matrices"), quantize.Activations(range="per_token")],
    "channels": [prune.Channels(keep=0.5, importance="l2")],
    "codebook": [quantize.Codebook(bits=4)],
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 5)).eval()


@pytest.mark.parametrize("way", STEPS)
def test_the_two_files_give_the_model_s_outputs_for_any_batch(model, way, tmp_path):
    data = [(torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.long))]
    small = model
    for technique in STEPS[way]:
        small = pared.apply(small, pared.Task(data, data), technique)
    written = export(small, tmp_path / "net.xml", to="openvino", example=data[0][0][:2])
    assert written.file_bytes == sum((tmp_path / f"net.{end}").stat().st_size for end in ("xml", "bin"))
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = small(x).numpy()
    found = run(tmp_path / "net.xml", x.numpy())
    size = np.abs(expected).max()
    assert np.abs(found - expected).max() < (0.05 if way in ("activations", "per token") else 1e-3) * size
    if way in ("int8", "affine", "activations"):
        dense = export(model, tmp_path / "dense.xml", to="openvino", example=data[0][0][:2]).file_bytes
        assert written.file_bytes < 0.4 * dense


def test_files_of_openvino_end_in_xml(model, tmp_path):
    with pytest.raises(InputError, match="called NAME.xml and NAME.bin, got net.onnx; end the name in .xml"):
        export(model, tmp_path / "net.onnx", to="openvino", example=torch.randn(1, 3, 8, 8))
