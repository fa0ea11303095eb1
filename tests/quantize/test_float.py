"""Short floats against all numbers that a format has."""

import math

import pytest
import torch
from torch import Tensor, nn

from pared.errors import RecipeError
from pared.quantize.float import FORMATS, Float
from pared.recipe import load
from pared.site import Site
from pared.statistics import Statistics

MANTISSA = {"float16": 10, "bfloat16": 7, "float8_e4m3": 3, "float8_e5m2": 2}


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def solved(technique: Float, weight: Tensor) -> nn.Module:
    return technique.solve(site_of(weight), Statistics())[1]


def numbers(name: str) -> Tensor:
    """Every finite number of a format."""
    form = FORMATS[name]
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16) if form.itemsize == 2 else torch.arange(256, dtype=torch.uint8)
    value = codes.view(form).double()
    return value[value.isfinite()].unique()


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_of_the_format_comes_back_as_it_is(name: str) -> None:
    value = numbers(name).float()
    assert torch.equal(
        solved(Float(format=name), value[: len(value) // 8 * 8].reshape(8, -1))(), value[: len(value) // 8 * 8].reshape(8, -1)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_weights_become_the_nearest_number_of_the_format(name: str) -> None:
    weight, every = torch.randn(20, 30), numbers(name)
    nearest = (weight.double().flatten()[:, None] - every).abs().amin(1) if len(every) < 1000 else None
    error = (solved(Float(format=name), weight)().double() - weight.double()).abs().flatten()
    if nearest is None:
        after = torch.searchsorted(every, weight.double().flatten())
        nearest = torch.minimum(
            (every[after] - weight.double().flatten()).abs(), (every[after - 1] - weight.double().flatten()).abs()
        )
    assert torch.equal(error, nearest)


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("group", ["tensor", "channel"])
def test_scaled_weights_keep_their_relative_precision(name: str, group: str) -> None:
    weight = (1 + torch.rand(6, 50)) * torch.randn(6, 50).sign()  # within a factor of two of the largest
    weight = weight * (10.0 ** torch.arange(-6, 6, 2))[:, None] if group == "channel" else 1e-7 * weight
    parts = solved(Float(format=name, group=group), weight)
    error = ((parts() - weight).abs() / weight.abs()).max().item()
    assert error <= 2.0 ** -(MANTISSA[name] + 1) * 1.001
    largest = weight.abs().amax(1) if group == "channel" else weight.abs().max()[None]
    wanted = [math.ceil(math.log2(value / torch.finfo(FORMATS[name]).max)) for value in largest.tolist()]
    assert parts.exponent.tolist() == wanted


def test_without_a_scale_small_weights_are_lost_in_eight_bits() -> None:
    weight = 1e-3 * torch.randn(30, 30)
    lost, kept = (
        float((solved(Float(format="float8_e4m3", group=group), weight)() - weight).square().mean() / weight.square().mean())
        for group in ("none", "channel")
    )
    assert lost > 0.2 and kept < 0.002


def test_weights_beyond_the_range_are_refused_or_scaled() -> None:
    weight = torch.full((8, 8), 1e6)
    told = Float(format="float16").refuse(site_of(weight))
    assert told is not None and "beyond float16's largest number, 65504; give it a scale" in told
    assert Float(format="bfloat16").refuse(site_of(weight)) is None
    assert Float(format="float16", group="tensor").refuse(site_of(weight)) is None
    assert torch.allclose(solved(Float(format="float16", group="tensor"), weight)(), weight, rtol=1e-3)


def test_what_is_as_short_already_is_refused() -> None:
    assert "would not be smaller" in str(Float(format="bfloat16").refuse(site_of(torch.randn(8, 8).half())))
    assert Float(format="float8_e5m2").refuse(site_of(torch.randn(8, 8).half())) is None


def test_bad_settings_are_told_in_one_line() -> None:
    told = r'quantize.float.format must be "float16", "bfloat16", "float8_e4m3" or "float8_e5m2", got \'fp8\' \(recipe, step 1\)'
    with pytest.raises(RecipeError, match=told):
        load({"steps": [{"quantize.float": {"format": "fp8"}}]})


def test_what_is_no_number_is_refused():
    site, technique = Site.of(nn.Linear(8, 8), "weight"), Float(format="float8_e4m3", group="channel")
    decoder = technique.build(site, technique.decide(site, Statistics()))
    technique.fit(site, decoder, Statistics())
    decoder.check()
    decoder.exponent[0] = -128
    with pytest.raises(ValueError, match="exponents must lie within"):
        decoder.check()
    decoder.exponent[0] = 0
    decoder.codes[0, 0] = 0x7F
    with pytest.raises(ValueError, match="finite"):
        decoder.check()
