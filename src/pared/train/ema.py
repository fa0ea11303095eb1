"""The moving average of the weights along a training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """a_t = sum_i d**(t - i) w_i / sum_i d**(t - i),   i = 1 … t

    with weights w_i after step i and decay d: corrected for its bias, so the start counts for nothing.

    Args:
        tensors: what is followed; read again at every update.
        decay: d, in [0, 1).

    >>> weight = torch.zeros(1)
    >>> average = Average([weight], decay=0.5)
    >>> for value in (1.0, 4.0):
    ...     _ = weight.fill_(value)
    ...     average.update()
    >>> average.values
    [tensor([3.])]
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.decay = decay
        self.n_steps = 0
        self.values = [tensor.clone() for tensor in self.tensors]

    def update(self) -> None:
        self.n_steps += 1
        weight = (1 - self.decay) / (1 - self.decay**self.n_steps)
        torch._foreach_lerp_(self.values, self.tensors, weight)

    def copy_to_model_(self) -> None:
        if self.n_steps:
            torch._foreach_copy_(self.tensors, self.values)


def decay_for(ema: float, n_steps: int) -> float:
    """The decay, lowered where a training is short: the average spans at most its last tenth or so."""
    return max(0.0, min(ema, 1 - 10 / n_steps))
