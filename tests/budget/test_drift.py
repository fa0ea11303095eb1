"""Weights that follow the coded layers before them, against the least squares written out."""

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import sources, trials
from pared.budget import drift
from pared.budget.damage import held_out, references
from pared.budget.observe import observe
from pared.budget.reconstruct import whole_batch
from pared.quantize import RateDistortion
from pared.site import duplicate, plain
from pared.sources.loader import ArrayLoader
from pared.statistics import Statistics
from pared.technique import Cost, Option


def task_of(n=256):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator) / 4
    x = torch.randn(n, 12, generator=generator) @ mix
    batches = [(x[i : i + 64], torch.arange(64) % 4) for i in range(0, n, 64)]
    return pared.Task(batches, batches, calibration=batches)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def options_of(model, technique, statistics):
    return [Option(site, technique, Cost(), 0.0, technique.decide(site, statistics)) for site in technique.sites(model)]


def test_weights_are_the_ridge_solution_on_the_inputs_from_the_coded_layers_before(monkeypatch):
    model, task, technique = net(), task_of(), RateDistortion(slope=3e-5)
    statistics = Statistics()
    moved = duplicate(model)
    distances = iter((0.0, 1.0))
    monkeypatch.setattr(drift, "_distance", lambda *_: next(distances))
    drift.follow_(moved, options_of(moved, technique, statistics), statistics, task)
    for name in ("0.weight", "0.bias"):  # nothing is coded before it
        torch.testing.assert_close(moved.get_parameter(name), model.get_parameter(name))
    coded = duplicate(moved)
    sites = [site for site in technique.sites(coded) if site.path.startswith("0.")]
    with torch.no_grad():
        for site in sites:
            site.tensor.copy_(technique.solve(site, statistics)[1]())
        x = torch.cat([batch[0] for batch in task.calibration(256)])
        read, was = coded[:2](x).double(), model[:2](x).double()
        old, bias = model[2].weight.double(), model[2].bias.double()
        target = was @ old.T + bias
        centred, rest = read - read.mean(0), (target - target.mean(0)) - (read - read.mean(0)) @ old.T
        gram = centred.T @ centred / len(x)
        held = gram + drift.RIDGE * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
        expected = old + torch.linalg.solve(held, centred.T @ rest / len(x)).T
        torch.testing.assert_close(moved[2].weight.double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moved[2].bias.double(), target.mean(0) - expected @ read.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slope", [3e-7, 3e-6, 3e-5])
def test_what_is_coded_afterwards_is_never_farther_from_the_original_on_validation_data(slope, monkeypatch):
    model, task = net(), task_of()

    def distance():
        batches = held_out(task, 256)
        small = pared.apply(model, task, RateDistortion(slope=slope))
        return drift._distance(small, task, batches, references(model, task, batches))

    followed = distance()
    monkeypatch.setattr(RateDistortion, "corrects", False)
    assert followed <= distance() * (1 + 1e-6)


def test_a_trained_network_comes_closer_to_what_it_was(monkeypatch):
    trained = sources.data("digits").task
    torch.manual_seed(0)
    first, second, third = (nn.Conv2d(a, 16, 3, padding=1) for a in (1, 16, 16))
    head = [nn.Flatten(), nn.Linear(256, 10)]
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), third, nn.ReLU(), *head)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(12):
        for batch in trained.train:
            optimiser.zero_grad()
            trained.batch_loss(model(batch[0]), batch).backward()
            optimiser.step()
    batches = list(trained.test)
    expected = references(model.eval(), trained, batches)
    distances = []
    for corrects in (True, False):
        monkeypatch.setattr(RateDistortion, "corrects", corrects)
        small = pared.apply(model, trained, RateDistortion(slope=1e-5))
        distances.append(drift._distance(small, trained, batches, expected))
    assert distances[0] < 0.9 * distances[1]


def test_what_was_coded_on_the_way_is_what_is_coded_at_the_end():
    """The network that later layers were fitted on is the one that comes out."""
    model, task, technique = net(), task_of(), RateDistortion(slope=3e-5)
    seen = observe(model, task, [technique], task.example(model))
    first, second = (plain(pared.apply(model, task, technique)) for _ in range(2))
    twin = duplicate(model)
    drift.follow_(twin, options_of(twin, technique, seen), seen, task)
    with torch.no_grad():
        for site in list(technique.sites(twin)):
            structure = technique.decide(site, seen)
            parts = technique.build(site, structure)
            technique.fit(site, parts, seen)
            site.tensor.copy_(parts())
    for path, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[path]) and torch.equal(value, twin.state_dict()[path])


def test_what_is_too_small_to_code_moves_along_or_stays(monkeypatch):
    """A bias of two numbers is fitted with its layer; where the moved weights are not taken, it is what it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 2)).eval()
    drawn = task_of()
    batches = [(x, y % 2) for x, y in drawn.train]
    task, technique, statistics = pared.Task(batches, batches, calibration=batches), RateDistortion(slope=1e-4), Statistics()
    for distances, stays in (((1.0, 0.0), True), ((0.0, 1.0), False)):
        given = iter(distances)
        monkeypatch.setattr(drift, "_distance", lambda *_, given=given: next(given))
        moved = duplicate(model)
        drift.follow_(moved, options_of(moved, technique, statistics), statistics, task)
        assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), model.parameters(), strict=True)) == stays
        assert torch.equal(moved[2].bias, model[2].bias) == stays


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        return self.second(x if float(x.sum()) > 0 else -x)


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x):
        return self.layers(x.view(64, 12))


@pytest.mark.parametrize("why", ["no graph", "fixed batch", "coded already", "too large", "few examples", "few groups", "no data"])
def test_networks_that_cannot_be_followed_keep_their_weights(why, monkeypatch):
    model = {"no graph": Branching, "fixed batch": FixedBatch}.get(why, net)().eval()
    technique, task = RateDistortion(slope=1e-4), task_of(128 if why == "few examples" else 256)
    if why == "coded already":
        model[0] = pared.apply(model[0], None, RateDistortion(slope=1e-2))
    if why == "few groups":
        x, y = (torch.cat(parts) for parts in zip(*task.train, strict=True))
        loader = ArrayLoader(x, y, 64, groups=np.arange(256) // 4)
        task = pared.Task(loader, loader, calibration=loader)
    options = options_of(model, technique, Statistics())
    assert options
    if why == "too large":
        monkeypatch.setattr(drift, "_MACS", 1.0)
    distances = iter((0.0, 1.0))  # whatever was moved would be taken
    monkeypatch.setattr(drift, "_distance", lambda *_: next(distances))
    before = {path: value.clone() for path, value in plain(model).state_dict().items()}
    drift.follow_(model, options, Statistics(), None if why == "no data" else task)
    assert all(torch.equal(value, before[path]) for path, value in plain(model).state_dict().items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.middle, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.middle(self.table(ids)).tanh())


def tied_task():
    drawn = [torch.randint(20, (128, length), generator=torch.Generator().manual_seed(i)) for i, length in enumerate((6, 6, 9))]
    batches = [(ids, ids.roll(-1, 1)) for ids in drawn]
    return pared.Task(batches, batches, loss=lambda out, b: nn.functional.cross_entropy(out.flatten(0, 1), b[1].flatten()),
                      metric=lambda out, b: (out.argmax(2) == b[1]).float().mean(1))  # fmt: skip


def test_what_is_judged_is_what_comes_out(monkeypatch):
    """A table that is the head, too: it is coded where it is read first, and the head does not move it again."""
    model, task, technique, statistics = Tied().eval(), tied_task(), RateDistortion(slope=1e-5), Statistics()
    judged = []

    def distance(model, *_):
        judged.append({path: value.clone() for path, value in model.state_dict().items()})
        return float(len(judged))  # the first one, moved, is taken

    monkeypatch.setattr(drift, "_distance", distance)
    moved = duplicate(model)
    drift.follow_(moved, options_of(moved, technique, statistics), statistics, task)
    assert not torch.equal(moved.middle.weight, model.middle.weight)
    for site in technique.sites(moved):
        with torch.no_grad():
            site.tensor.copy_(technique.solve(site, statistics)[1]())
    assert all(torch.equal(value, judged[0][path]) for path, value in moved.state_dict().items())


def test_of_batches_in_several_lengths_those_like_the_first_are_joined():
    (ids, targets) = whole_batch(tied_task(), 384)
    assert ids.shape == (256, 6) and targets.shape == (256, 6)


def test_what_all_examples_share_is_not_joined_and_must_be_the_same():
    mask = torch.eye(4)
    batches = [({"x": torch.randn(n, 4), "mask": m}, None) for n, m in ((64, mask), (64, 2 * mask), (32, mask.clone()), (64, mask))]
    task = pared.Task(batches, batches, loss=lambda out, b: out.sum(), metric=lambda out, b: out.sum(1))
    inputs, _ = whole_batch(task)
    assert inputs["x"].shape == (160, 4) and torch.equal(inputs["mask"], mask)


def test_plans_that_are_carried_out_are_followed(monkeypatch):
    """`compress` without training asks for it, too."""
    model, task, seen = net(), task_of(), []
    real = trials.follow_
    monkeypatch.setattr(trials, "follow_", lambda *args: (seen.append(len(args[1])), real(*args)))
    pared.compress(model, task, size="4x", train=False)
    assert seen and all(n > 0 for n in seen)
