"""Options on whole channels: which there are, which meet a budget with the least damage, and how they are carried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from pared.budget.damage import measure, references
from pared.budget.options import N_MEASURED
from pared.budget.reconstruct import reconstruct_, whole_batch
from pared.budget.responses import responses
from pared.cut import Coordinates, CutStructure
from pared.errors import BudgetError, InputError
from pared.graph.channels import Channels
from pared.graph.load import Axis
from pared.graph.program import Program
from pared.place import Refusal, bytes_of, everywhere, place
from pared.site import Site, duplicate
from pared.statistics import Responses, Statistics
from pared.task import Task
from pared.technique import Edit, Option, Technique

Progress = Callable[[dict[str, Any]], None]
SWEEPS = 6
STEPS = 48


def channel_options(
    model: nn.Module,
    techniques: Sequence[Technique],
    statistics: Statistics,
    graph: Channels,
    task: Task | None,
    progress: Progress | None = None,
) -> tuple[list[Option], list[Refusal]]:
    """What the techniques may remove from every group of channels, and which channels stay for what reason."""
    found: list[Option] = []
    refusals = list(refused(model, techniques, graph))
    known = {(refusal.path, refusal.technique) for refusal in refusals}
    pairs = [(technique, site) for technique in techniques for site in technique.sites(model, graph)]
    statistics = with_responses(statistics, techniques, graph, task)
    data: tuple[list[Any], list[Any]] | None = None
    known_cuts: set[tuple[str, bytes]] = set()
    for done, (technique, site) in enumerate(pairs, 1):
        if reason := technique.refuse(site):
            if (site.path, technique.name) not in known:
                refusals.append(Refusal(site.path, technique.name, reason, bytes_of(site)))
            continue
        with torch.no_grad():
            structure, parts = technique.solve(site, statistics)
            if site.group is not None and isinstance(structure, CutStructure):
                cut = site.path, site.group.gone(structure).tobytes()
                if cut in known_cuts:  # such as 0.5 and 0.52 of sixteen channels
                    continue
                known_cuts.add(cut)
            damage = technique.damage(site, parts, statistics)
        if damage is None and task is not None:
            if data is None:
                batches = list(task.calibration(N_MEASURED))
                data = batches, references(model, task, batches)
            damage = measure(model, site, parts, task, *data)
        if damage is not None and math.isfinite(damage):
            found.append(Option(site, technique, technique.cost(site, parts), max(0.0, damage), structure))
        if progress is not None:
            progress({"doing": "options", "done": done, "total": len(pairs)})
    return found, refusals


def with_responses(
    statistics: Statistics, techniques: Sequence[Technique], graph: Channels, task: Task | None
) -> Statistics:
    """The statistics with what the techniques' importance measures need of the channels."""
    if task is None or not any(technique.wants(Responses) for technique in techniques):
        return statistics
    grown = statistics.copy()
    grown.respond(responses(graph, task))
    return grown


def refused(model: nn.Module, techniques: Sequence[Technique], graph: Channels) -> Iterator[Refusal]:
    """The channels that the graph keeps."""
    name = techniques[0].name
    for frozen in graph.frozen:
        site = Site(model, (frozen.name,), "channels", frozen.paths)
        yield Refusal(frozen.name, name, frozen.reason, bytes_of(site))


class Removal:
    """Removes channels from a network, at once or bit by bit, and lets the layers after them make up for it.

    Args:
        model: of the graph's structure; it is changed in place.
        graph: as it was analysed, before anything was removed.
        task: calibration data; None: nothing is made up for.
    """

    def __init__(self, model: nn.Module, graph: Channels, task: Task | None) -> None:
        self.model, self.graph, self.task = model, graph, task
        self._coordinates = Coordinates()
        self._gone: dict[int, np.ndarray] = {}

    def remove_(self, options: Sequence[Option]) -> list[Edit]:
        """Remove what options say, as far as it is still there; gives the edits."""
        corrects = any(option.technique is not None and option.technique.corrects for option in options)
        before, going = duplicate(self.model).eval() if corrects and self.task else None, self.graph.going(self._gone)
        edits = place(self.model, options, Statistics(), self._coordinates)
        for number, gone in masks(options, self.graph).items():
            self._gone[number] = gone | self._gone.get(number, np.zeros_like(gone))
        after = self.graph.going(self._gone)
        examples = whole_batch(self.task) if before is not None and self.task is not None else None
        if before is not None and self.task is not None and examples is not None:
            programs = self.graph.cut_program(going), self.graph.cut_program(after)
            reconstruct_(self.model, before, *programs, lambda k: self.graph.rows(k, going, after), self.task, examples)
        return edits

    def program(self) -> Program:
        """That of the network as it is now."""
        return self.graph.cut_program(self.graph.going(self._gone))


def partly(options: Sequence[Option], found: Sequence[Option], progress: float) -> list[Option]:
    """For each option the one at its group that has gone about this part of its way; 1: the option itself."""
    chosen = []
    for option in options:
        group = option.site.group
        if group is None or progress >= 1:
            chosen.append(option)
            continue
        final = group.gone(cast(CutStructure, option.structure))
        least = progress * final.sum()
        steps = []
        for other in found:
            if other.site.path == option.site.path and other.technique is not None:
                gone = group.gone(cast(CutStructure, other.structure))
                if gone.sum() <= least and not (gone & ~final).any():
                    steps.append((int(gone.sum()), other))
        if steps:
            chosen.append(max(steps, key=lambda step: step[0])[1])
    return chosen


def cut_by_hand_(
    model: nn.Module,
    technique: Technique,
    statistics: Statistics,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    task: Task | None,
) -> tuple[list[Edit], Program]:
    """Remove channels of every group that the technique does not refuse, in place; gives the edits and the cut program, which
    alone computes what is meant where the technique rewrites.

    Raises:
        InputError: there is no example to trace the model with, or nothing can be removed; the first reasons are given.
    """
    if example is None:
        raise InputError(f"{technique.name} follows channels along an example call, but there is none; give apply a task")
    original = duplicate(model).eval()
    graph = Channels(original, *example, rewrite=technique.rewrites)
    statistics = with_responses(statistics, [technique], graph, task)
    chosen, refusals = everywhere(original, technique, statistics, graph)
    if not chosen:
        reasons = [f"{each.path}: {each.reason}" for each in (*refusals, *refused(original, [technique], graph))]
        told = "; ".join(dict.fromkeys(reasons[:3])) or "the model has no channels"
        raise InputError(f"{technique} must change something, but it changes nothing: {told}")
    removal = Removal(model, graph, task)
    return removal.remove_(chosen), removal.program()


def masks(options: Sequence[Option], graph: Channels) -> dict[int, np.ndarray]:
    """Which channels go, by the number of the group."""
    numbers = {id(group): number for number, group in enumerate(graph.groups)}
    found = {}
    for option in options:
        group, structure = option.site.group, option.structure
        if option.technique is not None and group is not None and isinstance(structure, CutStructure):
            found[numbers[id(group)]] = group.gone(structure)
    return found


class Layer(Protocol):
    """What something costs as a function of what the groups keep, such as `pared.graph.load.Load`."""

    @property
    def axes(self) -> tuple[Axis, ...]: ...

    def at(self, keep: np.ndarray, /) -> float: ...


@dataclass
class _Choice:
    """The levels of one group: the share that stays, the damage, and the option."""

    number: int
    keep: list[float]
    damage: list[float]
    option: list[Option | None]
    loads: list[int]


def plan_channels(
    options: Sequence[Option],
    graph: Channels,
    *,
    macs: float | None = None,
    bits: float | None = None,
    latency_ms: float | None = None,
    layers: Sequence[Layer] = (),
) -> list[Option]:
    """The options, one or none for every group, with the least damage whose network needs so many MACs, bits or milliseconds.

    What a layer costs is a product of what stays on both its sides, so costs do not add up over groups: for a price per
    unit of cost each group in turn takes its best level given the others, until none changes; the price is bisected, and
    what is left of the budget is given back to the groups that gain most.

    Args:
        layers: for latency_ms, the time of each.

    Raises:
        BudgetError: even with every group at its least the network is above the budget.
    """
    budgets: list[tuple[str, Sequence[Layer], float | None]] = [
        ("MACs", graph.loads() if macs is not None else (), macs),
        ("bits", graph.weights() if bits is not None else (), bits),
        ("ms", layers, latency_ms),
    ]
    (unit, loads, limit), *others = [each for each in budgets if each[2] is not None] or [("", (), None)]
    if limit is None or others:
        raise ValueError("plan_channels needs a budget of macs, of bits or of latency_ms, and one only")
    choices = _choices(options, graph, loads)
    keep = np.ones(len(graph.groups))
    levels = [0] * len(choices)
    total = sum(load.at(keep) for load in loads)
    if total <= limit:
        return []
    largest = sum(max(choice.damage) for choice in choices) + 1e-9
    low, high = math.log(1e-9 * largest / total), math.log(1e9 * largest / total)
    least = _best_levels(choices, loads, keep, math.exp(high), [len(choice.keep) - 1 for choice in choices])
    if (needed := _total(loads, choices, least, keep)) > limit:
        raise BudgetError(
            f"with every group at its least, {needed:.4g} of {total:.4g} {unit} stay, but the budget is {limit:.4g}; "
            "add smaller values of keep"
        )
    best = least
    for _ in range(STEPS):
        middle = (low + high) / 2
        levels = _best_levels(choices, loads, keep, math.exp(middle), list(levels))
        if _total(loads, choices, levels, keep) <= limit:
            best, high = list(levels), middle
        else:
            low = middle
    best = _given_back(choices, loads, best, keep, limit)
    return [option for choice, level in zip(choices, best) if (option := choice.option[level]) is not None]


def _choices(options: Sequence[Option], graph: Channels, loads: Sequence[Layer]) -> list[_Choice]:
    numbers = {id(group): number for number, group in enumerate(graph.groups)}
    by_group: dict[int, list[Option]] = {}
    for option in options:
        by_group.setdefault(numbers[id(option.site.group)], []).append(option)
    where: dict[int, list[int]] = {}
    for place_, load in enumerate(loads):
        for number in {g for axis in load.axes for _, groups in axis for g in groups}:
            where.setdefault(number, []).append(place_)
    found = []
    for number, own in by_group.items():
        group = graph.groups[number]
        rows: list[tuple[float, float, Option | None]] = [(1.0, 0.0, None)]
        for option in own:
            rows.append((1 - float(group.gone(cast(CutStructure, option.structure)).mean()), option.damage, option))
        rows.sort(key=lambda row: (-row[0], row[1]))
        keep, damage, options_ = ([row[k] for row in rows] for k in range(3))
        found.append(_Choice(number, keep, damage, options_, where.get(number, [])))  # type: ignore[arg-type]
    return found


def _total(loads: Sequence[Layer], choices: Sequence[_Choice], levels: Sequence[int], keep: np.ndarray) -> float:
    for choice, level in zip(choices, levels):
        keep[choice.number] = choice.keep[level]
    return sum(load.at(keep) for load in loads)


def _best_levels(
    choices: Sequence[_Choice], loads: Sequence[Layer], keep: np.ndarray, price: float, levels: list[int]
) -> list[int]:
    for choice, level in zip(choices, levels):
        keep[choice.number] = choice.keep[level]
    for _ in range(SWEEPS):
        changed = False
        for k, choice in enumerate(choices):
            values = []
            for share, damage in zip(choice.keep, choice.damage):
                keep[choice.number] = share
                values.append(damage + price * sum(loads[place_].at(keep) for place_ in choice.loads))
            chosen = int(np.argmin(values))
            changed |= chosen != levels[k]
            levels[k] = chosen
            keep[choice.number] = choice.keep[chosen]
        if not changed:
            break
    return levels


def _given_back(
    choices: Sequence[_Choice], loads: Sequence[Layer], levels: list[int], keep: np.ndarray, limit: float
) -> list[int]:
    total = _total(loads, choices, levels, keep)
    while True:
        gains = []
        for k, choice in enumerate(choices):
            level = levels[k]
            if level == 0:
                continue
            before = sum(loads[place_].at(keep) for place_ in choice.loads)
            for other in range(level):  # more channels need not take longer
                keep[choice.number] = choice.keep[other]
                more = sum(loads[place_].at(keep) for place_ in choice.loads) - before
                saved = choice.damage[level] - choice.damage[other]
                if total + more <= limit and saved >= 0:
                    gains.append((saved / max(more, 1e-9 * limit), more, k, other))
            keep[choice.number] = choice.keep[level]
        if not gains:
            return levels
        _, more, k, levels[k] = max(gains)
        keep[choices[k].number] = choices[k].keep[levels[k]]
        total += more


__all__ = ["Layer", "Removal", "channel_options", "cut_by_hand_", "masks", "partly", "plan_channels", "refused"]
