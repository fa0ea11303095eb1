"""What techniques that act on the whole network read: how values flow, and how they are distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pared.budget.calibrate import gather
from pared.errors import InputError
from pared.graph.flow import flow_of
from pared.ports import attach_
from pared.site import duplicate, plain
from pared.statistics import Curvature, Flow, Histogram, Port, Statistics
from pared.task import Task
from pared.technique import Technique

N_EXAMPLES = 256
N_BINS = 2048

Call = tuple[tuple[Any, ...], dict[str, Any]]


def observe(
    model: nn.Module, task: Task | None, techniques: Iterable[Technique], example: Call | None = None, **more: Any
) -> Statistics:
    """What the techniques read, observed on the model as it is now.

    Args:
        model: in eval mode; it is not changed.
        task: gives calibration data; None: the flow alone, from the example.
        more: as `gather` takes it.
    """
    links = [link for technique in techniques for link in getattr(technique, "techniques", (technique,))]
    reads = {kind for kind in (Curvature, Flow, Histogram) if any(link.wants(kind) for link in links)}
    twin = plain(model).eval()
    found = gather(twin, task, **more) if task is not None and Curvature in reads else Statistics()
    if Flow in reads or Histogram in reads:
        call = task.example(twin) if task is not None else example
        if call is None:
            raise InputError("the flow of values is seen in a call of the model: give a task, or a model that carries an example")
        found.flow = flow_of(twin, *call)
    if Histogram in reads and found.flow is not None:
        if task is None:
            raise InputError("ranges of activations come from calibration data: give a task")
        found.values = distributions(twin, task, found.flow)
    return found


def distributions(model: nn.Module, task: Task, flow: Flow, n_examples: int = N_EXAMPLES) -> dict[Port, Histogram]:
    """A histogram of every value that passes a port: a first pass over the calibration data finds the extremes.

    Raises:
        InputError: values that are not finite; the port is named.
    """
    batches = list(task.calibration(n_examples))
    twin = duplicate(model).eval()
    seen = {at[0][0]: _Seen() for at in flow.ports.values()}
    for count in (False, True):
        handles = [attach_(twin, port, _watch(one, port, count)) for port, one in seen.items()]
        with torch.no_grad():
            for batch in batches:
                task.outputs(twin, batch)
        for handle in handles:
            handle.remove()
    found: dict[Port, Histogram] = {}
    for at in flow.ports.values():
        one = seen[at[0][0]]
        if one.counts is not None:
            histogram = Histogram(one.counts, one.low, one.high, one.reach)
            found.update(dict.fromkeys((port for port, _ in at), histogram))
    return found


class _Seen:
    def __init__(self) -> None:
        self.low, self.high = float("inf"), -float("inf")
        self.counts: Tensor | None = None
        self.reach: dict[int, Tensor] = {}

    def extremes(self, value: Tensor, port: Port) -> None:
        low, high = (float(end) for end in torch.aminmax(value))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"calibration data must give finite values, but the {port} has NaN or infinity; repair the data")
        self.low, self.high = min(self.low, low), max(self.high, high)
        for axis in {1, value.ndim - 1} if value.ndim > 1 else set():
            reach = value.abs().amax([other for other in range(value.ndim) if other != axis]).cpu()
            before = self.reach.get(axis)
            same = before is not None and before.shape == reach.shape
            self.reach[axis] = torch.maximum(before, reach) if before is not None and same else reach

    def count(self, value: Tensor) -> None:
        counts = torch.histc(value.float(), N_BINS, self.low, self.high) if self.low < self.high else None
        if counts is None:
            counts = torch.zeros(N_BINS)
            counts[0] = value.numel()
        self.counts = counts.cpu().double() + (0 if self.counts is None else self.counts)


def _watch(one: _Seen, port: Port, count: bool) -> Callable[[nn.Module, Tensor], None]:
    def look(module: nn.Module, value: Tensor) -> None:
        if count:
            one.count(value)
            return
        one.extremes(value, port)

    return look
