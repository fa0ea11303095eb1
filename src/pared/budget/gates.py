"""Channels that training chooses: one price for all of them, gates in the layers that read them, and what is left open."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pared.budget.channels import masks
from pared.cut import Coordinates, CutStructure, Slice
from pared.graph.channels import Channels
from pared.graph.load import Load
from pared.site import duplicate, install_, plain, tensor_sites
from pared.statistics import Statistics
from pared.technique import Cost, Option, Technique
from pared.train.state import state_of

LEAST = 0.1
"""The share of a group that stays in any case, where the recipe offers no smaller one."""
ARRIVES = 0.7
"""The share of the way after which the price aims at all that was planned; what is left of it, the gates have to get there."""

_FIRST = 0.97
"""The share of the whole cost at which training starts."""
_DEAREST, _HALVINGS = 1e4, 50

Limit = tuple[Sequence[Load], float]
"""What the network costs as a function of what the groups keep, and what it may cost at most."""


class Gates(nn.Module):
    """The gates of all groups at one price, which is raised until what they keep costs what was planned.

    Each training step has the price at which cost(price) = aim, where the aim comes down from the whole network to the first
    limit; so the target is kept all the way, and the gradient that reaches a gate is what is left of the loss's own once it
    is moved along cost = aim, that is, less the multiplier times the gate's cost. At the end of the way the channels of
    the lowest scores close for good, until every limit is met; the rest of the training is for those that stay.

    Args:
        each: by the number of the group, as `Technique.relax` gives them.
        n_groups: how many groups the network has.
        limits: what has to be met.
        stays: by the number of the group how many channels stay: at least so many, or with `exactly` neither more nor fewer.
    """

    aim_bits = 1.0

    def __init__(
        self, each: dict[int, nn.Module], n_groups: int, limits: Sequence[Limit], stays: dict[int, int], exactly: bool
    ) -> None:
        super().__init__()
        self.each = nn.ModuleList(each.values())
        self.numbers, self.n_groups, self.limits = list(each), n_groups, list(limits)
        self.stays, self.exactly = stays, exactly
        for number, gate in each.items():
            self.register_buffer(f"open{number}", torch.ones_like(_scores(gate)))
        self.register_buffer("price", torch.zeros((), dtype=torch.float64))
        self.whole = self._cost([1.0] * n_groups)
        self.progress = 0.0
        self._price: Tensor | None = None

    # -- what the training loop calls ---------------------------------------------------------------------------------------

    def anneal(self, progress: float) -> None:
        """Go on to the aim at this part of the way; at its end, close."""
        self.progress = progress
        self._price = None
        price = cast(Tensor, self.price)
        with torch.no_grad():
            low, high = -_DEAREST, _DEAREST
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                is_met = float(self._kept_cost(price.new_tensor(middle))) <= self.aim
                low, high = (low, middle) if is_met else (middle, high)
            price.fill_(high)
            for gate in self.each:
                cast(Any, gate).adopt_(price)
            if progress >= 1:
                self._close_()

    def coded_bits(self) -> Tensor:
        """Called once in every step, after the loss. There is nothing to pay, since the target is kept at every price of
        the loop; the next step gets new draws and a new price."""
        self._price = None
        for gate in self.each:
            cast(Any, gate).draw_()
        return cast(Tensor, self.price).new_ones(())

    def train(self, mode: bool = True) -> Gates:
        self._price = None
        return super().train(mode)

    # -- what the gated tensors see -----------------------------------------------------------------------------------------

    def factor(self, number: int) -> Tensor:
        """What the channels of a group are multiplied with; (n,)."""
        gate = self.each[self.numbers.index(number)]
        return gate(self._price_now(), self.training and self.progress < 1) * self.mask(number)

    def mask(self, number: int) -> Tensor:
        """1 where a channel is open, 0 where it is closed."""
        return cast(Tensor, getattr(self, f"open{number}"))

    def gone(self) -> dict[int, np.ndarray]:
        """Which channels are closed, by the number of the group."""
        found = {number: (self.mask(number) == 0).cpu().numpy() for number in self.numbers}
        return {number: gone for number, gone in found.items() if gone.any()}

    @property
    def aim(self) -> float:
        """What the network should cost by now."""
        first = _FIRST * self.whole
        return first + (min(first, self.limits[0][1]) - first) * min(1.0, self.progress / ARRIVES)

    def _price_now(self) -> Tensor:
        """The price of this step: a Newton step on cost(price) = aim, through which the gradient sees what a gate costs the
        others."""
        if self._price is None:
            self._price = at = cast(Tensor, self.price).clone()
            if self.training and self.progress < 1 and torch.is_grad_enabled():
                cost = self._kept_cost(at.requires_grad_(True))
                if isinstance(cost, Tensor) and cost.requires_grad:
                    (slope,) = torch.autograd.grad(cost, at, retain_graph=True)
                    if float(slope) < 0:
                        self._price = at.detach() - (cost - self.aim) / slope
                        cast(Tensor, self.price).copy_(self._price.detach())
        return self._price

    def _kept_cost(self, price: Tensor) -> Any:
        """What the network costs with what the gates keep at a price."""
        shares: list[Any] = [1.0] * self.n_groups
        for number, gate in zip(self.numbers, self.each):
            shares[number] = cast(Any, gate).kept(price).double().mean()
        return self._cost(shares)

    def _cost(self, shares: Sequence[Any], limit: int = 0) -> Any:
        return sum(load.at(shares) for load in self.limits[limit][0])

    # -- the end of the way ---------------------------------------------------------------------------------------------------

    def _close_(self) -> None:
        """Channels of all groups in one order, the lowest score first: as many go as must, and those that are shut already."""
        order: list[tuple[float, int, int]] = []
        least = 0
        for number, gate in zip(self.numbers, self.each):
            scores = _scores(gate).cpu()
            shut = (gate(cast(Tensor, self.price), False) == 0).cpu()
            for channel in scores.argsort(stable=True).tolist()[: len(scores) - self.stays[number]]:
                is_shut = bool(shut[channel])
                least += is_shut
                order.append((-math.inf if is_shut else float(scores[channel]), number, channel))
        order.sort()
        low, high = least, len(order)
        if self.exactly:
            low = high
        while low < high:  # what it costs falls with every channel
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_met(order[:middle]) else (middle + 1, high)
        for _, number, channel in order[:low]:
            self.mask(number)[channel] = 0

    def _is_met(self, gone: Sequence[tuple[float, int, int]]) -> bool:
        shares = [1.0] * self.n_groups
        for _, number, _ in gone:
            shares[number] -= 1 / len(self.mask(number))
        return all(self._cost(shares, k) <= limit * (1 + 1e-9) for k, (_, limit) in enumerate(self.limits))


def _scores(gate: nn.Module) -> Tensor:
    return cast(Tensor, cast(Any, gate).scores().detach().float())


class Gated(nn.Module):
    """A tensor that is seen with its channels multiplied by what their gates let through."""

    def __init__(self, weight: nn.Parameter, gates: Gates, pieces: Sequence[tuple[int, Slice]]) -> None:
        super().__init__()
        self.weight, self.gates = weight, gates
        self.places = [(number, piece.axis) for number, piece in pieces]
        for k, (_, piece) in enumerate(pieces):
            self.register_buffer(f"channel{k}", torch.as_tensor(piece.channel, device=weight.device), persistent=False)

    def forward(self) -> Tensor:
        value: Tensor = self.weight
        for k, (number, axis) in enumerate(self.places):
            factor = self.gates.factor(number)
            factor = torch.cat([factor, factor.new_ones(1)])[getattr(self, f"channel{k}")]  # what belongs to no channel is last
            shape = [1] * value.ndim
            shape[axis] = -1
            value = value * factor.reshape(shape).to(value.dtype)
        return value


def gated(
    model: nn.Module,
    graph: Channels,
    chosen: Sequence[Option],
    found: Sequence[Option],
    statistics: Statistics,
    measures: Sequence[str],
    exactly: bool,
) -> tuple[nn.Module, Gates]:
    """A copy of the model with a gate for every group that any option is about.

    Args:
        graph: of the model's channels.
        chosen: the plan; together, what stays costs as much as it says.
        found: all options.
        measures: what the plan must keep to: "macs", "bits" or both, the priced one first.
        exactly: every group keeps as many channels as the plan says; otherwise training decides on that, too.
    """
    twin = duplicate(model)
    numbers = {id(group): number for number, group in enumerate(graph.groups)}
    planned = masks(chosen, graph)
    first: dict[int, Option] = {}
    stays: dict[int, int] = {}
    for option in [*chosen, *found]:
        if option.technique is None or option.site.group is None:
            continue
        group = option.site.group
        number = numbers[id(group)]
        first.setdefault(number, option)
        left = group.n - int(group.gone(cast(CutStructure, option.structure)).sum())
        stays[number] = min(stays.get(number, max(1, math.ceil(LEAST * group.n))), left)
    if exactly:
        first = {number: option for number, option in first.items() if number in planned}
        stays = {number: int((~planned[number]).sum()) for number in first}
    each: dict[int, nn.Module] = {}
    for number, option in first.items():
        relaxed = cast(Technique, option.technique).relax(replace(option.site, root=twin), option.structure, statistics)
        if relaxed is not None:
            each[number] = relaxed
    loads: dict[str, Callable[[], list[Load]]] = {"macs": graph.loads, "bits": graph.weights}
    costs = {"macs": graph.macs, "bits": graph.bits}
    gates = Gates(each, len(graph.groups), [(loads[name](), costs[name](planned)) for name in measures], stays, exactly)
    _install_(twin, gates)
    return twin, gates


def _install_(model: nn.Module, gates: Gates) -> None:
    """Every tensor with channels behind gates is decoded through them from now on."""
    sites = {path: site for site in tensor_sites(model, buffers=False) for path in site.paths}
    pieces: dict[str, dict[tuple[int, int], Slice]] = {}
    for number, gate in zip(gates.numbers, gates.each):
        for piece in cast(Any, gate).pieces:
            if piece.path in sites:
                pieces.setdefault(sites[piece.path].path, {})[number, piece.axis] = piece
    for path, own in pieces.items():
        site = sites[path]
        weight = cast(nn.Parameter, site.owner._parameters[site.name])
        install_(site, Gated(weight, gates, [(number, piece) for (number, _), piece in own.items()]), cache=False)


def absorb_(model: nn.Module, twin: nn.Module) -> None:
    """Give a model the values that its trained, gated copy shows."""
    shown = state_of(plain(twin.eval()))
    with torch.no_grad():
        for path, tensor in state_of(model).items():
            tensor.copy_(shown[path])


def closed(gates: Gates, graph: Channels, found: Sequence[Option]) -> list[Option]:
    """The channels that training closed, as options; each with the technique whose own share comes nearest."""
    options = []
    for number, gone in gates.gone().items():
        group = graph.groups[number]
        own = [option for option in found if option.site.group is group and option.technique is not None]
        nearest = min(own, key=lambda o: abs(int(group.gone(cast(CutStructure, o.structure)).sum()) - int(gone.sum())))
        structure = Coordinates().structure(group, gone, graph.model)
        options.append(Option(nearest.site, nearest.technique, Cost(), 0.0, structure))
    return options
