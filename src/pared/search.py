"""The search for a plan within the budget: which plan to carry out next, and which trial to keep."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pared.budget.allocate import Plan, allocate, curve, smallest
from pared.budget.calibrate import gather
from pared.budget.channel_latency import timed_layers
from pared.budget.channels import Layer, Removal, channel_options, masks, plan_channels
from pared.budget.options import Offers, fixed_bits, options
from pared.errors import BudgetError
from pared.graph.channels import Channels
from pared.job import Job
from pared.measurement.latency import compare
from pared.measurement.quality import Drop
from pared.place import Refusal, place
from pared.runtimes import session
from pared.site import duplicate, plain
from pared.statistics import Statistics
from pared.technique import Cost, Option
from pared.trials import Level, Trial, Trials, Way

MAX_TRIALS = 6
"""How many plans are trained and verified at most while the accepted drop is used up."""
MAX_CHEAP_TRIALS = 16
"""The same for plans that need no training."""
MAX_PACES = 5
"""How many plans are carried out at most until the network is as fast as asked."""
SIZE_TOLERANCE = 0.01
"""A plan this close below the size asked for is close enough."""


class Found(NamedTuple):
    """The trial to keep, whether the budget is met, and what is to be said if it is not."""

    best: Trial
    met: bool
    reason: str = ""


class Aim:
    """The predicted share of the time to plan for, so that the network as a whole is as fast as asked.

    What is predicted and what is measured differ by what no plan changes, so the share that is measured is taken for a
    straight line between the two plans next to the one that is wanted.

    Args:
        speedup: what is asked.
        rise: the predicted time of the whole over the measured one, so that a millisecond saved in a layer is one saved in all.
    """

    NEAR = 0.95
    """A network that takes this share of the time allowed, or more, is near enough."""
    SAFE = 0.98
    """The share of the time allowed that is aimed at."""

    def __init__(self, speedup: float, rise: float = 1.0) -> None:
        self.allowed = 1 / speedup
        self.pace = min(1.0, max(0.5 * self.allowed, 1 - (1 - self.SAFE * self.allowed) / rise))
        self.slow, self.fast = (1.0, 1.0), (0.0, 0.0)
        self.least = 0.0
        self.is_over = False

    def saw(self, speedup: float) -> None:
        """Take in how fast the plan at `pace` made the network."""
        time = 1 / speedup
        if self.NEAR * self.allowed <= time <= self.allowed:
            self.is_over = True
            return
        if time <= self.allowed:
            self.fast = max(self.fast, (self.pace, time))
        else:
            last, self.slow = self.slow, min(self.slow, (self.pace, time))
        near, far = self.slow, self.fast
        if not self.fast[0]:  # all too slow: go on along the line through the last two
            near, far = last, self.slow
        rise = (near[1] - far[1]) / max(near[0] - far[0], 1e-9)
        pace = far[0] + (self.SAFE * self.allowed - far[1]) / rise if rise > 0 else 0.0
        low, high = (self.fast[0] or max(0.5 * self.slow[0], self.least)), self.slow[0]
        margin = 0.1 * (high - low)
        self.pace = min(max(pace, low + margin), high - margin)
        self.is_over = high - low < 0.02

    def cannot(self) -> None:
        """No plan is that fast."""
        self.least = self.pace
        self.pace = (self.pace + self.slow[0]) / 2
        self.is_over = self.slow[0] - self.least < 0.02


class Search:
    """Chooses plans and has them carried out.

    Args:
        job: the run.
        statistics: of its base.
        trials: carries plans out.
    """

    def __init__(self, job: Job, statistics: Statistics, trials: Trials) -> None:
        self.job, self.statistics, self.trials = job, statistics, trials
        self.first_options: list[Option] = []
        """What the recipe's first step could do."""
        self._first_refusals: list[Refusal] = []
        self._first_offers: Offers | None = None

    @property
    def refusals(self) -> list[Refusal]:
        """Where and why the recipe's first step left a site alone, up to now: more may be tried while plans are made."""
        return self._first_refusals if self._first_offers is None else self._first_offers.refusals

    def find(self) -> Found:
        """The best trial for what is asked.

        Raises:
            BudgetError: even the smallest plan is above the budget.
        """
        target = self.job.target
        if target.speedup is not None:
            return self._search_latency()
        if target.max_drop is None:
            best = self._at_size(target.file_bytes, target.macs, self.job.trains)
            return Found(best, True)
        if target.file_bytes is not None or target.macs is not None:
            best = self._at_size(target.file_bytes, target.macs, trained=False)
            if self.job.trains and best.drop.value > target.max_drop / 2:  # near the limit, luck on validation data decides
                best = self._at_size(target.file_bytes, target.macs, trained=True)
            if self._accepts(best):
                return Found(best, True)
            if target.file_bytes is None:
                return Found(best, False, self._miss(best))
            fallback = self._within_drop(target.file_bytes)
            if fallback:
                return Found(fallback, False, self._miss(fallback, best))
            return Found(best, False, self._miss(best))
        best_within = self._within_drop(None)
        if best_within is None:
            if not self.trials.done:
                raise BudgetError("no plan makes the file smaller than the original; add techniques to the recipe")
            worst = min(self.trials.done, key=lambda trial: trial.drop.value)
            return Found(worst, False, self._miss(worst))
        return Found(best_within, True)

    def nearest(self) -> Trial:
        """The best there is where no plan meets the budget: the smallest within the drop, or the smallest of all."""
        drops = self.job.target.max_drop is not None and self.job.target.speedup is None
        return (self._within_drop(None) if drops else None) or self.trials.carry_out(*self._smallest_plan(), trained=False)

    @cached_property
    def ways(self) -> list[Way]:
        """Every way through the steps; one, if there is one step."""
        start = self.job.base, self.statistics, (), self.job.total_macs
        return self.job.timed("options", lambda: list(self._explore(0, *start)))

    def _explore(
        self, index: int, model: nn.Module, statistics: Statistics, levels: tuple[Level, ...], macs: float
    ) -> Iterator[Way]:
        job, step, graph, offers = self.job, self.job.steps[index], None, None
        layers: list[Layer] = []
        if step.cuts:
            graph = Channels(duplicate(model).eval(), *job.example)
            candidates, by_time = list(step.candidates), job.target.speedup is not None and not step.learns
            if by_time:
                candidates = list(dict.fromkeys(other for technique in candidates for other in technique.widths()))
            found, refusals = channel_options(graph.model, candidates, statistics, graph, job.task, job.progress)
            if by_time:
                layers = timed_layers(graph.model, job.one, graph, found, job.table, job.say)
        elif index == len(job.steps) - 1:
            offers = Offers(model, list(step.candidates), statistics, job.task, progress=job.progress)
            found, refusals = offers.options, offers.refusals
        else:
            found, refusals = options(model, list(step.candidates), statistics, job.task, progress=job.progress)
        if index == 0:
            self._first_refusals, self._first_offers = refusals, offers
            self.first_options = found
        if index == len(job.steps) - 1:
            covered = set() if graph else {path for option in found for path in option.site.covers}
            rest = 0.0 if graph else fixed_bits(model, covered)
            yield Way(levels, found, model, statistics, rest, macs, graph, layers, offers)
            return
        for chosen in _levels(found) if graph is None else self._cut_levels(found, graph, macs, layers):
            twin = duplicate(model)
            if graph is None:
                grown = statistics.copy()
                place(twin, chosen, grown)
                yield from self._explore(index + 1, twin, grown, (*levels, Level(chosen)), macs)
                continue
            Removal(twin, graph, job.task).remove_(chosen)
            seen = gather(plain(twin), job.task, seed=job.seed, progress=job.progress, folder=job.aside) if chosen else statistics
            left = macs * graph.macs(masks(chosen, graph)) / graph.macs({})
            yield from self._explore(index + 1, twin, seen, (*levels, Level(chosen, graph, tuple(found), seen)), left)

    def _cut_levels(
        self, found: list[Option], graph: Channels, macs: float, layers: Sequence[Layer]
    ) -> list[tuple[Option, ...]]:
        """A few plans of a step that removes channels before others follow: what is asked, or some shares of the MACs."""
        whole = graph.macs({})
        asked: list[list[Option]] = []
        if self.job.target.speedup is not None and layers:
            limit = _milliseconds(layers, np.ones(len(graph.groups))) / self.job.target.speedup
            asked.append(plan_channels(found, graph, latency_ms=limit, layers=layers))
        if self.job.target.macs is not None or (self.job.target.speedup is not None and not layers):
            limit = self.job.target.macs or self.job.total_macs / (self.job.target.speedup or 1.0)
            asked.append(plan_channels(found, graph, macs=whole * min(1.0, limit / macs)))
        if asked:
            lightest = min(asked, key=lambda plan: graph.macs(masks(plan, graph)))
            return [tuple(lightest)]
        plans: list[tuple[Option, ...]] = [()]
        for share in (0.75, 0.5, 0.35):
            try:
                plans.append(tuple(plan_channels(found, graph, macs=share * whole)))
            except BudgetError:
                continue
        return plans

    def _plan(self, file_bytes: float | None, macs: float | None, pace: float | None = None) -> tuple[Way, Plan]:
        """The least damage within a budget, over all ways through the steps.

        Args:
            pace: the share of the time of the layers, as predicted; where it is not known, of the MACs.
        """
        found: list[tuple[Way, Plan]] = []
        failure: BudgetError | None = None
        for way in self.ways:
            limits: dict[str, float] = {}
            if pace is not None and way.layers:
                limits["pace"] = pace
            lighter = macs
            if pace is not None and not way.layers:
                lighter = min(macs or math.inf, pace * self.job.total_macs)
            if file_bytes is not None:
                limits["size_bits"] = 8 * file_bytes / self.trials.correction - way.fixed_bits
            if lighter is not None:
                dense = sum(option.cost.macs for option in way.options if option.technique is None)
                limits["macs"] = lighter if way.graph else lighter - max(0.0, way.macs - dense)
            try:
                found.append((way, _cut_plan(way, **limits) if way.graph else self._least_damage(way, **limits)))
            except BudgetError as error:
                failure = error
        if not found:
            raise failure or BudgetError("no plan was found")
        return min(found, key=lambda pair: pair[0].damage + pair[1].damage)

    def _least_damage(self, way: Way, **limits: float) -> Plan:
        """The best plan within the budgets, with everything tried that lies next to what it chooses."""
        plan = allocate(way.options, **limits)
        while way.offers is not None and self.job.timed("options", partial(way.offers.refine, plan.options)):
            plan = allocate(way.options, **limits)
        return plan

    def _smallest_plan(self) -> tuple[Way, Plan]:
        lighter = self.job.target.file_bytes is None and (self.job.target.macs is not None or self.job.target.speedup is not None)
        measure_name = "macs" if lighter else "stored_bits"
        plans = [(way, _least(way, measure_name)) for way in self.ways]
        return min(plans, key=lambda pair: pair[0].fixed_bits + getattr(pair[1].cost, measure_name))

    def _accepts(self, trial: Trial) -> bool:
        limit = self.job.target.max_drop
        return limit is None or trial.drop.value + margin(trial.drop, limit) <= limit + 1e-9

    @property
    def _shrinks(self) -> tuple[float, ...]:
        """Parts of the size asked for that trainings aim at, one after the other until a file fits."""
        if all(technique.keeps_size for technique in self.job.steps[-1].candidates):
            return 0.98, 0.94
        return 0.9, 0.84  # training spreads the codes: files grow by up to a tenth

    def _at_size(self, file_bytes: float | None, macs: float | None, trained: bool, pace: float | None = None) -> Trial:
        """A trial whose file is within the size: the estimate is corrected by what files of earlier trials weighed."""
        fitting: list[Trial] = []
        aim, before = file_bytes, None
        for _ in range(4):
            chosen = self._plan(aim, macs, pace)
            if before is not None and chosen[0] is before[0] and chosen[1].options == before[1].options:
                break
            before = chosen
            trial = self.trials.carry_out(*chosen, trained=False)
            if file_bytes is None or trial.file_bytes <= file_bytes:
                fitting.append(trial)
            if file_bytes is None or self._fits(trial, file_bytes):
                break
            aim = file_bytes * (1 - SIZE_TOLERANCE / 2)
        for shrink in self._shrinks if trained else ():
            aim = file_bytes * shrink if file_bytes is not None else None
            try:
                trial = self.trials.carry_out(*self._plan(aim, macs, pace), trained=True)
            except BudgetError:
                break
            if file_bytes is None or trial.file_bytes <= file_bytes:
                fitting.append(trial)
                break
        if fitting:
            return min(fitting, key=lambda trial: trial.drop.value)
        nearest = min(self.trials.done, key=lambda trial: trial.file_bytes)
        worst = ", ".join(option.site.path for option in self._largest(nearest))
        raise BudgetError(
            f"the plan nearest to the budget needs {nearest.file_bytes / 1e6:.3g} MB but the budget is "
            f"{(file_bytes or 0) / 1e6:.3g} MB; raise the budget, or add a smaller option to: {worst}"
        )

    @staticmethod
    def _largest(trial: Trial, n: int = 3) -> list[Option]:
        return sorted(trial.plan.options, key=lambda option: -option.cost.stored_bits)[:n]

    def _fits(self, trial: Trial, file_bytes: float) -> bool:
        return trial.file_bytes <= file_bytes and (
            trial.file_bytes >= file_bytes * (1 - 4 * SIZE_TOLERANCE) or trial.plan.damage <= 0
        )

    def _within_drop(self, at_least: float | None) -> Trial | None:
        """The smallest trial within the accepted drop; first without training, then with it where that is allowed."""
        low = max(self._smallest_bytes(), at_least or 0.0)
        high = max(float(self.job.original_bytes), 1.1 * low)
        best, low, high = self._bisect(low, high, trained=False, n=MAX_CHEAP_TRIALS, best=None)
        if self.job.trains:
            # training reaches further down than the plan without it: go on from there
            top = float(best.file_bytes) if best else high
            bottom = max(top / 16, self._smallest_bytes(), at_least or 0.0)
            best, _, _ = self._bisect(bottom, top, trained=True, n=MAX_TRIALS, best=best, start=top / 2.5)
        return best

    def _bisect(
        self, low: float, high: float, *, trained: bool, n: int, best: Trial | None, start: float | None = None
    ) -> tuple[Trial | None, float, float]:
        """Bisection of the size on a logarithmic scale between one that is too small and one that is large enough."""
        for step in range(n):
            if high / low < (1.06 if trained else 1.03):
                break
            aim = max(low, start) if step == 0 and start is not None else math.sqrt(low * high)
            try:
                trial = self.trials.carry_out(*self._plan(aim, self.job.target.macs), trained)
            except BudgetError:
                low = aim
                continue
            if self._accepts(trial):
                if best is None or trial.file_bytes < best.file_bytes:
                    best = trial
                high = min(aim, float(trial.file_bytes))
            else:
                low = aim
            if high <= low:
                break
        return best, low, high

    def _smallest_bytes(self) -> float:
        sizes = [way.fixed_bits + _least(way, "stored_bits").cost.stored_bits for way in self.ways]
        return 1.02 * self.trials.correction * min(sizes) / 8

    def _search_latency(self) -> Found:
        """A trial as fast as asked: the time that is predicted is brought to what the whole network takes."""
        target, say = self.job.target, self.job.say
        wanted = target.speedup or 1.0
        tried: list[tuple[float, float, Trial]] = []  # pace, speed-up, trial
        if self.job.after and target.file_bytes is None:  # integers are faster at the same number of MACs
            plans = [(way, _least(way, "stored_bits")) for way in self.ways]
            chosen = min(plans, key=lambda pair: pair[0].fixed_bits + pair[1].cost.stored_bits)
            trial = self.trials.carry_out(*chosen, trained=False)
            tried.append((1.0, self._speedup(trial), trial))
            say(f"{tried[0][1]:.2f}x faster in {target.runtime} with everything that was planned before")
            if tried[0][1] >= wanted:
                return Found(trial, self._accepts(trial), "" if self._accepts(trial) else self._miss(trial))
        aim, failure = Aim(wanted, self._rise()), None
        for _ in range(MAX_PACES):
            if aim.is_over:
                break
            try:
                trial = self._at_pace(aim.pace, [trial for _, _, trial in tried])
            except BudgetError as error:
                failure = error
                aim.cannot()
                continue
            speedup = self._speedup(trial)
            say(f"{speedup:.2f}x faster in {target.runtime}, planned for {1 / aim.pace:.2f}x")
            tried.append((aim.pace, speedup, trial))
            aim.saw(speedup)
        if not tried:
            raise failure or BudgetError("no plan was found")
        fast = [one for one in tried if one[1] >= wanted]
        pace, speedup, trial = min(fast, key=lambda one: one[2].drop.value) if fast else max(tried, key=lambda one: one[1])
        if self.job.trains and target.file_bytes is None:
            trial = self.trials.carry_out(trial.way, trial.plan, trained=True)
        elif self.job.trains:
            try:
                trial = self._at_size(target.file_bytes, target.macs, trained=True, pace=pace)
            except BudgetError as error:
                say(f"{error}; what was found without training is kept")
        if trial.trained:
            speedup = self._speedup(trial)
            say(f"{speedup:.2f}x faster in {target.runtime} after training")
        met = speedup >= wanted and self._accepts(trial)
        reason = "" if met else (
            f"the budget is not met: {speedup:.2f}x faster in {target.runtime} (asked {wanted:g}x), "
            f"drop {trial.drop.value:.2f}; the best found is kept"
        )
        return Found(trial, met, reason)

    def _at_pace(self, pace: float, tried: Sequence[Trial]) -> Trial:
        """A trial of the plan for this share of the time; one that was carried out already is not carried out again."""
        target = self.job.target
        if target.file_bytes is not None:
            return self._at_size(target.file_bytes, target.macs, trained=False, pace=pace)
        way, plan = self._plan(None, target.macs, pace)
        same = (trial for trial in tried if trial.way is way and [*map(id, trial.plan.options)] == [*map(id, plan.options)])
        return next(same, None) or self.trials.carry_out(way, plan, trained=False)

    def _speedup(self, trial: Trial) -> float:
        """Of the whole network, one example at a time."""
        pair = [self.job.original, trial.model]
        before, after = self.job.folder.memo(f"milliseconds-{trial.number}", partial(self._timed, pair))
        return before / after

    def _rise(self) -> float:
        """The sum of what the layers take alone over what the network takes, where they were timed."""
        way = self.ways[0]
        if way.graph is None or not way.layers:
            return 1.0
        (whole,) = self.job.folder.memo("original-ms", partial(self._timed, [self.job.original]))
        return _milliseconds(way.layers, np.ones(len(way.graph.groups))) / whole

    def _timed(self, models: list[nn.Module]) -> list[float]:
        """Milliseconds of one example in the runtime that is asked for, in turns."""
        threads = torch.get_num_threads()
        calls = {k: session(model, self.job.target.runtime, self.job.one, threads) for k, model in enumerate(models)}
        return [latency.median for latency in compare(calls, n_runs=2000).values()]

    def _miss(self, kept: Trial, asked: Trial | None = None) -> str:
        unit = kept.drop.unit
        text = f"the budget is not met: the accepted drop is {self.job.target.max_drop:g} {unit}"
        if asked is not None:
            text += f", but at {asked.file_bytes / 1e6:.3g} MB the drop is {_spread(asked.drop)}"
        ratio = self.job.original_bytes / kept.file_bytes
        text += f"; kept is {kept.file_bytes / 1e6:.3g} MB ({ratio:.1f}x) with {_spread(kept.drop)}"
        worst = sorted(kept.plan.options, key=lambda option: -option.damage)[:3]
        if worst:
            text += f"; most damage comes from {', '.join(option.site.path for option in worst)}"
        return text


def _cut_plan(
    way: Way, size_bits: float | None = None, macs: float | None = None, pace: float | None = None
) -> Plan:
    """The channels to remove within the budgets; where there are several, the least harmful plan for one of them that meets all."""
    graph = way.graph
    if graph is None:
        raise ValueError("a way that removes no channels has no graph of them")
    start = time.perf_counter()
    limits: dict[str, float] = {}
    plans = []
    if pace is not None:
        limits["latency_ms"] = pace * _milliseconds(way.layers, np.ones(len(graph.groups)))
        plans.append(plan_channels(way.options, graph, latency_ms=limits["latency_ms"], layers=way.layers))
    if macs is not None:
        limits["macs"] = macs
        plans.append(plan_channels(way.options, graph, macs=graph.macs({}) * min(1.0, macs / way.macs)))
    if size_bits is not None:
        limits["stored_bits"] = size_bits
        plans.append(plan_channels(way.options, graph, bits=size_bits))
    costs = [(_cut_cost(way, plan), sum(option.damage for option in plan), plan) for plan in plans or [[]]]
    fitting = [one for one in costs if all(getattr(one[0], name) <= 1.0001 * limit for name, limit in limits.items())]
    if not fitting:
        raise BudgetError("no plan for the channels meets all of the budgets at once; relax one of them")
    cost, damage, chosen = min(fitting, key=lambda one: one[1])
    return Plan(tuple(chosen), cost, damage, 0.0, time.perf_counter() - start)


def _cut_cost(way: Way, chosen: Sequence[Option]) -> Cost:
    graph = way.graph
    if graph is None:
        raise ValueError("a way that removes no channels has no graph of them")
    gone = masks(chosen, graph)
    keep = np.ones(len(graph.groups))
    for number, mask in gone.items():
        keep[number] = 1 - float(mask.mean())
    return Cost(graph.bits(gone), way.macs * graph.macs(gone) / graph.macs({}), _milliseconds(way.layers, keep))


def _milliseconds(layers: Sequence[Layer], keep: np.ndarray) -> float:
    return sum(layer.at(keep) for layer in layers)


def _least(way: Way, measure_name: str) -> Plan:
    """What costs least, whatever it harms."""
    if way.graph is None:
        return smallest(way.options, measure_name)
    harshest: dict[str, Option] = {}
    for option in sorted(way.options, key=lambda option: -option.cost.stored_bits):
        harshest[option.site.path] = option
    chosen = tuple(harshest.values())
    return Plan(chosen, _cut_cost(way, chosen), sum(option.damage for option in chosen), 0.0, 0.0)


def margin(drop: Drop, max_drop: float) -> float:
    """How far below the accepted drop a drop on validation data must stay: its standard error, at most half of what is
    accepted. The plan is the best of several on the same examples, so half of all drops measured to be just within the
    limit are above it on others; and with few examples the standard error alone would leave no plan to accept."""
    error = drop.standard_error
    return max_drop / 2 if error is None else min(error, max_drop / 2)


def _spread(drop: Drop) -> str:
    error = drop.standard_error
    return f"{drop.value:.2f}" + (f" (standard error {error:.2f})" if error is not None else "")


def _levels(found: list[Option], n: int = 3) -> list[tuple[Option, ...]]:
    """A few plans of a step that others follow: nothing, and some points along its own trade-off."""
    points = curve(found, n=24)
    if len(points) < 2:
        return [()]
    most, least = points[0][0], points[-1][0]
    most, least = max(most, least), min(most, least)
    plans: list[tuple[Option, ...]] = [()]
    for share in [(index + 1) / (n + 1) for index in range(n)]:
        try:
            plans.append(allocate(found, size_bits=most - share * (most - least)).options)
        except BudgetError:
            continue
    return plans
