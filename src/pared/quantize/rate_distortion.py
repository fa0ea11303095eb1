"""Integers chosen for the least damage and bits together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pared.numerics import as_rows, channel_axis, from_rows
from pared.site import Site
from pared.statistics import Curvature, Kronecker, Layout, Statistics
from pared.technique import Structure, Technique, Tensors

_INPUT_DAMPING, _GRADIENT_DAMPING, _FLOOR = 0.02, 0.3, 1e-4
"""Off-diagonal shares of A and G that are not believed (they are estimates), and what is added to their diagonals."""
_WIDEST = 1e6
"""The largest ratio of importances within a tensor that scales follow."""
_OCTAVE = 4
"""Scales are powers of 2^(1/4): a step is free to choose, so finer ones would only cost bits."""
_THRIFT = 0.3
"""How much of the slope decides on a single weight: what rounding it the cheap way costs the weights after it is not
seen, and at 1 the sum of damage and slope * bits comes out up to a fifth higher."""
_PATHS, _FEWER_PATHS, _MANY = 16, 4, 1 << 18
"""How many ways to round a row are followed, in tensors of fewer and of more weights than this."""
_LARGEST = 24_000
_FINEST = 256
"""Where half of the codes are larger, nothing is to be gained from choosing them; with a trellis it is."""
_TILE = 64, 128
_BOTH = 1 << 22  # elements: above, the blocks of one order are kept only
_SMALL = 1 << 16  # elements: below, rates are learnt in a pass of their own
_N_LEVELS, _N_SIZES = 24, 18
_FLOORS = 2.0 ** ((np.arange(_N_LEVELS) - 16.5) / 2)  # the smallest magnitude expected at a level
_TAILS = np.concatenate([np.zeros(_N_SIZES - 1), 2 * np.log2(np.arange(1, 1024)) + 1])
"""Bits of a magnitude beyond those of the largest one that is counted by itself."""
_TRELLIS_FROM, _TRELLIS_DAMAGE = 1.0, 0.8
"""From which median size on there is a trellis, and what it leaves of the damage of plain rounding with the same steps."""
_LEARN_EVERY = 4096  # weights
_PRIOR = 4.0  # weights that the rates' first guess counts for


class RateDistortionStructure(Structure):
    """How wide the codes are, and which axes have scales of their own."""

    codes: Literal["int8", "int16"] = "int8"
    rows: bool = True
    columns: bool = False
    trellis: bool = False


class RateDistortionDecoder(nn.Module):
    """weight[o, i] = codes[o, i] * 2^((rows[o] + columns[i]) / 4); all integers, rows or columns may be a single one.

    With a trellis, codes whose place is shifted lie half a step nearer to zero (`_shifts`).
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, axis: int, structure: RateDistortionStructure) -> None:
        super().__init__()
        self.shape, self.dtype, self.axis, self.trellis = shape, dtype, axis, structure.trellis
        n_rows, n_columns = _matrix_shape(shape, axis)
        self.register_buffer("codes", torch.zeros(shape, dtype=getattr(torch, structure.codes)))
        self.register_buffer("rows", torch.zeros(n_rows if structure.rows else 1, dtype=torch.int8))
        if structure.columns:
            self.register_buffer("columns", torch.zeros(n_columns, dtype=torch.int8))
        self.register_buffer("powers", _powers(), persistent=False)

    def scales(self) -> tuple[Tensor, Tensor]:
        """Of rows (rows, 1) and of columns (1, columns); float32."""
        powers, rows = cast(Tensor, self.powers), cast(Tensor, self.rows)
        columns = cast(Tensor, self.columns) if "columns" in self._buffers else torch.zeros_like(rows[:1])
        return powers[rows.to(torch.int64) + 128][:, None], powers[columns.to(torch.int64) + 128][None]

    def forward(self) -> Tensor:
        rows, columns = self.scales()
        integers = as_rows(cast(Tensor, self.codes), self.axis)
        codes = integers.to(torch.float32)
        if self.trellis:
            codes = codes - 0.5 * codes.sign() * _shifts(integers)
        return from_rows(codes * rows * columns, self.shape, self.axis).to(self.dtype)


def _shifts(codes: Tensor) -> Tensor:
    """Which codes lie half a step nearer to zero, (rows, columns) of bool: the third bit of a register of three, which
    runs along each row. What enters it, u[j] = parity[j] + u[j-1] + u[j-3] modulo 2, is parity / (1 + D + D^3) in delays D,
    and since (1 + D + D^3)^(2^k) = 1 + D^(2^k) + D^(3 * 2^k) modulo 2, a few shifts of whole rows divide by it."""
    entered = codes.remainder(2).bool()
    delay, length = 1, codes.shape[1]
    while delay < length:
        entered = entered ^ _delayed(entered, delay) ^ _delayed(entered, 3 * delay)
        delay *= 2
    return _delayed(entered, 2)


def _delayed(bits: Tensor, by: int) -> Tensor:
    return nn.functional.pad(bits[:, : max(bits.shape[1] - by, 0)], (min(by, bits.shape[1]), 0))


class RateDistortion(Technique):
    """Store each weight as an integer, rounded to where damage and bits together are least.

    minimise   1/2 tr(G dW A dW^T) + slope * bits

    A and G are factored into triangles, which turns the damage into a sum of squares: a sweep over rows and columns rounds
    one weight after the other, against the error that those before it have left (GPTQ, on both sides). Along a row the
    ways to round it with the least damage + slope * bits so far are followed side by side, and the best one at its end is
    taken; bits by an adaptive model of the file's coder, so zeros come by themselves.
    Where codes are large, a trellis chooses between two quantizers (`_shifts`).
    The step of each row and column is what the slope asks for: important ones get finer steps. With one slope for all
    tensors no bit could do more good elsewhere.

    Acts on   every floating-point parameter and buffer of 4 elements or more.
    Stores    what the coder makes of the codes; a byte per row and column, where scales of their own pay.
    Reads     curvature, if there is one; without, every weight of a tensor matters the same.
    Refuses   nothing.
    Paper     Conzelmann & Bamler 2025, arXiv:2505.18758 (rate-aware rounding with compensation); Frantar et al. 2022,
              arXiv:2210.17323 (the sweep); Tseng et al. 2025, arXiv:2505.22988 (compensation on both sides); Marcellin &
              Fischer 1990, doi:10.1109/26.46532 (trellis).
    Differs   several ways at once instead of the best next weight; steps by row and column from the slope alone, in powers
              of 2^(1/4); least important rows first, and columns too where there is no trellis.
    """

    acts_on: ClassVar = Tensors(min_elements=4)
    reads: ClassVar = (Curvature,)
    corrects: ClassVar = True
    paper: ClassVar = "arXiv:2505.18758"
    structure_type: ClassVar = RateDistortionStructure
    ladder: ClassVar = ({"slope": 1e-7}, {"slope": 3e-6}, {"slope": 3e-5})

    slope: float = Field(
        default=1e-7, gt=0, le=1, allow_inf_nan=False,
        description="damage that a bit is worth, in the loss's unit per example (nats): larger is smaller",
    )  # fmt: skip

    def decide(self, site: Site, statistics: Statistics) -> RateDistortionStructure:
        if site.tensor.is_meta:
            return RateDistortionStructure(rows=site.tensor.ndim > 1)
        plain = self._plan(site, statistics, trellis=False)
        structure, typical = plain.structure, plain.typical
        del plain  # it takes several times the tensor's memory
        if typical < _TRELLIS_FROM:
            return structure
        better = self._plan(site, statistics, trellis=True)
        return better.structure if _lie_in_rows(better.blocks, better.shape) else structure

    def build(self, site: Site, structure: Structure) -> RateDistortionDecoder:
        axis = channel_axis(site.owner)
        return RateDistortionDecoder(site.tensor.shape, site.tensor.dtype, axis, cast(RateDistortionStructure, structure))

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(RateDistortionDecoder, parts)
        plan = self._plan(site, statistics, decoder.trellis, decoder)
        cast(Tensor, decoder.rows).copy_(torch.from_numpy(plan.rows))
        if "columns" in decoder._buffers:
            cast(Tensor, decoder.columns).copy_(torch.from_numpy(plan.columns))
        codes = plan.codes(self.slope).reshape(_matrix_shape(decoder.shape, decoder.axis))
        cast(Tensor, decoder.codes).copy_(from_rows(torch.from_numpy(codes), decoder.shape, decoder.axis))

    def _plan(
        self, site: Site, statistics: Statistics, trellis: bool, decoder: RateDistortionDecoder | None = None
    ) -> _Plan:
        axis = channel_axis(site.owner)
        weight = as_rows(site.tensor.detach().float().cpu(), axis).numpy()
        curvature = statistics.curvature(site.covers[0])
        if curvature is not None:
            blocks = _known_blocks(curvature, axis, in_place=trellis)
        else:
            norm = float(np.square(weight, dtype=np.float64).sum())
            everything = np.arange(weight.size).reshape(weight.shape)
            blocks = [_Block(everything, np.full(weight.shape, 1 / norm if norm > 0 else 1.0, np.float32), None, None)]
        return _Plan(weight, blocks, self.slope, trellis, decoder)


@dataclass
class _Block:
    """A matrix whose damage is 1/2 sum importance[i, j] (ug^T dW ua)[i, j]^2, ug and ua unit upper triangular.

    `places` (m, n): where its elements lie in the tensor's rows, flat.
    """

    places: np.ndarray
    importance: np.ndarray
    ua: np.ndarray | None
    ug: np.ndarray | None


_last: list[tuple[Curvature, int, dict[bool, list[_Block]]]] = []
"""The blocks that were made last, with columns in place or not: a site is tried at many slopes one after the other."""


def _known_blocks(curvature: Curvature, axis: int, in_place: bool) -> list[_Block]:
    if not (_last and _last[0][0] is curvature and _last[0][1] == axis):
        _last[:] = [(curvature, axis, {})]
    known = _last[0][2]
    if in_place not in known:
        if curvature.shape.numel() > _BOTH:
            known.clear()
        known[in_place] = list(_blocks(curvature, axis, in_place))
    return known[in_place]


def _lie_in_rows(blocks: list[_Block], shape: tuple[int, ...]) -> bool:
    """Whether the rows of all matrices are whole rows of the tensor, in which codes are chosen from left to right."""
    n = shape[1]
    firsts = [block.places[:, :1] for block in blocks]
    if any(block.places.shape[1] != n or (first % n).any() for block, first in zip(blocks, firsts, strict=True)):
        return False
    return all(bool((block.places == first + np.arange(n)).all()) for block, first in zip(blocks, firsts, strict=True))


def _blocks(curvature: Curvature, axis: int, in_place: bool = False) -> Iterator[_Block]:
    """The tensor's matrices, the one that matters most first; elements that no matrix covers come as one by themselves.

    Args:
        in_place: columns stay where they are, instead of the one that matters least coming first.
    """
    numel = curvature.shape.numel()
    numbers = torch.arange(numel, dtype=torch.int32 if numel < 2**31 else torch.int64)
    order = numbers.numpy()
    if axis:
        order = np.empty_like(order)
        order[as_rows(numbers.reshape(curvature.shape), axis).reshape(-1).numpy()] = numbers.numpy()
    covered = np.zeros(numel, bool)
    uses = sorted((term for term in curvature.terms if isinstance(term, Kronecker)), key=Kronecker.trace, reverse=True)
    for use in uses:
        index = _elements(use, numbers.reshape(curvature.shape))
        if index is None or covered[index].any():  # by a weightier use
            continue
        before = np.count_nonzero(covered)
        covered[index] = True
        if np.count_nonzero(covered) - before < index.size:
            raise ValueError(f"a use as a matrix must show every element once, {index.shape} of {tuple(curvature.shape)} does not")
        for group, inside in enumerate(index):
            yield _factored(order[inside], use.inputs[group].numpy(), use.gradients[group].numpy(), in_place)
    rest = np.flatnonzero(~covered)
    if len(rest):
        importance = curvature.diagonal().reshape(-1).numpy()[rest].astype(np.float32)
        least = float(importance.mean()) * _FLOOR + 1e-30
        yield _Block(order[rest][None], importance[None] + np.float32(least), None, None)


def _elements(use: Kronecker, numbers: Tensor) -> np.ndarray | None:
    """(groups, m, n): which element of the tensor stands where in the matrices; None if what stands there is none of them."""
    if isinstance(use.as_matrix, Layout):
        return use.as_matrix(numbers).numpy()
    places = use.as_matrix(numbers.double()).detach().numpy()
    index = np.rint(places).astype(np.int64)
    return index if np.abs(places - index).max() == 0 and index.max() < numbers.numel() else None


def _factored(places: np.ndarray, inputs: np.ndarray, gradients: np.ndarray, in_place: bool = False) -> _Block:
    by_column, ua, columns = _triangle(inputs, _INPUT_DAMPING, in_place)
    by_row, ug, rows = _triangle(gradients, _GRADIENT_DAMPING)
    return _Block(places[np.ix_(rows, columns)], np.outer(by_row, by_column).astype(np.float32), ua, ug)


def _triangle(matrix: np.ndarray, damping: float, in_place: bool = False) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """D, U and the order of sides with M[order][:, order] ~ U D U^T, U unit upper triangular; least diagonal first, unless
    they stay in place.

    A side whose off-diagonals are unknown: a diagonal of counts, where what was never seen counts half of the least seen.
    """
    if matrix.ndim == 1 or len(matrix) == 1:
        diagonal = matrix.reshape(-1).astype(np.float64)
        seen = diagonal[diagonal > 0]
        order = np.arange(len(diagonal)) if in_place else np.argsort(diagonal, kind="stable")
        return np.maximum(diagonal[order], seen.min() / 2 if len(seen) else 1e-30), None, order
    diagonal = np.diagonal(matrix).astype(np.float64)
    order = np.arange(len(diagonal)) if in_place else np.argsort(diagonal, kind="stable")
    m = matrix.astype(np.float64) * (1 - damping)
    m[np.diag_indices(len(m))] += damping * diagonal + _FLOOR * diagonal.mean() + 1e-30
    backwards = order[::-1]
    lower = np.linalg.cholesky(m[np.ix_(backwards, backwards)])
    root = np.diagonal(lower).copy()
    return root[::-1] ** 2, np.ascontiguousarray((lower / root)[::-1, ::-1], np.float32), order


class _Plan:
    """Scales of a tensor's rows and columns for a slope, and the codes that go with them."""

    def __init__(
        self,
        weight: np.ndarray,
        blocks: list[_Block],
        slope: float,
        trellis: bool,
        decoder: RateDistortionDecoder | None,
    ) -> None:
        self.weight, self.blocks, self.shape, self.trellis = weight.reshape(-1), blocks, weight.shape, trellis
        importance = np.empty(weight.size, np.float32)
        for block in blocks:
            importance[block.places.reshape(-1)] = block.importance.reshape(-1)
        least = np.maximum(importance.max() / np.float32(_WIDEST), np.float32(1e-30))
        np.log2(np.maximum(importance, least, out=importance), out=importance)
        log = importance.reshape(weight.shape)
        by_row, by_column = log.mean(1, dtype=np.float64), log.mean(0, dtype=np.float64)
        if decoder is None:
            has_rows, has_columns = _pays(by_row, weight.size), _pays(by_column, weight.size)
        else:
            has_rows, has_columns = len(cast(Tensor, decoder.rows)) > 1, "columns" in decoder._buffers
        columns = -by_column / 2 if has_columns else np.zeros(1)
        self.columns = np.rint(_OCTAVE * (columns - columns.mean())).clip(-128, 127).astype(np.int8)
        log += 2 / _OCTAVE * self.columns.astype(np.float32)  # what is left for the rows
        with np.errstate(under="ignore"):
            mean = np.log2(np.exp2(log, out=log).mean(1 if has_rows else None, dtype=np.float64))
        # half the slope of damage 1/2 h step^2 / 12 at high rates, where a bit quarters it
        better = _TRELLIS_DAMAGE if self.trellis else 1.0
        rows = np.atleast_1d(math.log2(12 * slope / math.log(2) / better) / 2 - mean / 2)
        np.multiply(weight, np.exp2(-self.columns / np.float32(_OCTAVE)), out=log)
        largest = np.abs(log, out=log).max(1 if has_rows else None)
        del log, importance
        with np.errstate(divide="ignore"):
            rows = np.maximum(rows, np.log2(largest / _LARGEST))  # however little a bit is worth, the codes must fit
        self.rows = np.ceil(_OCTAVE * rows - 0.5).clip(-128, 127).astype(np.int8)
        down, across = (_powers().numpy()[lines.astype(np.int64) + 128] for lines in (self.rows, self.columns))
        self.steps = np.broadcast_to(down[:, None] * across[None], weight.shape).reshape(-1)
        if decoder is None:
            sizes = np.abs(self.weight) / self.steps
            codes: Literal["int8", "int16"] = "int8" if float(sizes.max()) < 100 else "int16"
            self.typical = float(np.median(sizes, overwrite_input=True))
            self.structure = RateDistortionStructure(codes=codes, rows=has_rows, columns=has_columns, trellis=trellis)
        else:
            self.most = int(torch.iinfo(cast(Tensor, decoder.codes).dtype).max)

    def codes(self, slope: float) -> np.ndarray:
        """Integers in the order of the rows, flat."""
        sizes = self.weight / self.steps
        if float(np.median(np.abs(sizes))) > _FINEST and not self.trellis:
            return np.rint(sizes).astype(np.int32).clip(-self.most, self.most)
        codes = np.rint(np.sign(sizes) * np.maximum(np.abs(sizes) - 0.2, 0)).astype(np.int32)
        del sizes
        if not codes.any():
            return codes
        counts = np.zeros((_N_LEVELS, _N_SIZES))
        for last in (False, True) if self.weight.size < _SMALL else (True,):
            expected = _expected(codes.reshape(self.shape))
            for block in self.blocks:
                _sweep_block(self, block, _THRIFT * slope, expected, counts, codes)
            if not last:
                counts *= 0.5
        return codes


def _pays(by_line: np.ndarray, n_weights: int) -> bool:
    """Whether scales of their own for lines of such log-importances save more bits than they cost."""
    arithmetic = float(np.log2(np.exp2(by_line - by_line.max()).mean()) + by_line.max())
    return len(by_line) > 1 and n_weights * (arithmetic - float(by_line.mean())) / 4 > 3 * len(by_line) + 128


def _expected(codes: np.ndarray) -> np.ndarray:
    """The magnitude that is expected of each weight, from the means of its row and column; flat float32."""
    size = np.minimum(np.abs(codes), _N_SIZES)
    rows, columns, mean = size.mean(1), size.mean(0), size.mean() + 1e-3
    rows = (rows * codes.shape[1] + 4 * mean) / (codes.shape[1] + 4)
    columns = (columns * codes.shape[0] + 2 * mean) / (codes.shape[0] + 2)
    return (rows.astype(np.float32)[:, None] * (columns / mean).astype(np.float32)[None]).reshape(-1)


def _sweep_block(plan: _Plan, block: _Block, slope: float, expected: np.ndarray, counts: np.ndarray, codes: np.ndarray) -> None:
    """Round one matrix, tile by tile; matrix products carry errors from tile to tile."""
    m, n = block.places.shape
    left = None if block.ua is None else np.zeros((m, n), np.float32)  # W - W'
    error = None if block.ug is None else np.zeros((m, n), np.float32)  # (W - W') ua
    rates = np.zeros((_N_LEVELS, _N_SIZES))
    tile, n_paths = _compiled_tile(), _PATHS if plan.weight.size < _MANY else _FEWER_PATHS
    registers = np.full(m, 0 if plan.trellis else -1)
    none = np.zeros((0, 0), np.float32)
    for start in range(0, n, _TILE[1]):
        columns = slice(start, min(start + _TILE[1], n))
        carried = np.zeros((m, columns.stop - start), np.float32)
        if block.ua is not None and left is not None and start:
            carried = left[:, :start] @ block.ua[:start, columns]
        ua = none if block.ua is None else np.ascontiguousarray(block.ua[columns, columns])
        for top in range(0, m, _TILE[0]):
            rows = slice(top, min(top + _TILE[0], m))
            places = block.places[rows, columns]
            above = np.zeros(places.shape, np.float32)
            if block.ug is not None and error is not None and top:
                above = block.ug[:top, rows].T @ error[:top, columns]
            ug = none if block.ug is None else np.ascontiguousarray(block.ug[rows, rows])
            given = (plan.weight[places], plan.steps[places], expected[places])
            importance = np.ascontiguousarray(block.importance[rows, columns])
            found, left_here, error_here = (np.zeros(places.shape, kind) for kind in (np.int32, np.float32, np.float32))
            tile(*given, importance, carried[rows], above, ua, ug, slope, plan.most, n_paths, counts, rates,
                 registers[rows], found, left_here, error_here)  # fmt: skip
            codes[places] = found
            if left is not None:
                left[rows, columns] = left_here
            if error is not None:
                error[rows, columns] = error_here


def _tile(
    weight, steps, expected, importance, carried, above, ua, ug, slope, most, n_paths, counts, rates,
    registers, found, left, error,
):  # fmt: skip
    """Round the weights of one tile; carried and above are the errors of columns and rows before it.

    Along each row the n_paths cheapest ways to round it so far are kept, each with the errors that it carries on.
    registers: of each row, the three bits that tell which codes are shifted; -1 without a trellis.
    """
    m, n = weight.shape
    seen = _LEARN_EVERY
    trellis = registers[0] >= 0
    if not ua.size and not trellis:
        n_paths = 1  # no weight sees what those before it became
    paths, longer = np.zeros((n_paths, n), np.float32), np.zeros((n_paths, n), np.float32)
    totals, cheapest = np.zeros(n_paths), np.zeros(n_paths)
    # by column and path: code, level, carried error, and the path up to the column before
    codes, levels = np.zeros((n, n_paths), np.int32), np.zeros((n, n_paths), np.int32)
    errors, parents = np.zeros((n, n_paths), np.float32), np.zeros((n, n_paths), np.int32)
    bits, longer_bits = np.zeros(n_paths, np.int64), np.zeros(n_paths, np.int64)
    shifts = np.zeros((n, n_paths), np.float32)
    at, row = np.zeros(n_paths, np.int32), np.zeros(n, np.float32)
    for i in range(m):
        if seen >= _LEARN_EVERY:
            learn(counts, rates)
            seen = 0
        seen += n
        n_alive = 1
        totals[0] = 0.0
        paths[0] = carried[i]
        bits[0] = registers[i] if trellis else 0
        for j in range(n):
            step, expects = steps[i, j], expected[i, j]
            harm = 0.5 * importance[i, j] * step * step
            aim = weight[i, j] + above[i, j]
            around = 0.75 * expects + (0.125 * min(abs(found[i - 1, j]), _N_SIZES) if i > 0 and j > 0 else 0.25 * expects)
            lowest = min(max(int(2.0 * math.log2(around + 1e-9) + 16.5), 0), _N_LEVELS - 1)
            n_kept = 0
            for p in range(n_alive):
                near, level = around, lowest
                if i > 0 and j > 0:
                    near += 0.125 * min(abs(codes[j - 1, p]), _N_SIZES)
                    while level < _N_LEVELS - 1 and near >= _FLOORS[level + 1]:
                        level += 1
                at[p] = level
                target = aim + paths[p, j]
                shift = 0.5 * (bits[p] >> 1 & 1)
                size = abs(target) / step + shift
                nearest = int(min(size, most))
                for k in range(4):  # both neighbours, one less where sizes are small, and zero
                    candidate = nearest + 1 - k if k < 3 else 0
                    if candidate > most or candidate < 0 or (k == 2 and nearest > 2) or (k == 3 and nearest < 2):
                        continue
                    rate = rates[level, min(candidate, _N_SIZES - 1)] + _TAILS[min(candidate, len(_TAILS) - 1)]
                    off = size - (candidate if candidate else shift)
                    total = totals[p] + harm * off * off + slope * rate
                    if n_kept == n_paths and total >= cheapest[n_kept - 1]:
                        continue
                    n_kept = min(n_kept + 1, n_paths)
                    place = n_kept - 1
                    while place > 0 and total < cheapest[place - 1]:
                        cheapest[place], codes[j, place] = cheapest[place - 1], codes[j, place - 1]
                        parents[j, place] = parents[j, place - 1]
                        place -= 1
                    cheapest[place], parents[j, place] = total, p
                    codes[j, place] = candidate if target > 0 else -candidate
            for p in range(n_kept):
                before = parents[j, p]
                totals[p], levels[j, p], errors[j, p] = cheapest[p], at[before], paths[before, j]
                code, register = codes[j, p], bits[before]
                shifts[j, p] = 0.5 * (register >> 1 & 1) * np.sign(code)
                longer_bits[p] = (register << 1 & 7) | ((code ^ register ^ register >> 2) & 1) if trellis else 0
                difference = np.float32(weight[i, j] - step * (code - shifts[j, p]))
                if ua.size:
                    for k in range(n):  # what lies before j is not read again, and a loop from j + 1 would not be vectorised
                        longer[p, k] = paths[before, k] + difference * ua[j, k]
                else:
                    longer[p] = paths[before]
            n_alive = n_kept
            paths, longer = longer, paths
            bits, longer_bits = longer_bits, bits
        p = 0
        if trellis:
            registers[i] = bits[0]
        for j in range(n - 1, -1, -1):
            code = codes[j, p]
            counts[levels[j, p], min(abs(code), _N_SIZES - 1)] += 1
            found[i, j] = code
            left[i, j] = weight[i, j] - steps[i, j] * (code - shifts[j, p])
            row[j] = left[i, j] + errors[j, p]
            p = parents[j, p]
        error[i] = row
        if ug.size:
            for k in range(i + 1, m):
                for j in range(n):
                    above[k, j] += ug[i, k] * row[j]


def _learn(counts, rates):
    """Bits of every size at every expected magnitude: geometric at first, then as counted. Signs are included."""
    for level in range(_N_LEVELS):
        mean = 2.0 ** ((level - 16) / 2)
        ratio = mean / (1 + mean)
        total = _PRIOR
        for size in range(_N_SIZES):
            total += counts[level, size]
        probability = 1 - ratio
        for size in range(_N_SIZES):
            guess = probability if size < _N_SIZES - 1 else probability / (1 - ratio)
            rates[level, size] = math.log2(total / (counts[level, size] + _PRIOR * (guess + 1e-6))) + (size > 0)
            probability *= ratio


learn: Any = _learn


@cache
def _compiled_tile() -> Any:
    """The loops in machine code; numba takes half a second to import, which nobody else shall pay."""
    global learn
    import numba

    learn = numba.njit(_learn, cache=True)
    return numba.njit(_tile, cache=True)


def _powers() -> Tensor:
    """2^(e / 4) for e = -128 ... 127: quarter powers as stored constants, so that every machine decodes the same."""
    quarter = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
    return torch.tensor([math.ldexp(quarter[e % _OCTAVE], e // _OCTAVE) for e in range(-128, 128)], dtype=torch.float32)


def _matrix_shape(shape: torch.Size, axis: int) -> tuple[int, int]:
    return (shape[axis], shape.numel() // shape[axis]) if len(shape) > 1 else (1, shape.numel())
