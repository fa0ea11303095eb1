import pytest

from pared.report.plots import Axis, Plot, rank_correlation


def test_rank_correlation_matches_the_closed_form():
    stats = pytest.importorskip("scipy.stats")
    a, b = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0]
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize("low, high", [(1e-9, 1e3), (2, 5), (900, 1100), (1, 1e12), (0.03, 0.031)])
def test_logarithmic_ticks_lie_on_the_axis(low, high):
    axis = Axis.around("x", [low, high], str, log=True)
    assert 0 < len(axis.ticks()) <= 12
    assert all(-0.01 <= axis.at(tick) <= 1.01 for tick in axis.ticks())


@pytest.mark.parametrize("low, high", [(0, 1), (-0.2, 0.7), (5, 5), (0, 0), (1e-12, 3e-12), (-1e9, 1e9)])
def test_linear_ticks_lie_on_the_axis(low, high):
    axis = Axis.around("x", [low, high], str)
    assert 2 <= len(axis.ticks()) <= 12
    assert all(-0.01 <= axis.at(tick) <= 1.01 for tick in axis.ticks())


def test_up_is_up():
    plot = Plot(Axis.around("x", [0, 1], str), Axis.around("y", [0, 10], str), "")
    assert plot.py(10) < plot.py(0) and plot.px(0) < plot.px(1)
