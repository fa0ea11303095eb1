"""The least damage within a budget: exact allocation of options to sites."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from pared.errors import BudgetError, InputError
from pared.technique import Cost, Option

GAP = 1e-4
"""The relative distance from the best possible damage at which a search may stop."""

_FITS = 1 + 1e-12


@dataclass(frozen=True)
class Plan:
    """What to do where.

    Args:
        options: the chosen options that change something, in the order in which they were offered.
        cost: of everything that the options cover, sites left as they are included.
        damage: the predicted increase of the loss.
        gap: how far at most the damage lies above the best possible one, as a fraction of it.
        seconds: what the search took.
    """

    options: tuple[Option, ...]
    cost: Cost
    damage: float
    gap: float
    seconds: float


def allocate(
    options: Sequence[Option],
    *,
    size_bits: float | None = None,
    macs: float | None = None,
    latency_ms: float | None = None,
) -> Plan:
    """The options, one for every covered tensor, whose damage is least within the budgets.

    Sites that cover a common tensor exclude each other. One budget: dominated options are removed, the linear
    relaxation bounds the rest, and dynamic programming over what the bound leaves finds the best; several: a
    mixed-integer program (HiGHS). Equal damage: fewer bits, then the order of the options.

    Raises:
        BudgetError: even the smallest plan is above a budget.
    """
    start = time.perf_counter()
    budgets = {
        name: float(value)
        for name, value in (("stored_bits", size_bits), ("macs", macs), ("latency_ms", latency_ms))
        if value is not None
    }
    if not budgets:
        raise InputError("allocate needs at least one budget (size_bits, macs or latency_ms), got none")
    _check(options)
    for name, limit in budgets.items():
        least = smallest(options, name)
        if getattr(least.cost, name) > limit * _FITS:
            raise BudgetError(_impossible(name, least, limit, options))
    if len(budgets) == 1:
        (name, limit), = budgets.items()
        picks, gap = _knapsack(_groups(options, name), limit)
    else:
        picks, gap = _program(options, budgets)
    return _plan(options, picks, gap, start)


def smallest(options: Sequence[Option], measure: str = "stored_bits") -> Plan:
    """The plan that costs least, whatever it harms; of equal ones the least harmful."""
    start = time.perf_counter()
    _check(options)
    return _plan(options, [pick for group in _groups(options, measure) for pick in group.picks[0]], 0.0, start)


def curve(options: Sequence[Option], n: int = 20) -> list[tuple[float, float]]:
    """The convex trade-off: at most n pairs (stored bits, least predicted damage), the smallest plan first."""
    groups = _groups(options, "stored_bits")
    if not groups:
        return []
    _, _, gain, price = _segments(groups)
    bits = sum(g.cost[0] for g in groups) + np.concatenate([[0.0], np.cumsum(price)])
    damage = sum(g.damage[0] for g in groups) - np.concatenate([[0.0], np.cumsum(gain)])
    wanted = np.geomspace(max(bits[0], 1.0), max(bits[-1], 1.0), n)
    keep = np.unique(np.abs(bits[None, :] - wanted[:, None]).argmin(axis=1))
    return [(float(bits[i]), max(float(damage[i]), 0.0)) for i in keep]


# -- options, sites, groups --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Alternatives that exclude each other, none dominated: cost rises, damage falls."""

    cost: np.ndarray
    damage: np.ndarray
    bits: np.ndarray
    picks: list[tuple[int, ...]]


def _check(options: Sequence[Option]) -> None:
    for option in options:
        numbers = (option.damage, option.cost.stored_bits, option.cost.macs, option.cost.latency_ms)
        if not np.isfinite(numbers).all():
            where = option.site.path
            raise InputError(f"costs and damage of an option must be finite, got {numbers} at {where}; drop it")


def _by_site(options: Sequence[Option]) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for index, option in enumerate(options):
        found.setdefault((option.site.kind, option.site.path), []).append(index)
    return found


def _covered(option: Option) -> tuple[str, ...]:
    return option.site.covers or (option.site.path,)


def _components(options: Sequence[Option]) -> list[list[list[int]]]:
    """Sites (lists of option indices) joined when they cover a common tensor."""
    parent: dict[str, str] = {}

    def find(tensor: str) -> str:
        while parent.setdefault(tensor, tensor) != tensor:
            tensor = parent[tensor]
        return tensor

    sites = list(_by_site(options).values())
    for indices in sites:
        first, *rest = (find(t) for t in _covered(options[indices[0]]))
        for other in rest:
            parent[find(other)] = find(first)
    found: dict[str, list[list[int]]] = {}
    for indices in sites:
        found.setdefault(find(_covered(options[indices[0]])[0]), []).append(indices)
    return list(found.values())


def _groups(options: Sequence[Option], measure: str) -> list[_Group]:
    return [_alternatives(options, sites, measure) for sites in _components(options)]


def _alternatives(options: Sequence[Option], sites: list[list[int]], measure: str) -> _Group:
    """All ways to cover the tensors of a component once each: sums over sites that do not overlap."""
    fronts = []
    for indices in sites:
        table = np.array(
            [(getattr(options[i].cost, measure), options[i].damage, options[i].cost.stored_bits) for i in indices]
        )
        fronts.append((frozenset(_covered(options[indices[0]])), _pruned(*table.T, picks=[(i,) for i in indices])))
    tensors = list(dict.fromkeys(t for indices in sites for t in _covered(options[indices[0]])))
    known: dict[frozenset[str], _Group | None] = {frozenset(): _Group(*(np.zeros(1),) * 3, [()])}

    def cover(remaining: frozenset[str]) -> _Group | None:
        if remaining in known:
            return known[remaining]
        tensor = next(t for t in tensors if t in remaining)
        ways: list[_Group] = []
        for covers, front in fronts:
            if tensor in covers and covers <= remaining and (rest := cover(remaining - covers)) is not None:
                ways.append(_added(front, rest))
        known[remaining] = _united(ways) if ways else None
        return known[remaining]

    group = cover(frozenset(tensors))
    if group is None:
        named = ", ".join(tensors)
        raise InputError(f"every tensor must have an option that leaves it as it is; one is missing among: {named}")
    return group


def _pruned(cost: np.ndarray, damage: np.ndarray, bits: np.ndarray, *, picks: Sequence[tuple[int, ...]]) -> _Group:
    order = np.lexsort((np.arange(len(cost)), bits, damage, cost))
    damage_sorted = damage[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(damage_sorted)[:-1]])
    kept = order[damage_sorted < before]
    return _Group(cost[kept], damage[kept], bits[kept], [picks[i] for i in kept])


def _added(a: _Group, b: _Group) -> _Group:
    if len(b.picks) == 1 and not b.picks[0]:
        return a
    sums = [(x[:, None] + y[None, :]).ravel() for x, y in ((a.cost, b.cost), (a.damage, b.damage), (a.bits, b.bits))]
    return _pruned(*sums, picks=[p + q for p in a.picks for q in b.picks])


def _united(ways: list[_Group]) -> _Group:
    if len(ways) == 1:
        return ways[0]
    joined = (np.concatenate([getattr(w, key) for w in ways]) for key in ("cost", "damage", "bits"))
    return _pruned(*joined, picks=[pick for way in ways for pick in way.picks])


def _plan(options: Sequence[Option], picks: Sequence[int], gap: float, start: float) -> Plan:
    chosen = [options[i] for i in sorted(picks)]
    return Plan(
        options=tuple(option for option in chosen if option.technique is not None),
        cost=sum((option.cost for option in chosen), Cost()),
        damage=float(sum(option.damage for option in chosen)),
        gap=gap,
        seconds=time.perf_counter() - start,
    )


# -- one budget --------------------------------------------------------------------------------------------------------


def _hull(group: _Group) -> np.ndarray:
    """Indices of the lower convex hull, from the cheapest alternative on."""
    hull: list[int] = []
    for i in range(len(group.cost)):
        while len(hull) >= 2:
            p, q = hull[-2], hull[-1]
            run_q, run_i = group.cost[q] - group.cost[p], group.cost[i] - group.cost[p]
            if (group.damage[p] - group.damage[q]) * run_i > (group.damage[p] - group.damage[i]) * run_q:
                break
            hull.pop()
        hull.append(i)
    return np.array(hull)


def _segments(groups: list[_Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps along the hulls in the order of their worth: group, the alternative reached, damage saved, cost paid."""
    owner, target, gain, price = [], [], [], []
    for g, group in enumerate(groups):
        hull = _hull(group)
        owner.append(np.full(len(hull) - 1, g))
        target.append(hull[1:])
        gain.append(-np.diff(group.damage[hull]))
        price.append(np.diff(group.cost[hull]))
    owners, targets, gains, prices = (np.concatenate(x) for x in (owner, target, gain, price))
    order = np.lexsort((targets, owners, -gains / prices))
    return owners[order], targets[order], gains[order], prices[order]


def _knapsack(groups: list[_Group], limit: float) -> tuple[list[int], float]:
    """Multiple-choice knapsack: relaxation, bounds, then dynamic programming over undominated partial sums.

    Source: the relaxation and its bounds as in Sinha & Zoltners 1979; states within the bound as in Pisinger 1995.
    """
    limit *= _FITS
    owner, target, gain, price = _segments(groups)
    base = np.zeros(len(groups), dtype=np.int64)
    spent = float(sum(g.cost[0] for g in groups))
    at = 0
    while at < len(owner) and spent + price[at] <= limit:
        base[owner[at]] = target[at]
        spent += price[at]
        at += 1
    harm = _total(groups, base)
    if at == len(owner):
        return _picks(groups, base), 0.0
    worth = gain[at] / price[at]
    bound = harm - worth * (limit - spent)
    best, least = _filled(groups, base, owner, target, at, limit)
    lost = np.inf
    for n_states in (5_000, 50_000, 500_000):
        exact = least - bound <= 1e-12 * least
        if exact or (lost < np.inf and min(least - bound, lost) <= GAP * least):
            break
        best, least, lost = _searched(groups, (owner, target, gain, price), limit, worth, bound, best, least, n_states)
    gap = min(least - bound, lost) / least if least > 0 else 0.0
    return _picks(groups, best), max(float(gap), 0.0)


def _searched(
    groups: list[_Group],
    segments: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    limit: float,
    worth: float,
    bound: float,
    best: np.ndarray,
    least: float,
    n_states: int,
) -> tuple[np.ndarray, float, float]:
    """Dynamic programming over undominated partial plans: best plan, its damage, what thinning lost at most."""
    owner, target, gain, price = segments
    # what an alternative loses against the relaxation; what loses more than a better plan can win back is out
    losses = [g.damage + worth * g.cost for g in groups]
    alive = [np.flatnonzero(x - x.min() <= (least - bound) * (1 + 1e-9)) for x in losses]
    spread = [float(np.ptp(g.cost[a])) for g, a in zip(groups, alive)]
    order = sorted(range(len(groups)), key=lambda g: -spread[g])
    state_cost, state_harm = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    found: tuple[int, int, int] | None = None
    thinned = 0.0
    in_rest = np.ones(len(groups), dtype=bool)
    for depth, g in enumerate(order):
        in_rest[g] = False
        rest = order[depth + 1 :]
        cost = (state_cost[:, None] + groups[g].cost[alive[g]]).ravel()
        harm = (state_harm[:, None] + groups[g].damage[alive[g]]).ravel()
        # the relaxation of the groups to come, for every state at once: a bound, and a plan to finish with
        ahead = np.flatnonzero(in_rest[owner])
        paid = np.concatenate([[0.0], np.cumsum(price[ahead])])
        saved = np.concatenate([[0.0], np.cumsum(gain[ahead])])
        left = limit - cost - sum(groups[r].cost[0] for r in rest)
        start = harm + sum(groups[r].damage[0] for r in rest)
        hopeful = np.flatnonzero((left >= 0) & (start - np.interp(left, paid, saved) < least * (1 - 1e-12)))
        if not len(hopeful):
            break
        reach = np.searchsorted(paid, left[hopeful], side="right") - 1
        ends = start[hopeful] - saved[reach]
        winner = int(ends.argmin())
        if ends[winner] < least:
            least = float(ends[winner])
        else:
            winner = -1
        by_cost = np.lexsort((harm[hopeful], cost[hopeful]))
        falling = harm[hopeful[by_cost]] < np.concatenate(
            [[np.inf], np.minimum.accumulate(harm[hopeful[by_cost]])[:-1]]
        )
        if winner >= 0:
            falling |= by_cost == winner
        kept = by_cost[falling]
        if len(kept) > n_states:
            cell = float(np.ptp(harm[hopeful[kept]])) / n_states
            cells = np.floor((harm[hopeful[kept]].max() - harm[hopeful[kept]]) / cell)
            first = np.concatenate([[True], np.diff(np.maximum.accumulate(cells)) > 0])
            kept = kept[first | (kept == winner)]
            thinned += cell
        if winner >= 0:
            found = (depth, int(np.flatnonzero(kept == winner)[0]), int(reach[winner]))
        index = hopeful[kept]
        steps.append((index // len(alive[g]), index % len(alive[g])))
        state_cost, state_harm = cost[index], harm[index]
    if found is not None:
        depth, at_state, reached = found
        best = np.zeros(len(groups), dtype=np.int64)
        in_rest[:] = False
        in_rest[order[depth + 1 :]] = True
        ahead = np.flatnonzero(in_rest[owner])[:reached]
        best[owner[ahead]] = target[ahead]
        for level in range(depth, -1, -1):
            previous, choice = steps[level]
            best[order[level]] = alive[order[level]][choice[at_state]]
            at_state = int(previous[at_state])
    return best, _total(groups, best), thinned


def _total(groups: list[_Group], choice: np.ndarray) -> float:
    return float(sum(g.damage[i] for g, i in zip(groups, choice)))


def _picks(groups: list[_Group], choice: np.ndarray) -> list[int]:
    return [pick for g, i in zip(groups, choice) for pick in g.picks[int(i)]]


def _filled(
    groups: list[_Group], base: np.ndarray, owner: np.ndarray, target: np.ndarray, at: int, limit: float
) -> tuple[np.ndarray, float]:
    """The relaxation's plan with later steps taken wherever they still fit."""
    choice = base.copy()
    spent = sum(g.cost[i] for g, i in zip(groups, choice))
    for g, i in zip(owner[at:], target[at:]):
        extra = groups[g].cost[i] - groups[g].cost[choice[g]]
        if groups[g].damage[i] < groups[g].damage[choice[g]] and spent + extra <= limit:
            choice[g] = i
            spent += extra
    return choice, _total(groups, choice)


# -- several budgets ---------------------------------------------------------------------------------------------------


def _program(options: Sequence[Option], budgets: dict[str, float]) -> tuple[list[int], float]:
    """Each tensor is covered once, each budget is kept: a mixed-integer program, made small by reduced costs."""
    columns = _undominated(options, list(budgets))
    problem = _Program(options, columns, budgets)
    alive = np.arange(len(columns))
    unit = float(problem.damage.max()) or 1.0
    bound, reduced = problem.relaxation(alive, unit)
    # a fair plan among the options next to the relaxation; then only what could still be part of a better one
    near = problem.best_of_each_row(alive, reduced, 3)
    answer = problem.solve(near, unit, 50 * GAP) or problem.solve(alive, unit)
    if answer is None:
        raise BudgetError(_impossible_together(budgets, options))
    chosen = answer[0]
    total = float(problem.damage[chosen].sum())
    lower = bound
    if total - bound > GAP * total:
        alive = alive[reduced <= (total - bound) * (1 + 1e-6) + 1e-9 * unit]
        # damages span many orders of magnitude: the plan found is the scale on which the solver's tolerances are small
        bound, reduced = problem.relaxation(alive, total)
        alive = alive[reduced <= (total - bound) * (1 + 1e-6)]
        again = problem.solve(alive, total)
        if again is not None:
            lower = max(bound, again[1])
            if float(problem.damage[again[0]].sum()) <= total:
                chosen = again[0]
                total = float(problem.damage[chosen].sum())
    gap = (total - lower) / total if total > 0 else 0.0
    return [columns[j] for j in chosen], max(gap, 0.0)


class _Program:
    """The program in arrays: which column covers which tensor, what it costs as a fraction of each budget."""

    def __init__(self, options: Sequence[Option], columns: list[int], budgets: dict[str, float]) -> None:
        from scipy import sparse

        rows = {t: r for r, t in enumerate(dict.fromkeys(t for i in columns for t in _covered(options[i])))}
        entries = [(rows[t], j) for j, i in enumerate(columns) for t in _covered(options[i])]
        self.n_rows = len(rows)
        self.cover = sparse.csc_array((np.ones(len(entries)), tuple(zip(*entries))), shape=(len(rows), len(columns)))
        limits = np.array(list(budgets.values()))
        scale = np.where(limits > 0, limits, 1.0)
        cost = np.array([[getattr(options[i].cost, n) for i in columns] for n in budgets])
        # what is far above a budget by itself is never chosen: twice the budget says so without overflow
        self.cost = np.divide(cost, scale[:, None], out=np.full(cost.shape, 2.0), where=cost <= 2 * scale[:, None])
        self.limit = limits / scale
        self.damage = np.array([options[i].damage for i in columns])
        bits = np.array([options[i].cost.stored_bits for i in columns])
        self.tie = 1e-9 * bits / max(float(bits.max()), 1.0)

    def relaxation(self, alive: np.ndarray, unit: float) -> tuple[float, np.ndarray]:
        """The least damage when options may be mixed, and how much more each option would harm (its reduced cost)."""
        from scipy import optimize

        cover, cost, damage = self.cover[:, alive], self.cost[:, alive], self.damage[alive] / unit
        answer = optimize.linprog(damage, A_ub=cost, b_ub=self.limit, A_eq=cover, b_eq=np.ones(self.n_rows))
        if not answer.success:
            return -np.inf, np.zeros(len(alive))
        reduced = damage - cover.T @ answer.eqlin.marginals - cost.T @ answer.ineqlin.marginals
        return float(answer.fun) * unit, reduced * unit

    def best_of_each_row(self, alive: np.ndarray, reduced: np.ndarray, n: int) -> np.ndarray:
        """Places in `alive` of the n columns of least reduced cost that cover each tensor."""
        entries = self.cover[:, alive].tocoo()
        order = np.lexsort((reduced[entries.col], entries.row))
        rows = entries.row[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        return np.unique(entries.col[order][rank < n])

    def solve(self, index: np.ndarray, unit: float, gap: float = 0.9 * GAP) -> tuple[np.ndarray, float] | None:
        """The best choice among the columns `index`, and a lower bound of the damage over them."""
        from scipy import optimize

        cover, cost = self.cover[:, index], self.cost[:, index]
        # HiGHS may exceed a limit by its tolerance: tighten the limit until the plan truly fits
        for slack in (0.0, 1e-9, 1e-7, 1e-6):
            limits = [
                optimize.LinearConstraint(cover, 1, 1),
                optimize.LinearConstraint(1e4 * cost, -np.inf, 1e4 * (self.limit - slack)),
            ]
            with _quiet():
                answer = optimize.milp(
                    1e3 * (self.damage[index] / unit + self.tie[index]),
                    constraints=limits,
                    integrality=np.ones(len(index)),
                    bounds=optimize.Bounds(0, 1),
                    options={"mip_rel_gap": gap},
                )
            if answer.x is None:
                return None
            chosen = index[answer.x > 0.5]
            if (self.cost[:, chosen].sum(axis=1) <= self.limit * _FITS).all():
                return chosen, float(answer.mip_dual_bound) / 1e3 * unit - len(index) * 1e-9 * unit
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS writes to standard output when it repairs a plan, whatever it is told: send that nowhere."""
    if os.name != "posix":
        yield
        return
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _undominated(options: Sequence[Option], names: list[str]) -> list[int]:
    """Options that no other of the same site matches in every budgeted cost and in damage."""
    kept = []
    for indices in _by_site(options).values():
        table = np.array([[options[i].damage, *(getattr(options[i].cost, n) for n in names)] for i in indices])
        bits = np.array([options[i].cost.stored_bits for i in indices])
        no_worse = (table[:, None, :] <= table[None, :, :]).all(axis=2)
        equal = no_worse & no_worse.T
        place = np.arange(len(indices))
        fewer, same = bits[:, None] < bits[None, :], bits[:, None] == bits[None, :]
        earlier = fewer | (same & (place[:, None] < place[None, :]))
        beaten = (no_worse & (~equal | earlier)).any(axis=0)
        kept += [i for i, out in zip(indices, beaten) if not out]
    return sorted(kept)


# -- what cannot be ----------------------------------------------------------------------------------------------------

_WORDS = {"stored_bits": "smallest", "macs": "lightest", "latency_ms": "fastest"}


def _amount(measure: str, value: float, digits: int) -> str:
    """A cost in its unit, for people."""
    if measure == "latency_ms":
        return f"{value:.{digits}f} ms"
    if measure == "stored_bits":
        value, unit = value / 8, "B"
    else:
        unit = " MACs"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.{digits}f} {prefix}{unit}"
    return f"{value:.0f} {unit.strip()}"


def _impossible(measure: str, least: Plan, limit: float, options: Sequence[Option]) -> str:
    needed = getattr(least.cost, measure)
    digits = next((d for d in (1, 2, 3) if _amount(measure, needed, d) != _amount(measure, limit, d)), 6)
    heavy = _heaviest(measure, options)
    return (
        f"the {_WORDS[measure]} plan needs {_amount(measure, needed, digits)} but the budget is "
        f"{_amount(measure, limit, digits)}; add a {_WORDS[measure][:-3]}er option to: {', '.join(heavy)}."
    )


def _impossible_together(budgets: dict[str, float], options: Sequence[Option]) -> str:
    wanted = ", ".join(_amount(name, limit, 1) for name, limit in budgets.items())
    heavy = _heaviest(next(iter(budgets)), options)
    return (
        f"each budget can be met alone but not all at once ({wanted}); "
        f"loosen one, or add options to: {', '.join(heavy)}."
    )


def _heaviest(measure: str, options: Sequence[Option], n: int = 3) -> list[str]:
    """The sites with the largest share of the smallest plan: at most n, fewer if they make up half of it."""
    picks = [pick for group in _groups(options, measure) for pick in group.picks[0]]
    shares = sorted(((getattr(options[i].cost, measure), -i) for i in picks), reverse=True)
    total, seen, named = sum(s for s, _ in shares), 0.0, []
    for share, index in shares[:n]:
        named.append(options[-index].site.path)
        seen += share
        if seen >= total / 2:
            break
    return named
