"""What a training minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import InputError
from pared.task import Batch, Task, targets_of
from pared.technique import Technique


class Criterion:
    """The task's own loss, times a weight, plus the loss terms of techniques.

    With several teachers each technique's term is the mean over them; for divergences from the teacher that has the
    gradient of the divergence from the teachers' mean.

    Args:
        task_weight: of the task's own loss; None: what the techniques leave to it (their field `hard`), 1 without any.

    Raises:
        InputError: there is nothing to minimise.
    """

    def __init__(
        self, task: Task, losses: Sequence[Technique], teachers: Sequence[nn.Module], task_weight: float | None
    ) -> None:
        self.task = task
        self.losses = tuple(losses)
        self.teachers = tuple(teachers)
        asked = task_weight if task_weight is not None else float(sum(getattr(t, "hard", 0.0) for t in losses))
        self.task_weight = 1.0 if task_weight is None and not losses else asked
        batch = next(iter(task.train), None)
        if batch is None:
            raise InputError("Task.train must hold at least one batch, got none; check the data it is made from")
        if targets_of(batch) is None and task.loss == "cross_entropy":
            if not losses:
                raise InputError(
                    "training without labels needs a loss such as distill.logits and a teacher, got no loss; "
                    "give one, or targets"
                )
            self.task_weight = 0.0
        if not losses and not self.task_weight:
            raise InputError("training must minimise something, but the task's weight is 0 and there is no other loss")
        if not losses:
            self.teachers = ()

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        terms = []
        if self.task_weight:
            own = self.task.batch_loss(outputs, batch)
            terms.append(own if self.task_weight == 1 else self.task_weight * own)
        if self.losses:
            with torch.no_grad():
                taught = [self.task.outputs(teacher, batch) for teacher in self.teachers] or [None]
            for technique in self.losses:
                given = [t for one in taught if (t := technique.loss(batch, outputs, one)) is not None]
                terms += [term / len(given) for term in given] if len(given) > 1 else given
        if not terms:
            raise InputError(f"no loss came from {', '.join(map(str, self.losses))}; add one, or train on labels")
        return terms[0] if len(terms) == 1 else torch.stack([term.reshape(()) for term in terms]).sum()
