"""What the checks look at: where a technique acts on a net, what it built there, and what that does to the outputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared import registry
from pared.budget.channels import Removal
from pared.graph.channels import Channels
from pared.place import place_everywhere
from pared.record import Record, attach_
from pared.site import Site, install_
from pared.technique import Chain, Cost, Option, Structure, Technique
from pared.testing.nets import Net, net


class Nonconformance(AssertionError):
    """A technique that does not keep a promise that every technique makes."""


def must(holds: bool, message: str) -> None:
    if not holds:
        raise Nonconformance(message)


@dataclass(frozen=True, eq=False)
class Solved:
    """One site of a net with the parts that a technique found for it; shared by the checks, so never changed."""

    site: Site
    structure: Structure
    parts: nn.Module


def graph_of(technique: Technique, name: str) -> Channels | None:
    """The channels of a net, for a technique that acts on them."""
    return _channels(name) if technique.kind == "channels" else None


@cache
def _channels(name: str) -> Channels:
    trained = net(name)
    return Channels(trained.copy(), (trained.inputs,))


@lru_cache(maxsize=256)
def solved(technique: Technique, name: str) -> tuple[Solved, ...]:
    """Everywhere the technique acts on a net, on a copy that stays as it was."""
    trained = net(name)
    model, statistics = trained.copy(), trained.statistics()
    sites = [site for site in technique.sites(model, graph_of(technique, name)) if not technique.refuse(site)]
    return tuple(Solved(site, *technique.solve(site, statistics)) for site in sites)


def placed(technique: Technique, trained: Net) -> nn.Module:
    """A copy of the net with the technique at all its sites, in eval mode, ready to be saved."""
    model = trained.copy()
    edits, _ = place_everywhere(model, technique, trained.statistics(), graph_of(technique, trained.name))
    attach_(model, Record(edits=edits, example=((trained.inputs,), {})))
    return model.eval()


def alone(one: Solved, trained: Net) -> nn.Module:
    """A copy of the net with one site replaced, in eval mode."""
    model = trained.copy()
    install_(replace(one.site, root=model), copy.deepcopy(one.parts))
    return model.eval()


def _corrected(technique: Technique, one: Solved, trained: Net) -> nn.Module:
    """A copy of the net without the channels of one site, the layers after them fitted anew."""
    model = trained.copy()
    option = Option(one.site, technique, Cost(), 0.0, one.structure)
    Removal(model, _channels(trained.name), trained.task).remove_([option])
    return model.eval()


@cache
def divergence(technique: Technique, name: str) -> float:
    """KL of the outputs from the original's when one site is replaced, in nats: the mean over sites and examples."""
    trained = net(name)
    inputs = torch.cat([x for x, _ in trained.task.val])
    total = 0.0
    for one in solved(technique, name):
        replaced = alone(one, trained) if technique.kind != "channels" else _corrected(technique, one, trained)
        with torch.no_grad():
            ours, theirs = (F.log_softmax(m(inputs).double(), 1) for m in (replaced, trained.model))
        total += float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean"))
    return total / max(1, len(solved(technique, name)))


def is_registered(technique: Technique) -> bool:
    """Whether the registry knows it by its name, so that recipes and files can."""
    links = technique.techniques if isinstance(technique, Chain) else (technique,)
    return all(link.name in registry.names() and registry.get(link.name) is type(link) for link in links)


def shapes(parts: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in parts.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
