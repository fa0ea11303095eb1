"""Ternary codes against brute force and closed forms; slopes of learned scales against differences."""

import math

import pytest
import torch
from torch import Tensor, nn

from pared import Task, store
from pared.budget.observe import observe
from pared.errors import RecipeError
from pared.place import everywhere, relax_, settle_
from pared.quantize.ternary import Scaled, Ternary
from pared.recipe import load
from pared.site import Site
from pared.statistics import Curvature, Diagonal, Statistics
from pared.testing import net
from pared.train import train


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def solved(technique: Ternary, weight: Tensor, statistics: Statistics | None = None) -> nn.Module:
    return technique.solve(site_of(weight), statistics or Statistics())[1].requires_grad_(False)


def relaxed(technique: Ternary, weight: Tensor) -> Scaled:
    site = site_of(weight)
    return technique.relax(site, technique.decide(site, Statistics()), Statistics())


@pytest.mark.parametrize("group", ["channel", "tensor"])
def test_codes_and_scale_are_those_of_the_paper(group: str) -> None:
    weight = torch.randn(5, 3, 3, 3)
    parts = solved(Ternary(group=group), weight)
    for row, coded in zip(weight, parts(), strict=True):
        among = row if group == "channel" else weight
        kept = among.abs() > 0.7 * among.abs().mean()
        scale = among.abs()[kept].mean().half().float()
        expected = torch.where(row.abs() > 0.7 * among.abs().mean(), row.sign() * scale, torch.zeros(()))
        assert torch.allclose(coded, expected, rtol=2e-3)


def test_the_threshold_is_near_the_best_for_gaussian_weights() -> None:
    weight = torch.randn(1, 50000)
    error = {t / 20: float((weight - solved(Ternary(threshold=t / 20), weight)()).square().mean()) for t in range(31)}
    assert error[0.7] < 1.02 * min(error.values())
    assert error[0.7] == pytest.approx(0.19, abs=0.01)  # a three-level quantizer of a normal variable (Max 1960)


def test_the_scale_is_the_least_squares_of_the_curvature() -> None:
    weight, h = torch.randn(3, 40), torch.rand(3, 40) ** 4
    parts = solved(Ternary(), weight, Statistics({"weight": Curvature(weight.shape, [Diagonal(h)])}))
    for row in range(3):
        used = parts.codes[0, row] != 0
        best = float((h[row] * weight[row].abs())[used].sum() / h[row][used].sum())
        assert float(parts.scale[0, 0, row]) == pytest.approx(best, rel=0.02)


def test_a_further_term_takes_most_of_what_is_left() -> None:
    weight = torch.randn(4, 20000)
    left = [float((weight - solved(Ternary(terms=n), weight)()).square().mean()) for n in (1, 2, 3)]
    assert left[1] < 0.3 * left[0] and left[2] < 0.5 * left[1]


@pytest.mark.parametrize("threshold", [0.7, 1.5])
def test_codes_take_their_entropy_in_the_file(threshold: float) -> None:
    parts = solved(Ternary(threshold=threshold), torch.randn(64, 500))
    shares = torch.bincount(parts.codes.flatten().long() + 1) / parts.codes.numel()
    entropy = float(-(shares * shares.log2()).sum())
    coded = 8 * len(store.encode(parts.codes.numpy())[1]) / parts.codes.numel()
    assert coded == pytest.approx(entropy, rel=0.02)
    assert coded <= math.log2(3) * 1.01 and (threshold == 0.7 or coded < 1.2)


def test_slopes_of_learned_scales_are_sums_over_the_weights_that_share_them() -> None:
    stand_in = relaxed(Ternary(scales="learned"), torch.randn(4, 30))
    gradient = torch.randn(4, 30)
    (stand_in() * gradient).sum().backward()
    assert torch.equal(stand_in.weight.grad, gradient)
    codes, scale = stand_in.parts.codes[0], stand_in.scale().detach()
    for side, sign in ((0, 1), (1, -1)):
        expected = sign * (gradient * (codes == sign)).sum(1) * scale[0, side]
        assert torch.allclose(stand_in.stretch.grad[0, side], expected, rtol=1e-3, atol=1e-4)


def test_learned_scales_find_what_the_data_want() -> None:
    """Weights of which the positive ones should be twice as large as they are."""
    weight = torch.randn(4, 200)
    wanted = torch.where(weight > 0, 2 * weight, weight)
    stand_in = relaxed(Ternary(scales="learned"), weight)
    stand_in.weight.requires_grad_(False)
    optimiser = torch.optim.Adam([stand_in.stretch], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (stand_in() - wanted).square().sum().backward()
        optimiser.step()
    parts = stand_in.settle()
    for row in range(4):
        used = parts.codes[0, row] > 0
        assert float(parts.scale[0, 0, row]) == pytest.approx(float(wanted[row][used].mean()), rel=0.02)
        assert float(parts.scale[0, 1, row]) == pytest.approx(-float(weight[row][parts.codes[0, row] < 0].mean()), rel=0.02)
    assert torch.equal(parts(), stand_in())


def accuracy(model: nn.Module, task: Task) -> float:
    return float(torch.cat([(model(x).argmax(1) == y).float() for x, y in task.val]).mean())


@pytest.mark.parametrize("scales", ["fitted", "learned"])
def test_training_wins_back_what_ternary_weights_lose(scales: str) -> None:
    trained = net("perceptron")
    model, task = trained.copy(), trained.task
    technique = Ternary(scales=scales, threshold=1.2)
    statistics = observe(model, task, [technique])
    options, _ = everywhere(model, technique, statistics)
    relax_(model, options, statistics)
    at_first = accuracy(model.eval(), task)
    train(model, task, epochs=12, learning_rate=0.003, ema=None)
    settle_(model, options, statistics)
    now, then = accuracy(model.eval(), task), accuracy(trained.model, task)
    assert at_first < then - 0.1 and now > then - 0.04, (then, at_first, now)


def test_bad_settings_are_told_in_one_line() -> None:
    with pytest.raises(
        RecipeError, match=r'quantize.ternary.scales must be "fitted" or "learned", got \'both\' \(recipe, step 1\)'
    ):
        load({"steps": [{"quantize.ternary": {"scales": "both"}}]})


@pytest.mark.parametrize("code", [-128, -2, 2])
def test_codes_of_a_damaged_file_are_refused(code):
    site = Site.of(nn.Linear(8, 8), "weight")
    decoder = Ternary().build(site, Ternary().decide(site, Statistics()))
    decoder.check()
    decoder.codes[0, 0, 0] = code
    with pytest.raises(ValueError, match="codes must be -1, 0 or 1"):
        decoder.check()


def test_a_large_weight_among_zeros_is_stored_as_a_number():
    layer = nn.Linear(8, 2, bias=False)
    layer.weight.data.zero_()[0, 3] = 2e5
    site = Site.of(layer, "weight")
    decoder = Ternary().build(site, Ternary().decide(site, Statistics()))
    Ternary().fit(site, decoder, Statistics())
    torch.testing.assert_close(decoder(), layer.weight.data)


def test_a_sign_without_weights_starts_where_the_other_is():
    layer = nn.Linear(8, 2, bias=False)
    layer.weight.data.abs_()
    site, technique = Site.of(layer, "weight"), Ternary(scales="learned", group="tensor")
    decoder = technique.build(site, technique.decide(site, Statistics()))
    technique.fit(site, decoder, Statistics())
    assert decoder.scale[0, 1, 0] == decoder.scale[0, 0, 0] > 0
