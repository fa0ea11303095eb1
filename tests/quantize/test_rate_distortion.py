"""Rate-distortion rounding against dense formulas, plain rounding and the file's coder."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared import store
from pared.quantize import RateDistortion, rate_distortion
from pared.site import Site
from pared.statistics import Curvature, Diagonal, Kronecker, Layout, Statistics


def site_of(weight: Tensor) -> Site:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return Site.of(module, "weight")


def spd(n: int, rank: int, generator: torch.Generator) -> Tensor:
    factor = torch.randn(n, rank, generator=generator)
    return factor @ factor.T / rank + 0.05 * torch.eye(n)


def observed(m: int, n: int, seed: int = 0) -> tuple[Site, Statistics]:
    """A matrix with correlated inputs and gradients of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) / math.sqrt(n)
    by_row, by_column = torch.exp(torch.randn(m, generator=generator)), torch.exp(torch.randn(n, generator=generator))
    inputs = by_column[:, None] * spd(n, n // 4, generator) * by_column
    gradients = by_row[:, None] * spd(m, m // 2, generator) * by_row
    use = Kronecker(inputs[None], gradients[None], Layout((1, m, n), (m * n, n, 1)))
    return site_of(weight), Statistics({"weight": Curvature(weight.shape, [use])})


def bits_of(parts: nn.Module) -> int:
    return sum(8 * len(store.encode(value.numpy())[1]) for value in parts.state_dict().values())


def rounded(weight: Tensor, step: float) -> tuple[Tensor, int]:
    codes = (weight / step).round()
    return codes * step, 8 * len(store.encode(codes.to(torch.int16).numpy())[1])


def test_at_equal_bits_the_damage_is_a_fraction_of_plain_rounding():
    site, statistics = observed(64, 128)
    curvature = statistics.curvature("weight")
    technique = RateDistortion(slope=3e-4)
    _, parts = technique.solve(site, statistics)
    damage, bits = technique.damage(site, parts, statistics), bits_of(parts)
    plain = [rounded(site.tensor, float(site.tensor.std()) * 2.0**e) for e in np.arange(-4, 3, 0.25)]
    cheaper = [curvature.damage(value - site.tensor) for value, cost in plain if cost <= 1.05 * bits]
    assert damage < 0.5 * min(cheaper)


def test_the_damage_of_the_sweep_is_the_damage_of_the_dense_formula():
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = spd(12, 6, generator).double(), spd(8, 4, generator).double()
    delta = torch.randn(8, 12, generator=generator).double()
    block = rate_distortion._factored(np.arange(96).reshape(8, 12), inputs.numpy(), gradients.numpy())
    damped = [m.clone() for m in (inputs, gradients)]
    for m, damping in zip(damped, (rate_distortion._INPUT_DAMPING, rate_distortion._GRADIENT_DAMPING), strict=True):
        diagonal = m.diagonal().clone()
        m *= 1 - damping
        m += torch.diag(damping * diagonal + rate_distortion._FLOOR * diagonal.mean())
    expected = torch.einsum("ab,bc,cd,ad->", damped[1], delta, damped[0], delta)
    squares = (block.ug.T @ delta.reshape(-1).numpy()[block.places] @ block.ua) ** 2
    assert float((block.importance * squares).sum()) == pytest.approx(float(expected), rel=1e-4)


def test_following_several_ways_to_round_a_row_beats_the_best_next_weight(monkeypatch):
    site, statistics = observed(64, 128)
    sums = []
    for n_paths in (1, 4, 16):
        monkeypatch.setattr(rate_distortion, "_PATHS", n_paths)
        technique = RateDistortion(slope=1e-4)
        _, parts = technique.solve(site, statistics)
        sums.append(technique.damage(site, parts, statistics) + 1e-4 * bits_of(parts))
    assert sums[2] < sums[1] < 0.99 * sums[0]


@pytest.mark.parametrize("trellis", [False, True])
def test_weights_in_a_row_are_rounded_to_the_best_combination(trellis):
    """Whatever a weight takes, those after it see its error, and with a trellis where they may lie: with ways to spare
    every combination of neighbours is weighed."""
    tile = rate_distortion._tile
    generator = np.random.default_rng(0)
    rates = np.zeros((rate_distortion._N_LEVELS, rate_distortion._N_SIZES))
    none, n = np.zeros((0, 0), np.float32), 4
    for _ in range(20):
        weight = generator.normal(0, 1, (1, n)).astype(np.float32)
        ua = (np.eye(n) + np.triu(generator.uniform(-1, 1, (n, n)), 1)).astype(np.float32)
        importance = generator.uniform(0.1, 10, (1, n)).astype(np.float32)
        zeros = [np.zeros((1, n), np.float32) for _ in range(4)]
        found = np.zeros((1, n), np.int32)
        ones, counts = np.ones((1, n), np.float32), np.zeros_like(rates)
        register = np.full(1, 0 if trellis else -1)
        tile(weight, ones, ones, importance, *zeros[:2], ua, none, 0.0, 127, 512, counts, rates, register, found, *zeros[2:])

        def errors(codes, weight=weight, ua=ua):
            row = torch.tensor([codes])
            shifted = row - 0.5 * row.sign() * rate_distortion._shifts(row) if trellis else row
            return (weight[:, : len(codes)] - shifted.numpy()) @ ua[: len(codes)]

        def best(codes, errors=errors, importance=importance):
            if len(codes) == n:
                return float((importance * errors(codes) ** 2).sum())
            target = float(errors([*codes, 0])[0, len(codes)])
            below = int(abs(target) + (0.5 if trellis and register_of([*codes, 0])[-1] else 0.0))
            return min(best([*codes, int(math.copysign(size, target))]) for size in {0, below, below + 1})

        harm = float((importance * errors([int(code) for code in found[0]]) ** 2).sum())
        assert harm <= best([]) * (1 + 1e-4)


def register_of(codes):
    """Which codes are shifted, the register written out."""
    shifted, before = [], [0, 0, 0]
    for code in codes:
        shifted.append(bool(before[1]))
        before = [(code & 1) ^ before[0] ^ before[2], before[0], before[1]]
    return shifted


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 300])
def test_shifts_are_those_of_the_register(n):
    codes = torch.randint(-9, 10, (7, n), generator=torch.Generator().manual_seed(n)).to(torch.int8)
    assert rate_distortion._shifts(codes).tolist() == [register_of(row) for row in codes.tolist()]


def test_a_trellis_leaves_less_damage_and_bits_together(monkeypatch):
    site, statistics = observed(64, 300)
    sums = []
    for least in (math.inf, 1.0):
        monkeypatch.setattr(rate_distortion, "_TRELLIS_FROM", least)
        technique = RateDistortion(slope=1e-5)
        structure, parts = technique.solve(site, statistics)
        assert structure.trellis == (least == 1.0)
        sums.append(technique.damage(site, parts, statistics) + 1e-5 * bits_of(parts))
    assert sums[1] < 0.985 * sums[0]


def test_a_trellis_follows_rows_of_several_matrices_and_is_left_out_where_it_cannot_pay():
    site, statistics = observed(64, 128)
    assert not RateDistortion(slope=1e-2).decide(site, statistics).trellis  # hardly any code is not zero
    filters = torch.randn(24, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    use = Kronecker(torch.eye(9).expand(24, 9, 9).contiguous(), torch.ones(24, 1, 1), Layout((24, 1, 9), (9, 9, 1)))
    statistics = Statistics({"weight": Curvature(filters.shape, [use])})
    structure, parts = RateDistortion(slope=1e-5).solve(site_of(filters), statistics)
    assert structure.trellis and float((parts() - filters).abs().max()) < 0.05
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    transposed = Kronecker(torch.eye(16)[None], torch.eye(24)[None], Layout((1, 24, 16), (384, 1, 24)))
    statistics = Statistics({"weight": Curvature(weight.shape, [transposed])})
    structure, parts = RateDistortion(slope=1e-5).solve(site_of(weight), statistics)
    assert not structure.trellis and float((parts() - weight).abs().max()) < 0.05


@pytest.mark.parametrize("slope", [1e-5, 1e-4, 1e-3])
def test_no_plain_rounding_has_less_damage_and_bits_together(slope):
    site, statistics = observed(48, 96, seed=1)
    technique = RateDistortion(slope=slope)
    _, parts = technique.solve(site, statistics)
    ours = technique.damage(site, parts, statistics) + slope * bits_of(parts)
    curvature = statistics.curvature("weight")
    for exponent in np.arange(-5, 3, 0.5):
        value, bits = rounded(site.tensor, float(site.tensor.std()) * 2.0**exponent)
        assert ours < curvature.damage(value - site.tensor) + slope * bits


def test_a_steeper_slope_leaves_more_zeros_and_larger_steps():
    site, statistics = observed(32, 64)
    solved = [RateDistortion(slope=slope).solve(site, statistics)[1] for slope in (1e-5, 1e-4, 1e-3)]
    zeros = [int((parts.codes == 0).sum()) for parts in solved]
    assert zeros == sorted(zeros) and zeros[0] < zeros[-1]
    assert solved[0].rows.float().mean() < solved[1].rows.float().mean() < solved[2].rows.float().mean()


def test_every_tensor_of_a_network_sits_at_the_slope_asked_for():
    """Around the slope, damage won for a bit more is what the slope says, up to what damping takes the curvature for."""
    for seed, scale in ((2, 1.0), (3, 100.0)):
        site, statistics = observed(64, 128, seed)
        use = statistics.curvature("weight").terms[0]
        use.gradients.mul_(scale)
        slope = 1e-4
        ends = []
        for factor in (0.5, 2.0):
            technique = RateDistortion(slope=slope * factor)
            _, parts = technique.solve(site, statistics)
            ends.append((technique.damage(site, parts, statistics), bits_of(parts)))
        (less, more_bits), (more, fewer_bits) = ends
        assert 0.3 * slope < (more - less) / (more_bits - fewer_bits) < 1.5 * slope


def test_important_columns_get_finer_steps():
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    inputs = torch.diag(4.0 ** torch.arange(32).remainder(4).float())
    use = Kronecker(inputs[None], torch.eye(64)[None], Layout((1, 64, 32), (2048, 32, 1)))
    structure, parts = RateDistortion(slope=1e-3).solve(site_of(weight), Statistics({"weight": Curvature(weight.shape, [use])}))
    assert structure.columns and not structure.rows
    steps = parts.columns.float().reshape(8, 4).mean(0)
    assert torch.equal(steps.diff(), torch.full((3,), -4.0))  # four times the importance: half the step, four quarter octaves


def test_what_no_statistics_saw_is_kept_by_its_size():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    _, parts = RateDistortion(slope=1e-6).solve(site_of(weight), Statistics())
    assert float((parts() - weight).abs().max()) < 0.05 * float(weight.abs().max())


def test_however_little_a_bit_is_worth_the_codes_fit():
    site, statistics = observed(32, 48)
    _, parts = RateDistortion(slope=1e-30).solve(site, statistics)
    assert float((parts() - site.tensor).abs().max()) < 1e-2 * float(site.tensor.abs().max())


def test_slices_of_a_fused_tensor_each_follow_their_own_use():
    """Two halves with uses of their own: the half that matters a thousand times more comes out that much closer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 24, generator=generator)
    terms = [
        Kronecker(spd(24, 12, generator)[None], scale * torch.eye(16)[None], Layout((1, 16, 24), (384, 24, 1), offset))
        for scale, offset in ((1000.0, 0), (1.0, 384))
    ]
    _, parts = RateDistortion(slope=1e-2).solve(site_of(weight), Statistics({"weight": Curvature(weight.shape, terms)}))
    error = (parts() - weight).square().mean(1)
    assert float(error[16:].mean()) > 100 * float(error[:16].mean())


def test_depthwise_groups_and_vectors_are_coded():
    filters = torch.randn(24, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    use = Kronecker(torch.eye(9).expand(24, 9, 9).contiguous(), torch.ones(24, 1, 1), Layout((24, 1, 9), (9, 9, 1)))
    _, parts = RateDistortion(slope=1e-4).solve(site_of(filters), Statistics({"weight": Curvature(filters.shape, [use])}))
    assert parts().shape == filters.shape and float((parts() - filters).abs().max()) < 0.1
    vector = torch.linspace(-1, 1, 40)
    hessian = torch.where(torch.arange(40) < 20, 1e4, 1e-6)
    statistics = Statistics({"weight": Curvature(vector.shape, [Diagonal(hessian)])})
    _, parts = RateDistortion(slope=1e-2).solve(site_of(vector), statistics)
    error = (parts() - vector).abs()
    assert float(error[:20].max()) < 0.02 and float(error[20:].max()) > 10 * float(error[:20].max())


def test_rows_that_the_weightier_use_covers_are_left_to_it():
    """A tied tensor: as an embedding and as a head. The use of larger trace decides, and every element is coded once."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 16, generator=generator)
    head = Kronecker(spd(16, 8, generator)[None], torch.eye(40)[None], Layout((1, 40, 16), (640, 16, 1)))
    table = Kronecker(torch.ones(1, 40) * 1e-3, torch.eye(16)[None], Layout((1, 16, 40), (640, 1, 16)))
    _, parts = RateDistortion(slope=1e-3).solve(site_of(weight), Statistics({"weight": Curvature(weight.shape, [table, head])}))
    assert float((parts() - weight).square().mean()) < 0.1


def test_scales_are_exact_powers():
    powers = rate_distortion._powers().double()
    assert torch.equal(powers[::4], 2.0 ** torch.arange(-32, 32).double())
    assert torch.allclose(powers[1:] / powers[:-1], torch.tensor(2.0**0.25).double(), rtol=1e-6)


def test_the_same_codes_come_out_twice():
    site, statistics = observed(70, 150)
    first, second = (RateDistortion(slope=1e-4).solve(site, statistics)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_the_loops_stay_within_their_arrays_under_bounds_checks(monkeypatch):
    import numba

    site, statistics = observed(70, 150)
    expected = RateDistortion(slope=1e-3).solve(site, statistics)[1]
    rate_distortion._compiled_tile()
    checked = numba.njit(rate_distortion._tile, boundscheck=True)
    monkeypatch.setattr(rate_distortion, "_compiled_tile", lambda: checked)
    found = RateDistortion(slope=1e-3).solve(site, statistics)[1]
    assert torch.equal(found.codes, expected.codes)


def test_decoders_built_for_shapes_alone_leave_later_ones_whole():
    """What is built on the meta device first must not be handed to a network with values."""
    technique = RateDistortion(slope=1e-4)
    site = Site.of(nn.Linear(8, 4), "weight")
    with torch.device("meta"):
        technique.build(site.on_meta(), technique.structure_type())
    assert technique.build(site, technique.structure_type())().device.type == "cpu"
