"""Single layers written as ONNX files compute what torch computes."""

import pytest
import torch
from torch import nn

from pared.errors import ExportError
from pared.runtimes import layer_session
from pared.runtimes.layer import write

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

CASES = [
    (nn.Linear(5, 3), (2, 5)),
    (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    (nn.Conv2d(3, 4, 3, stride=2, padding=(1, 0), dilation=2, bias=False), (2, 3, 9, 9)),
    (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 7, 7)),
    (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=[str(layer) for layer, _ in CASES])
def test_a_written_layer_computes_the_same(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (found,) = layer_session(layer, x, "onnxruntime", threads=1)()
    with torch.no_grad():
        assert torch.allclose(torch.as_tensor(found), layer(x), rtol=1e-4, atol=1e-5)


def test_torch_runs_the_layer_itself():
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    assert torch.equal(layer_session(layer, x, "torch")(), layer(x).detach())


def test_what_is_no_such_layer_is_refused(tmp_path):
    with pytest.raises(ExportError, match="must be a convolution with padding in numbers or linear"):
        write(nn.ReLU(), torch.zeros(1, 2), tmp_path / "layer.onnx")
