"""Biases after rounding: means of all layers come back, in the order of the network."""

import pytest
import torch
from torch import nn

import pared
from pared.budget.biases import correct_biases_
from pared.measurement.quality import evaluate
from pared.quantize import Activations
from pared.site import duplicate


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bare = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, bias=False)
        self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.bare(torch.relu(self.first(x)))).mean((2, 3))
        return self.head(self.twice(torch.relu(self.twice(x))))


@pytest.fixture
def task():
    x = torch.randn(96, 1, 6, 6, generator=torch.Generator().manual_seed(0)).relu()
    batches = [(x[i : i + 32], torch.arange(32) % 3) for i in range(0, 96, 32)]
    return pared.Task(batches, batches, calibration=batches)


def outputs(model, task, path):
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, o: found.append(o), prepend=True)
    with torch.no_grad():
        for batch in task.calibration(96):
            task.outputs(model, batch)
    handle.remove()
    return torch.cat(found)


def test_means_come_back_and_layers_that_cannot_be_corrected_stay(task):
    torch.manual_seed(0)
    before = Net().eval()
    after = duplicate(before)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.mul_(1.2)
    held = {path: after.get_submodule(path).bias.clone() for path in ("first", "twice", "head")}
    correct_biases_(after, before, task)
    for path, axes in (("first", (0, 2, 3)), ("head", (0,))):
        assert not torch.equal(after.get_submodule(path).bias, held[path])
        torch.testing.assert_close(outputs(after, task, path).mean(axes), outputs(before, task, path).mean(axes))
    assert torch.equal(after.twice.bias, held["twice"])  # it runs twice
    assert after.bare.bias is None


def test_rounded_activations_are_closer_to_the_original_with_corrected_biases(task, monkeypatch):
    torch.manual_seed(0)
    model = Net().eval()

    def distance(small):
        x = torch.cat([batch[0] for batch in task.val])
        with torch.no_grad():
            return float((small(x) - model(x)).square().mean())

    corrected = distance(pared.apply(model, task, Activations(bits=3)))
    monkeypatch.setattr(Activations, "corrects", False)
    assert corrected < 0.9 * distance(pared.apply(model, task, Activations(bits=3)))


def test_the_correction_is_in_the_file(task, tmp_path):
    small = pared.apply(Net().eval(), task, Activations(bits=4))
    pared.save(small, tmp_path / "net.pared")
    scores = [evaluate(net, task, task.val).value for net in (small, pared.load(tmp_path / "net.pared"))]
    assert scores[0] == scores[1]


def test_a_layer_that_sees_one_vector_is_corrected_too():
    class Queried(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.map, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.relu(x + self.map(self.query)))

    x = torch.randn(32, 6)
    task = pared.Task([(x, torch.arange(32) % 3)], [(x, torch.arange(32) % 3)])
    before = Queried().eval()
    after = duplicate(before)
    with torch.no_grad():
        after.map.weight.mul_(1.1)
    correct_biases_(after, before, task)
    torch.testing.assert_close(after.map(after.query), before.map(before.query))
