"""Put techniques into a model: at once, or through trainable stand-ins that give way to what they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from pared import registry
from pared.cut import Coordinates, Cut, CutStructure
from pared.errors import InputError
from pared.graph.module import ProgramModule
from pared.record import Record, attach_, record_of
from pared.site import Decoded, Site, duplicate, install_, network_site
from pared.statistics import Statistics
from pared.task import Task
from pared.technique import Cost, Edit, Option, Structure, Technique, build

Progress = Callable[[dict[str, Any]], None]
_OF_ALL = ("network", "channels")
"""Kinds after which everything that was observed has to be observed anew."""


@dataclass(frozen=True)
class Refusal:
    """A site that a technique left alone, and why."""

    path: str
    technique: str
    reason: str
    bytes: int


def apply(
    model: nn.Module,
    task: Task | None,
    technique: Technique | Sequence[Technique],
    progress: Progress | None = None,
) -> nn.Module:
    """Apply techniques by hand, without budget or training, wherever they act; works on a copy.

    Args:
        model: a trained model; it is not changed.
        task: gives calibration data and the example to trace; None: weights only.
        technique: one technique, a chain, or a list: later ones act on what earlier ones built.

    Returns:
        A copy in eval mode that `pared.save` accepts.

    Raises:
        InputError: a technique changes nothing; the message gives its first reason.
    """
    techniques = [technique] if isinstance(technique, Technique) else list(technique)
    for item in techniques:
        if not isinstance(item, Technique):
            raise InputError(f"apply takes techniques such as quantize.Integer(bits=8), got {type(item).__name__}")
    for item, later in itertools.pairwise(techniques):
        follows = later.kind is not None and (later.kind != "network" or later.exact)
        if item.kind == "network" and not item.exact and follows:
            raise InputError(f"{item.name} changes what the network computes and must come last; put {later.name} before it")
    if len(techniques) > 1 and any(item.rewrites for item in techniques):
        raise InputError("rewrite: true leaves a network without its code, which no other technique can name; use it alone")
    if isinstance(model, ProgramModule) and record_of(model) is not None and not cast(Record, record_of(model)).edits:
        raise InputError("a network that was rewritten has no code that techniques could act on; use them before, on the original")
    check_finite(model)
    if task is not None:
        task.check(model)
    earlier = record_of(model)
    twin, edits = prepared(model)
    edits = [*(earlier.edits if earlier else ()), *edits]
    from pared.budget.biases import place_on_network
    from pared.budget.observe import observe

    carried = earlier.example if earlier else None
    statistics: Statistics | None = None
    program = None
    for number, item in enumerate(techniques):
        if item.kind == "network":
            if reason := item.refuse(network_site(twin)):  # before anything is observed
                raise InputError(f"{item} must change something, but it changes nothing: {reason}")
            statistics = observe(twin, task, [item], carried)
        elif statistics is None:  # what is read stays true until the network itself is changed
            following = itertools.takewhile(lambda later: later.kind not in _OF_ALL, techniques[number + 1 :])
            statistics = observe(twin, task, [item, *following], carried)
        if item.kind == "channels":
            from pared.budget.channels import cut_by_hand_
            from pared.graph.cutting import as_program

            call = task.example(twin) if task is not None else carried
            found, program = cut_by_hand_(twin, item, statistics, call, task)
            edits += found
            statistics = None
            if item.rewrites:  # its code is gone, and with it what edits are replayed on
                twin, edits, program = as_program(twin, program).eval(), [], None
            continue
        if item.kind is None:
            rewritten = item.prepare(twin, None, statistics)
            if rewritten is None:
                raise InputError(f"{item} must change something, but there was nothing to rewrite; drop it")
            twin = rewritten
            continue
        placed, refusals = place_on_network(twin, item, statistics, task if item.corrects else None)
        if not placed:
            reason = f": {refusals[0].path}: {refusals[0].reason}" if refusals else "; the model has no site for it"
            raise InputError(f"{item} must change something, but it changes nothing{reason}")
        edits += placed
        statistics = None if item.kind == "network" else statistics
    example = task.example(twin) if task is not None else carried
    attach_(twin, Record(edits=edits, example=example, program=program))
    return twin.eval()


def prepared(model: nn.Module) -> tuple[nn.Module, list[Edit]]:
    """A copy in eval mode whose reparametrised weights (weight norm and the like) are plain, and the edits that did it."""
    twin = duplicate(model).eval()
    bake = registry.get("structure.bake")()
    return twin, place_everywhere(twin, bake, Statistics())[0]


def place_everywhere(
    model: nn.Module, technique: Technique, statistics: Statistics, graph: Any = None
) -> tuple[list[Edit], list[Refusal]]:
    """Solve and install the technique at all its sites, in place; statistics grow by what the new parts see.

    Args:
        graph: of the model's channels, for techniques that act on them.
    """
    if technique.kind == "channels":
        chosen, refusals = everywhere(model, technique, statistics, graph)
        return place(model, chosen, statistics), refusals
    edits, refusals = [], []
    for site in list(technique.sites(model)):
        if reason := technique.refuse(site):
            refusals.append(Refusal(site.path, technique.name, reason, bytes_of(site)))
            continue
        if technique.kind == "network" and technique.decide(site, statistics) == technique.structure_type():
            refusals.append(Refusal(site.path, technique.name, "there is no place for it in the network", bytes_of(site)))
            continue
        structure, parts = technique.solve(site, statistics)
        _put(site, technique, parts, statistics)
        edits.append(Edit(technique, site.paths, structure))
    return edits, refusals


def everywhere(
    model: nn.Module, technique: Technique, statistics: Statistics, graph: Any = None
) -> tuple[list[Option], list[Refusal]]:
    """The technique at all its sites, each decided as if it were the only one; costs and damage are not asked for."""
    chosen, refusals = [], []
    for site in technique.sites(model, graph):
        if reason := technique.refuse(site):
            refusals.append(Refusal(site.path, technique.name, reason, bytes_of(site)))
        else:
            chosen.append(Option(site, technique, Cost(), 0.0, technique.decide(site, statistics)))
    return chosen, refusals


def place(
    model: nn.Module, options: Iterable[Option], statistics: Statistics, coordinates: Coordinates | None = None
) -> list[Edit]:
    """Build, fit and install chosen options on a model of the same structure, in place; returns the edits in order.

    Args:
        coordinates: what earlier calls have left of the axes that channels are removed from.
    """
    edits = []
    coordinates = coordinates or Coordinates()
    for option in in_order(options):
        site, technique, structure = _on(model, option), _technique(option), option.structure
        if site.group is not None and isinstance(structure, CutStructure):  # others were cut since it was decided
            structure = coordinates.structure(site.group, site.group.gone(structure), model)
            if not structure.removed:
                continue
        edits.append(_fill(site, technique, structure, statistics))
    return edits


def relax_(model: nn.Module, options: Iterable[Option], statistics: Statistics) -> None:
    """Install the trainable stand-ins of chosen options, in place. Buffers wait: they are not trained."""
    for option in in_order(options):
        site, technique = _on(model, option), _technique(option)
        if site.is_buffer:
            continue
        relaxed = technique.relax(site, option.structure, statistics)
        if relaxed is not None:
            install_(site, relaxed)


def relax_network_(model: nn.Module, technique: Technique, statistics: Statistics) -> Edit | None:
    """Put a technique that acts on the whole network in force for training, in place; None where there is no place for it.
    Its `settle` ends it."""
    site = network_site(model)
    if technique.refuse(site):
        return None
    structure = technique.decide(site, statistics)
    if structure == technique.structure_type():
        return None
    technique.relax(site, structure, statistics)
    return Edit(technique, site.paths, structure)


def settle_(model: nn.Module, options: Iterable[Option], statistics: Statistics) -> list[Edit]:
    """Stand-ins give way to the parts that they stood for, in place; returns the edits in order.

    Buffers stay as they are: `place_buffers_` codes them once training is over.
    """
    for module in list(model.modules()):
        if isinstance(module, Decoded) and callable(settle := getattr(module.decoder, "settle", None)):
            module.decoder = settle().requires_grad_(True)
            module.train(module.training)
    edits = []
    for option in in_order(options):
        site, technique = _on(model, option), _technique(option)
        if site.is_buffer:
            continue
        edits.append(Edit(technique, site.paths, option.structure))
    return edits


def place_buffers_(model: nn.Module, options: Iterable[Option], statistics: Statistics) -> list[Edit]:
    """Code the buffers among the options, in place."""
    edits = []
    for option in in_order(options):
        site = _on(model, option)
        if site.is_buffer:
            edits.append(_fill(site, _technique(option), option.structure, statistics))
    return edits


def in_order(options: Iterable[Option]) -> list[Option]:
    """Channels first, then modules: what is in them (a bias) may be coded afterwards under the same path."""
    chosen = [option for option in options if option.technique is not None]
    return sorted(chosen, key=lambda option: ("channels", "module", "tensor").index(option.site.kind))


def check_finite(model: nn.Module) -> None:
    """Raise an InputError that names the first tensor with NaN or infinity."""
    for path, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"weights must be finite, found NaN or infinity in {path}; repair or retrain the model")
    for path, held in model.named_buffers():  # infinity is what attention masks are made of
        if held.is_floating_point() and bool(torch.isnan(held).any()):
            raise InputError(f"buffers must hold numbers, found NaN in {path}; repair or retrain the model")


def bytes_of(site: Site) -> int:
    """Bytes of the tensors that the site covers."""
    state = dict([*site.root.named_parameters(remove_duplicate=False), *site.root.named_buffers(remove_duplicate=False)])
    return sum(state[path].numel() * state[path].element_size() for path in site.covers if path in state)


def _fill(site: Site, technique: Technique, structure: Structure, statistics: Statistics) -> Edit:
    parts = build(technique, site, structure)
    technique.fit(site, parts, statistics)
    _put(site, technique, parts, statistics)
    return Edit(technique, site.paths, structure)


def _put(site: Site, technique: Technique, parts: nn.Module, statistics: Statistics) -> None:
    if isinstance(parts, Cut):
        install_(site, parts)
        return
    if technique.kind == "network":  # changed in place; what is in it keeps its paths
        return
    inner = technique.inner(site, parts, statistics)
    install_(site, parts)
    inside = f"{site.path}." if site.kind == "module" else _inside(site)
    statistics.update({f"{inside}{path}": curvature for path in inner if (curvature := inner.curvature(path))})


def _inside(site: Site) -> str:
    parent = site.path.rpartition(".")[0]
    return f"{parent}{'.' if parent else ''}parametrizations.{site.name}.0.decoder."


def _on(model: nn.Module, option: Option) -> Site:
    return replace(option.site, root=model)


def _technique(option: Option) -> Technique:
    if option.technique is None:
        raise ValueError(f"{option.site.path} is left as it is: there is no technique to apply")
    return option.technique
