"""prune.l0_channels: gates against closed forms, and what is left of a trained network when training chose its channels."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import prune
from pared.errors import RecipeError
from pared.graph.channels import Channels
from pared.prune.l0_channels import HardConcrete
from pared.testing import net

KEEP = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
TRAIN = {"epochs": 16, "tune_epochs": 2, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def convolution():
    return net("convolution")


@pytest.fixture(scope="module")
def smaller(convolution):
    """A third of the MACs."""
    recipe = {"steps": [{"prune.l0_channels": {"keep": KEEP}, "train": TRAIN}]}
    return pared.compress(convolution.model, convolution.task, recipe, macs="3x")


def accuracy(model, batches):
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def test_a_gate_is_open_as_often_as_its_formula_says():
    torch.manual_seed(0)
    importance = np.exp(np.array([-3.0, -1.0, 0.0, 2.0]))
    gate, price, n = HardConcrete(importance, ()).train(), torch.tensor(0.5), 20_000
    is_open, total = torch.zeros(4), torch.zeros(4)
    for _ in range(n):
        gate.draw_()
        z = gate(price, True).detach()
        is_open, total = is_open + (z > 0), total + z
    expected = torch.sigmoid(torch.tensor(importance).log() - 0.5 - 2 / 3 * math.log(0.1 / 1.1))
    assert torch.allclose(is_open / n, expected.float(), atol=0.01)
    assert torch.allclose(gate.kept(price), expected.float(), atol=1e-6)
    assert ((total / n - gate(price, False).detach()).abs() < 0.1).all()


def test_the_channels_are_really_gone(convolution, smaller):
    assert smaller.met and smaller.before.macs / smaller.after.macs >= 3
    n_before, n_after = (sum(p.numel() for p in m.parameters()) for m in (convolution.model, smaller.model))
    assert n_after < 0.6 * n_before
    assert all(type(m) is type(o) for m, o in zip(smaller.model.modules(), convolution.model.modules()))


def test_the_trained_network_is_kept_and_is_as_good_as_the_original_within_four_points(convolution, smaller):
    """Of the trials the trained one is best; cutting alone loses more."""
    by_cut, by_training = (trial["drop_pp"] for trial in smaller.data["trials"])
    assert by_training < by_cut
    test = convolution.task.test
    assert accuracy(smaller.model, test) > accuracy(convolution.model, test) - 0.04


def test_random_channels_of_the_same_number_are_worse(convolution, smaller):
    """Cut from the original and trained for as many epochs as the cut network was, at the same rate."""
    from pared import registry
    from pared.train import train

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
    train(
        model.requires_grad_(True), convolution.task, epochs=TRAIN["tune_epochs"], teacher=convolution.model,
        losses=[registry.get("distill.logits")()], learning_rate=TRAIN["learning_rate"] / 4,
    )  # fmt: skip
    assert accuracy(smaller.model, convolution.task.test) > accuracy(model, convolution.task.test) + 0.05


def test_it_saves_loads_both_ways(convolution, smaller, tmp_path):
    smaller.save(tmp_path / "net.pared")
    with torch.no_grad():
        expected = smaller.model(convolution.inputs)
        assert torch.equal(pared.load(tmp_path / "net.pared")(convolution.inputs), expected)
        assert torch.equal(pared.load(tmp_path / "net.pared", convolution.copy()).eval()(convolution.inputs), expected)


def test_before_another_step_groups_keep_as_many_channels_as_planned():
    perceptron = net("perceptron")
    recipe = {
        "steps": [
            {"prune.l0_channels": {"keep": [0.5]}, "train": {"epochs": 2}},
            {"quantize.integer": {"bits": [8]}, "train": {"epochs": 1}},
        ]
    }
    result = pared.compress(perceptron.model, perceptron.task, recipe, macs="2.3x", size="7x")
    widths = [m.out_features for m in result.model.modules() if isinstance(m, nn.Linear)]
    assert widths == [24, 16, 10]
    assert [edit.technique.name for edit in result.edits].count("quantize.integer") >= 3


def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path):
    perceptron = net("perceptron")
    recipe = {"steps": [{"prune.l0_channels": {"keep": KEEP}, "train": {"epochs": 6, "average": 0, "keep_best": False}}]}

    class Killed(Exception):
        pass

    def kill_in(epoch):
        def progress(event):
            if event.get("epoch") == epoch and event.get("score") is not None:
                raise Killed

        return progress

    whole = pared.compress(perceptron.model, perceptron.task, recipe, size="3x", out=tmp_path / "whole")
    for epoch in (2, 5):  # while the price rises, and after the gates closed
        with pytest.raises(Killed):
            pared.compress(
                perceptron.model, perceptron.task, recipe, size="3x", out=tmp_path / "killed", progress=kill_in(epoch)
            )
    again = pared.compress(perceptron.model, perceptron.task, recipe, size="3x", out=tmp_path / "killed")
    assert (tmp_path / "whole/model.pared").read_bytes() == (tmp_path / "killed/model.pared").read_bytes()
    assert whole.data["trials"][-1]["metric"] == again.data["trials"][-1]["metric"]


def test_by_hand_it_cuts_like_channels(convolution):
    by_hand = pared.apply(convolution.model, convolution.task, prune.L0Channels(keep=0.5))
    channels = pared.apply(convolution.model, convolution.task, prune.Channels(keep=0.5))
    assert all(torch.equal(a, b) for a, b in zip(by_hand.parameters(), channels.parameters()))


def test_bad_input_gets_one_clear_line(convolution):
    def run(step):
        return pared.compress(copy.deepcopy(convolution.model), convolution.task, {"steps": [step]}, macs="2x")

    with pytest.raises(RecipeError, match="learns which channels go, all in one round, got rounds 3"):
        run({"prune.l0_channels": {"keep": 0.5}, "train": {"epochs": 3, "rounds": 3}})
    with pytest.raises(RecipeError, match=r"must be alone in its step, got prune.l0_channels and prune.channels"):
        run({"any_of": [{"prune.l0_channels": {"keep": 0.5}}, {"prune.channels": {"keep": 0.5}}]})
    with pytest.raises(RecipeError, match=r"prune.l0_channels.keep must be a number in \(0, 1\), got 1"):
        run({"prune.l0_channels": {"keep": 1}})
