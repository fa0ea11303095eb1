"""Average, schedule and seeds against closed forms."""

import random

import numpy as np
import pytest
import torch

from pared.train.ema import Average, decay_for
from pared.train.schedule import Schedule
from pared.train.seeds import seed_epoch


def test_the_average_is_the_normalised_geometric_sum():
    weight, decay, values = torch.zeros(3, dtype=torch.float64), 0.9, torch.randn(40, 3, dtype=torch.float64)
    average = Average([weight], decay)
    for value in values:
        weight.copy_(value)
        average.update()
    powers = decay ** torch.arange(39, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(average.values[0], (powers[:, None] * values).sum(0) / powers.sum())


def test_the_average_forgets_the_weights_before_training():
    weight = torch.full((2,), 100.0)
    average = Average([weight], 0.999)
    weight.fill_(1.0)
    average.update()
    assert torch.equal(average.values[0], torch.ones(2))


def test_short_trainings_average_over_their_last_tenth():
    assert decay_for(0.999, 100) == pytest.approx(0.9)
    assert decay_for(0.999, 10**6) == 0.999
    assert decay_for(0.999, 5) == 0.0


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_schedules_rise_to_the_peak_and_then_never_rise(shape):
    schedule = Schedule(shape, 0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:11] == sorted(factors[:11]) and factors[0] > 0
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    if shape != "constant":
        assert 0 <= factors[-1] < 0.02


def test_a_function_is_a_schedule():
    assert Schedule(lambda t: 1 - t**2, 0.0).factor(5, 10) == 0.75


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(1)), float(np.random.rand()), random.random()


def test_an_epochs_seed_sets_every_generator_and_differs_by_seed_step_and_epoch():
    loader = torch.utils.data.DataLoader(range(100), shuffle=True, generator=torch.Generator())
    seen = set()
    for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2)]:
        seed_epoch(loader, *key)
        first, order = drawn(), [int(i) for i in loader]
        drawn()
        seed_epoch(loader, *key)
        assert drawn() == first and [int(i) for i in loader] == order
        seen.add((first, tuple(order)))
    assert len(seen) == 4
