"""How long the layers of a network take with fewer channels, in a runtime on this machine: one curve for each side of a layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pared.budget.channels import Layer
from pared.budget.layer_latency import Call, LatencyTable, seen
from pared.cut import CutStructure
from pared.errors import MissingExtra, ParedError
from pared.graph.channels import Channels
from pared.graph.load import Axis, Load
from pared.measurement.latency import compare
from pared.runtimes import layer_session
from pared.technique import Option

SECONDS = 2.0
"""For the timed calls of one layer with all its widths."""
SECONDS_IN_ALL = 60.0
"""After so long, layers that are not measured yet are timed whole, and count as products of their widths."""
BYTES_AT_ONCE = 2**28
"""Of the weights of layers that are timed in turn."""


@dataclass(frozen=True)
class Side:
    """One side of a layer.

    Args:
        axis: which of its positions belong to which groups.
        widths: how many of them may be left, ascending; the last: all.
        ms: milliseconds at these widths, while the other side is whole.
    """

    axis: Axis
    widths: tuple[int, ...]
    ms: tuple[float, ...] = ()


@dataclass(eq=False)
class Timed:
    """Milliseconds of one layer, as a function of what the groups keep.

    What the sides save adds up, less what both would save twice:  t = whole - a - b + c a b.  A layer that takes as long as
    the product of its widths has c = 1 / whole; here c is such that the layer with the least of both sides is as fast as measured.

    Args:
        sides: those that groups lie in, one or two.
        least: milliseconds with the least of all sides.
    """

    sides: tuple[Side, ...]
    least: float
    _known: dict[tuple[float, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.axes = tuple(side.axis for side in self.sides)
        self.groups = sorted({group for axis in self.axes for _, groups in axis for group in groups})
        self.whole = min(side.ms[-1] for side in self.sides)
        saved = [self.whole - side.ms[0] for side in self.sides]
        both = math.prod(saved) if len(saved) == 2 else 0.0
        self.twice = (self.least - self.whole + sum(saved)) / both if min(saved) > 0 and both else 0.0

    def at(self, keep: Sequence[float] | np.ndarray) -> float:
        """With the kept share of every group."""
        key = tuple(float(keep[group]) for group in self.groups)
        if key not in self._known:
            saved = [self.whole - float(np.interp(width(side.axis, keep), side.widths, side.ms)) for side in self.sides]
            both = math.prod(saved) if len(saved) == 2 else 0.0
            self._known[key] = max(0.0, self.whole - sum(saved) + self.twice * both)
        return self._known[key]


def width(axis: Axis, keep: Sequence[float] | np.ndarray | Mapping[int, float]) -> float:
    """How many positions of an axis stay."""
    return sum(n * math.prod(float(keep[group]) for group in groups) for n, groups in axis)


def timed_layers(
    model: nn.Module,
    example: Call,
    graph: Channels,
    options: Sequence[Option],
    table: LatencyTable,
    say: Callable[[str], Any],
) -> list[Layer]:
    """Every convolution and linear layer that the options can make narrower, measured alone at the widths that they leave.

    Layers of one description are measured once, and never again on this machine. Grouped convolutions other than depthwise
    ones and transposed ones are left out.
    """
    shares = _shares(options, graph)
    start, n_new, n_whole = time.perf_counter(), 0, 0
    found: list[Layer] = []
    without: list[str] = []
    for path, (layer, x) in seen(model, example).items():
        sides = [Side(axis, _widths(axis, shares)) for axis in _axes(layer, graph, path)]
        moving = [side for side in sides if len(side.widths) > 1]
        if not moving:
            continue
        name = f"{_sized(layer, sides[0].widths[-1], sides[-1].widths[-1], 'meta')} on {tuple(x.shape)}"
        key = f"{name} | {' x '.join(','.join(map(str, side.widths)) for side in sides)}"
        is_late = not table.knows(key) and time.perf_counter() - start > SECONDS_IN_ALL
        if is_late:
            n_whole += 1
            whole = [Side(side.axis, side.widths[-1:]) for side in sides]
            if ms := table.get(name, partial(_time, layer, x, whole, table)):
                each = ms[0] / math.prod(side.widths[-1] for side in moving)
                found.append(Load(each, tuple(side.axis for side in moving)))
            continue
        n_new += not table.knows(key)
        if ms := table.get(key, partial(_time, layer, x, sides, table)):
            found.append(_timed(moving, ms))
        else:
            without.append(path)
    seconds = time.perf_counter() - start
    late = f", {n_whole} whole only, since the time was over" if n_whole else ""
    say(f"{len(found)} layers at the widths on offer in {table.runtime}: {n_new} measured in {seconds:.0f} s{late}, others known")
    if without:
        say(f"not timed, since {table.runtime} does not take them alone: {', '.join(without)}")
    return found


def _timed(moving: Sequence[Side], ms: Sequence[float]) -> Timed:
    """From the figures in the order of `_points`."""
    at, sides = 0, []
    for side in moving:
        sides.append(Side(side.axis, side.widths, tuple(ms[at : at + len(side.widths)])))
        at += len(side.widths)
    whole = min(side.ms[-1] for side in sides)  # measured for each side
    return Timed(tuple(Side(side.axis, side.widths, (*side.ms[:-1], whole)) for side in sides), ms[-1])


def _points(sides: Sequence[Side]) -> Iterator[tuple[int, int]]:
    """What goes in and out of the layers to time: each side at its widths with the other one whole, then both at their least."""
    first, last = sides[0], sides[-1]
    both = len(sides) == 1
    if len(first.widths) > 1:
        yield from ((n, n if both else last.widths[-1]) for n in first.widths)
    if len(last.widths) > 1 and not both:
        yield from ((first.widths[-1], n) for n in last.widths)
    yield first.widths[0], last.widths[0]


def _shares(options: Sequence[Option], graph: Channels) -> dict[int, set[float]]:
    """What the options keep of each group that they cut."""
    numbers = {id(group): number for number, group in enumerate(graph.groups)}
    found: dict[int, set[float]] = {}
    for option in options:
        group = option.site.group
        if option.technique is not None and group is not None:
            gone = group.gone(cast(CutStructure, option.structure))
            found.setdefault(numbers[id(group)], {1.0}).add(1 - float(gone.mean()))
    return found


def _axes(layer: nn.Module, graph: Channels, path: str) -> list[Axis]:
    """What comes in and what goes out of a layer; one axis where both are the same channels, none where it is left out."""
    axes = graph.axes_of(f"{path}.weight" if path else "weight")
    if len(axes) < 2 or isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return []
    if isinstance(layer, nn.Linear) or cast(Any, layer).groups == 1:
        return [axes[1], axes[0]]
    return [axes[0]] if _is_depthwise(layer) else []


def _is_depthwise(layer: Any) -> bool:
    return bool(1 < layer.groups == layer.in_channels == layer.out_channels)


def _widths(axis: Axis, shares: Mapping[int, set[float]]) -> tuple[int, ...]:
    """The widths that options leave; where several groups meet, some at which all of them keep the same share."""
    groups = {group for _, several in axis for group in several}
    cut = [group for group in groups if group in shares]
    offered = shares[cut[0]] if len(cut) == 1 else {k / 8 for k in range(1, 9)} if cut else {1.0}
    return tuple(sorted({max(1, round(width(axis, {g: s if g in shares else 1.0 for g in groups}))) for s in offered}))


def _sized(layer: nn.Module, n_in: int, n_out: int, device: str = "cpu") -> nn.Module:
    """A layer of the same kind with random weights and these widths."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(n_in, n_out, layer.bias is not None, device)
    given = cast(Any, layer)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(given.kernel_size) - 1]
    return kind(
        n_in, n_out, given.kernel_size, given.stride, given.padding, given.dilation,
        n_out if _is_depthwise(given) else 1, given.bias is not None, device=device,
    )  # fmt: skip


def _time(layer: nn.Module, x: Tensor, sides: Sequence[Side], table: LatencyTable) -> tuple[float, ...]:
    """Milliseconds at every point; none where the runtime cannot run the layer alone."""
    channels = -1 if isinstance(layer, nn.Linear) else -1 - len(cast(Any, layer).kernel_size)
    found: list[float] = []
    calls: dict[int, Callable[[], Any]] = {}
    n_bytes = 0
    points = list(_points(sides))
    for number, (n_in, n_out) in enumerate(points):
        alone = _sized(layer, n_in, n_out).eval()
        shape = list(x.shape)
        shape[channels] = n_in
        try:
            calls[number] = layer_session(alone, torch.randn(shape), table.runtime, table.threads)
        except MissingExtra:
            raise
        except ParedError:  # the runtime has no such layer
            return ()
        n_bytes += sum(4 * p.numel() for p in alone.parameters())
        if n_bytes > BYTES_AT_ONCE or number == len(points) - 1:
            times = compare(calls, n_runs=200, seconds=SECONDS * len(calls) / len(points), threads=table.threads)
            found += [times[k].p10 for k in calls]  # what others do on the machine at the time is not the layer's
            calls, n_bytes = {}, 0
    return tuple(found)
