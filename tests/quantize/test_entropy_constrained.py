"""Entropy-constrained quantization against the coder, and its gradients against differences counted one by one."""

import math

import pytest
import torch
from torch import Tensor, nn

from pared import store
from pared.quantize.entropy_constrained import EntropyConstrained, Priced
from pared.site import Site
from pared.statistics import Statistics


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def relaxed(weight: Tensor, bits: float) -> Priced:
    site = site_of(weight)
    technique = EntropyConstrained(bits=bits)
    return technique.relax(site, technique.decide(site, Statistics()), Statistics())


def uneven(rows: int = 96, columns: int = 160) -> Tensor:
    """A matrix whose rows and columns differ much in size."""
    return torch.randn(rows, columns) * torch.exp(0.5 * torch.randn(rows, 1) + 0.5 * torch.randn(1, columns))


@pytest.mark.parametrize("bits", [0.3, 1.0, 4.0])
def test_the_step_is_the_finest_that_fits_into_the_bits(bits: float) -> None:
    weight = uneven()
    _, parts = EntropyConstrained(bits=bits).solve(site_of(weight), Statistics())
    coded = 8 * len(store.encode(parts.codes.numpy())[1])
    assert 0.97 * bits * weight.numel() < coded <= 1.01 * bits * weight.numel() + 128
    finer = torch.round(weight / (0.97 * parts.step.detach())).to(torch.int16)
    assert store.estimate_bits(finer.numpy()) > bits * weight.numel()


def test_weights_are_the_nearest_multiples_of_the_step() -> None:
    weight = torch.randn(20, 30)
    _, parts = EntropyConstrained(bits=3).solve(site_of(weight), Statistics())
    assert (parts() - weight).abs().max().item() <= 0.501 * parts.step.item()
    assert torch.equal(parts(), parts.codes.float() * parts.step)


def test_a_tensor_of_zeros_stays_one() -> None:
    _, parts = EntropyConstrained(bits=1).solve(site_of(torch.zeros(8, 8)), Statistics())
    assert not parts().any()


@pytest.mark.parametrize("bits", [0.25, 1.0, 3.0])
def test_bits_counted_in_training_are_near_those_of_the_file(bits: float) -> None:
    weight = uneven(300, 400)
    stand_in = relaxed(weight, bits)
    coded = 8 * len(store.encode(stand_in.settle().codes.numpy())[1])
    assert stand_in.coded_bits().item() == pytest.approx(coded, rel=0.03)


def test_the_slope_of_the_bits_is_what_the_next_code_costs() -> None:
    stand_in = relaxed(uneven(12, 20), 1.0)
    before = stand_in.coded_bits()
    (slope,) = torch.autograd.grad(before, stand_in.weight)
    step = stand_in.step().detach()
    for row, column in ((0, 0), (3, 7), (11, 19)):
        value = float(stand_in.weight.detach()[row, column] / step)
        low, high = math.floor(abs(value)), math.floor(abs(value)) + 1
        cost = []
        for code in (low, high):
            with torch.no_grad():
                kept = stand_in.weight[row, column].clone()
                stand_in.weight[row, column] = math.copysign(code, value) * step
                cost.append(stand_in.coded_bits().item())
                stand_in.weight[row, column] = kept
        assert float(slope[row, column] * step) == pytest.approx(math.copysign(cost[1] - cost[0], value), abs=0.02)


def test_gradients_pass_straight_through_and_reach_the_step_as_in_lsq() -> None:
    stand_in = relaxed(torch.randn(16, 16), 2.0)
    gradient = torch.randn(16, 16)
    (stand_in() * gradient).sum().backward()
    scaled = stand_in.weight.detach() / stand_in.step().detach()
    assert torch.allclose(stand_in.weight.grad, gradient * stand_in.scale)
    expected = float((gradient * (scaled.round() - scaled)).sum() * stand_in.step().detach() * stand_in.scale)
    assert float(stand_in.stretch.grad) == pytest.approx(expected, rel=1e-4)


def test_training_starts_fine_and_its_aim_comes_down_to_the_bits_asked_for() -> None:
    stand_in = relaxed(torch.randn(64, 64), 0.5)
    coarse = stand_in.step().item()
    stand_in.anneal(0.0)
    assert stand_in.step().item() < coarse / 2
    aims = []
    for progress in (0.0, 0.5, 1.0):
        stand_in.anneal(progress)
        aims.append(stand_in.aim_bits / 4096)
    assert aims == pytest.approx([3.0, math.sqrt(3 * 0.5), 0.5])
