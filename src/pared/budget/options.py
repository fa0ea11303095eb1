"""Every technique at every site: what it costs and what it harms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pared import store
from pared.budget.damage import held_out, kept, measure, references
from pared.place import Refusal, bytes_of
from pared.site import Site, tensor_sites
from pared.statistics import Statistics
from pared.task import Task
from pared.technique import (
    ENTRY_BITS,
    Cost,
    Option,
    Technique,
    as_numpy,
    kept_of,
    stored_tensors,
    value_at,
)

LONG, STRIDE, FEW = 12, 8, 2**20
"""Of more than so many values of one number only every so manieth is tried at first, unless there are few weights."""
EDIT_BITS = 8 * 16
"""What one line of the manifest costs: the technique, its settings, where."""
N_MEASURED = 64

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Candidate:
    """An option together with the parts that it stands for."""

    option: Option
    parts: nn.Module


def options(
    model: nn.Module,
    techniques: Sequence[Technique],
    statistics: Statistics,
    task: Task | None,
    *,
    graph: Any = None,
    progress: Progress | None = None,
    measured: int = N_MEASURED,
) -> tuple[list[Option], list[Refusal]]:
    """All options of all techniques, and where and why techniques leave a site alone.

    Every tensor that a site covers can also stay as it is (technique None, damage 0). Options that save neither bits
    nor MACs are left out.

    Args:
        model: trained, in eval mode; it is not changed.
        statistics: curvature by tensor path and positions for the MACs; empty: weights only.
        task: on whose validation data damage is measured where it cannot be predicted; None: relative squared error.
        graph: what the techniques' sites may need to know of the graph.
        measured: on how many examples.
    """
    refusals: dict[tuple[str, str, str], Refusal] = {}
    found = [c.option for c in candidates(model, techniques, statistics, task, refusals, graph, progress, measured)]
    return found, _with_the_useless(found, refusals)


def _with_the_useless(found: Sequence[Option], refusals: dict[tuple[str, str, str], Refusal]) -> list[Refusal]:
    """The refusals, and a line for every tensor for which nothing was better than leaving it."""
    improved = {path for option in found if option.technique is not None for path in option.site.covers}
    refused = {path for path, _, _ in refusals}
    for option in found:
        site = option.site
        if option.technique is None and site.path not in improved and site.path not in refused:
            _refuse(refusals, site, "every technique", "nothing was smaller here")
    return list(refusals.values())


class Offers:
    """The options of techniques among which plans choose. Where a technique comes with more than `LONG` values of one number, and
    there are more than `FEW` weights, some of them are tried at every site, and `refine` tries those next to what a plan chose.

    Args:
        as for `options`.
    """

    def __init__(
        self, model: nn.Module, techniques: Sequence[Technique], statistics: Statistics, task: Task | None,
        *, progress: Progress | None = None, measured: int = N_MEASURED,
    ) -> None:  # fmt: skip
        self.statistics, self.progress = statistics, progress
        self._refusals: dict[tuple[str, str, str], Refusal] = {}
        self._work = _work(model, techniques, statistics, self._refusals, None)
        self._left = {site.path: _left(site, statistics) for site in _touched(model, self._work)}
        self._gauge = _Gauge(model, statistics, task, measured)
        scales = _scales(model, techniques)
        self._scales = {
            key: [[number for each in scale for number, (one, _) in enumerate(pairs) if one is each] for scale in scales]
            for key, pairs in self._work.items()
        }
        self._tried: dict[tuple[str, str], dict[int, Option | None]] = {key: {} for key in self._work}
        self.options: list[Option] = []
        """All that was tried and saves something, and every tensor as it is."""
        self._try([(key, number) for key, pairs in self._work.items() for number in self._at_first(key, len(pairs))])

    @property
    def refusals(self) -> list[Refusal]:
        """Where and why techniques left a site alone."""
        return _with_the_useless(self.options, dict(self._refusals))

    def refine(self, chosen: Sequence[Option]) -> bool:
        """Try what lies half-way between the options of a plan and those tried on both sides; whether there was any.

        A site that the plan leaves alone might do with a setting between one that saves nothing and one that does.
        """
        taken: dict[tuple[str, str], Technique | None] = {(o.site.kind, o.site.path): o.technique for o in chosen}
        missing = []
        for key, scales in self._scales.items():
            tried, technique = self._tried[key], taken.get(key)
            for scale in scales:
                for low, high in pairwise(place for place, number in enumerate(scale) if number in tried):
                    ends = scale[low], scale[high]
                    if technique is None:
                        near = (tried[ends[0]] is None) != (tried[ends[1]] is None)
                    else:
                        near = any(self._work[key][end][0] is technique for end in ends)
                    if near and high - low > 1:
                        missing.append((key, scale[(low + high) // 2]))
        self._try(missing)
        return bool(missing)

    def _at_first(self, key: tuple[str, str], n: int) -> list[int]:
        """Of the settings at a site, all but those within long lists."""
        later = {
            number
            for scale in self._scales[key]
            for place, number in enumerate(scale)
            if place % STRIDE and place < len(scale) - 1
        }
        return [number for number in range(n) if number not in later]

    def _try(self, wanted: Sequence[tuple[tuple[str, str], int]]) -> None:
        for done, (key, number) in enumerate(wanted, 1):
            technique, site = self._work[key][number]
            found = _candidate(technique, site, self.statistics, self._left, self._gauge, self._refusals)
            self._tried[key][number] = None if found is None else found.option
            if self.progress is not None:
                self.progress({"doing": "options", "done": done, "total": len(wanted)})
        tried = (tried[number] for tried in self._tried.values() for number in sorted(tried))
        self.options[:] = [*self._left.values(), *(option for option in tried if option is not None)]


def n_tried(model: nn.Module, techniques: Sequence[Technique]) -> int:
    """About how many options for each site a plan needs."""
    scales = _scales(model, techniques)
    return len(techniques) - sum(len(scale) - (len(scale) // STRIDE + 2 * STRIDE.bit_length()) for scale in scales)


def _scales(model: nn.Module, techniques: Sequence[Technique]) -> list[list[Technique]]:
    """Techniques that differ in one number alone, more than `LONG` of them, in the order of it; none for a small model."""
    if sum(parameter.numel() for parameter in model.parameters()) < FEW:
        return []
    kinds: dict[type[Technique], list[Technique]] = {}
    for technique in techniques:
        kinds.setdefault(type(technique), []).append(technique)
    found = []
    for same in kinds.values():
        settings = [technique.model_dump() for technique in same]
        varying = [name for name in settings[0] if len({repr(each[name]) for each in settings}) > 1]
        if len(same) > LONG and len(varying) == 1 and all(isinstance(each[varying[0]], (int, float)) for each in settings):
            found.append(sorted(same, key=lambda technique: getattr(technique, varying[0])))
    return found


def candidates(
    model: nn.Module,
    techniques: Sequence[Technique],
    statistics: Statistics,
    task: Task | None,
    refusals: dict[tuple[str, str, str], Refusal],
    graph: Any = None,
    progress: Progress | None = None,
    measured: int = N_MEASURED,
) -> Iterator[Candidate]:
    """Options with their parts, site by site; reasons for leaving a site alone go into `refusals`."""
    work = _work(model, techniques, statistics, refusals, graph)
    left = {site.path: _left(site, statistics) for site in _touched(model, work)}
    yield from (Candidate(option, nn.Identity()) for option in left.values())
    gauge = _Gauge(model, statistics, task, measured)
    total = sum(len(pairs) for pairs in work.values())
    done = 0
    for pairs in work.values():
        for technique, site in pairs:
            candidate = _candidate(technique, site, statistics, left, gauge, refusals)
            done += 1
            if progress is not None:
                progress({"doing": "options", "done": done, "total": total})
            if candidate is not None:
                yield candidate


def _work(
    model: nn.Module,
    techniques: Sequence[Technique],
    statistics: Statistics,
    refusals: dict[tuple[str, str, str], Refusal],
    graph: Any,
) -> dict[tuple[str, str], list[tuple[Technique, Site]]]:
    """By kind and path of a site, which techniques are to be tried there; none where all refuse."""
    work: dict[tuple[str, str], list[tuple[Technique, Site]]] = {}
    for technique in techniques:
        for site in technique.sites(model, graph):
            if reason := technique.refuse(site):
                _refuse(refusals, site, technique.name, reason)
                work.setdefault((site.kind, site.path), [])
                continue
            seen_at = max((statistics.positions.get(path, 0.0) for path in site.covers), default=0.0)
            work.setdefault((site.kind, site.path), []).append((technique, replace(site, positions=seen_at)))
    return work


def fixed_bits(model: nn.Module, covered: set[str]) -> float:
    """Bits in the file of every tensor that no option covers, integers and tiny ones included."""
    rest = (tensor for path, tensor, _ in stored_tensors(model) if path not in covered)
    return sum(store.estimate_bits(as_numpy(tensor)) + ENTRY_BITS for tensor in rest)


def _touched(model: nn.Module, work: dict[tuple[str, str], list[tuple[Technique, Site]]]) -> Iterator[Site]:
    """The tensors that some technique considered, as sites."""
    wanted = {path for kind, path in work if kind == "tensor"}
    wanted |= {path for pairs in work.values() for _, site in pairs for path in site.covers}
    return (site for site in tensor_sites(model) if site.path in wanted)


def _left(site: Site, statistics: Statistics) -> Option:
    """The tensor as it is."""
    positions = statistics.positions.get(site.path, 0.0)
    cost = Cost(store.estimate_bits(as_numpy(site.tensor)) + ENTRY_BITS, positions * site.tensor.numel())
    return Option(replace(site, positions=positions), None, cost, 0.0)


def _candidate(
    technique: Technique,
    site: Site,
    statistics: Statistics,
    left: dict[str, Option],
    gauge: _Gauge,
    refusals: dict[tuple[str, str, str], Refusal],
) -> Candidate | None:
    with torch.no_grad():
        structure, parts = technique.solve(site, statistics)
        cost = technique.cost(site, parts) + _entries(site, parts)
        before = sum((left[path].cost for path in site.covers if path in left), Cost())
        if cost.stored_bits >= before.stored_bits and cost.macs >= before.macs:
            return None
        damage = gauge.damage(technique, site, parts)
    if damage is None:
        _refuse(refusals, site, technique.name, "its damage can be neither predicted nor, without data, measured")
        return None
    if not math.isfinite(damage):
        _refuse(refusals, site, technique.name, "its damage is not a finite number")
        return None
    return Candidate(Option(site, technique, cost, damage, structure), parts)


def _entries(site: Site, parts: nn.Module) -> Cost:
    kept = kept_of(site)
    n_tensors = sum(1 for _, tensor, _ in stored_tensors(parts) if id(tensor) not in kept)
    return Cost(n_tensors * ENTRY_BITS + EDIT_BITS)


def _refuse(refusals: dict[tuple[str, str, str], Refusal], site: Site, technique: str, reason: str) -> None:
    key = (site.path, technique, reason)
    if key not in refusals:
        refusals[key] = Refusal(site.path, technique, reason, bytes_of(site))


class _Gauge:
    """Damage of parts: predicted where there is curvature, else measured; without data, from the weights alone."""

    def __init__(self, model: nn.Module, statistics: Statistics, task: Task | None, n_examples: int) -> None:
        self.model, self.statistics, self.task, self.n_examples = model, statistics, task, n_examples
        self._data: tuple[list[Any], list[Any]] | None = None

    def damage(self, technique: Technique, site: Site, parts: nn.Module) -> float | None:
        predicted = technique.damage(site, parts, self.statistics)
        if predicted is not None:
            return max(float(predicted), 0.0)
        if self.task is not None and self.n_examples:
            return self.measured(site, parts)
        weight = technique.weight(site, parts)
        if weight is None or not site.covers:
            return None
        return _relative_error(weight, value_at(site.root, site.covers[0]))

    def measured(self, site: Site, parts: nn.Module) -> float:
        if self.task is None:
            raise ValueError("damage is measured on a task's validation data; there is no task")
        if self._data is None:
            batches = held_out(self.task, kept(self.model, self.task, self.n_examples))
            self._data = batches, references(self.model, self.task, batches)
        return measure(self.model, site, parts, self.task, *self._data)


def _relative_error(weight: Tensor, value: Tensor) -> float:
    """1/2 |W - W'|^2 / |W|^2: without data every tensor counts the same."""
    norm = float(value.double().square().sum())
    error = float((weight.double().cpu() - value.double().cpu()).square().sum())
    return 0.5 * error / norm if norm > 0 else error


