"""Fixed point against brute force, and the network in integers alone against the simulation in floats, bit for bit."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import Task, quantize, sources, structure
from pared.errors import ExportError, RecipeError
from pared.quantize.fixed_point import FixedPoint
from pared.recipe import load
from pared.runtimes.fixed_point import Fixed, _dequantize, _linear, compute, exact, rounded
from pared.site import Site
from pared.statistics import Curvature, Diagonal, Statistics


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def solved(technique: FixedPoint, weight: Tensor, statistics: Statistics | None = None) -> nn.Module:
    return technique.solve(site_of(weight), statistics or Statistics())[1]


@pytest.mark.parametrize("bits", [3, 8, 12])
@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
def test_no_other_number_of_fraction_bits_has_less_error(bits: int, size: float) -> None:
    weight = size * torch.randn(4, 50)
    parts = solved(FixedPoint(bits=bits, group="channel"), weight)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row, coded in zip(weight, parts(), strict=True):
        errors = [float((row - (row * 2.0**f).round().clamp(low, high) * 2.0**-f).square().sum()) for f in range(-12, 40)]
        assert float((row - coded).square().sum()) == pytest.approx(min(errors), rel=1e-4)


def test_weights_are_integers_times_a_power_of_two_exactly() -> None:
    parts = solved(FixedPoint(bits=10), torch.randn(20, 30))
    fraction = int(parts.fraction)
    assert all(Fraction(value) * 2**fraction == int(code) for value, code in zip(parts().flatten().tolist(), parts.codes.flatten()))


def test_curvature_decides_whether_the_largest_weight_is_clipped() -> None:
    weight = torch.cat([0.1 * torch.randn(1, 99), torch.tensor([[1.0]])], 1)
    h = torch.full_like(weight, 1.0)
    h[0, -1] = 1e-6
    plain, weighted = (solved(FixedPoint(bits=4), weight, Statistics(found)) for found in (
        {}, {"weight": Curvature(weight.shape, [Diagonal(h)])},
    ))  # fmt: skip
    assert int(weighted.fraction) > int(plain.fraction)


def test_rounding_by_shifts_is_rounding_to_the_nearest_and_halves_to_even() -> None:
    numbers = np.arange(-4000, 4000, dtype=np.int64)
    for bits in (1, 2, 5):
        assert rounded(numbers, bits).tolist() == [round(Fraction(int(n), 2**bits)) for n in numbers]
    assert rounded(numbers, -3).tolist() == (8 * numbers).tolist()


def test_floats_become_integers_without_loss() -> None:
    value = torch.tensor([0.0, 0.75, -3.0, 2.0**-20, 1024.0])
    fixed = exact(value)
    assert fixed.fraction == 20 and fixed.numbers().tolist() == value.tolist()
    assert exact(torch.zeros(3)).integers.tolist() == [0, 0, 0]
    with pytest.raises(ExportError, match="grid of at most 62 bits"):
        exact(torch.tensor([1e-30, 1e30]))


class LeNet5(nn.Sequential):
    """In the shapes of examples/lenet.py."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def large_digits() -> Task:
    """scikit-learn's digits at 28 x 28."""
    small = sources.data("digits").task
    train, val = ([(F.interpolate(x.reshape(-1, 1, 8, 8), size=28), y) for x, y in part] for part in (small.train, small.val))
    return Task(train, val)


@pytest.fixture(scope="module")
def lenet(large_digits: Task) -> nn.Module:
    torch.manual_seed(0)
    model = LeNet5()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        for x, y in large_digits.train:
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    return model.eval()


@pytest.mark.parametrize("bits, scheme", [(8, "affine"), (8, "symmetric"), (5, "affine")])
def test_lenet_5_in_integers_alone_is_the_simulation_bit_for_bit(
    lenet: nn.Module, large_digits: Task, bits: int, scheme: str
) -> None:
    values = quantize.Activations(bits=bits, scheme=scheme, powers_of_two=True)
    small = pared.apply(lenet, large_digits, [FixedPoint(bits=bits, group="channel"), values])
    x, y = next(iter(large_digits.val))
    with torch.no_grad():
        expected = small(x)
    got = compute(small, x)
    assert got.integers.dtype == np.int64
    assert np.array_equal(got.numbers(), expected.double().numpy())
    if bits == 8:
        before = float((lenet(x).argmax(1) == y).float().mean())
        assert before > 0.8
        assert float((torch.as_tensor(got.integers).argmax(1) == y).float().mean()) > before - 0.02
    row = small[7].parametrizations.weight[0].decoder.codes[3]
    row[row.abs().argmax()] = 0
    assert not np.array_equal(compute(small, x).integers, got.integers)


class Residual(nn.Module):
    """Padding, strides, groups, an addition, a batch norm to fold, a pooling that overlaps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.body, self.pool = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(8 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        return self.head(self.pool(F.relu(self.body(x) + x)).flatten(1))


def test_a_residual_network_in_integers_alone_is_the_simulation_bit_for_bit(large_digits: Task) -> None:
    torch.manual_seed(0)
    model = Residual()
    model(next(iter(large_digits.train))[0])
    steps = [structure.FoldBatchNorm(), FixedPoint(bits=6), quantize.Activations(bits=7, powers_of_two=True)]
    small = pared.apply(model.eval(), large_digits, steps)
    x, _ = next(iter(large_digits.val))
    with torch.no_grad():
        assert np.array_equal(compute(small, x).numbers(), small(x).double().numpy())


def test_what_integers_cannot_do_is_named(large_digits: Task) -> None:
    x, _ = next(iter(large_digits.val))
    model = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Sigmoid(), nn.Flatten(), nn.Linear(1152, 10)).eval()
    fixed, any_scales = FixedPoint(), quantize.Activations()
    with pytest.raises(ExportError, match="fixed point has no operator sigmoid"):
        compute(pared.apply(model, large_digits, [fixed, quantize.Activations(powers_of_two=True)]), x)
    with pytest.raises(ExportError, match="scales must be powers of two in fixed point, found"):
        compute(pared.apply(model, large_digits, [fixed, any_scales]), x)
    told = r"quantize.activations: steps: learned gives any scales; leave it or powers_of_two out"
    with pytest.raises(RecipeError, match=told):
        load({"steps": [{"quantize.activations": {"steps": "learned", "powers_of_two": True}}]})


def test_bad_settings_are_told_in_one_line() -> None:
    with pytest.raises(RecipeError, match=r"quantize.fixed_point.bits must be an int in \[2, 16\], got 17 \(recipe, step 1\)"):
        load({"steps": [{"quantize.fixed_point": {"bits": 17}}]})


def test_a_file_with_codes_out_of_range_is_refused() -> None:
    parts = solved(FixedPoint(bits=4), torch.randn(8, 8))
    parts.check()
    parts.codes[0, 0] = 8
    with pytest.raises(ValueError, match=r"codes must lie in \[-8, 7\]"):
        parts.check()


def test_integers_that_grow_too_large_are_named():
    assert rounded(np.array([5, -5]), 122).tolist() == [0, 0]
    for work in (
        lambda: rounded(np.array([3]), -63),
        lambda: _linear(Fixed(np.full((1, 4), 2**40), 0), Fixed(np.full((2, 4), 2**30), 0)),
        lambda: _dequantize(Fixed(np.array([[100], [50]]), 0), torch.tensor([2.0**-8, 2.0**-80]), None, 0, 0, 8),
    ):
        with pytest.raises(ExportError, match="below 62 bits"):
            work()
    same = _dequantize(Fixed(np.array([[100], [50]]), 0), torch.tensor([2.0**-8, 2.0**-10]), None, 0, 0, 8)
    assert same.numbers().ravel().tolist() == [100 / 256, 50 / 1024]
