"""Half-quadratic offsets against min-max and against brute force, on the weights of trained networks."""

import pytest
import torch
from torch import Tensor, nn

from pared import InputError, apply
from pared.errors import RecipeError
from pared.quantize.hqq import Hqq
from pared.recipe import load
from pared.site import Site
from pared.statistics import Statistics
from pared.testing import net

NORM = 0.7


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def decoded(weight: Tensor, **settings: object) -> Tensor:
    return Hqq(**settings).solve(site_of(weight), Statistics())[1]().detach()


def min_max(weight: Tensor, bits: int, group: int) -> Tensor:
    """Each group from its smallest to its largest weight, in as many levels as there are."""
    found = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group]
            scale = (values.max() - values.min()) / (2**bits - 1)
            found[row, start : start + group] = ((values - values.min()) / scale).round() * scale + values.min()
    return found


def error(weight: Tensor, other: Tensor) -> float:
    return float((weight - other).abs().pow(NORM).sum())


def trained_weights() -> list[Tensor]:
    models = [net(name).model for name in ("perceptron", "attention", "recurrent")]
    return [p.detach().clone() for model in models for p in model.parameters() if p.ndim == 2 and p.numel() >= 512]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_trained_weights_come_nearer_in_the_norm_than_with_min_max(bits: int) -> None:
    shares = [error(w, decoded(w, bits=bits, group=32)) / error(w, min_max(w, bits, 32)) for w in trained_weights()]
    assert max(shares) < 1 and sum(shares) / len(shares) < 0.97, shares


@pytest.mark.parametrize("bits", [2, 4])
def test_the_offset_is_nearly_the_best_that_there_is(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 32)
    low, levels = weight.amin(1, keepdim=True), 2**bits - 1
    scale = (weight.amax(1, keepdim=True) - low) / levels
    best = torch.full((24,), torch.inf)
    for shift in torch.linspace(-1, 1, 801).tolist():
        start = low + shift * scale
        value = start + ((weight - start) / scale).round().clamp(0, levels) * scale
        best = torch.minimum(best, (weight - value).abs().pow(NORM).sum(1))
    found, simple = error(weight, decoded(weight, bits=bits, group=32)), error(weight, min_max(weight, bits, 32))
    assert found < simple - 0.35 * (simple - float(best.sum())), (float(best.sum()), found, simple)


def test_an_outlier_costs_the_others_nothing_at_a_small_norm() -> None:
    """Weights on a grid but for one: the grid is found, since the odd one out is given up."""
    torch.manual_seed(0)
    weight = torch.randint(0, 16, (8, 64)).float()
    weight[:, 0], weight[:, 1] = 0, 15
    weight[:, 2] = 7.45
    value = decoded(weight, bits=4, group=64)
    others = [i for i in range(64) if i != 2]
    assert torch.allclose(value[:, others], weight[:, others], atol=1e-2)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_size_of_the_weights_does_not_matter(scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    relative = error(weight, decoded(weight * scale, bits=3, group=32) / scale)
    assert relative == pytest.approx(error(weight, decoded(weight, bits=3, group=32)), rel=0.02)


def test_weights_that_are_all_alike_stay() -> None:
    for value in (0.0, 0.25, -3.0):
        weight = torch.full((4, 64), value)
        assert torch.equal(decoded(weight, bits=2, group=32), weight)


def test_the_last_group_may_be_shorter() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 50) + 5  # a filled-up group must not reach to zero
    _, parts = Hqq(bits=8, group=32).solve(site_of(weight), Statistics())
    assert parts.offset.shape == (4, 2)
    assert torch.allclose(parts(), weight, atol=0.02)


def test_it_needs_no_data() -> None:
    trained = net("perceptron")
    smaller = apply(trained.model, None, Hqq(bits=4, group=32))
    with torch.no_grad():
        agree = (smaller(trained.inputs).argmax(1) == trained.model(trained.inputs).argmax(1)).float().mean()
    assert float(agree) > 0.93


def test_a_tensor_that_would_grow_is_refused() -> None:
    assert "larger" in (Hqq(bits=8, group=8).refuse(site_of(torch.randn(16, 2).half())) or "")
    with pytest.raises(InputError, match="would be larger than the tensor"):
        apply(nn.Sequential(nn.Linear(1, 16)).eval(), None, Hqq(bits=8))


def test_bad_settings_are_named() -> None:
    with pytest.raises(RecipeError, match=r"quantize.hqq.norm must be a number in \(0, 1\), got 1.5 \(recipe, step 1\)"):
        load({"steps": [{"quantize.hqq": {"norm": 1.5}}]})
