import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pared
from pared import quantize, structure
from pared.budget.observe import observe
from pared.errors import InputError
from pared.graph.flow import flow_of
from pared.lowered import dequantize, through_integers
from pared.lowered import quantize as to_integers
from pared.place import place_everywhere, relax_network_
from pared.quantize.activations import Activations, Placement, Rounding
from pared.site import duplicate
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
        "output of blocks",
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


def test_pools_and_additions_before_a_mean_work_on_integers(task, tmp_path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.act, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
            self.again = nn.MaxPool2d(2, 1)
            self.block = Block()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.block(self.again(self.pool(self.act(self.stem(x))))).mean((2, 3)))

    torch.manual_seed(0)
    small = pared.apply(Pooled().eval(), task, [quantize.Integer(tensors="matrices"), Activations()])
    assert small.act.output_scale == small.pool.output_scale == small.again.output_scale
    coarse = pared.apply(Pooled().eval(), task, Activations(bits=3))
    assert coarse.act.output_scale == coarse.pool.output_scale == coarse.again.output_scale
    pared.export(small, tmp_path / "net.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 4
    ort.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert not {"MaxPool", "Add", "Relu", "Conv"} & set(kinds), kinds


def test_for_few_bits_only_what_products_read_is_rounded():
    flow = flow_of(Net().eval(), (torch.randn(2, 1, 6, 6),))
    read = [str(port) for port in Placement(flow, only_read=True).ports()]
    first, second = ("input of blocks.0.conv2", "input of blocks.1.conv2")
    alike = {"output of blocks.0.act": first, "output of blocks.1.act": second}  # the same values
    assert [alike.get(port, port) for port in read] == [
        "input of stem", "input of blocks", first, "output of blocks.0", second, "input of head",
    ]  # fmt: skip
    assert "input of stem" not in [str(port) for port in Placement(flow, ("stem",), only_read=True).ports()]


@pytest.mark.parametrize("bits, zero", [(2, 0), (4, 5)])
def test_slopes_of_learned_steps_are_those_of_the_paper(bits, zero):
    x = (2 * torch.randn(6, 10)).requires_grad_()
    scale, zero_point, gradient = torch.tensor(0.4, requires_grad=True), torch.tensor(zero, dtype=torch.uint8), torch.randn(6, 10)
    y = through_integers(x, scale, zero_point, bits)
    codes = to_integers(x.detach(), scale.detach(), zero_point, bits)
    assert torch.equal(y, dequantize(codes, scale.detach(), zero_point, bits=bits))
    (y * gradient).sum().backward()
    top, summed = 2**bits - 1, 0.0
    for value, g, slope in zip(x.flatten().tolist(), gradient.flatten().tolist(), x.grad.flatten().tolist(), strict=True):
        at = value / 0.4
        inside = -zero <= at <= top - zero
        assert slope == pytest.approx(g if inside else 0.0)
        summed += g * (round(at) - at if inside else -zero if at < -zero else top - zero)
    assert float(scale.grad) == pytest.approx(summed / (10 * top) ** 0.5, rel=1e-4)


def test_steps_that_are_twice_too_coarse_are_trained_back_and_leave_a_network_as_build_makes_it(task):
    model, technique = Net().eval(), Activations(bits=3, steps="learned")
    fitted = duplicate(model)
    place_everywhere(fitted, technique, observe(model, task, [technique]))
    edit = relax_network_(model, technique, observe(model, task, [technique]))
    x = task.train[0][0]
    assert torch.equal(model(x), fitted(x))  # at first they are those of the calibration data
    wanted = Net().eval()
    wanted.load_state_dict({name: value for name, value in model.state_dict().items() if name in wanted.state_dict()})
    for name, scale in model.named_buffers():
        scale.mul_(2.5 if name.endswith("_scale") else 1)
    trained = [p for name, p in model.named_parameters() if name.endswith("_stretch")]
    assert len(trained) == len(edit.structure.places)
    optimiser = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (model(x) - wanted(x)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    expected = model(x)
    technique.settle(model)
    assert not any(name.endswith("_stretch") for name, _ in model.named_parameters())
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert model.state_dict().keys() == fitted.state_dict().keys()
    assert Rounding("input", 3)(model.stem, x).unique().numel() <= 8


def test_two_of_them_give_different_layers_different_bits(task, tmp_path):
    torch.manual_seed(0)
    ends, middle = Activations(bits=8, places="products", keep="blocks"), Activations(bits=3, places="products", keep="stem,head")
    model = pared.apply(Net().eval(), task, [quantize.Integer(bits=8), ends, middle])
    seen = {}
    for path in ("stem", "blocks.0.conv2", "blocks.1.conv1", "head"):
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda _, args, __, path=path: seen.update({path: args[0].unique().numel()}))
    x = task.train[0][0]
    expected = model(x)
    assert seen["stem"] > 100 and seen["head"] > 30
    assert 2 < seen["blocks.0.conv2"] <= 8 and 2 < seen["blocks.1.conv1"] <= 8
    pared.save(model, tmp_path / "net.pared")
    assert torch.equal(pared.load(tmp_path / "net.pared")(x), expected)
    with pytest.raises(InputError, match="must come last"):
        pared.apply(Net().eval(), task, [ends, quantize.Integer(bits=8)])


class Attending(nn.Module):
    """Normalised after each sum, so that what the linear layers read is also added."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.norm, self.wide, self.narrow, self.head = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 4
        x = self.norm(x + scores.softmax(-1) @ self.value(x))
        return self.head((x + self.narrow(F.gelu(self.wide(x)))).mean(1))


@pytest.fixture
def sequences():
    x = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(0))
    return pared.Task([(x, torch.arange(8) % 3)], [(x, torch.arange(8) % 3)])


@pytest.mark.parametrize("bits", [4, 8])
def test_every_token_is_rounded_in_units_of_its_own_largest_magnitude(sequences, bits):
    torch.manual_seed(0)
    model = pared.apply(Attending().eval(), sequences, Activations(range="per_token", bits=bits))
    read = {}
    for path in ("query", "wide"):
        model.get_submodule(path).register_forward_hook(lambda _, args, __, path=path: read.update({path: args[0]}))
    x = sequences.train[0][0].clone()
    x[0, 0, 0] = 1000.0  # one outlier costs no other token anything
    x[0, 1] = 0.0
    with torch.no_grad():
        model(x)
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert torch.allclose(read["query"], (x / scale.clamp_min(1e-12)).round() * scale, rtol=1e-5, atol=1e-7)
    assert read["wide"][1, 0].unique().numel() <= 2**bits - 1


def test_only_what_linear_layers_read_is_rounded_per_token(sequences):
    model = Attending().eval()
    ports = Placement(flow_of(model, (sequences.train[0][0],))).readers()
    assert [str(port) for port in ports] == [f"input of {name}" for name in ("query", "key", "value", "wide", "narrow", "head")]
    with pytest.raises(InputError, match="there is no linear layer in it"):
        pared.apply(nn.Sequential(nn.Conv2d(1, 2, 3)), None, Activations(range="per_token"))
    with pytest.raises(ValueError, match="per_token gives any scales"):
        Activations(range="per_token", powers_of_two=True)
    with pytest.raises(ValueError, match="range: per_token is for what linear layers read; leave places: products out"):
        Activations(range="per_token", places="products")
    with pytest.raises(ValueError, match="percentile: 99 is of range: percentile, got range: mse"):
        Activations(percentile=99)


def test_tokens_in_their_own_units_are_multiplied_as_integers_in_onnxruntime(sequences, tmp_path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    steps = [quantize.Integer(tensors="matrices"), Activations(range="per_token")]
    small = pared.apply(Attending().eval(), sequences, steps)
    x = sequences.train[0][0]
    written = pared.export(small, tmp_path / "net.onnx")
    assert written.rounds and written.dynamic
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 4
    ort.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in nodes) == 6
    pared.save(small, tmp_path / "net.pared")
    assert torch.equal(pared.load(tmp_path / "net.pared")(x), small(x))


def test_what_the_network_returns_is_not_rounded_per_token(sequences):
    class Both(Attending):
        def forward(self, x):
            x = self.norm(x)
            return self.head(x), x

    model, x = Both().eval(), sequences.train[0][0]
    task = pared.Task(sequences.train, sequences.val, loss=lambda o, b: o[0].mean(), metric=lambda o, b: o[0].mean(-1).mean(-1))
    rounded = pared.apply(model, task, Activations(range="per_token", bits=4))
    assert torch.equal(rounded(x)[1], model(x)[1]) and not torch.equal(rounded(x)[0], model(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_of_zeros_stay_zeros_in_short_floats(dtype):
    layer, x = nn.Linear(4, 4).to(dtype), torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    layer.register_buffer("input_scale", torch.tensor(1 / 127))
    layer.register_buffer("input_zero_point", torch.tensor(128, dtype=torch.uint8))
    y = Rounding("input", 8, per_token=True)(layer, x)
    y.sum().backward()
    assert y.dtype == dtype and torch.equal(y, torch.zeros_like(y)) and bool(x.grad.isfinite().all())


def test_other_factors_than_the_largest_magnitude_stay_before_the_product_in_onnx(sequences, tmp_path):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.c(self.a(x) * self.g(x).clamp(0, 6)).mean(1)

    torch.manual_seed(0)
    small = pared.apply(Gated().eval(), sequences, [quantize.Integer(tensors="matrices"), Activations(keep="c")])
    assert pared.export(small, tmp_path / "net.onnx").rounds
