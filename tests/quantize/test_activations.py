import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pared
from pared import quantize, structure
from pared.errors import InputError
from pared.graph.flow import flow_of
from pared.quantize.activations import Activations, Placement
from pared.statistics import Histogram


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv2(self.act(self.conv1(x))) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(Block(), Block()), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture
def task():
    x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.arange(16) % 3)]
    return pared.Task(batches, batches)


def histogram(values, n=2048):
    low, high = float(values.min()), float(values.max())
    return Histogram(torch.histc(values, n, low, high).double(), low, high, {})


def error(values, grid, bits=8):
    scale, zero_point = grid
    rounded = (((values / scale).round() + zero_point).clamp(0, 2**bits - 1) - zero_point) * scale
    return float((rounded - values).square().mean())


def test_places_are_where_integer_kernels_read_and_write():
    ports = [str(port) for port in Placement(flow_of(Net().eval(), (torch.randn(2, 1, 6, 6),))).ports()]
    assert ports == [
        "input of stem",
        "input of blocks",
        "output of blocks.0.act",
        "output of blocks.0.conv2",
        "output of blocks.0",
        "output of blocks.1.act",
        "output of blocks.1.conv2",
        "input of head",
    ]


def test_a_value_is_rounded_before_it_is_padded():
    class Same(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)

    model = nn.Sequential(Same(1, 2, 2), nn.ReLU(), Same(2, 2, 2))
    ports = Placement(flow_of(model.eval(), (torch.randn(2, 1, 6, 6),))).ports()
    assert [str(port) for port in ports] == ["input of 0", "output of 1", "output of 2"]


@pytest.mark.parametrize("chosen", ["min_max", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_is_exact_and_no_grid_reaches_beyond_what_was_seen(chosen, bits):
    values = torch.randn(20000).relu().clamp(max=6)
    technique = Activations(range=chosen, bits=bits)
    scale, zero_point = technique.grid(histogram(values))
    assert zero_point == 0 and scale * (2**bits - 1) <= float(values.max())
    scale, zero_point = technique.grid(histogram(torch.randn(20000)))
    assert 0 < zero_point < 2**bits - 1


def test_least_squares_beats_the_extremes_where_there_are_outliers():
    values = torch.cat([torch.randn(100000), torch.tensor([30.0, -25.0])])
    seen = histogram(values)
    errors = {name: error(values, Activations(range=name, bits=4).grid(seen), 4) for name in ("min_max", "mse", "percentile")}
    assert errors["mse"] < errors["percentile"] < errors["min_max"]
    brute = min(
        error(values, Activations(bits=4)._between(low, high), 4)
        for low in torch.linspace(-8, -1, 30).tolist()
        for high in torch.linspace(1, 8, 30).tolist()
    )
    assert errors["mse"] < 1.1 * brute


def test_more_bits_never_lose_more(task):
    torch.manual_seed(0)
    model, (x, _) = Net().eval(), task.train[0]
    with torch.no_grad():
        moved = [float((pared.apply(model, task, Activations(bits=b))(x) - model(x)).square().mean()) for b in (8, 6, 4, 2)]
    assert moved == sorted(moved)


def test_gradients_pass_where_nothing_is_clipped(task):
    model = pared.apply(Net().eval(), task, Activations())
    x = task.train[0][0].clone().requires_grad_()
    model.requires_grad_(True)(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any()) and bool(model.stem.weight.grad.any())


def test_quantizing_twice_is_refused(task):
    once = pared.apply(Net().eval(), task, Activations())
    with pytest.raises(InputError, match="no place for it in the network"):
        pared.apply(once, task, Activations())


def test_calibration_data_with_nan_are_named(task):
    x = task.train[0][0].clone()
    x[0, 0, 0, 0] = float("nan")
    spoilt = pared.Task(task.train, task.val, calibration=[*task.train, (x, task.train[0][1])])
    with pytest.raises(InputError, match=r"finite values, but the input of stem has NaN"):
        pared.apply(Net().eval(), spoilt, Activations())


def test_without_data_it_says_what_is_missing():
    with pytest.raises(InputError, match="give a task"):
        pared.apply(Net().eval(), None, Activations())


def test_the_whole_network_runs_on_integers_in_onnxruntime(task, tmp_path):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    body = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 3))
    steps = [structure.FoldBatchNorm(), quantize.Integer(tensors="matrices", rounding="compensated"), Activations()]
    small = pared.apply(model.eval(), task, steps)
    pared.export(small, tmp_path / "net.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 4
    ort.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2 and kinds.count("QGemm") == 1
    assert "Conv" not in kinds and "Gemm" not in kinds
