"""Gates at one price: the target is met, the gradient is that along it, and what is closed can be cut without a change."""

import numpy as np
import pytest
import torch

import pared
from pared.budget.channels import Removal, channel_options, masks, plan_channels
from pared.budget.gates import Gated, absorb_, closed, gated
from pared.graph.channels import Channels
from pared.prune.group_lasso import GroupLasso
from pared.prune.l0_channels import L0Channels
from pared.testing import net


def opened(name, cls=L0Channels, share=0.4, measures=("macs",), exactly=False):
    """A gated copy of a net, its gates, and what is needed to cut it."""
    trained = net(name)
    graph = Channels(trained.copy(), (trained.inputs,))
    techniques = [cls(keep=keep) for keep in (0.8, 0.6, 0.4, 0.2)]
    found, _ = channel_options(graph.model, techniques, trained.statistics(), graph, trained.task)
    plan = plan_channels(found, graph, macs=share * graph.macs({}))
    twin, gates = gated(trained.copy(), graph, plan, found, trained.statistics(), measures, exactly)
    return trained, graph, plan, found, twin, gates


def cost_now(gates):
    with torch.no_grad():
        return float(gates._kept_cost(gates.price))


def test_the_target_is_met_at_every_part_of_the_way_and_follows_the_gates():
    trained, graph, _, _, twin, gates = opened("perceptron")
    for progress in (0.0, 0.3, 0.6, 0.9):
        gates.anneal(progress)
        assert cost_now(gates) == pytest.approx(gates.aim, rel=1e-6)
    assert gates.aim <= 0.4 * graph.macs({})
    for gate in gates.each:
        gate.logit.data += 0.002 * torch.randn_like(gate.logit)  # as an optimiser would
    gates.coded_bits()
    twin.train()(trained.inputs)
    assert cost_now(gates) == pytest.approx(gates.aim, rel=0.01)


def test_the_gradient_is_that_of_the_loss_along_the_target():
    """Against differences, with the price solved anew for each."""
    _, _, _, _, twin, gates = opened("perceptron")
    twin.train()
    gates.double().anneal(0.6)
    weights = [torch.randn(len(gate.scores()), dtype=torch.float64) for gate in gates.each]

    def value():
        return sum((w * gates.factor(number)).sum() for w, number in zip(weights, gates.numbers))

    logit = gates.each[0].logit
    value().backward()
    for k in range(0, len(logit), 7):
        sides = []
        for step in (1e-4, -2e-4):
            logit.data[k] += step
            gates.anneal(0.6)
            sides.append(float(value().detach()))
        logit.data[k] += 1e-4
        assert float(logit.grad[k]) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-3, abs=1e-3)


def test_every_limit_is_met_in_the_end_and_no_group_is_left_without_channels():
    _, graph, plan, _, _, gates = opened("convolution", measures=("macs", "bits"))
    gates.anneal(1.0)
    gone, planned = gates.gone(), masks(plan, graph)
    assert graph.macs(gone) <= graph.macs(planned) * 1.000001
    assert graph.bits(gone) <= graph.bits(planned) * 1.000001
    assert all(not mask.all() for mask in gone.values())


def test_groups_keep_the_planned_numbers_where_others_rely_on_them():
    _, graph, plan, _, _, gates = opened("convolution", exactly=True)
    gates.anneal(1.0)
    assert {n: m.sum() for n, m in gates.gone().items()} == {n: m.sum() for n, m in masks(plan, graph).items()}


@pytest.mark.parametrize("cls", [L0Channels, GroupLasso])
@pytest.mark.parametrize("name", ["perceptron", "convolution", "recurrent"])
def test_closed_channels_are_cut_without_a_change(name, cls):
    trained, graph, _, found, twin, gates = opened(name, cls)
    gates.anneal(1.0)
    model = trained.copy()
    absorb_(model, twin)
    Removal(model, graph, None).remove_(closed(gates, graph, found))
    with torch.no_grad():
        expected, got = twin.eval()(trained.inputs), model.eval()(trained.inputs)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * sum(p.numel() for p in trained.model.parameters())
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.allclose(got, trained.model(trained.inputs), atol=1e-2)


def test_gates_lie_in_the_layers_that_read_a_channel():
    _, _, _, _, twin, _ = opened("perceptron")
    places = {path: m.places for path, m in twin.named_modules() if isinstance(m, Gated)}
    assert {path.split(".parametrizations")[0]: [axis for _, axis in own] for path, own in places.items()} == {
        "layers.2": [1],
        "layers.4": [1],
    }


@pytest.mark.parametrize("technique", ["prune.l0_channels", "prune.group_lasso"])
def test_attention_is_cut_by_training_too(technique, tmp_path):
    attention = net("attention")
    recipe = {"steps": [{technique: {"keep": [0.75, 0.5, 0.25]}, "train": {"epochs": 3, "learning_rate": 3e-3}}]}
    result = pared.compress(attention.model, attention.task, recipe, macs="1.6x")
    assert result.met and result.before.macs / result.after.macs >= 1.6
    assert np.isfinite([row["loss"] for row in result.data["training"]]).all()
    result.save(tmp_path / "net.pared")
    with torch.no_grad():
        again = pared.load(tmp_path / "net.pared", attention.copy()).eval()(attention.inputs)
        assert torch.allclose(again, result.model(attention.inputs), atol=1e-5)
