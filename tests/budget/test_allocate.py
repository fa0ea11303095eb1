"""Allocation against exhaustive search, on options that stand for nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from pared.budget.allocate import GAP, allocate, curve, smallest
from pared.errors import BudgetError, InputError
from pared.site import Site
from pared.technique import Cost, Option, Technique

ROOT = nn.Module()


class Fake(Technique):
    level: int = 0


def tensor(name: str) -> Site:
    return Site(ROOT, (name,), "tensor", (name,))


def module(name: str, *covers: str) -> Site:
    return Site(ROOT, (name,), "module", covers)


def option(site: Site, bits: float, damage: float, level: int | None = 0, macs: float = 0, latency: float = 0) -> Option:
    return Option(site, None if level is None else Fake(level=level), Cost(bits, macs, latency), damage)


def layer(name: str, *levels: tuple[float, float], dense: float = 320.0) -> list[Option]:
    return [option(tensor(name), dense, 0.0, None), *(option(tensor(name), b, d, i) for i, (b, d) in enumerate(levels))]


def best_by_hand(options: list[Option], limits: dict[str, float]) -> float | None:
    """The least damage over every way to cover each tensor exactly once."""
    tensors = {t for o in options for t in o.site.covers}
    best = None
    for n in range(1, len(tensors) + 1):
        for chosen in itertools.combinations(options, n):
            covered = [t for o in chosen for t in o.site.covers]
            if len(covered) != len(tensors) or set(covered) != tensors:
                continue
            cost = sum((o.cost for o in chosen), Cost())
            if all(getattr(cost, key) <= limit for key, limit in limits.items()):
                damage = sum(o.damage for o in chosen)
                best = damage if best is None else min(best, damage)
    return best


NAMES = {"stored_bits": "size_bits", "macs": "macs", "latency_ms": "latency_ms"}
numbers = st.integers(0, 60)
choices = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@example(sites=[[(0, 0, 0, 1)]], joint=[], measures=["stored_bits", "macs"], fraction=4.1e-65)
@example(sites=[[(0, 0, 0, 1)]], joint=[], measures=["stored_bits", "macs"], fraction=2.2e-309)
@given(
    sites=st.lists(choices, min_size=1, max_size=4),
    joint=st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=2),
    measures=st.lists(st.sampled_from(list(NAMES)), min_size=1, max_size=3, unique=True),
    fraction=st.floats(0.0, 1.1),
)
def test_plans_are_as_good_as_exhaustive_search(sites, joint, measures, fraction):
    options = []
    for place, levels in enumerate(sites):
        options.append(option(tensor(f"t{place}"), 60, 0, None, 60, 60))
        for level, (bits, macs, latency, damage) in enumerate(levels):
            options.append(option(tensor(f"t{place}"), bits, damage, level, macs, latency))
    for level, (bits, macs, latency, damage) in enumerate(joint if len(sites) > 1 else []):
        options.append(option(module("block", "t0", "t1"), bits, damage, level, macs, latency))
    limits = {m: fraction * 60 * len(sites) for m in measures}
    best = best_by_hand(options, limits)
    asked = {NAMES[m]: limit for m, limit in limits.items()}
    if best is None:
        with pytest.raises(BudgetError):
            allocate(options, **asked)
        return
    plan = allocate(options, **asked)
    assert all(getattr(plan.cost, m) <= limit * (1 + 1e-9) for m, limit in limits.items())
    assert plan.damage <= best * (1 + GAP) + 1e-9
    assert plan.gap <= GAP


@pytest.mark.parametrize("budgets", [("size_bits",), ("size_bits", "macs", "latency_ms")])
def test_large_instances_stay_within_the_gap(budgets):
    rng = np.random.default_rng(0)
    options = []
    for place in range(60):
        n, hurt = 10 ** rng.uniform(3, 6), 10 ** rng.uniform(-3, 2)
        options.append(option(tensor(f"t{place}"), 32 * n, 0, None, 100 * n, n))
        for level in range(8):
            bits, share = rng.uniform(0.5, 9), rng.uniform(0.2, 1)
            damage = hurt * (4**-bits + (1 - share) ** 2)
            options.append(option(tensor(f"t{place}"), n * bits * share, damage, level, 100 * n * share, n * share))
    dense = sum((o.cost for o in options if o.technique is None), Cost())
    limits = {"size_bits": dense.stored_bits / 10, "macs": 0.6 * dense.macs, "latency_ms": 0.7 * dense.latency_ms}
    plan = allocate(options, **{name: limits[name] for name in budgets})
    assert plan.gap <= GAP
    assert plan.cost.stored_bits <= limits["size_bits"] * (1 + 1e-9)


def test_a_module_excludes_options_of_its_tensors_but_goes_with_those_of_others():
    options = [
        *layer("fc.weight", (80, 4.0)), *layer("fc.bias", (40, 1.0), dense=100.0),
        option(module("fc", "fc.weight"), 60, 0.5, 7),
    ]  # fmt: skip
    plan = allocate(options, size_bits=100)
    assert [o.site.path for o in plan.options] == ["fc.bias", "fc"]
    assert plan.cost.stored_bits == 100 and plan.damage == 1.5


def test_a_block_competes_with_everything_inside_it():
    inside = [*layer("a", (10, 3.0)), *layer("b", (10, 3.0)), option(module("m", "b"), 8, 5.0, 1)]
    options = [*inside, option(module("block", "a", "b"), 18, 4.0, 2)]
    assert [o.site.path for o in allocate(options, size_bits=20).options] == ["block"]
    assert [o.site.path for o in allocate(inside, size_bits=18).options] == ["a", "m"]
    assert allocate(options, size_bits=640).options == ()


def test_equal_damage_takes_fewer_bits_then_the_order():
    options = layer("a", (50, 1.0), (40, 1.0), (40, 1.0), dense=100.0)
    assert allocate(options, size_bits=90).options == (options[2],)
    assert allocate([option(tensor("a"), 9, 1.0, 0, macs=1), option(tensor("a"), 8, 1.0, 1, macs=1)], macs=1).cost.stored_bits == 8


def test_an_impossible_budget_names_what_is_needed_and_where():
    options = [*layer("layer4.1.conv2", (8 * 3_000_000, 1.0), dense=8e8), *layer("fc", (8 * 1_100_000, 1.0), dense=8e8)]
    with pytest.raises(BudgetError) as caught:
        allocate(options, size_bits=8 * 3.0e6)
    assert str(caught.value) == (
        "the smallest plan needs 4.1 MB but the budget is 3.0 MB; add a smaller option to: layer4.1.conv2."
    )
    with pytest.raises(BudgetError, match=r"needs 4\.100 MB but the budget is 4\.099 MB"):
        allocate(options, size_bits=8 * 4.0994e6)


def test_budgets_that_only_fail_together_say_so():
    options = [option(tensor("a"), 1, 0, 0, macs=9), option(tensor("a"), 9, 0, 1, macs=1)]
    with pytest.raises(BudgetError, match="each budget can be met alone but not all at once"):
        allocate(options, size_bits=5, macs=5)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="at least one budget"):
        allocate(layer("a"))
    with pytest.raises(InputError, match="finite"):
        allocate([option(tensor("a"), 1, float("nan"))], size_bits=1)
    with pytest.raises(InputError, match="leaves it as it is"):
        allocate([option(module("m", "a", "b"), 1, 1), option(module("n", "b", "c"), 1, 1)], size_bits=9)


def test_the_curve_is_convex_and_starts_at_the_smallest_plan():
    rng = np.random.default_rng(1)
    options = [o for i in range(9) for o in layer(f"t{i}", *((b, float(rng.uniform(0, 300 - b))) for b in (20, 60, 120, 200)))]
    points = curve(options, n=12)
    assert points[0][0] == smallest(options).cost.stored_bits
    bits, damage = np.array(points).T
    slopes = np.diff(damage) / np.diff(bits)
    assert (np.diff(bits) > 0).all() and (slopes <= 0).all() and (np.diff(slopes) >= -1e-9).all()
    assert points[-1][1] == pytest.approx(0.0, abs=1e-9)


def test_the_same_options_give_the_same_plan():
    rng = np.random.default_rng(2)
    options = [o for i in range(20) for o in layer(f"t{i}", *((float(b), float(rng.uniform(0, 9))) for b in (9, 40, 99)))]
    plans = [allocate(options, size_bits=2000) for _ in range(2)]
    assert plans[0].options == plans[1].options
