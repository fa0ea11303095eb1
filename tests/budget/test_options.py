"""Options with five-line techniques: what is offered, at what cost, and what is refused."""

import sys
from typing import ClassVar

import pytest
import torch
from torch import nn

from pared import store
from pared.budget import Offers, allocate, fixed_bits, gather, options, sensitivity
from pared.budget.damage import held_out, installed, measure, references
from pared.budget.options import n_tried
from pared.quantize import RateDistortion
from pared.site import Site, install_, tensor_sites
from pared.statistics import Statistics
from pared.task import Task
from pared.technique import ENTRY_BITS, Modules, Technique, Tensors, as_numpy
from pared.testing import net as trained_net


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.codes = nn.Parameter(value)

    def forward(self):
        return self.codes.float()


class Halve(Technique):
    """Stores float16, rounded to `steps` values per unit."""

    acts_on: ClassVar = Tensors(min_axes=2)
    steps: int = 64

    def refuse(self, site):
        return "too small to matter" if site.tensor.numel() < 20 else None

    def build(self, site, structure):
        return Holder(torch.zeros(site.tensor.shape, dtype=torch.float16))

    def fit(self, site, parts, statistics):
        parts.codes.data.copy_((site.tensor * self.steps).round() / self.steps)


class Grow(Halve):
    """Never smaller."""

    def build(self, site, structure):
        return Holder(torch.zeros(site.tensor.shape, dtype=torch.float64))

    def fit(self, site, parts, statistics):
        parts.codes.data.copy_(site.tensor + 1e-9 * torch.randn(site.tensor.shape, dtype=torch.float64))


class Shrink(Technique):
    """A module technique without a weight to compare: its damage has to be measured."""

    acts_on: ClassVar = Modules((nn.Linear,))

    def build(self, site, structure):
        return nn.Sequential(nn.Linear(site.module.in_features, 1), nn.Linear(1, site.module.out_features))

    def fit(self, site, parts, statistics):
        torch.nn.init.constant_(parts[0].weight, 0.1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.fixture
def setting():
    model = net()
    batches = [(torch.randn(32, 12), None) for _ in range(3)]
    return model, Task(batches, batches)


def test_every_tensor_can_stay_as_it_is_at_what_the_file_stores(setting):
    model, task = setting
    found, refusals = options(model, [Halve(), Halve(steps=4)], gather(model, task), task)
    stay = {o.site.path: o for o in found if o.technique is None}
    assert set(stay) == {"0.weight", "2.weight", "4.weight"}
    assert stay["0.weight"].cost.stored_bits == store.estimate_bits(as_numpy(model[0].weight)) + ENTRY_BITS
    assert stay["0.weight"].cost.macs == 12 * 16 and stay["0.weight"].damage == 0
    changed = [(o.site.path, o.technique.steps) for o in found if o.technique is not None]
    assert changed == [("0.weight", 64), ("0.weight", 4), ("2.weight", 64), ("2.weight", 4)]
    assert [(r.path, r.reason, r.bytes) for r in refusals] == [("4.weight", "too small to matter", 64)]


def test_coarser_options_cost_less_and_harm_more(setting):
    model, task = setting
    found, _ = options(model, [Halve(steps=s) for s in (256, 32, 4)], gather(model, task), task)
    of_one = [o for o in found if o.site.path == "0.weight" and o.technique is not None]
    bits, damage = zip(*((o.cost.stored_bits, o.damage) for o in of_one))
    assert list(bits) == sorted(bits, reverse=True) and list(damage) == sorted(damage)


def test_what_never_gets_smaller_is_said(setting):
    model, task = setting
    found, refusals = options(model, [Grow()], gather(model, task), task)
    assert all(o.technique is None for o in found)
    assert {(r.path, r.reason) for r in refusals if r.path != "4.weight"} == {
        ("0.weight", "nothing was smaller here"), ("2.weight", "nothing was smaller here"),
    }  # fmt: skip


def test_damage_that_cannot_be_predicted_is_measured(setting):
    model, task = setting
    found, _ = options(model, [Shrink()], gather(model, task), task, measured=96)
    option = next(o for o in found if o.technique is not None)
    twin = net()
    site = Site(twin, option.site.paths, "module", option.site.covers)
    torch.manual_seed(1)
    parts = Shrink().solve(site, Statistics())[1]
    batches = held_out(task, 96)
    originals = references(model, task, batches)
    by_hand = measure(twin, site, parts, task, batches, originals)
    install_(site, parts)
    with torch.no_grad():
        p = torch.cat([model(x).double().log_softmax(1) for x, _ in batches])
        q = torch.cat([twin(x).double().log_softmax(1) for x, _ in batches])
    assert by_hand == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-6)
    assert option.damage > 0


def test_without_data_weights_alone_decide(setting):
    model, _ = setting
    found, refusals = options(model, [Halve(steps=4), Shrink()], Statistics(), None)
    damages = {o.site.path: o.damage for o in found if o.technique is not None}
    weight = model[0].weight.detach()
    rounded = (weight * 4).round() / 4
    assert damages["0.weight"] == pytest.approx(0.5 * float((weight - rounded).square().sum() / weight.square().sum()), rel=1e-3)
    assert any("without data" in r.reason for r in refusals)


def test_plans_from_options_and_the_rest_add_up_to_the_whole_file(setting):
    model, task = setting
    found, _ = options(model, [Halve()], gather(model, task), task)
    covered = {path for o in found for path in o.site.covers}
    rest = fixed_bits(model, covered)
    assert rest == sum(store.estimate_bits(as_numpy(model[i].bias)) + ENTRY_BITS for i in (0, 2, 4))
    dense = sum(o.cost.stored_bits for o in found if o.technique is None)
    assert dense + rest == fixed_bits(model, set())
    plan = allocate(found, size_bits=0.8 * dense)
    assert plan.cost.stored_bits <= 0.8 * dense and plan.options


def test_parts_that_are_tried_are_taken_out_again(setting):
    model, _ = setting
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for site in [next(tensor_sites(model)), Site(model, ("2",), "module", ("2.weight", "2.bias"))]:
        technique = Halve(steps=2) if site.kind == "tensor" else Shrink()
        parts = technique.solve(site, Statistics())[1]
        original = model[2]
        with pytest.raises(ZeroDivisionError), installed(model, site, parts):
            assert not torch.equal(model(torch.ones(1, 12)), net()(torch.ones(1, 12)))
            raise ZeroDivisionError
        assert model[2] is original
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_coded_tensor_can_be_tried_again(setting):
    model, _ = setting
    site = next(tensor_sites(model))
    install_(site, Halve(steps=64).solve(site, Statistics())[1])
    model.eval()
    x = torch.randn(3, 12)
    before = model(x)
    parts = Halve(steps=1).solve(site, Statistics())[1]
    with installed(model, site, parts):
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)


def test_of_a_long_list_what_lies_next_to_the_plan_is_tried_and_the_plan_is_as_good(monkeypatch):
    trained = trained_net("attention")
    statistics, slopes = trained.statistics(), [10 ** (k / 4 - 9) for k in range(33)]
    techniques = [RateDistortion(slope=slope) for slope in slopes]
    every, _ = options(trained.copy(), techniques, statistics, trained.task)
    monkeypatch.setattr(sys.modules["pared.budget.options"], "FEW", 1)
    dense = sum(o.cost.stored_bits for o in every if o.technique is None)
    offers = Offers(trained.copy(), techniques, statistics, trained.task)
    at_first = len(offers.options)
    assert n_tried(trained.model, techniques) < 20
    for share in (0.3, 0.15, 0.1):
        best = allocate(every, size_bits=share * dense)
        plan = allocate(offers.options, size_bits=share * dense)
        while offers.refine(plan.options):
            plan = allocate(offers.options, size_bits=share * dense)
        assert plan.cost.stored_bits <= share * dense
        assert plan.damage <= 1.02 * best.damage, (share, plan.damage, best.damage)
    assert at_first < 0.3 * len(every) and len(offers.options) < 0.8 * len(every)
    assert {o.site.path for o in offers.options} == {o.site.path for o in every}


class Sometimes(Grow):
    """Smaller if it is coarse."""

    def fit(self, site, parts, statistics):
        (Halve if self.steps < 1000 else Grow).fit(self, site, parts, statistics)


def test_a_list_that_begins_with_what_saves_nothing_is_followed_to_where_it_does(setting, monkeypatch):
    monkeypatch.setattr(sys.modules["pared.budget.options"], "FEW", 1)
    model, task = setting
    techniques = [Sometimes(steps=1 << k) for k in range(40, 4, -1)]
    offers = Offers(model, techniques, gather(model, task), task)
    while offers.refine(()):  # of a plan that leaves all as it is
        pass
    found = [o.technique.steps for o in offers.options if o.technique and o.site.path == "0.weight"]
    assert max(found) == 512 and len(found) < 5


def test_sensitivity_has_a_row_for_every_site_and_option(setting):
    model, task = setting
    rows = sensitivity(model, task, [Halve(steps=8), Halve(steps=32), Shrink()])
    assert [set(row) for row in rows] == [{"path", "technique", "stored_bits", "predicted", "measured"}] * len(rows)
    tensors = [row for row in rows if row["path"].endswith("weight")]
    assert len(tensors) == 4
    for row in tensors:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.6)


def test_refusals_and_options_are_the_same_every_time(setting):
    model, task = setting
    statistics = gather(model, task)
    first, second = (options(model, [Halve(), Grow()], statistics, task) for _ in range(2))
    assert [(o.site.path, o.cost, o.damage) for o in first[0]] == [(o.site.path, o.cost, o.damage) for o in second[0]]
    assert first[1] == second[1]
