"""Damage measured: how far the outputs move from the original's when a technique is in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.cut import Cut
from pared.errors import InputError
from pared.site import Decoded, Site
from pared.task import Batch, Task, batch_size, class_logits, float_outputs, in_order, output_weights, take

MOST_NUMBERS = 2**27
"""Of reference outputs that are kept at a time, one example's at least: a language model gives a vocabulary for every position."""
IGNORED = -100
"""The target that cross entropy leaves out."""


def divergence(outputs: Any, reference: Any, task: Task, batch: Batch) -> Tensor:
    """How far outputs are from the reference outputs, one number per example, float64.

    Classifiers: KL(reference || outputs), the mean over positions with a target, in nats. Others: half the mean square of
    the difference, the mean over all floating-point outputs, each in units of its own variance (`output_weights`).
    """
    size = batch_size(batch)
    if task.classifies:
        new, targets = class_logits(outputs, batch)
        old, _ = class_logits(reference, batch)
        divergences = []
        for now, before in zip(new, old, strict=True):  # one example at a time: vocabularies are large
            p, q = before.double().log_softmax(0), now.double().log_softmax(0)
            divergences.append((p.exp() * (p - q)).sum(0).clamp_min(0))
        per_position = torch.stack(divergences)
        if per_position.ndim == 1:
            return per_position
        counted = torch.ones_like(per_position)
        if targets is not None and targets.shape == per_position.shape:
            counted = (targets.to(per_position.device) != IGNORED).double()
        return (per_position * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)
    found, wanted = float_outputs(outputs), float_outputs(reference)
    total = torch.zeros(size, dtype=torch.float64)
    for now, before, weight in zip(found, wanted, output_weights(wanted, size), strict=True):
        if now.shape != before.shape:
            raise InputError(f"outputs must keep their shape, got {tuple(now.shape)} instead of {tuple(before.shape)}")
        squares = 0.5 * (now.double() - before.double()).square().cpu()
        per_example = squares.flatten(1).mean(1) if now.ndim > 1 and len(now) == size else squares
        total += weight / len(found) * (per_example if per_example.shape == (size,) else squares.mean())
    return total


def held_out(task: Task, n_examples: int) -> list[Batch]:
    """The first examples of the validation data, on which damage is measured: calibration data are most often training
    data, of which a network is surer than of others."""
    batches: list[Batch] = []
    for batch in in_order(task.val):
        size = batch_size(batch)
        batches.append(batch if size <= n_examples else take(batch, n_examples))
        n_examples -= size
        if n_examples <= 0:
            break
    return batches


def kept(model: nn.Module, task: Task, n_examples: int) -> int:
    """As many examples, or fewer if the model's outputs for them are too many numbers to be kept."""
    one = references(model, task, held_out(task, 1))
    n_numbers = sum(each.numel() for outputs in one for each in float_outputs(outputs))
    return max(1, min(n_examples, MOST_NUMBERS // max(1, n_numbers)))


def references(model: nn.Module, task: Task, batches: Sequence[Batch]) -> list[Any]:
    """The model's outputs for each batch, to compare with."""
    with torch.no_grad():
        return [task.outputs(model, batch) for batch in batches]


def measure(
    model: nn.Module, site: Site, parts: nn.Module, task: Task, batches: Sequence[Batch], references: Sequence[Any]
) -> float:
    """The mean divergence over the batches with the parts in the place of the site; the model is left as it was."""
    total, count = 0.0, 0
    with torch.no_grad(), installed(model, site, parts):
        for batch, reference in zip(batches, references, strict=True):
            found = divergence(task.outputs(model, batch), reference, task, batch)
            total += float(found.sum())
            count += len(found)
    return total / max(count, 1)


@contextmanager
def installed(model: nn.Module, site: Site, parts: nn.Module) -> Iterator[None]:
    """The model with the parts in the place of the site, for a while: values are written over and written back."""
    if isinstance(parts, Cut):
        take_back = parts(model)
        try:
            yield
        finally:
            take_back()
        return
    if site.kind == "module":
        holders = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in site.paths]
        before = [getattr(holder, name) for holder, name in holders]
        training = parts.training
        parts.train(before[0].training)
        try:
            for holder, name in holders:
                setattr(holder, name, parts)
            yield
        finally:
            for (holder, name), module in zip(holders, before):
                setattr(holder, name, module)
            parts.train(training)
        return
    parent, _, name = site.path.rpartition(".")
    owner = model.get_submodule(parent)
    if parametrize.is_parametrized(owner, name):
        held = cast(Decoded, owner.parametrizations[name][0])  # type: ignore[index]
        decoder, held.decoder, held._value = held.decoder, parts, None
        try:
            yield
        finally:
            held.decoder, held._value = decoder, None
        return
    tensor = cast(Tensor, getattr(owner, name))
    with torch.no_grad():
        kept = tensor.detach().clone()
        tensor.data.copy_(parts())
    try:
        yield
    finally:
        tensor.data.copy_(kept)

