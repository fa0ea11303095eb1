"""What holds for every technique that shapes training or prepares a model."""

from __future__ import annotations

import torch

from pared.technique import Technique
from pared.testing.nets import Net
from pared.testing.observing import must


def its_loss_can_be_trained(technique: Technique, trained: Net) -> None:
    """A finite scalar, the same at every call, that falls along its gradient and is least at the teacher's outputs."""
    batch = next(iter(trained.task.val))
    with torch.no_grad():
        teacher = trained.task.outputs(trained.model, batch)
    student = (teacher + torch.linspace(-1, 1, teacher.numel()).reshape(teacher.shape)).requires_grad_()
    value = technique.loss(batch, student, teacher)
    if value is None:
        return
    must(value.ndim == 0 and bool(value.isfinite()), f"the loss of {technique} must be a finite scalar, got {value}")
    again = technique.loss(batch, student, teacher)
    must(again is not None and torch.equal(value, again), f"the loss of {technique} must be deterministic, got {again}")
    (gradient,) = torch.autograd.grad(value, student)
    must(
        bool(gradient.isfinite().all()) and bool(gradient.any()),
        f"the loss of {technique} must have a gradient at a student that is not the teacher, got none",
    )
    better = technique.loss(batch, student - 0.01 * gradient / gradient.norm(), teacher)
    must(better is not None and bool(better < value), f"the loss of {technique} must fall along its gradient")
    least = technique.loss(batch, teacher, teacher)
    must(least is not None and bool(least <= value), f"the loss of {technique} must be least at the teacher's outputs")


def preparing_keeps_the_function(technique: Technique, trained: Net) -> None:
    model = trained.copy()
    with torch.no_grad():
        expected = model(trained.inputs)
    prepared = technique.prepare(model, None, trained.statistics())
    if prepared is None:
        return
    with torch.no_grad():
        error = float((prepared.eval()(trained.inputs) - expected).abs().max() / expected.abs().max())
    must(error < 1e-4, f"{technique} must rewrite {trained.name} exactly, but outputs move by {error:.2g}")
