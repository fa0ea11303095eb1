"""Second moments over calibration data: sums over two halves, moved towards the same for all directions."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pared.budget.products import Product, Rows
from pared.errors import InputError
from pared.statistics import Kronecker, Layout

WIDEST = 4096
"""A matrix with a longer side is kept as its diagonal."""
SHARES = (1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
"""How far moments are moved towards the same for all directions."""
_WIDEST_SHARE = 1024
"""Longer sides are judged by a part of them."""


def is_wide(side: int) -> bool:
    """Whether a matrix with such a side is kept as its diagonal."""
    return side > WIDEST


class Moment:
    """A sum of second moments, (groups, n, n) or the diagonals (groups, n), over two halves of the calibration data."""

    def __init__(self) -> None:
        self.halves: list[Tensor | None] = [None, None]

    def add(self, part: Tensor, half: int) -> None:
        held = self.halves[half]
        self.halves[half] = part if held is None else held.add_(part)

    def total(self, size: tuple[int, ...], shrink: bool) -> Tensor:
        """The sum, moved towards the same for all directions by as much as makes each half likeliest given the other.

        Where weights are rounded with a step of 1 / sqrt(moment) in each direction, the bits are 1/2 log det M and the damage
        on other data, with moments N, is tr(M^-1 N): together the likelihood of normal data. A direction that the calibration
        data happen to leave out would else be free to be spoilt. (Ledoit & Wolf 2004 shrink for the least square error.)
        """
        first, second = self.halves
        if first is None or second is None:
            found = first if second is None else second
            return torch.zeros(size) if found is None else found
        share = _share(first, second) if shrink else 0.0
        total = first.add_(second)
        self.halves = [None, None]
        diagonal = total if total.ndim < 3 else total.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean()
        total.mul_(1 - share)
        diagonal.add_(share * mean)
        return total


def _share(first: Tensor, second: Tensor) -> float:
    """How far to move: the share among `SHARES` with the largest likelihood of either half given the other."""
    scores = torch.zeros(len(SHARES), dtype=torch.float64)
    shares = torch.tensor(SHARES, dtype=torch.float64, device=first.device)
    for known, other in ((first, second), (second, first)):
        if known.ndim == 3 and known.shape[1] > 1:
            chosen = slice(None, None, -(-known.shape[1] // _WIDEST_SHARE))
            known, other = known[:, chosen, chosen], other[:, chosen, chosen]
            values, vectors = torch.linalg.eigh(known.double())
            seen = torch.einsum("gji,gjk,gki->gi", vectors, other.double(), vectors)
        else:
            values, seen = known.flatten().double(), other.flatten().double()
        mean, mean_seen = values.mean(), seen.mean()
        if not (mean > 0 and mean_seen > 0):
            return 0.0
        values, seen = (values / mean).clamp_min(0).flatten(), (seen / mean_seen).flatten()
        moved = (1 - shares[:, None]) * values + shares[:, None]
        scores += (moved.log() + seen / moved).mean(1).cpu()
    return SHARES[int(scores.argmin())]


class Matrix:
    """Sums for one use of a tensor as a matrix."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.inputs = Moment()
        self.gradients = Moment()
        self.n_gradients = 0

    @staticmethod
    def n_numbers(layout: Layout) -> int:
        """That both halves of the data hold."""
        groups, *sides = layout.size
        return 2 * groups * sum(side if is_wide(side) else side**2 for side in sides)

    def see_inputs(self, product: Product, chosen: Rows, half: int) -> None:
        groups, _, n = self.layout.size
        x = product.inputs(chosen).float()
        if x.ndim == 2:  # an embedding: counts
            self.inputs.add(x, half)
            return
        share = 1.0 if chosen is None else product.n_positions / len(chosen)
        self.inputs.add(_outer(x, n).mul_(share), half)

    def see_gradients(self, g: Tensor, half: int) -> None:
        groups, m, _ = self.layout.size
        self.gradients.add(_outer(g.float(), m), half)
        self.n_gradients += g.shape[1]

    def term(self, n_examples: int, shrink: bool) -> Kronecker:
        groups, m, n = self.layout.size
        inputs, gradients = self.inputs.total((groups, n), shrink), self.gradients.total((groups, m), shrink)
        return Kronecker(inputs.div_(n_examples).cpu(), gradients.div_(max(self.n_gradients, 1)).cpu(), self.layout)


def aside(term: Kronecker, folder: Path | None) -> Kronecker:
    """The same, with its matrices in files that have no name and go with them.

    Raises:
        InputError: there is no room for them.
    """

    def moved(tensor: Tensor) -> Tensor:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                tensor.contiguous().numpy().tofile(file)
                return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=tuple(tensor.shape)))
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise InputError(f"calibration must put matrices of {tensor.nbytes / 1e6:.0f} MB aside in {where}: {error}") from error

    return replace(term, inputs=moved(term.inputs), gradients=moved(term.gradients))


def _outer(rows: Tensor, side: int) -> Tensor:
    """The sum over positions of r r^T, rows (groups, positions, side); its diagonal if side is wide."""
    return rows.square().sum(1) if is_wide(side) else rows.transpose(1, 2) @ rows


def rescaled(terms: list[Kronecker], energy: float) -> list[Kronecker]:
    """The same curvature with the trace that was seen: E |sum over positions of g x^T|^2.

    G and A alone leave out that gradients of neighbouring positions agree, which matters where a weight is used many
    times over (the hidden-to-hidden weights of a recurrent layer are out by a factor of five without it).
    """
    trace = sum(term.trace() for term in terms)
    if not (trace > 0 and energy > 0 and math.isfinite(energy)):
        return terms
    factor = energy / trace
    return [replace(term, gradients=term.gradients.mul_(factor)) for term in terms]
