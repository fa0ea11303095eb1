"""Magnitude pruning against counting and sorting."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from pared.errors import RecipeError
from pared.prune import Magnitude
from pared.site import Site
from pared.statistics import Statistics
from pared.technique import parse
from pared.testing import Case, cases


@pytest.mark.parametrize("case", cases(Magnitude(pattern="2:4"), Magnitude(sparsity=0.5, pattern="4x1")), ids=str)
def test_conformance_of_patterns(case: Case) -> None:
    case()


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def pruned(weight: Tensor, **settings: object) -> Tensor:
    _, parts = Magnitude(**settings).solve(site_of(weight), Statistics())
    return parts()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(16, 10), (7, 3, 3, 3), (33, 5)])
def test_as_many_weights_as_asked_become_zero_and_they_are_the_smallest(sparsity: float, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    result = pruned(weight, sparsity=sparsity)
    n_zero = int(sparsity * weight.numel())
    assert int((result == 0).sum()) == n_zero
    ordered = weight.abs().flatten().sort().values
    assert torch.equal(result == 0, weight.abs() < ordered[n_zero])
    assert torch.equal(result[result != 0], weight[result != 0])


def test_ties_are_broken_so_that_the_count_is_exact() -> None:
    assert int((pruned(torch.ones(8, 8), sparsity=0.3) == 0).sum()) == 19


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("shape", [(6, 16), (4, 8, 3, 3)])
def test_n_of_every_m_stay_and_they_are_the_largest(n: int, m: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    result = pruned(weight, pattern=f"{n}:{m}")
    groups, kept = weight.reshape(-1, m), result.reshape(-1, m)
    for group, left in zip(groups, kept):
        largest = sorted(group.abs().tolist())[-n:]
        assert sorted(left[left != 0].abs().tolist()) == largest


def test_blocks_go_as_a_whole_and_those_of_least_energy_go() -> None:
    weight = torch.randn(8, 12)
    result = pruned(weight, sparsity=0.5, pattern="4x3")
    blocks = weight.reshape(2, 4, 4, 3).transpose(1, 2).reshape(8, 12)
    left = result.reshape(2, 4, 4, 3).transpose(1, 2).reshape(8, 12)
    energy = blocks.square().sum(1)
    for number, (before, after) in enumerate(zip(blocks, left)):
        stays = number in energy.topk(4).indices
        assert torch.equal(after, before if stays else torch.zeros(12))


@pytest.mark.parametrize(
    ("settings", "shape", "reason"),
    [
        ({"pattern": "2:4"}, (8, 6), "do not divide into groups of 4"),
        ({"pattern": "4x4", "sparsity": 0.5}, (6, 16), "does not divide into blocks of 4x4"),
    ],
)
def test_a_matrix_that_does_not_divide_is_refused(settings: dict[str, object], shape: tuple[int, int], reason: str) -> None:
    assert reason in (Magnitude(**settings).refuse(site_of(torch.randn(shape))) or "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "sparsity must be given"),
        ({"pattern": "4:2"}, "n < m"),
        ({"pattern": "2:4", "sparsity": 0.5}, "leave sparsity out"),
        ({"pattern": "0x2", "sparsity": 0.5}, "pattern must be"),
        ({"sparsity": 1.0}, r"must be a number in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_contradict_each_other_are_rejected(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(Magnitude, settings)


def test_the_schedule_is_cubic() -> None:
    technique = Magnitude(sparsity=0.8)
    for progress, expected in [(0.0, 0.0), (0.25, 0.4625), (0.5, 0.7), (0.75, 0.7875), (1.0, 0.8)]:
        assert technique.at(progress).sparsity == pytest.approx(expected)
    steps = [technique.at(i / 20).sparsity for i in range(21)]
    assert all(later > earlier for earlier, later in pairwise(steps))
    assert technique.at(1.0) is technique


def test_the_schedule_leaves_fixed_patterns_alone() -> None:
    technique = Magnitude(pattern="2:4")
    assert technique.at(0.3) == technique


def test_gradients_reach_the_weights_that_are_in() -> None:
    site = site_of(torch.tensor([[0.1, 1.0, 2.0, 3.0] * 4]))
    technique = Magnitude(sparsity=0.25)
    relaxed = technique.relax(site, technique.decide(site, Statistics()), Statistics())
    assert relaxed is not None
    relaxed().sum().backward()
    assert torch.equal(relaxed.weight.grad, (site.tensor > 0.5).float())
