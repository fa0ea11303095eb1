"""Distillation of outputs: the compressed network learns the original's probabilities."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pared.errors import InputError
from pared.task import Batch, batch_size, class_logits, float_outputs, logits_of, output_weights, targets_of
from pared.technique import Technique


class Logits(Technique):
    """Train towards the teacher's softened probabilities.

    loss = (1 - hard) * T**2 * mean over examples of KL(softmax(z_teacher / T) || softmax(z_student / T))

    with logits z and temperature T; T**2 keeps the gradient's size whatever T is. The true label's part, hard times the
    task's own loss, is added by the training loop, where there are labels. With one prediction per position (tokens,
    pixels) the mean is over positions too. Outputs that are no softmax logits are matched by their mean squared
    difference, in every floating-point tensor among them; where there are several, each in units of its own variance.

    Acts on   outputs; no parameter.
    Reads     nothing.
    Refuses   a student and a teacher whose outputs differ in shape.
    Paper     Hinton, Vinyals & Dean 2015, arXiv:1503.02531; matching of outputs: Ba & Caruana 2014, arXiv:1312.6184.

    >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> Logits(temperature=1, hard=0).loss((torch.zeros(1), torch.tensor([0])), student, teacher)
    tensor(0.4338)
    """

    paper: ClassVar = "arXiv:1503.02531"

    temperature: float = Field(4.0, gt=0, le=100, description="T; a higher one shows more of the small probabilities")
    hard: float = Field(0.1, ge=0, le=1, description="weight of the true label; the rest is the teacher's")
    softmax: bool | None = Field(
        None, description="outputs are logits of a softmax; default: targets are class indices, or there are none"
    )

    def loss(self, batch: Batch, student: Any, teacher: Any) -> Tensor | None:
        """The teacher's part of the loss, a scalar; None if the true label has all the weight."""
        if teacher is None:
            raise InputError("distill.logits needs a teacher, got none; give the original model as teacher")
        if self.hard == 1:
            return None
        if self.softmax if self.softmax is not None else _classifies(student, batch):
            distance = self._divergence(batch, student, teacher)
        else:
            distance = _squared_difference(student, teacher, batch_size(batch))
        return (1 - self.hard) * distance

    def _divergence(self, batch: Batch, student: Any, teacher: Any) -> Tensor:
        """T**2 KL(teacher || student), the mean over examples and positions."""
        own, taught = class_logits(student, batch)[0], class_logits(teacher, batch)[0]
        _same_shape(own, taught)
        own_log = F.log_softmax(_wide(own) / self.temperature, 1)
        taught_log = F.log_softmax(_wide(taught.to(own.device)) / self.temperature, 1)
        n_predictions = own.numel() // own.shape[1]
        return self.temperature**2 * F.kl_div(own_log, taught_log, reduction="sum", log_target=True) / n_predictions


def _classifies(outputs: Any, batch: Batch) -> bool:
    """Whether outputs are logits with an axis of classes: one prediction per class index, or there are no targets."""
    try:
        logits, targets = class_logits(outputs, batch)
    except InputError:
        return False
    if not logits.is_floating_point() or logits.ndim < 2 or logits.shape[1] < 2:
        return False
    if targets_of(batch) is None:
        return True
    if targets is None or targets.is_floating_point():
        return False
    return targets.shape == (logits.shape[0], *logits.shape[2:])


def _squared_difference(student: Any, teacher: Any, size: int) -> Tensor:
    """The sum, over the floating-point tensors of the outputs, of their weighted mean squared difference."""
    own, taught = _values(student), _values(teacher)
    if not own or len(own) != len(taught):
        raise InputError(
            f"distill.logits needs as many floating-point outputs of the student as of the teacher, got {len(own)} and "
            f"{len(taught)}; use the same architecture, or a wrapper that gives the same outputs"
        )
    terms = []
    for a, b, weight in zip(own, taught, output_weights(taught, size), strict=True):
        _same_shape(a, b)
        terms.append(weight * F.mse_loss(_wide(a), _wide(b.to(a.device))))
    return torch.stack(terms).sum()


def _values(outputs: Any) -> list[Tensor]:
    """All floating-point tensors that have a batch axis; the logits, where nothing else can be seen."""
    return [leaf for leaf in float_outputs(outputs) if leaf.ndim] or [logits_of(outputs)]


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"student and teacher must give outputs of one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; use a teacher of the same task"
        )


def _wide(values: Tensor) -> Tensor:
    """At least float32: a softmax in 16 bits loses the small probabilities that distillation is about."""
    return values if values.dtype == torch.float64 else values.float()
