"""Low rank against Eckart and Young, against random perturbations, and against dense layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.errors import RecipeError
from pared.factor import LowRank
from pared.site import Site, install_
from pared.statistics import Curvature, Kronecker, Statistics
from pared.technique import parse


def site_of(layer: nn.Module, technique: LowRank) -> Site:
    return next(technique.sites(nn.Sequential(layer)))


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)[None]


def second_moment(n: int, decay: float) -> Tensor:
    basis, _ = torch.linalg.qr(torch.randn(n, n))
    return (basis * torch.exp(-decay * torch.arange(n))) @ basis.T


def curvature_of(weight: Tensor, decay: float = 0.15) -> Curvature:
    m, n = weight.flatten(1).shape
    return Curvature(weight.shape, [Kronecker(second_moment(n, decay)[None], second_moment(m, decay)[None], as_matrix)])


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.Conv2d(6, 32, 3)], ids=["linear", "convolution"])
def test_without_statistics_the_error_is_that_of_eckart_and_young(layer: nn.Module, rank: int) -> None:
    technique = LowRank(rank=rank)
    site = site_of(layer, technique)
    _, parts = technique.solve(site, Statistics())
    error = float((technique.weight(site, parts) - layer.weight).square().sum())
    tail = torch.linalg.svdvals(layer.weight.detach().flatten(1).double())[rank:]
    assert error == pytest.approx(float(tail.square().sum()), rel=1e-4)


def raised(curvature: Curvature) -> Curvature:
    """The metric that the factors minimise: G's diagonal raised by its mean, A's by a ten-thousandth of its mean."""
    (use,) = curvature.terms
    assert isinstance(use, Kronecker)
    g, a = use.gradients[0], use.inputs[0]
    g = g + g.diagonal().mean() * torch.eye(len(g))
    a = a + 1e-4 * a.diagonal().mean() * torch.eye(len(a))
    return Curvature(curvature.shape, [Kronecker(a[None], g[None], as_matrix)])


@pytest.mark.parametrize("rank", [2, 8])
def test_whitened_no_perturbation_of_the_factors_does_less_damage(rank: int) -> None:
    layer = nn.Linear(30, 20)
    technique, curvature = LowRank(rank=rank), curvature_of(layer.weight)
    site = site_of(layer, technique)
    _, parts = technique.solve(site, Statistics({site.covers[0]: curvature}))
    metric, weight = raised(curvature), layer.weight.detach()
    least = metric.damage(parts.weight.detach() - weight)
    up, down = parts.up.detach(), parts.down.detach()
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(100):
            moved = (up + size * torch.randn_like(up)) @ (down + size * torch.randn_like(down))
            assert metric.damage(moved - weight) >= least * (1 - 1e-5)


@pytest.mark.parametrize("rank", [2, 5, 10])
def test_whitened_does_less_damage_than_the_plain_decomposition(rank: int) -> None:
    layer = nn.Conv2d(5, 24, 3)
    technique, curvature = LowRank(rank=rank), curvature_of(layer.weight)
    site = site_of(layer, technique)
    statistics = Statistics({site.covers[0]: curvature})
    whitened, plain = technique.solve(site, statistics)[1], technique.solve(site, Statistics())[1]
    damages = [technique.damage(site, parts, statistics) for parts in (whitened, plain)]
    assert damages[0] is not None and damages[1] is not None
    assert damages[0] < 0.8 * damages[1]


def test_a_diagonal_second_moment_gives_what_the_full_one_gives() -> None:
    layer, technique = nn.Linear(30, 20), LowRank(rank=6)
    site = site_of(layer, technique)
    a, g = torch.rand(30) + 0.1, torch.rand(20) + 0.1
    full = Curvature(layer.weight.shape, [Kronecker(a.diag()[None], g.diag()[None], as_matrix)])
    thin = Curvature(layer.weight.shape, [Kronecker(a[None], g[None], as_matrix)])
    found = [technique.weight(site, technique.solve(site, Statistics({site.covers[0]: c}))[1]) for c in (full, thin)]
    assert torch.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(20, 12), nn.Conv2d(4, 12, 3)], ids=["linear", "convolution"])
def test_inner_statistics_give_the_damage_of_changing_a_factor(layer: nn.Module) -> None:
    technique, curvature = LowRank(rank=3), curvature_of(layer.weight)
    site = site_of(layer, technique)
    statistics = Statistics({site.covers[0]: curvature})
    _, parts = technique.solve(site, statistics)
    inner = technique.inner(site, parts, statistics)
    for name in ("up", "down"):
        changed = copy.deepcopy(parts)
        delta = 0.1 * torch.randn_like(getattr(parts, name))
        getattr(changed, name).data += delta
        exact = curvature.damage((changed.weight - parts.weight).detach())
        seen = inner.curvature(name)
        assert seen is not None
        assert seen.damage(delta) == pytest.approx(exact, rel=1e-4)


def test_a_layer_that_is_used_twice_has_both_uses_in_its_inner_statistics() -> None:
    layer, technique = nn.Linear(20, 12), LowRank(rank=3)
    curvature = curvature_of(layer.weight)
    curvature.terms.extend(curvature_of(layer.weight, 0.5).terms)
    site = site_of(layer, technique)
    statistics = Statistics({site.covers[0]: curvature})
    _, parts = technique.solve(site, statistics)
    delta = 0.1 * torch.randn_like(parts.down)
    seen = technique.inner(site, parts, statistics).curvature("down")
    assert seen is not None
    assert seen.damage(delta) == pytest.approx(curvature.damage((parts.up @ delta).detach()), rel=1e-4)


def test_a_use_of_the_transposed_weight_is_no_whitening_for_the_layer() -> None:
    layer, technique = nn.Linear(12, 12), LowRank(rank=3)
    site = site_of(layer, technique)
    turned = Kronecker(second_moment(12, 1.0)[None], second_moment(12, 1.0)[None], lambda w: w.T[None])
    statistics = Statistics({site.covers[0]: Curvature(layer.weight.shape, [turned])})
    found = [technique.weight(site, technique.solve(site, s)[1]) for s in (statistics, Statistics())]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (3, 1), "padding": (1, 0)},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_a_convolution_equals_the_dense_one_with_the_low_rank_weight(mode: str, settings: dict[str, object]) -> None:
    layer = nn.Conv2d(8, 16, padding_mode=mode, **settings)
    technique = LowRank(rank=3)
    site = site_of(layer, technique)
    _, parts = technique.solve(site, Statistics())
    x = torch.randn(2, 8, 9, 9)
    found = parts(x)
    layer.weight.data = technique.weight(site, parts)
    assert torch.allclose(found, layer(x), atol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv1d(8, 16, 3, padding=1), (2, 8, 9)), (nn.Conv3d(4, 8, 2), (2, 4, 5, 5, 5))])
def test_one_and_three_axes_work_too(layer: nn.Module, shape: tuple[int, ...]) -> None:
    technique = LowRank(rank=2)
    site = site_of(layer, technique)
    _, parts = technique.solve(site, Statistics())
    x = torch.randn(shape)
    found = parts(x)
    layer.weight.data = technique.weight(site, parts)
    assert torch.allclose(found, layer(x), atol=1e-5)


def test_keep_is_the_share_of_weights_and_of_multiply_adds() -> None:
    layer, technique = nn.Linear(64, 128), LowRank(keep=0.25)
    site = site_of(layer, technique)
    structure, parts = technique.solve(site, Statistics())
    n_weights = parts.up.numel() + parts.down.numel()
    assert structure.rank == 10
    assert 0.22 * 64 * 128 < n_weights <= 0.25 * 64 * 128
    assert technique.cost(site).stored_bits == 32 * n_weights


def test_the_bias_is_kept_and_costs_nothing() -> None:
    layer, technique = nn.Linear(32, 32), LowRank(rank=4)
    site = site_of(layer, technique)
    _, parts = technique.solve(site, Statistics())
    assert parts.bias is layer.bias
    assert technique.cost(site).stored_bits == 32 * 4 * 64


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "grouped"),
        (nn.Linear(6, 6), "larger"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(64, 64), "read by its owner"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), "coded"),
    ],
)
def test_what_cannot_be_factored_is_refused(layer: nn.Module, reason: str) -> None:
    technique = LowRank(keep=0.5 if "larger" not in reason else 0.01)
    assert reason in (technique.refuse(site_of(layer, technique)) or "")


def test_a_forward_of_its_own_is_refused() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 0, 1, 0)))

    technique = LowRank(keep=0.5)
    assert "Padded has a forward of its own" in (technique.refuse(site_of(Padded(16, 16, 3), technique)) or "")


def test_hooks_are_a_reason_to_refuse() -> None:
    layer, technique = nn.Linear(64, 64), LowRank(keep=0.5)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    assert "hooks" in (technique.refuse(site_of(layer, technique)) or "")


def test_a_shared_weight_is_refused_and_its_other_place_named() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 32), "head": nn.Linear(32, 50, bias=False)})
    model["head"].weight = model["embedding"].weight
    technique = LowRank(keep=0.5)
    (site,) = technique.sites(model)
    assert "shared with embedding.weight" in (technique.refuse(site) or "")


def test_a_module_that_is_used_twice_is_one_site() -> None:
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    technique = LowRank(keep=0.5)
    (site,) = technique.sites(model)
    install_(site, technique.solve(site, Statistics())[1])
    assert model[0] is model[2] and not isinstance(model[0], nn.Linear)


def test_owners_that_read_the_weight_find_it() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)).eval()
    technique, x = LowRank(keep=0.9), torch.randn(2, 5, 32)
    for site in [site for site in technique.sites(model) if not technique.refuse(site)]:
        install_(site, technique.solve(site, Statistics())[1])
    with torch.no_grad():
        assert torch.allclose(model(x), copy.deepcopy(model).train().requires_grad_(False)[0].eval()(x), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"keep": 0.5, "rank": 4}])
def test_exactly_one_of_keep_and_rank_is_given(settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="exactly one of keep and rank"):
        parse(LowRank, settings)
