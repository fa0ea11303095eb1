"""prune.group_lasso: the proximal step against its closed form, and what is left of a trained network when norms decided."""

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import prune, registry
from pared.errors import InputError, RecipeError
from pared.graph.channels import Channels
from pared.prune.group_lasso import Proximal
from pared.testing import net
from pared.train import train

KEEP = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
TRAIN = {"epochs": 16, "tune_epochs": 2, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def convolution():
    return net("convolution")


@pytest.fixture(scope="module", params=["group", "batch_norm"])
def smaller(request, convolution):
    """40 % of the MACs."""
    recipe = {"steps": [{"prune.group_lasso": {"keep": KEEP, "norm": request.param}, "train": TRAIN}]}
    return pared.compress(convolution.model, convolution.task, recipe, macs="2.5x")


def accuracy(model, batches):
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def gate_of(layer, reader):
    from pared.cut import Slice

    channel = np.arange(layer.out_features)
    weights = [(layer.weight, Slice("a.weight", 0, channel)), (layer.bias, Slice("a.bias", 0, channel))]
    weights.append((reader.weight, Slice("b.weight", 1, channel)))
    return Proximal(len(channel), weights, ())


def test_the_proximal_step_shortens_each_channel_by_its_price():
    """Against the formula, written out for one channel after the other over all tensors that it lies in."""
    torch.manual_seed(0)
    a, b = nn.Linear(5, 4), nn.Linear(4, 3)
    gate = gate_of(a, b)
    before = torch.stack([torch.cat([a.weight[c], a.bias[c : c + 1], b.weight[:, c]]) for c in range(4)]).detach()
    norms = before.norm(dim=1)
    r = norms / norms.mean()
    gamma = 2 ** (6 * (r.max() - r) / (r.max() - r.min()))
    price = 0.9 * float((r / gamma).sort().values[1])  # the weakest dies
    gate.adopt_(torch.tensor(price))
    after = torch.stack([torch.cat([a.weight[c], a.bias[c : c + 1], b.weight[:, c]]) for c in range(4)]).detach()
    expected = before * (1 - min(price, 0.1) * gamma / r).clamp_min(0)[:, None]
    assert torch.allclose(after, expected, atol=1e-6)
    assert torch.equal(gate.scores() > 0, after.abs().sum(1) > 0)


def test_a_channel_that_has_died_stays_dead_although_the_optimiser_moves_its_weights():
    torch.manual_seed(0)
    a, b = nn.Linear(5, 4), nn.Linear(4, 3)
    gate = gate_of(a, b)
    optimiser = torch.optim.AdamW([*a.parameters(), *b.parameters()], lr=0.1, weight_decay=0)
    for step in range(5):
        optimiser.zero_grad()
        b(torch.relu(a(torch.randn(8, 5)))).square().sum().backward()
        optimiser.step()
        if step == 1:
            gate.adopt_(gate.scores().min() * 1.01)
            died = gate.scores() == 0
    assert died.any() and not died.all()
    assert a.weight[died].abs().max() > 0
    assert torch.equal(gate.scores() == 0, died)
    assert torch.equal(gate(torch.tensor(0.0), False) == 0, died)


def test_the_channels_are_really_gone_and_little_is_lost(convolution, smaller):
    assert smaller.met and smaller.before.macs / smaller.after.macs >= 2.5
    n_before, n_after = (sum(p.numel() for p in m.parameters()) for m in (convolution.model, smaller.model))
    assert n_after < 0.75 * n_before
    by_cut, by_training = (trial["drop_pp"] for trial in smaller.data["trials"])
    assert by_training < by_cut
    test = convolution.task.test
    assert accuracy(smaller.model, test) > accuracy(convolution.model, test) - 0.04


def test_random_channels_of_the_same_number_are_worse(convolution, smaller):
    """Cut from the original and trained for as many epochs as the cut network was, at the same rate."""
    graph = Channels(convolution.copy(), (convolution.inputs,))
    rng, masks = np.random.default_rng(0), {}
    for number, group in enumerate(graph.groups):
        for edit in smaller.edits:
            if edit.paths == (group.name,):
                masks[number] = rng.permutation(group.gone(edit.structure))
    model = convolution.copy()
    graph.cut_(model, masks)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in smaller.model.named_parameters()
    }
    losses = [registry.get("distill.logits")()]
    rate = TRAIN["learning_rate"] / 4
    model.requires_grad_(True)
    train(model, convolution.task, epochs=2, teacher=convolution.model, losses=losses, learning_rate=rate)
    assert accuracy(smaller.model, convolution.task.test) > accuracy(model, convolution.task.test) + 0.03


def test_it_saves_and_loads_both_ways(convolution, smaller, tmp_path):
    smaller.save(tmp_path / "net.pared")
    with torch.no_grad():
        expected = smaller.model(convolution.inputs)
        assert torch.equal(pared.load(tmp_path / "net.pared")(convolution.inputs), expected)
        assert torch.equal(pared.load(tmp_path / "net.pared", convolution.copy()).eval()(convolution.inputs), expected)


def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path):
    perceptron = net("perceptron")
    recipe = {"steps": [{"prune.group_lasso": {"keep": KEEP}, "train": {"epochs": 6, "average": 0, "keep_best": False}}]}

    class Killed(Exception):
        pass

    def kill_in(epoch):
        def progress(event):
            if event.get("epoch") == epoch and event.get("score") is not None:
                raise Killed

        return progress

    pared.compress(perceptron.model, perceptron.task, recipe, size="3x", out=tmp_path / "whole")
    for epoch in (2, 5):  # while norms shrink, and after the last were closed
        with pytest.raises(Killed):
            pared.compress(
                perceptron.model, perceptron.task, recipe, size="3x", out=tmp_path / "killed", progress=kill_in(epoch)
            )
    pared.compress(perceptron.model, perceptron.task, recipe, size="3x", out=tmp_path / "killed")
    assert (tmp_path / "whole/model.pared").read_bytes() == (tmp_path / "killed/model.pared").read_bytes()


def test_by_hand_the_smallest_norms_go(convolution):
    """Group norms over all tensors of the stem's channels, which the residual sum couples."""
    graph = Channels(convolution.copy(), (convolution.inputs,))
    technique, m = prune.GroupLasso(keep=0.5), convolution.model
    site = next(site for site in technique.sites(graph.model, graph) if site.path == "stem")
    gone = site.group.gone(technique.decide(site, convolution.statistics()))
    made = [m.stem.weight, m.stem.bias, m.second[0].weight, *m.second[1].parameters()]
    squares = sum(weight.square().reshape(12, -1).sum(1) for weight in made)
    squares = squares + sum(weight.square().sum((0, 2, 3)) for weight in (m.first[0].weight, m.down[0].weight))
    assert set(np.flatnonzero(gone)) == set(squares.argsort()[:6].tolist())


def test_bad_input_gets_one_clear_line(convolution):
    with pytest.raises(RecipeError, match=r'prune.group_lasso.norm must be "group" or "batch_norm", got \'l7\''):
        pared.recipe.load({"steps": [{"prune.group_lasso": {"norm": "l7"}}]})
    perceptron = net("perceptron")
    with pytest.raises(InputError, match="changes nothing: .*no normalisation scales its channels"):
        pared.apply(perceptron.model, perceptron.task, prune.GroupLasso(keep=0.5, norm="batch_norm"))
