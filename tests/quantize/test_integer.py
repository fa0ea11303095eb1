"""Integers against brute force: every scale on a fine grid, refined."""

from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.budget.observe import observe
from pared.errors import RecipeError
from pared.place import everywhere, relax_, settle_
from pared.quantize.integer import Integer, Stepped
from pared.rounding import fitted_scales, only_use
from pared.site import Site, install_
from pared.statistics import Curvature, Diagonal, Kronecker, Layout, Statistics
from pared.task import Task
from pared.testing import Case, cases, net
from pared.train import train

OTHERS = (
    Integer(bits=6, group="tensor", scheme="affine"), Integer(bits=4, group=16), Integer(bits=3, rounding="learned"),
    Integer(bits=3, group=16, scheme="affine", rounding="compensated"),
)  # fmt: skip


@pytest.mark.parametrize("case", cases(*OTHERS), ids=str)
def test_conformance_of_groups(case: Case) -> None:
    case()


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def squared_error(weight: Tensor, **settings: object) -> Tensor:
    _, parts = Integer(**settings).solve(site_of(weight), Statistics())
    return (parts() - weight).detach() ** 2


def least_squared_error(rows: Tensor, bits: int) -> Tensor:
    """Of each row, over scales of both signs on a fine grid, each refined by least squares."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest = rows.abs().amax(1) / 2 ** (bits - 1)
    best = torch.full((len(rows),), torch.inf)
    for factor in [sign * x for x in torch.linspace(0.02, 1.3, 1000).tolist() for sign in (1, -1)]:
        q = (rows / (factor * widest)[:, None]).round().clamp(low, high)
        scale = (q * rows).sum(1) / (q * q).sum(1).clamp_min(1e-30)
        best = torch.minimum(best, ((rows - scale[:, None] * q) ** 2).sum(1))
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [8, 32, 64])
def test_the_scale_is_within_six_percent_of_brute_force(bits: int, columns: int) -> None:
    rows = torch.randn(64, columns)
    found = squared_error(rows, bits=bits).sum()
    assert float(found) <= 1.06 * float(least_squared_error(rows, bits).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_halving_the_group_never_raises_error(bits: int) -> None:
    weight = torch.randn(32, 256) * torch.rand(32, 1)
    groups = ["tensor", "channel", 128, 64, 32, 16, 8, 4, 2]
    errors = [float(squared_error(weight, bits=bits, group=group).sum()) for group in groups]
    assert all(finer <= coarser for coarser, finer in pairwise(errors))


def test_a_bit_more_takes_off_at_least_half_of_the_error() -> None:
    errors = [float(squared_error(torch.randn(16, 512), bits=bits).sum()) for bits in range(2, 9)]
    assert all(more < 0.5 * fewer for fewer, more in pairwise(errors))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_on_the_grid_are_exact(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    q = torch.randint(low, high, (8, 64)).float()
    q[:, 0] = low
    assert float(squared_error(q * 0.25, bits=bits).max()) == 0


def test_the_longer_tail_gets_the_longer_half_of_the_range() -> None:
    weight = torch.tensor([[4.0, 2.0, 0.0, -2.0] * 4])
    assert float(squared_error(weight, bits=2).max()) == 0
    assert float(squared_error(-weight, bits=2).max()) == 0


def test_zero_points_are_within_a_tenth_of_brute_force_and_exact_on_the_grid() -> None:
    rows = torch.randn(40, 32) + torch.randn(40, 1)
    best = torch.full((40,), torch.inf)
    for zero in range(-8, 8):
        for scale in torch.linspace(0.05, 0.7, 400).tolist():
            q = (rows / scale).round().clamp(-8 - zero, 7 - zero)
            best = torch.minimum(best, ((rows - scale * q) ** 2).sum(1))
    found = squared_error(rows, bits=4, scheme="affine").sum()
    assert float(found) <= 1.1 * float(best.sum())
    assert float(found) < 0.7 * float(squared_error(rows, bits=4).sum())
    grid = torch.randint(-3, 13, (8, 64)).float()
    grid[:, :2] = torch.tensor([-3.0, 12.0])
    assert float(squared_error(grid * 0.25, bits=4, scheme="affine").max()) == 0


def test_zero_points_help_as_much_where_rounding_is_compensated() -> None:
    trained = net("perceptron")
    found = {}
    for scheme in ("symmetric", "affine"):
        technique = Integer(bits=4, group=16, tensors="matrices", rounding="compensated", scheme=scheme)
        sites = [site for site in technique.sites(trained.copy()) if technique.refuse(site) is None]
        statistics = trained.statistics()
        found[scheme] = sum(technique.damage(s, technique.solve(s, statistics)[1], statistics) or 0.0 for s in sites)
    assert found["affine"] < 0.9 * found["symmetric"], found


def test_curvature_decides_which_weights_are_exact() -> None:
    weight = torch.tensor([[1.0, 0.37, -0.9, 0.61] * 4])
    hessian = torch.where(weight == 0.37, 1000.0, 1e-3)
    statistics = Statistics({"weight": Curvature(weight.shape, [Diagonal(hessian)])})
    site, technique = site_of(weight), Integer(bits=2)
    plain, weighted = (technique.solve(site, s)[1]() - weight for s in (Statistics(), statistics))
    assert float(weighted[weight == 0.37].abs().max()) < float(plain[weight == 0.37].abs().max())
    assert float((hessian * weighted**2).sum()) < float((hessian * plain**2).sum())


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1.0, 1e4, 1e6])
def test_the_relative_error_does_not_depend_on_the_size_of_the_weights(scale: float) -> None:
    weight = torch.randn(8, 64)
    error = float(squared_error(weight * scale, bits=4).sum()) / scale**2
    assert error == pytest.approx(float(squared_error(weight, bits=4).sum()), rel=0.02)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 32)
    weight[2] = 0
    _, parts = Integer(bits=3).solve(site_of(weight), Statistics())
    assert torch.equal(parts()[2], torch.zeros(32))


def test_the_last_group_may_be_shorter() -> None:
    weight = torch.randn(4, 50)
    _, parts = Integer(bits=8, group=16).solve(site_of(weight), Statistics())
    assert parts.scale.shape == (4, 4)
    assert torch.allclose(parts(), weight, atol=0.03)


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(6, 4, 3), nn.ConvTranspose2d(6, 8, 3, groups=2), nn.Conv3d(2, 6, 2)])
def test_scales_belong_to_output_channels(layer: nn.Module) -> None:
    axis = 1 if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)) else 0
    with torch.no_grad():
        layer.weight *= (10.0 ** -torch.arange(layer.weight.shape[axis])).reshape(
            [-1 if i == axis else 1 for i in range(layer.weight.ndim)]
        )
    expected = layer.weight.detach().clone()
    model = nn.Sequential(layer).eval()
    site = next(s for s in Integer(bits=8).sites(model) if s.path == "0.weight")
    install_(site, Integer(bits=8).solve(site, Statistics())[1])
    relative = ((layer.weight - expected).abs().amax([i for i in range(expected.ndim) if i != axis])) / (
        expected.abs().amax([i for i in range(expected.ndim) if i != axis])
    )
    assert float(relative.max()) < 0.01


def test_a_tensor_that_would_grow_is_refused() -> None:
    weight = torch.randn(64, 2)
    assert "larger" in (Integer(bits=8, group=2).refuse(site_of(weight.half())) or "")
    assert Integer(bits=8, group=2).refuse(site_of(weight)) is None


def test_codes_out_of_range_are_named() -> None:
    _, parts = Integer(bits=3).solve(site_of(torch.randn(8, 8)), Statistics())
    parts.check()
    parts.codes[0, 0] = 4
    with pytest.raises(ValueError, match=r"codes must lie in \[-4, 3\], found"):
        parts.check()
    _, parts = Integer(bits=3, scheme="affine").solve(site_of(torch.randn(8, 8)), Statistics())
    parts.zero[0, 0] = -5
    with pytest.raises(ValueError, match=r"zero must lie in \[-4, 3\], found"):
        parts.check()


def test_cost_without_parts_is_codes_and_scales() -> None:
    weight = torch.randn(32, 64)
    assert Integer(bits=4, group=16).cost(site_of(weight)).stored_bits == 32 * 64 * 4 + 16 * 32 * 4
    assert Integer(bits=4, group=16, scheme="affine").cost(site_of(weight)).stored_bits == 32 * 64 * 4 + (16 + 4) * 32 * 4


def relaxed(technique: Integer, weight: torch.Tensor) -> Stepped:
    site = site_of(weight)
    return technique.relax(site, technique.decide(site, Statistics()), Statistics())


@pytest.mark.parametrize("settings", [{"group": "tensor"}, {"group": "channel"}, {"group": 7}], ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_slopes_of_learned_steps_are_those_of_the_paper(bits: int, settings: dict[str, object]) -> None:
    weight = torch.randn(5, 20)
    stand_in = relaxed(Integer(bits=bits, steps="learned", **settings), weight)
    gradient = torch.randn(5, 20)
    (stand_in() * gradient).sum().backward()
    scale, low, high = stand_in.spread().detach(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    summed: dict[float, float] = {}
    for row in range(5):
        for column in range(20):
            g, s = float(gradient[row, column]), float(scale[row, column])
            at = float(weight[row, column]) / s
            inside = low <= at <= high
            slope = round(at) - at if inside else low if at < low else high
            assert float(stand_in.weight.grad[row, column]) == pytest.approx(g if inside else 0.0)
            summed[s] = summed.get(s, 0.0) + g * slope
    n = weight.numel() / stand_in.stretch.numel()
    for s, slope in zip(stand_in.scale().flatten().tolist(), stand_in.stretch.grad.flatten().tolist(), strict=True):
        assert slope == pytest.approx(summed[s] * s / (n * high) ** 0.5, rel=1e-3, abs=1e-5)


def test_a_step_that_is_too_coarse_or_too_fine_learns_the_best_one() -> None:
    weight = torch.randn(1, 4000)
    scales = torch.linspace(0.05, 2, 400)
    best = min(float(((weight / s).round().clamp(-4, 3) * s - weight).square().mean()) for s in scales)
    for factor in (0.3, 3.0):
        stand_in = relaxed(Integer(bits=3, steps="learned"), weight)
        stand_in.first.mul_(factor)
        stand_in.weight.requires_grad_(False)
        optimiser = torch.optim.Adam([stand_in.stretch], lr=0.02)
        at_first = float((stand_in() - weight).square().mean().detach())
        for _ in range(300):
            optimiser.zero_grad()
            (stand_in() - weight).square().sum().backward()
            optimiser.step()
        error = float((stand_in() - weight).square().mean().detach())
        assert error < 1.05 * best and at_first > 2 * best
        assert torch.equal(stand_in.settle()(), stand_in())


def test_two_bits_with_learned_steps_are_trained_to_nearly_what_the_net_was() -> None:
    trained = net("convolution")
    model, task = trained.copy(), trained.task
    technique = Integer(bits=2, tensors="matrices", steps="learned", keep="stem")
    statistics = observe(model, task, [technique])
    options, refusals = everywhere(model, technique, statistics)
    assert "stem.weight" in [refusal.path for refusal in refusals]
    relax_(model, options, statistics)
    first = [(module, module.scale().clone()) for module in model.modules() if isinstance(module, Stepped)]
    at_first = accuracy(model.eval(), task)
    train(model, task, epochs=8, learning_rate=0.003, ema=None)
    assert all(not torch.equal(module.scale(), scale) for module, scale in first)
    settle_(model, options, statistics)
    now, then = accuracy(model.eval(), task), accuracy(trained.model, task)
    assert at_first < then - 0.1 and now > then - 0.04, (then, at_first, now)


def accuracy(model: nn.Module, task: Task) -> float:
    return float(torch.cat([(model(x).argmax(1) == y).float() for x, y in task.val]).mean())


def damages(name: str, bits: int) -> dict[str, float]:
    """Of all matrices of a trained net together, by rounding."""
    found = {}
    for rounding in ("nearest", "compensated", "learned"):
        technique, statistics = Integer(bits=bits, tensors="matrices", rounding=rounding), net(name).statistics()
        sites = [site for site in technique.sites(net(name).copy()) if technique.refuse(site) is None]
        found[rounding] = sum(technique.damage(s, technique.solve(s, statistics)[1], statistics) or 0.0 for s in sites)
    return found


@pytest.mark.parametrize("name", ["perceptron", "attention", "recurrent"])
def test_learned_rounding_halves_the_damage_of_the_nearest(name: str) -> None:
    found = damages(name, 3)
    assert found["learned"] < 0.5 * found["nearest"], found
    assert found["learned"] < 1.5 * found["compensated"], found


def crossed(m: int, n: int) -> Curvature:
    """A random matrix's, both sides of which hang together."""
    sides = [torch.randn(1, size, 2 * size) for size in (n, m)]
    return Curvature(torch.Size((m, n)), [Kronecker(*(x @ x.mT / x.shape[2] for x in sides), Layout((1, m, n), (m * n, n, 1)))])


def test_compensated_rounding_finds_nearly_the_best_of_all_codes() -> None:
    shares = []
    for seed in range(5):
        torch.manual_seed(seed)
        module, curvature = nn.Linear(4, 2, bias=False), crossed(2, 4)
        site, value = Site.of(module, "weight"), module.weight.detach()
        technique = Integer(bits=2, group=4, rounding="compensated")
        statistics = Statistics({site.covers[0]: curvature})
        parts = technique.solve(site, statistics)[1]
        scale = parts.spread().detach()
        every = torch.cartesian_prod(*[torch.arange(-2.0, 2.0)] * 8).reshape(-1, 2, 4)
        use = curvature.terms[0]
        errors = every * scale - value
        damage = 0.5 * (use.gradients[0] @ errors @ use.inputs[0] * errors).sum((1, 2))
        shares.append(curvature.damage(parts().detach() - value) / float(damage.min()))
    assert max(shares) < 2 and sorted(shares)[2] < 1.2, shares


def test_scales_are_fitted_to_the_codes_as_exactly_as_by_solving_for_them() -> None:
    torch.manual_seed(0)
    value, curvature = torch.randn(6, 8), crossed(6, 8)
    use = only_use(curvature)
    assert use is not None
    owners = torch.arange(12).reshape(6, 2).repeat_interleave(4, 1)
    codes, start = (value / 0.4).round(), torch.full((12,), 0.4)
    per_scale = torch.zeros(12, 6, 8).scatter_(0, owners[None], codes[None])  # the matrix that each scale multiplies
    slopes = use.gradients[0] @ per_scale @ use.inputs[0]
    hessian = torch.einsum("kij,lij->kl", slopes, per_scale)
    best = torch.linalg.solve(hessian, (slopes * value).sum((1, 2)))
    fitted = fitted_scales(use, codes, value, start, owners)
    found, least, first = (float(use.quadratic(codes * scale[owners] - value)) for scale in (fitted, best, start))
    assert found - least < 0.05 * (first - least), (found, least, first)


def test_learned_rounding_finds_nearly_the_best_of_all_roundings() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(1, 10), torch.randn(40, 10) @ torch.randn(10, 10)
    term = Kronecker((x.T @ x / len(x))[None], torch.ones(1, 1, 1), Layout((1, 1, 10), (10, 10, 1)))
    curvature = Curvature(weight.shape, [term])
    site, technique = site_of(weight), Integer(bits=3, rounding="learned")
    parts = technique.solve(site, Statistics({"weight": curvature}))[1]
    scale = parts.spread().detach()
    down = (weight / scale).floor()
    ups = [torch.tensor([[float(number >> i & 1) for i in range(10)]]) for number in range(1024)]
    every = sorted(curvature.damage((down + up).clamp(-4, 3) * scale - weight) for up in ups)
    found = curvature.damage(parts().detach() - weight)
    assert found <= every[10], (found, every[0], every[10], every[512])
    assert bool(((parts.codes == down.clamp(-4, 3)) | (parts.codes == (down + 1).clamp(-4, 3))).all())


def test_learned_rounding_moves_the_outputs_less() -> None:
    trained = net("recurrent")
    moved = {}
    for rounding in ("nearest", "learned"):
        smaller = pared.apply(trained.model, trained.task, Integer(bits=3, tensors="matrices", rounding=rounding))
        with torch.no_grad():
            now, then = (model(trained.inputs).log_softmax(1) for model in (smaller, trained.model))
        moved[rounding] = float((then.exp() * (then - now)).sum(1).mean())
    assert moved["learned"] < 0.7 * moved["nearest"], moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", ["fitted", "learned"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_training_starts_from_the_codes_that_were_rounded(scheme: str, steps: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8).to(dtype)
    statistics = Statistics({"weight": crossed(6, 8)})
    technique = Integer(bits=3, group=8, rounding="compensated", scheme=scheme, steps=steps)
    site = site_of(weight)
    structure, parts = technique.solve(site, statistics)
    stand_in = technique.relax(site, structure, statistics)
    output = stand_in()
    assert output.dtype == dtype and torch.equal(output, parts())
    output.float().sum().backward()
    assert bool((stand_in.weight.grad != 0).all())
    assert torch.equal(stand_in.settle().codes, parts.codes)


def test_scales_beside_zero_points_stay_above_zero() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        weight, curvature = torch.randn(8, 32), crossed(8, 32)
        technique = Integer(bits=2, scheme="affine", rounding="compensated")
        _, parts = technique.solve(site_of(weight), Statistics({"weight": curvature}))
        assert float(parts.scale.min()) > 0
        assert torch.allclose(technique.lower(parts)(), parts(), atol=1e-6)


def test_modules_that_are_kept_are_those_named_and_what_is_in_them() -> None:
    model = nn.ModuleDict({"stem": nn.Linear(8, 8), "stem2": nn.Linear(8, 8), "body": nn.Sequential(nn.Linear(8, 8))})
    technique = Integer(keep="stem,body")
    taken = [site.path for site in technique.sites(model) if technique.refuse(site) is None and site.tensor.ndim == 2]
    assert taken == ["stem2.weight"]


def test_a_module_to_keep_that_is_not_there_is_named_with_its_like():
    with pytest.raises(RecipeError, match="no layer is called haed; near it are head"):
        list(Integer(keep="haed").sites(nn.Sequential(OrderedDict(head=nn.Linear(4, 4)))))


def test_a_tied_tensor_is_kept_by_any_of_its_names():
    net = nn.Sequential(OrderedDict(embed=nn.Embedding(8, 8), head=nn.Linear(8, 8, bias=False)))
    net.head.weight = net.embed.weight
    (site,) = Integer(keep="head").sites(net)
    assert Integer(keep="head").refuse(site) is not None and Integer(keep="other").refuse(site) is None


@pytest.mark.parametrize("rounding", ["compensated", "learned"])
def test_a_layer_that_neither_sees_nor_gives_anything_is_rounded_all_the_same(rounding: str) -> None:
    weight, nothing = torch.randn(6, 8), Kronecker(torch.zeros(1, 8, 8), torch.zeros(1, 6, 6), Layout((1, 6, 8), (48, 8, 1)))
    statistics = Statistics({"weight": Curvature(weight.shape, [nothing])})
    _, parts = Integer(bits=4, rounding=rounding).solve(site_of(weight), statistics)
    assert float((parts() - weight).abs().max()) < float(weight.abs().max())
