"""What a drop on validation data must keep below the accepted one."""

import numpy as np
import pytest

from pared.measurement.quality import Drop, Quality, drop
from pared.search import margin


def measured(n_examples: int, n_worse: int, n_better: int = 0) -> Drop:
    before = np.ones(n_examples)
    before[:n_better] = 0
    after = np.ones(n_examples)
    after[n_examples - n_worse :] = 0
    return drop(Quality("accuracy", before), Quality("accuracy", after))


def test_the_margin_is_the_standard_error_of_the_paired_drop():
    found = measured(10_000, n_worse=80, n_better=40)
    expected = 100 * np.sqrt((0.012 - 0.004**2) / 10_000)  # of a difference that is 1, -1 or 0
    assert margin(found, 0.5) == pytest.approx(expected, rel=0.05)


def test_few_examples_keep_half_of_what_is_accepted_and_no_more():
    found = measured(100, n_worse=3, n_better=3)
    assert found.standard_error > 1
    assert margin(found, 0.5) == 0.25
    assert found.value + margin(found, 0.5) <= 0.5


def test_a_plan_that_changes_nothing_needs_no_margin():
    assert margin(measured(50, 0), 0.5) == 0.0


def test_a_single_independent_unit_keeps_half():
    assert margin(Drop(0.1, None, None, 30, 1, "pp"), 1.0) == 0.5


def test_a_limit_of_zero_asks_for_no_drop_and_no_more():
    assert margin(measured(100, n_worse=1, n_better=1), 0.0) == 0.0
