"""What a network costs, as a function of what its channel groups keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Axis = tuple[tuple[int, tuple[int, ...]], ...]
"""Pairs (positions, groups): so many positions, each of which stays while none of its channels, one in each of the groups, goes."""


@dataclass(frozen=True)
class Load:
    """What a product costs in multiply-adds per example, or a tensor in bits: `constant` times the size of each axis."""

    constant: float
    axes: tuple[Axis, ...]

    def at(self, keep: Sequence[float] | np.ndarray) -> float:
        """With the kept share of every group."""
        total = self.constant
        for axis in self.axes:
            stays = 0.0
            for n, groups in axis:
                share = float(n)
                for group in groups:
                    share *= keep[group]
                stays += share
            total *= stays
        return total
