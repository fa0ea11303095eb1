"""Frequency tables for rANS: integers that sum to a power of two, and the few bytes that carry them.

A table is sent in whichever of two forms makes the whole payload smaller:

explicit     g_k = round(sqrt(count_k / n) * S) per symbol, f_k ~ g_k**2. Equal steps of the square root cost equally
             much everywhere (the Fisher information of a multinomial is flat in it), so S, and with it the size of the
             table, is matched to the number of symbols coded.
parametric   sixteen bits: a peak with its odds, and tails that fall by a ratio r_1, r_1 s, r_1 s**2, ...: s = 1 is the
             discretised Laplace density, s < 1 the Gaussian.

Decoding uses integer arithmetic only, so that every machine gets the same table.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from pared.store import _sequences
from pared.store._bits import BitReader, BitWriter, damaged, gamma_field

PRECISIONS = (10, 12, 14, 16)  # log2 of what the frequencies sum to; two bits of the table say which
_LARGEST_PARAMETRIC = 256  # symbols
_N_PEAKS, _N_RATIOS, _N_BENDS = 64, 32, 8
_PEAK_UNIT, _RATIO_UNIT = 8, 64
_BENDS = tuple(65536 - (65536 >> (8 - j) if j else 0) for j in range(_N_BENDS))  # 1, 1 - 1/128, ..., 1 - 1/2


class Table(NamedTuple):
    """frequencies (K,) int64 summing to 2**precision, bit fields that describe them; number and bits of the data."""

    frequencies: np.ndarray
    precision: int
    description: tuple[tuple[int, int], ...]
    n: int
    data_bits: float

    @property
    def bits(self) -> float:
        """Description and data."""
        return sum(width for _, width in self.description) + self.data_bits

    def write(self, writer: BitWriter) -> None:
        for value, width in self.description:
            writer.write(value, width)


def choose(counts: np.ndarray, lowest: int) -> Table:
    """The table that makes description plus data smallest for a histogram counts (K,), K >= 2, all symbols coded by it.

    lowest is the value of symbol 0: the peak of a parametric table is cheapest at the value 0.
    """
    tables = [_explicit(counts)]
    if len(counts) <= _LARGEST_PARAMETRIC:
        default = _default_peak(lowest, len(counts))
        tables += [_parametric(counts, peak, default) for peak in {default, int(counts.argmax())}]
    return min(tables, key=lambda table: table.bits)


def read(bits: BitReader, n_symbols: int, lowest: int) -> tuple[np.ndarray, int]:
    """Frequencies (n_symbols,) and precision as written by Table.write; StoreError if they are no table."""
    precision = PRECISIONS[bits.read(2)]
    if bits.read(1):
        weights = _read_parametric(bits, n_symbols, lowest)
    else:
        weights = _sequences.read(bits, n_symbols) ** 2
    if not 0 < np.count_nonzero(weights) <= 1 << precision:
        raise damaged(f"a frequency table must name 1 .. {1 << precision} symbols")
    return normalise(weights, precision), precision


def normalise(weights: np.ndarray, precision: int) -> np.ndarray:
    """Frequencies proportional to weights, summing to 2**precision, zero only where the weight is (largest remainders).

    weights: (K,) int64 >= 0, below 2**46 each, at most 2**precision of them positive.
    """
    frequencies = (weights > 0).astype(np.int64)
    free = np.flatnonzero(weights)
    total = 1 << precision
    spare = 1  # handed out beforehand to each, should the rounds below not come to an end
    for _ in range(8):  # those that would get less than one keep exactly one, the others share what is left
        keeps = weights[free] * total >= weights[free].sum()
        if keeps.all():
            spare = 0
            break
        total -= len(free) - int(np.count_nonzero(keeps))
        free = free[keeps]
    total -= spare * len(free)
    scaled = weights[free] * total
    quotient, remainder = np.divmod(scaled, weights[free].sum())
    quotient[np.argsort(-remainder, kind="stable")[: total - int(quotient.sum())]] += 1
    frequencies[free] = quotient + spare
    return frequencies


def _data_bits(counts: np.ndarray, used: np.ndarray, frequencies: np.ndarray, precision: int) -> float:
    return float(counts[used] @ (precision - np.log2(frequencies[used])))


def _with_precision(counts: np.ndarray, weights: np.ndarray, description: tuple[tuple[int, int], ...]) -> Table:
    """The coarsest precision that is nearly as good as the next finer one: small tables stay in the cache."""
    used = np.flatnonzero(counts)
    best = None
    for index, precision in enumerate(PRECISIONS):
        if np.count_nonzero(weights) > 1 << precision:
            continue
        frequencies = normalise(weights, precision)
        bits = _data_bits(counts, used, frequencies, precision)
        if best is not None and bits > best.data_bits - max(2.0, 2e-4 * best.data_bits):
            break
        best = Table(frequencies, precision, ((index, 2), *description), int(counts.sum()), bits)
    if best is None:
        raise ValueError("the finest precision has room for the largest alphabet: this cannot happen")
    return best


def _explicit(counts: np.ndarray) -> Table:
    n = int(counts.sum())
    share = np.sqrt(counts / n)
    widest = _sequences.LARGEST / float(share.max())
    scales = np.unique(np.minimum(np.sqrt(n) * np.array([0.25, 0.35, 0.5, 0.7, 1.0, 1.4]), widest))
    roots = np.rint(share * scales[:, None]).astype(np.int64)
    roots = np.where((roots == 0) & (counts > 0), 1, roots)
    ways, table_bits = _sequences.cost(roots)
    weights = roots * roots
    with np.errstate(divide="ignore"):
        information = np.where(counts > 0, np.log2(weights.sum(1, keepdims=True)) - np.log2(weights), 0.0)
    pick = int(np.argmin(table_bits + information @ counts))
    description = ((0, 1), *_sequences.fields(roots[pick], int(ways[pick])))
    return _with_precision(counts, weights[pick], description)


def _default_peak(lowest: int, n_symbols: int) -> int:
    return -lowest if 0 <= -lowest < n_symbols else (n_symbols - 1) // 2


def _ratio(index: int) -> int:
    """Ratio of neighbours, in 65536ths, of tails whose mean distance is 1/16 ... 14, four steps per octave."""
    distance = (4 + index % 4) << (index // 4)
    return 65536 * distance // (distance + _RATIO_UNIT)


def _odds(index: int) -> int:
    """Peak against tails, in 256ths: 1/64 ... 896, four steps per octave."""
    return (4 + index % 4) << (index // 4)


def _tail(ratio_index: int, bend_index: int, length: int) -> list[int]:
    weight, ratio, bend = 1 << 20, _ratio(ratio_index), _BENDS[bend_index]
    weights = []
    for _ in range(length):
        weights.append(weight)
        weight = max(1, weight * ratio >> 16)
        ratio = ratio * bend >> 16
    return weights


@cache
def _tails() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tails (ratios * bends, _LARGEST_PARAMETRIC), their logarithms, and sums of the first 0, 1, ... weights."""
    pairs = [(ratio, bend) for ratio in range(_N_RATIOS) for bend in range(_N_BENDS)]
    tails = np.array([_tail(ratio, bend, _LARGEST_PARAMETRIC) for ratio, bend in pairs], np.int64)
    return tails, np.log2(tails), np.pad(tails.cumsum(1), ((0, 0), (1, 0)))


def _parametric_weights(tail: np.ndarray, peak: int, peak_index: int, n_symbols: int) -> np.ndarray:
    weights = np.concatenate([tail[:peak][::-1], [0], tail[: n_symbols - 1 - peak]])
    weights[peak] = max(1, int(weights.sum()) * _odds(peak_index) >> _PEAK_UNIT)
    return weights


def _parametric(counts: np.ndarray, peak: int, default_peak: int) -> Table:
    n_symbols = len(counts)
    left, right = peak, n_symbols - 1 - peak
    folded = np.zeros(max(left, right), np.int64)
    folded[:left] += counts[:peak][::-1]
    folded[:right] += counts[peak + 1 :]
    tails, logarithms, sums = _tails()
    information = folded.sum() * np.log2(sums[:, left] + sums[:, right]) - logarithms[:, : len(folded)] @ folded
    tail_index = int(information.argmin())
    odds = int(counts[peak]) * (1 << _PEAK_UNIT) / max(1, int(folded.sum()))
    peak_index = int(np.argmin(np.abs(np.log2([_odds(index) for index in range(_N_PEAKS)]) - np.log2(max(odds, 1e-9)))))
    weights = _parametric_weights(tails[tail_index], peak, peak_index, n_symbols)
    fields = [(1, 1), (int(peak != default_peak), 1)]
    if peak != default_peak:
        fields.append(gamma_field(peak, 3))
    fields += [(peak_index, 6), (tail_index // _N_BENDS, 5), (tail_index % _N_BENDS, 3)]
    return _with_precision(counts, weights, tuple(fields))


def _read_parametric(bits: BitReader, n_symbols: int, lowest: int) -> np.ndarray:
    if n_symbols > _LARGEST_PARAMETRIC:
        raise damaged(f"a parametric table must have at most {_LARGEST_PARAMETRIC} symbols, got {n_symbols}")
    peak = bits.read_gamma(3, n_symbols - 1) if bits.read(1) else _default_peak(lowest, n_symbols)
    peak_index, ratio, bend = bits.read(6), bits.read(5), bits.read(3)
    tail = np.array(_tail(ratio, bend, n_symbols - 1), np.int64)
    return _parametric_weights(tail, peak, peak_index, n_symbols)
