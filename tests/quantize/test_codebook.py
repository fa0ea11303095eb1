"""Clustering against exact one-dimensional k-means (dynamic programming) and against gradients summed by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.prune import Magnitude
from pared.quantize import Codebook
from pared.site import Site
from pared.statistics import Curvature, Diagonal, Statistics
from pared.technique import Chain


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def least_error(values: Tensor, k: int, weights: Tensor | None = None) -> float:
    """The least weighted squared error with k clusters: exact, O(k n**2)."""
    order = values.flatten().argsort()
    x = values.flatten().double()[order].numpy()
    h = np.ones(len(x)) if weights is None else weights.flatten().double()[order].numpy()
    mass, first, second = (np.concatenate([[0], (h * x**p).cumsum()]) for p in (0, 1, 2))
    best = np.concatenate([[0.0], np.full(len(x), np.inf)])
    for _ in range(k):
        new = best.copy()
        for j in range(1, len(x) + 1):
            m, s, q = mass[j] - mass[:j], first[j] - first[:j], second[j] - second[:j]
            new[j] = min(new[j], (best[:j] + q - s * s / m).min())
        best = new
    return float(best[-1])


def squared_error(weight: Tensor, **settings: int) -> float:
    _, parts = Codebook(**settings).solve(site_of(weight), Statistics())
    return float(((parts() - weight).detach() ** 2).sum())


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_of_evenly_spread_weights_the_clusters_are_within_two_percent_of_the_optimum(bits: int) -> None:
    weight = torch.rand(20, 20)
    least = least_error(weight, 2**bits)
    assert 0.999 * least <= squared_error(weight, bits=bits, iterations=200) <= 1.02 * least


@pytest.mark.parametrize(("bits", "factor"), [(1, 1.02), (2, 1.3), (3, 1.5), (4, 2)])
def test_of_normal_weights_the_linear_start_stays_near_the_optimum(bits: int, factor: float) -> None:
    weight = torch.randn(20, 20)
    assert squared_error(weight, bits=bits, iterations=200) <= factor * least_error(weight, 2**bits)


def test_curvature_weighs_the_clusters() -> None:
    weight, hessian = torch.randn(20, 20), torch.rand(20, 20) ** 2
    statistics = Statistics({"weight": Curvature(weight.shape, [Diagonal(hessian)])})
    plain, weighted = ((Codebook(bits=1).solve(site_of(weight), s)[1]() - weight).detach() for s in (Statistics(), statistics))
    assert float((hessian * weighted**2).sum()) < float((hessian * plain**2).sum())
    assert float((hessian * weighted**2).sum()) < 1.02 * least_error(weight, 2, hessian)


def test_every_centroid_is_the_mean_of_its_cluster_and_every_weight_has_the_nearest() -> None:
    weight = torch.randn(40, 40)
    _, parts = Codebook(bits=3, iterations=1000).solve(site_of(weight), Statistics())
    table = parts.values().detach()
    distances = (weight[..., None] - table).abs()
    assert torch.equal(distances.argmin(-1), parts.codes.long())
    for code, centroid in enumerate(table):
        members = weight[parts.codes == code]
        if len(members):
            assert float(members.mean()) == pytest.approx(float(centroid), abs=2e-3)


def test_as_many_values_as_codes_are_exact() -> None:
    weight = torch.linspace(-1, 1, 8).repeat(16).reshape(8, 16).half().float()
    _, parts = Codebook(bits=3).solve(site_of(weight), Statistics())
    assert torch.equal(parts(), weight)


def test_zeros_stay_exact_and_nothing_else_becomes_zero() -> None:
    weight = torch.randn(32, 32)
    chain = Chain(Magnitude(sparsity=0.7), Codebook(bits=2))
    _, parts = chain.solve(site_of(weight), Statistics())
    kept = weight.abs() >= weight.abs().flatten().sort().values[int(0.7 * 1024)]
    assert torch.equal(parts() != 0, kept)


def test_a_tensor_of_zeros_is_exact() -> None:
    _, parts = Codebook(bits=1).solve(site_of(torch.zeros(16, 16)), Statistics())
    assert torch.equal(parts(), torch.zeros(16, 16))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_gradient_of_a_table_entry_is_the_sum_over_its_weights(sparsity: float) -> None:
    weight = torch.randn(16, 16)
    weight[weight.abs() < sparsity] = 0
    _, parts = Codebook(bits=2).solve(site_of(weight), Statistics())
    parts.table.data = parts.table.data.float()
    parts.table.requires_grad_(True)
    upstream = torch.randn(16, 16)
    (parts() * upstream).sum().backward()
    expected = [float(upstream[parts.codes == code].sum()) for code in range(4)]
    assert torch.allclose(parts.table.grad, torch.tensor(expected[4 - len(parts.table) :]), atol=1e-5)


def test_encoding_with_the_tables_at_hand_keeps_the_tables() -> None:
    site, moved = site_of(torch.randn(16, 16)), site_of(torch.randn(16, 16))
    technique = Codebook(bits=3)
    _, parts = technique.solve(site, Statistics())
    table = parts.table.clone()
    technique.encode(moved, parts, Statistics())
    assert torch.equal(parts.table, table)
    assert torch.equal((moved.tensor[..., None] - parts.values()).abs().argmin(-1), parts.codes.long())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_relative_error_does_not_depend_on_the_size_of_the_weights(scale: float) -> None:
    weight = torch.randn(16, 16)
    errors = [((Codebook(bits=3).solve(site_of(weight * s), Statistics())[1]() / s - weight) ** 2).sum() for s in (1, scale)]
    assert float(errors[1]) == pytest.approx(float(errors[0]), rel=0.01)


def test_a_tensor_that_would_grow_is_refused() -> None:
    assert "larger than the tensor" in (Codebook(bits=8).refuse(site_of(torch.randn(8, 8))) or "")
    assert Codebook(bits=2).refuse(site_of(torch.randn(8, 8))) is None


def test_codes_beyond_the_table_are_named() -> None:
    _, parts = Codebook(bits=2).solve(site_of(torch.randn(8, 8)), Statistics())
    parts.check()
    parts.codes[0, 0] = 4
    with pytest.raises(ValueError, match="codes must be less than 4, found 4"):
        parts.check()
