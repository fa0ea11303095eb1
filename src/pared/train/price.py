"""What a bit costs: stand-ins that know the size of their codes are trained at one price, which comes from the size asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_START = 0.1
"""Of the loss: what all bits together cost at the first step."""
_GAIN, _DAMPING = 100.0, 1.0
"""By how much the logarithm of the price follows a size that is too large by a factor e: over a whole training, and at once."""
_FASTEST = 0.1
"""The gain per step in short trainings: weights must be able to follow."""
_DEAREST = 100.0
"""Of the largest loss so far: what all bits together cost at most."""


class Price:
    """One price per bit for all modules that have `coded_bits()` and `aim_bits`, steered until the sums agree.

    coded_bits: a scalar with a gradient, what the codes take by now; aim_bits: a number, what they should take. Which
    module gets how much of the sum is left to training: at one price, a bit does the same good everywhere.
    """

    def __init__(self, model: nn.Module, n_steps: int) -> None:
        self.modules: list[Any] = [module for module in model.modules() if callable(getattr(module, "coded_bits", None))]
        self.gain = min(_GAIN / n_steps, _FASTEST)
        self.largest_loss = 1e-6
        self.log_price: float | None = None
        self.error = 0.0

    def __bool__(self) -> bool:
        return bool(self.modules)

    @property
    def state(self) -> list[float | None]:
        """What an interrupted training needs to go on."""
        return [self.log_price, self.error, self.largest_loss]

    @state.setter
    def state(self, saved: list[float | None]) -> None:
        self.log_price, self.error, self.largest_loss = saved[0], float(saved[1] or 0), float(saved[2] or 0)

    def of_bits(self, loss: float) -> Tensor:
        """The term of the loss; every call steers the price."""
        bits = torch.stack([module.coded_bits() for module in self.modules]).sum()
        aim = sum(module.aim_bits for module in self.modules)
        error = max(-1.0, min(1.0, math.log(max(bits.item(), 1.0) / aim)))
        self.largest_loss = max(self.largest_loss, loss)
        if self.log_price is None:
            self.log_price = math.log(_START * self.largest_loss / aim)
        else:
            steered = self.log_price + self.gain * error + _DAMPING * (error - self.error)
            self.log_price = min(steered, math.log(_DEAREST * self.largest_loss / aim))
        self.error = error
        return math.exp(self.log_price) * bits
