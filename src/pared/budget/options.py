"""Every technique at every site: what it costs and what it harms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pared import store
from pared.budget.damage import held_out, measure, references
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
    improved = {path for option in found if option.technique is not None for path in option.site.covers}
    refused = {path for path, _, _ in refusals}
    for option in found:
        site = option.site
        if option.technique is None and site.path not in improved and site.path not in refused:
            _refuse(refusals, site, "every technique", "nothing was smaller here")
    return found, list(refusals.values())


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
    work: dict[tuple[str, str], list[tuple[Technique, Site]]] = {}
    for technique in techniques:
        for site in technique.sites(model, graph):
            if reason := technique.refuse(site):
                _refuse(refusals, site, technique.name, reason)
                work.setdefault((site.kind, site.path), [])
                continue
            seen_at = max((statistics.positions.get(path, 0.0) for path in site.covers), default=0.0)
            work.setdefault((site.kind, site.path), []).append((technique, replace(site, positions=seen_at)))
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
            batches = held_out(self.task, self.n_examples)
            self._data = batches, references(self.model, self.task, batches)
        return measure(self.model, site, parts, self.task, *self._data)


def _relative_error(weight: Tensor, value: Tensor) -> float:
    """1/2 |W - W'|^2 / |W|^2: without data every tensor counts the same."""
    norm = float(value.double().square().sum())
    error = float((weight.double().cpu() - value.double().cpu()).square().sum())
    return 0.5 * error / norm if norm > 0 else error


