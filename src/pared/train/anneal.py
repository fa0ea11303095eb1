"""Techniques that come into force bit by bit while the network trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


class Annealing:
    """Calls every module that has `anneal` (or one function that was given) with a progress that reaches 1 early.

    Args:
        function: called instead of the modules' own.
        every: steps between calls.
        until: fraction of the training at which progress is exactly 1; the rest trains the final state.
    """

    def __init__(self, model: nn.Module, function: Callable[[float], None] | None, every: int, until: float) -> None:
        own = [anneal for module in model.modules() if callable(anneal := getattr(module, "anneal", None))]
        self._functions: list[Callable[[float], None]] = [function] if function is not None else own
        self._settles = [settle for module in model.modules() if callable(settle := getattr(module, "settle", None))]
        self.every = every
        self.until = until
        self.progress = 0.0 if self._functions else 1.0

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    def __bool__(self) -> bool:
        return bool(self._functions)

    def before(self, step: int, n_steps: int) -> None:
        """To be called before each step."""
        if self.finished:
            return
        last = min(int(self.until * n_steps), n_steps - 1)
        if step >= last:
            self.go_to(1.0)
        elif step % self.every == 0:
            self.go_to(step / last)

    def go_to(self, progress: float) -> None:
        for function in self._functions:
            function(progress)
        self.progress = progress

    def settle(self) -> None:
        """Make what the model shows agree with its present weights."""
        for settle in self._settles:
            settle()
