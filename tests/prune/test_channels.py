"""prune.channels: which channels go, what is left, and that it can be saved, loaded, exported and trained."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pared
from pared import prune, quantize
from pared.budget.channels import masks, plan_channels
from pared.budget.responses import responses
from pared.errors import BudgetError, InputError, RecipeError
from pared.graph.channels import Channels
from pared.statistics import Statistics
from pared.technique import Cost, Option
from pared.testing import net

KEEP = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]


@pytest.fixture(scope="module")
def perceptron():
    return net("perceptron")


def accuracy(model, task):
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in task.val)
    return right / sum(len(y) for _, y in task.val)


def test_half_of_every_group_leaves_half_of_every_hidden_layer(perceptron):
    smaller = pared.apply(perceptron.model, perceptron.task, prune.Channels(keep=0.5))
    shapes = [tuple(p.shape) for p in smaller.parameters() if p.ndim == 2]
    assert shapes == [(24, 64), (16, 24), (10, 16)]
    assert [m.out_features for m in smaller.modules() if isinstance(m, nn.Linear)] == [24, 16, 10]


def test_a_smaller_model_saves_loads_both_ways_exports_and_trains(perceptron, tmp_path):
    smaller = pared.apply(perceptron.model, perceptron.task, prune.Channels(keep=0.5))
    pared.save(smaller, tmp_path / "net.pared")
    x = perceptron.inputs
    with torch.no_grad():
        expected = smaller(x)
        assert torch.equal(pared.load(tmp_path / "net.pared")(x), expected)
        replayed = pared.load(tmp_path / "net.pared", copy.deepcopy(perceptron.model))
        assert torch.equal(replayed.eval()(x), expected)
    replayed.requires_grad_(True).train()
    F.cross_entropy(replayed(x), expected.argmax(1)).backward()
    assert all(p.grad is not None for p in replayed.parameters())


def test_what_other_layers_can_make_up_for_goes_first():
    """Unit 2 is twice unit 0: removing either costs nothing once the next layer is refitted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 2 * model[0].weight[0], 2 * model[0].bias[0]
    x = torch.randn(512, 6)
    batches = [(x, model(x).argmax(1))]
    task = pared.Task(train=batches, val=batches)
    smaller = pared.apply(model, task, prune.Channels(keep=0.8))
    with torch.no_grad():
        error = (smaller(x) - model(x)).abs().max() / model(x).abs().max()
    assert smaller[0].out_features == 4
    assert error < 0.01


def test_refitting_wins_back_most_of_what_a_cut_loses(perceptron, monkeypatch):
    corrected = pared.apply(perceptron.model, perceptron.task, prune.Channels(keep=0.5))
    monkeypatch.setattr(prune.Channels, "corrects", False)
    bare = pared.apply(perceptron.model, perceptron.task, prune.Channels(keep=0.5))
    whole = accuracy(perceptron.model, perceptron.task)
    assert whole - accuracy(corrected, perceptron.task) < 0.5 * (whole - accuracy(bare, perceptron.task))


@pytest.mark.parametrize("importance", ["taylor", "fisher", "apoz", "l1", "l2", "geometric_median", "random"])
def test_every_importance_measure_orders_all_channels(perceptron, importance):
    technique = prune.Channels(keep=0.5, importance=importance)
    smaller = pared.apply(perceptron.model, perceptron.task, technique)
    assert next(iter(smaller.parameters())).shape == (24, 64)


def test_taylor_is_the_square_of_activation_times_gradient(perceptron):
    """Against autograd on the hidden layer's own values."""
    graph = Channels(perceptron.copy(), (perceptron.inputs,))
    found = responses(graph, perceptron.task)
    model, total, n = perceptron.copy(), 0.0, 0
    for x, y in perceptron.task.calibration(256):
        hidden = torch.relu(model.layers[0](x.flatten(1))).detach().requires_grad_()
        loss = F.cross_entropy(model.layers[2:](hidden), y)
        (gradient,) = torch.autograd.grad(loss, hidden)
        total, n = total + (len(x) * hidden * gradient).square().sum(0).detach(), n + len(x)
    assert np.allclose(found["layers.0"].taylor, (total / n).numpy(), rtol=1e-4)


def test_a_plan_for_macs_meets_them_as_measured(perceptron):
    recipe = {"steps": [{"prune.channels": {"keep": KEEP}}]}
    result = pared.compress(perceptron.model, perceptron.task, recipe, macs="2x", train=False)
    assert result.met
    assert 2 <= result.before.macs / result.after.macs < 2.6


def test_costs_of_groups_multiply_in_a_plan(perceptron):
    graph = Channels(perceptron.copy(), (perceptron.inputs,))
    options = [
        Option(site, technique, Cost(), 1 - keep, technique.solve(site, Statistics())[0])
        for keep in KEEP
        for technique in [prune.Channels(keep=keep)]
        for site in technique.sites(graph.model, graph)
    ]
    whole = graph.macs({})
    assert whole == 64 * 48 + 48 * 32 + 32 * 10
    for share in (0.8, 0.5, 0.25):
        assert graph.macs(masks(plan_channels(options, graph, macs=share * whole), graph)) <= share * whole
    with pytest.raises(BudgetError, match="smaller values of keep"):
        plan_channels(options, graph, macs=0.01 * whole)


def test_rounds_end_at_the_planned_network(perceptron):
    recipe = {"steps": [{"prune.channels": {"keep": KEEP}, "train": {"epochs": 4, "rounds": 2}}]}
    result = pared.compress(perceptron.model, perceptron.task, recipe, macs="3x")
    assert result.met and result.before.macs / result.after.macs >= 3
    assert [trial["epochs"] for trial in result.data["trials"]] == [0, 4]


def test_protected_layers_stay_whole(perceptron):
    smaller = pared.apply(perceptron.model, perceptron.task, prune.Channels(keep=0.5, protect="layers.0"))
    assert [tuple(p.shape) for p in smaller.parameters() if p.ndim == 2] == [(48, 64), (16, 48), (10, 16)]


def test_round_to_leaves_multiples(perceptron):
    smaller = pared.apply(perceptron.model, perceptron.task, prune.Channels(keep=0.4, round_to=8))
    assert [m.out_features for m in smaller.modules() if isinstance(m, nn.Linear)] == [16, 16, 10]


def test_bad_input_gets_one_clear_line(perceptron):
    for keep in (0, 1, 1.5):
        with pytest.raises(ValueError):
            prune.Channels(keep=keep)
    with pytest.raises(RecipeError, match=r"no layer is called layer\.0; near it are layers"):
        pared.apply(perceptron.model, perceptron.task, prune.Channels(keep=0.5, protect="layer.0"))
    with pytest.raises(InputError, match="give apply a task"):
        pared.apply(perceptron.model, None, prune.Channels(keep=0.5))
    alone = nn.Linear(4, 3).eval()
    batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(InputError, match="changes nothing"):
        pared.apply(alone, pared.Task(train=batches, val=batches), prune.Channels(keep=0.5))
    with pytest.raises(RecipeError, match="cannot stand in a chain"):
        pared.Chain(prune.Channels(keep=0.5), prune.Magnitude(sparsity=0.5))


def test_code_with_sizes_of_its_own_is_left_behind_when_asked(tmp_path):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).relu().view(-1, 16))

    torch.manual_seed(0)
    model, x = Stubborn().eval(), torch.randn(64, 8)
    task = pared.Task([(x, torch.arange(64) % 4)], [(x, torch.arange(64) % 4)])
    kept = pared.apply(model, task, prune.Channels(keep=0.5))
    assert kept.b.out_features == 16
    technique = prune.Channels(keep=0.5, rewrite=True)
    small = pared.apply(model, task, technique)
    assert sorted(p.shape for p in small.parameters() if p.ndim == 2) == [(4, 8), (6, 8), (8, 6)]
    small.train()(x).sum().backward()
    pared.save(small.eval(), tmp_path / "small.pared")
    loaded = pared.load(tmp_path / "small.pared")
    torch.testing.assert_close(loaded(x[:5]), small(x[:5]))
    with pytest.raises(InputError, match="use it alone"):
        pared.apply(model, task, [technique, quantize.Integer(bits=8)])
    with pytest.raises(InputError, match="use them before"):
        pared.apply(small, task, quantize.Integer(bits=8))
    with pytest.raises(InputError, match="use pared.apply"):
        pared.compress(model, task, {"steps": [{"prune.channels": {"rewrite": True}}]}, macs="2x", train=False)
