"""Biases moved so that layers give in the mean what they gave before something was rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pared.budget.drift import follow_
from pared.measurement.compute import compute
from pared.place import Refusal, everywhere, place, place_everywhere
from pared.site import duplicate
from pared.statistics import Statistics
from pared.task import Batch, Task, batch_size
from pared.technique import Edit, Technique

N_EXAMPLES = 512
LEAST = 16
_MACS = 1e12


def place_on_network(
    model: nn.Module, technique: Technique, statistics: Statistics, task: Task | None
) -> tuple[list[Edit], list[Refusal]]:
    """Let a technique act wherever it can, in place; where it asks for it, biases then correct what it did to the network, or
    weights follow what coding does to the layers before them."""
    if technique.corrects and technique.kind == "tensor":
        chosen, refusals = everywhere(model, technique, statistics)
        follow_(model, chosen, statistics, task)
        return place(model, chosen, statistics), refusals
    before = duplicate(model).eval() if technique.corrects and task is not None else None
    edits, refusals = place_everywhere(model, technique, statistics)
    if edits and before is not None and task is not None:
        correct_biases_(model, before, task)
    return edits, refusals


def correct_biases_(model: nn.Module, before: nn.Module, task: Task) -> None:
    """Each layer's bias gives back what the mean of its output has lost, in place, in the order of the network: what comes
    later sees what was corrected before. Layers without a bias of their own, or called several times, stay.

    Source: Nagel et al. 2019, arXiv:1906.04721 (bias correction), with means over calibration data instead of batch norms.
    """
    batches = list(task.calibration(N_EXAMPLES))
    layers = _layers(model)
    calls: list[str] = []
    _run(model, task, batches[:1], {path: lambda output, path=path: calls.append(path) for path in layers})
    once = [path for path in calls if Counter(calls)[path] == 1]
    args, kwargs = task.call(model, batches[0])
    work = max(1.0, len(once) / 2 * compute(before, args, kwargs).macs / batch_size(batches[0]))
    chosen: list[Batch] = []
    for batch in batches:
        chosen.append(batch)
        if sum(map(batch_size, chosen)) >= max(LEAST, _MACS / work):
            break
    sums: dict[str, Tensor] = {}

    def add(path: str, output: Tensor) -> None:
        axis = output.ndim - 1 if isinstance(layers[path], nn.Linear) else output.ndim - layers[path].weight.ndim + 1
        moved = output.detach().double().movedim(axis, 0)
        moved = moved.reshape(len(moved), -1)
        sums[path] = sums[path] + moved.mean(1) if path in sums else moved.mean(1)

    _run(before, task, chosen, {path: lambda output, path=path: add(path, output) for path in once})
    expected, n = dict(sums), len(chosen)
    for path in once:
        sums.clear()
        _run(model, task, chosen, {path: lambda output, path=path: add(path, output)}, until=path)
        bias = cast(Tensor, layers[path].bias)
        bias.data += ((expected[path] - sums[path]) / n).to(bias.device, bias.dtype)


def _layers(model: nn.Module) -> dict[str, Any]:
    """Convolutions and linear layers with a plain bias that nothing else holds."""
    held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    found = {}
    for path, module in model.named_modules():
        bias = module._parameters.get("bias")
        if isinstance(module, kinds) and bias is not None and held[id(bias)] == 1:
            found[path] = module
    return found


class _Enough(BaseException):
    """The layer that was looked for has run."""


def _run(model: nn.Module, task: Task, batches: Iterable[Batch], watched: dict[str, Any], until: str | None = None) -> None:
    """Call the model; `watched` see what modules give, before anything else that is attached there changes it."""

    def hook(module: nn.Module, args: Any, output: Any, path: str) -> None:
        watched[path](output)
        if path == until:
            raise _Enough

    modules = dict(model.named_modules())
    handles = [
        modules[path].register_forward_hook(lambda m, a, o, path=path: hook(m, a, o, path), prepend=True) for path in watched
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                try:
                    task.outputs(model, batch)
                except _Enough:
                    continue
    finally:
        for handle in handles:
            handle.remove()
