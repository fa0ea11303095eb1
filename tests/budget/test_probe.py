"""One factor brings predicted damage to what unseen data feel; nothing else changes."""

import pytest
import torch
from torch import nn

from pared.budget import damage
from pared.budget.calibrate import gather
from pared.budget.damage import held_out, measure, references
from pared.budget.probe import _rounded, correct_
from pared.site import tensor_sites
from pared.statistics import Statistics
from pared.task import Task


class Fixed(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self):
        return self.value


def clusters(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=generator)
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    return centres[y] + 1.6 * torch.randn(n, 12, generator=generator), y


@pytest.fixture(scope="module")
def memorised():
    """A net that knows its 256 training examples by heart, with unseen validation and test data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x, y = clusters(256, 0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval(), Task(train=[(x, y)], val=[clusters(256, 1)], test=[clusters(512, 2)])


def ratio(model, task, statistics, batches):
    """Median of predicted over measured, tensors rounded to 16 steps."""
    originals = references(model, task, batches)
    found = []
    for site in tensor_sites(model):
        value = site.tensor.detach()
        if value.ndim == 2:
            rounded = _rounded(value, 8)
            predicted = statistics.curvature(site.path).damage(rounded - value)
            found.append(predicted / measure(model, site, Fixed(rounded), task, batches, originals))
    return float(torch.tensor(found).median())


def test_a_net_that_memorised_is_predicted_well_on_data_that_nobody_has_seen(memorised):
    model, task = memorised
    gathered, statistics = gather(model, task), gather(model, task)
    factor = correct_(model, task, statistics)
    test = list(task.test)
    assert ratio(model, task, gathered, test) < 0.1
    assert 1 / 3 < ratio(model, task, statistics, test) < 3
    assert factor > 10


def test_every_damage_is_multiplied_by_the_factor_and_positions_are_kept(memorised):
    model, task = memorised
    gathered, statistics = gather(model, task), gather(model, task)
    factor = correct_(model, task, statistics)
    assert statistics.positions == gathered.positions
    assert set(statistics) == set(gathered)
    for site in tensor_sites(model):
        delta = torch.randn_like(site.tensor)
        before, after = (s.curvature(site.path).damage(delta) for s in (gathered, statistics))
        assert after == pytest.approx(factor * before, rel=1e-4)


def test_the_result_does_not_depend_on_the_scale_it_starts_from(memorised):
    model, task = memorised
    statistics = gather(model, task)
    correct_(model, task, statistics)
    delta = torch.randn(64, 12)
    once = statistics.curvature("0.weight").damage(delta)
    assert correct_(model, task, statistics) == pytest.approx(1.0, rel=1e-4)
    assert statistics.curvature("0.weight").damage(delta) == pytest.approx(once, rel=1e-3)


def test_the_model_is_left_as_it_was(memorised):
    model, task = memorised
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    correct_(model, task, gather(model, task))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_curvature_there_is_no_factor(memorised):
    model, task = memorised
    statistics = Statistics()
    assert correct_(model, task, statistics) == 1.0 and not statistics


def test_held_out_examples_are_the_first_of_the_validation_data():
    x = torch.arange(10.0)[:, None]
    task = Task(train=[(x, None)], val=[(x[:4], None), (x[4:8], None), (x[8:], None)])
    assert torch.equal(torch.cat([inputs for inputs, _ in held_out(task, 6)]), x[:6])
    assert torch.equal(torch.cat([inputs for inputs, _ in held_out(task, 50)]), x)


def test_of_wide_outputs_fewer_examples_are_kept_one_at_least(monkeypatch):
    batches = [(torch.zeros(10, 1), torch.zeros(10, 50))]
    model, task = nn.Linear(1, 50), Task(train=batches, val=batches)
    assert damage.kept(model, task, 10) == 10
    monkeypatch.setattr(damage, "MOST_NUMBERS", 120)
    assert damage.kept(model, task, 10) == 2
    monkeypatch.setattr(damage, "MOST_NUMBERS", 20)
    assert damage.kept(model, task, 10) == 1
