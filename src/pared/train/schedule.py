"""The learning rate over a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from pared.errors import InputError

Shape = Callable[[float], float]

SHAPES: dict[str, Shape] = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
}


class Schedule:
    """A linear warm-up, then a shape: "cosine" (Loshchilov & Hutter 2017, arXiv:1608.03983), "linear", "constant", or a
    function from the fraction of the way after the warm-up, in [0, 1), to a factor.

    Args:
        warmup: fraction of the steps.

    >>> schedule = Schedule("linear", warmup=0.2)
    >>> [round(schedule.factor(step, n_steps=5), 2) for step in range(5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(self, shape: str | Shape, warmup: float) -> None:
        if isinstance(shape, str) and shape not in SHAPES:
            raise InputError(f"schedule must be one of {', '.join(SHAPES)} or a function, got {shape!r}")
        if not 0 <= warmup < 1:
            raise InputError(f"warmup must be a fraction of the steps in [0, 1), got {warmup}")
        self.name = shape if isinstance(shape, str) else "a function"
        self.warmup = warmup
        self._shape = SHAPES[shape] if isinstance(shape, str) else shape

    def factor(self, step: int, n_steps: int) -> float:
        """What the peak learning rate is multiplied with at a step in [0, n_steps)."""
        n_warm = int(self.warmup * n_steps)
        if step < n_warm:
            return (step + 1) / (n_warm + 1)
        return self._shape(min((step - n_warm) / (n_steps - n_warm), 1.0))


def default_learning_rate(parameters: Iterable[Tensor]) -> float:
    """A peak for AdamW from the number of trained parameters n: 1e-3 * sqrt(1e6 / n), within [2e-5, 1e-3].

    One million parameters or fewer: 1e-3; ResNet-18: 3e-4; a language model of 135 million: 9e-5. A rule of
    thumb: wide layers add up more simultaneous changes, so each has to be smaller.
    """
    n = sum(parameter.numel() for parameter in parameters)
    return min(1e-3, max(2e-5, 1e-3 * math.sqrt(1e6 / max(n, 1))))
