"""Layers timed by their widths: what is measured, what is predicted, and what a plan makes of it. No test takes a time."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import prune
from pared.budget import channel_latency
from pared.budget.channel_latency import Side, Timed, timed_layers
from pared.budget.channels import masks, plan_channels
from pared.budget.layer_latency import LatencyTable
from pared.errors import BudgetError
from pared.graph.channels import Channels
from pared.search import Aim, Search
from pared.statistics import Statistics
from pared.technique import Cost, Option
from pared.testing import net

KEEP = [k / 32 for k in range(4, 32)]


def by_blocks(layer, x, sides, table):
    """A machine that works on sixteen channels at a time, and is slower when a layer reads an odd number of them."""
    points = channel_latency._points(sides)
    return tuple(math.ceil(i / 16) * math.ceil(o / 16) * (2.0 if i > 1 and i % 2 else 1.0) for i, o in points)


@pytest.fixture
def network(monkeypatch, tmp_path):
    monkeypatch.setattr(channel_latency, "_time", by_blocks)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    ).eval()
    example = ((torch.zeros(1, 1, 8, 8),), {})
    graph = Channels(model, (torch.zeros(2, 1, 8, 8),))
    options = [
        Option(site, technique, Cost(), (1 - technique.keep) ** 2, technique.solve(site, Statistics())[0])
        for technique in [prune.Channels(keep=keep) for keep in KEEP]
        for site in technique.sites(model, graph)
    ]
    said: list[str] = []
    table = LatencyTable("torch", tmp_path / "table.json")
    layers = timed_layers(model, example, graph, options, table, said.append)
    return SimpleNamespace(model=model, example=example, graph=graph, options=options, table=table, layers=layers, said=said)


def total(layers, graph, gone=None):
    keep = np.ones(len(graph.groups))
    for number, mask in (gone or {}).items():
        keep[number] = 1 - mask.mean()
    return sum(layer.at(keep) for layer in layers)


def test_every_layer_is_known_at_the_widths_on_offer(network):
    assert [[side.widths for side in layer.sides] for layer in network.layers] == [
        [tuple(range(4, 33))], [tuple(range(4, 33)), tuple(range(4, 33))], [tuple(range(4, 33))],
    ]  # fmt: skip
    assert total(network.layers, network.graph) == 2 + 4 + 2


def test_a_layer_of_known_description_is_not_measured_again(network, monkeypatch):
    monkeypatch.setattr(channel_latency, "_time", lambda *args: pytest.fail("measured again"))
    again = timed_layers(
        network.model, network.example, network.graph, network.options, network.table, network.said.append
    )
    assert [layer.at([0.5, 0.5]) for layer in again] == [layer.at([0.5, 0.5]) for layer in network.layers]
    assert network.said[0].startswith("3 layers") and "3 measured" in network.said[0] and "0 measured" in network.said[1]
    assert len(json.loads(network.table.path.read_text())) == 3


def test_a_layer_that_costs_the_product_of_its_widths_is_predicted_everywhere():
    widths = (4, 8, 12, 16)
    side = [Side(((16, (group,)),), widths, tuple(n * 16.0 for n in widths)) for group in (0, 1)]
    layer = Timed(tuple(side), 4.0 * 4.0)
    for i in widths:
        for o in widths:
            assert layer.at([i / 16, o / 16]) == pytest.approx(i * o)


def test_a_layer_whose_sides_save_apart_is_predicted_everywhere():
    widths = (4, 8, 16)
    side = [Side(((16, (group,)),), widths, tuple(n + 16.0 for n in widths)) for group in (0, 1)]
    layer = Timed(tuple(side), 8.0)
    assert layer.at([0.5, 0.25]) == pytest.approx(8 + 4)


def test_a_plan_for_milliseconds_leaves_whole_blocks(network):
    """Less than a block saves nothing, so nothing less is removed."""
    for limit in (7, 5, 3):
        plan = plan_channels(network.options, network.graph, latency_ms=limit, layers=network.layers)
        gone = masks(plan, network.graph)
        assert total(network.layers, network.graph, gone) <= limit
        assert plan and all((~mask).sum() % 16 == 0 for mask in gone.values())


def test_a_plan_for_as_many_multiply_adds_takes_longer(network):
    timed = masks(plan_channels(network.options, network.graph, latency_ms=5, layers=network.layers), network.graph)
    light = masks(plan_channels(network.options, network.graph, macs=network.graph.macs(timed)), network.graph)
    assert total(network.layers, network.graph, light) >= total(network.layers, network.graph, timed)


def test_a_plan_that_cannot_be_fast_enough_says_what_is_left(network):
    with pytest.raises(BudgetError, match="ms stay, but the budget is 1; add smaller values of keep"):
        plan_channels(network.options, network.graph, latency_ms=1, layers=network.layers)


def test_what_there_is_no_time_for_is_timed_whole_and_said(network, monkeypatch, tmp_path):
    monkeypatch.setattr(channel_latency, "SECONDS_IN_ALL", -1.0)
    said = []
    table = LatencyTable("torch", tmp_path / "empty.json")
    found = timed_layers(network.model, network.example, network.graph, network.options, table, said.append)
    assert [layer.at([1.0, 1.0]) for layer in found] == [2, 4, 2]
    assert [layer.at([0.5, 0.25]) for layer in found] == [1, 0.5, 0.5]  # products of the widths
    assert "0 measured" in said[0] and "3 whole only" in said[0]


def test_depthwise_convolutions_have_one_side(monkeypatch, tmp_path):
    monkeypatch.setattr(channel_latency, "_time", by_blocks)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 3, 1)).eval()
    graph = Channels(model, (torch.zeros(2, 3, 8, 8),))
    half = prune.Channels(keep=0.5)
    options = [Option(s, half, Cost(), 1.0, half.solve(s, Statistics())[0]) for s in half.sites(model, graph)]
    table = LatencyTable("torch", tmp_path / "table.json")
    found = timed_layers(model, ((torch.zeros(1, 3, 8, 8),), {}), graph, options, table, lambda text: None)
    assert [[side.widths for side in layer.sides] for layer in found] == [[(4, 8)], [(4, 8)], [(4, 8)]]


def test_widths_that_runtimes_like_are_offered_unless_the_recipe_names_one():
    assert [technique.round_to for technique in prune.Channels(keep=0.5).widths()] == [1, 8, 16]
    assert prune.Channels(keep=0.5, round_to=4).widths() == (prune.Channels(keep=0.5, round_to=4),)


@pytest.mark.parametrize("fixed", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("wanted", [1.5, 2.0])
def test_the_aim_finds_the_plan_whatever_no_plan_changes(fixed, wanted):
    """A network of which a part takes as long as before."""
    aim = Aim(wanted)
    for _ in range(4):
        aim.saw(1 / (fixed + (1 - fixed) * aim.pace))
        if aim.is_over:
            break
    assert aim.is_over


def test_the_aim_is_right_at_once_where_the_layers_are():
    """Layers that take 3 ms alone, in a network of 2 ms: what is saved alone is saved in it."""
    aim = Aim(2.0, 3 / 2)
    aim.saw(2 / (2 - 3 * (1 - aim.pace)))
    assert aim.is_over


def test_the_aim_goes_up_again_after_a_plan_that_was_too_fast():
    aim = Aim(2.0)
    aim.saw(4.0)
    assert 0.5 < aim.pace < 1


def test_the_aim_stays_above_what_no_plan_reaches():
    aim = Aim(2.0)
    aim.cannot()
    assert aim.least == 0.49 and 0.49 < aim.pace < 1
    aim.saw(1.2)
    assert 0.49 < aim.pace < 0.745


def test_compress_for_latency_leaves_widths_that_the_machine_likes(monkeypatch, tmp_path):
    """On a machine that works on sixteen units at a time and takes 4 ms for what is no layer."""

    def whole(_, model):
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        return 4 + sum(math.ceil(m.in_features / 16) * math.ceil(m.out_features / 16) for m in linear)

    found = net("perceptron")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(channel_latency, "_time", by_blocks)
    sizes = set()

    def timed(self, models):
        sizes.add(len(self.job.one[0][0]))
        return [whole(self, model) for model in models]

    monkeypatch.setattr(Search, "_timed", timed)
    recipe = {"steps": [{"prune.channels": {"keep": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]}}]}
    result = pared.compress(found.model, found.task, recipe, latency="1.5x", train=False)
    assert result.met and sizes == {1}
    widths = [m.out_features for m in result.model.modules() if isinstance(m, nn.Linear)][:-1]
    assert sum(widths) < 48 + 32 and all(n % 16 == 0 for n in widths)
    assert whole(None, found.model) / whole(None, result.model) >= 1.5
