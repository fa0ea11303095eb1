"""Weights moved, before they are coded, to make up for what coding has done to the layers before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pared.budget.damage import divergence, held_out, kept, references
from pared.budget.reconstruct import reconstruct_, whole_batch
from pared.errors import TraceError
from pared.graph import trace
from pared.measurement.compute import compute
from pared.place import Progress
from pared.site import Decoded, duplicate
from pared.statistics import Statistics
from pared.task import Batch, Task, batch_size
from pared.technique import Option, build

RIDGE = 1.0
"""Of the mean square of the inputs. The drift is small, so the weights are held much more tightly than after a cut."""
N_EXAMPLES, LEAST, N_JUDGED = 2048, 256, 256
_MACS, _BYTES = 1.2e12, 4e9
"""What the examples may cost, all in one batch; where fewer than LEAST fit or are there, weights stay: few examples are
fitted better than what they stand for, and so are many that come from few photographs."""


def follow_(
    model: nn.Module,
    options: Sequence[Option],
    statistics: Statistics,
    task: Task | None,
    progress: Progress = lambda _: None,
) -> None:
    """Move the weights that options are about to code, in place, where their technique asks for it.

    In the order of the network, each linear layer and convolution is fitted by least squares to what it gave in the
    original, on inputs that come from layers which are moved and coded already; then it is coded. If the outputs on
    validation data do not come closer to the original's by it, all weights stay where they were, and so they do in
    models without graph or with coded tensors, and where there are few examples.

    Source: inputs from the quantized prefix and outputs from the original, as in Li et al. 2025, arXiv:2504.02692 (GPTAQ).
    """
    chosen = {
        path: option
        for option in options
        if option.technique is not None and option.technique.corrects and option.site.kind == "tensor"
        for path in option.site.paths
    }
    if not chosen or task is None or any(isinstance(module, Decoded) for module in model.modules()):
        return
    batch = next(iter(task.calibration()), None)
    if batch is None:
        return
    args, kwargs = task.call(model, batch)
    try:
        program = trace(model, args, kwargs)
    except TraceError:
        return
    if program.static_reason is not None:  # it takes as many examples as it was traced with, and no more
        return
    cost = compute(model, args, kwargs)
    affordable = batch_size(batch) * min(_MACS / max(1, cost.macs), _BYTES / max(1, cost.peak_activation_bytes))
    examples = whole_batch(task, int(min(N_EXAMPLES, affordable))) if affordable >= LEAST else None
    if examples is None or min(batch_size(examples), task.calibration_groups or LEAST) < LEAST:
        return
    original = duplicate(model).eval()
    held = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    moved: dict[str, Tensor] = {}

    def code_(path: str) -> None:
        option = chosen.get(path)
        if option is None or option.technique is None or option.site.path in moved:
            return
        site = replace(option.site, root=model)
        progress({"doing": "coding layer by layer", "done": len(moved), "total": len(chosen)})
        moved[site.path] = site.tensor.detach().clone()
        parts = build(option.technique, site, option.structure)
        option.technique.fit(site, parts, statistics)
        value = option.technique.weight(site, parts)
        if value is not None:
            held[site.path].data.copy_(value)

    with torch.no_grad():
        everything = slice(None)
        reconstruct_(model, original, program, program, lambda node: everything, task, examples, ridge=RIDGE, used=code_)
        batches = held_out(task, kept(original, task, N_JUDGED))
        expected = references(original, task, batches)
        source = dict([*original.named_parameters(remove_duplicate=False), *original.named_buffers(remove_duplicate=False)])
        plain = {path: value.detach().clone() for path, value in held.items() if path not in chosen}  # biases too small to code
        followed, moves = _distance(model, task, batches, expected), {**plain, **moved}
        moved.clear()
        for path in moves:
            held[path].data.copy_(source[path])
            code_(path)
        if followed < _distance(model, task, batches, expected):
            moved = moves
        for path, value in moved.items():
            held[path].data.copy_(value)


def _distance(model: nn.Module, task: Task, batches: Sequence[Batch], expected: Sequence[Any]) -> float:
    outputs = references(model, task, batches)
    far = [divergence(found, wanted, task, batch) for found, wanted, batch in zip(outputs, expected, batches, strict=True)]
    return float(torch.cat(far).mean())
