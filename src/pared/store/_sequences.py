"""Short sequences of small integers, as tables are made of: residuals of a prediction in exponential Golomb codes.

The predictor (zero, the last entry, the line through the last two) and the order of the code are chosen by size. After
a zero comes how many more zeros follow.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pared.store._bits import BitReader, damaged, gamma_bits, gamma_field

LARGEST = 4095
_ORDERS = (0, 1, 2, 4)  # of the exponential Golomb code
_N_PREDICTORS = 3
_N_CHOICES = _N_PREDICTORS * len(_ORDERS)


def cost(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best way to write each row of (R, K), and its bits. Entries 0 .. LARGEST, zeros in the same places in all."""
    used = rows > 0
    sent = used[0].copy()
    sent[0] = True
    sent[1:] |= used[0, :-1]
    sent = np.flatnonzero(sent)
    folded = _fold(rows, _predictions(rows))[..., sent]
    bits = np.stack([widths[folded].sum(-1) for widths in _gamma_widths()], axis=1).reshape(_N_CHOICES, len(rows))
    way = bits.argmin(0)
    _, lengths = _runs(rows[0])
    run_bits = int((2 * np.floor(np.log2(lengths)) + 1).sum())
    return way, bits[way, np.arange(len(rows))] + run_bits + 4


def fields(row: np.ndarray, way: int) -> list[tuple[int, int]]:
    """Bit fields (value, width) of row (K,), written in the way that cost() found."""
    predictor, order = divmod(way, len(_ORDERS))
    folded = _fold(row, _predictions(row))[predictor].tolist()
    run_at = dict(zip(*(part.tolist() for part in _runs(row)), strict=True))
    written, position = [(way, 4)], 0
    while position < len(folded):
        written.append(gamma_field(folded[position], _ORDERS[order]))
        run = run_at.get(position)
        if run is not None:
            written.append(gamma_field(run - 1, 0))
        position += run or 1
    return written


def read(bits: BitReader, length: int) -> np.ndarray:
    """The sequence (length,) int64 that fields() wrote; StoreError if it is none."""
    way = bits.read(4)
    if way >= _N_CHOICES:
        raise damaged(f"a table must be written in one of {_N_CHOICES} ways, got {way}")
    predictor, order = divmod(way, len(_ORDERS))
    row = [0] * length
    position, last, before = 0, 0, 0
    while position < length:
        predicted = (0, last, min(max(2 * last - before, 0), LARGEST))[predictor]
        entry = _unfold(bits.read_gamma(_ORDERS[order], 2 * LARGEST), predicted)
        if entry > LARGEST:
            raise damaged(f"a table's entry must be at most {LARGEST}, got {entry}")
        row[position] = entry
        before, last = last, entry
        position += 1
        if entry == 0:
            run = bits.read_gamma(0, length - position)
            position += run
            before = 0 if run else before
    return np.array(row, np.int64)


def _predictions(rows: np.ndarray) -> np.ndarray:
    """What each predictor says of every entry, (_N_PREDICTORS, ..., K), for rows (..., K)."""
    predicted = np.zeros((_N_PREDICTORS, *rows.shape), np.int64)
    predicted[1, ..., 1:] = rows[..., :-1]
    predicted[2] = 2 * predicted[1]
    predicted[2, ..., 2:] -= rows[..., :-2]
    np.clip(predicted[2], 0, LARGEST, out=predicted[2])
    return predicted


def _fold(rows: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The residual as an integer >= 0: 0, -1, 1, -2, ... as far as both signs are possible, then upwards."""
    residual = rows - predicted
    size = np.abs(residual)
    return np.where(size <= predicted, 2 * size - (residual < 0), rows)


def _unfold(folded: int, predicted: int) -> int:
    return folded if folded > 2 * predicted else predicted + ((folded >> 1) ^ -(folded & 1))


@cache
def _gamma_widths() -> np.ndarray:
    """Bits of the code of 0 .. 2 * LARGEST, (orders, values)."""
    return np.array([[gamma_bits(value, order) for value in range(2 * LARGEST + 1)] for order in _ORDERS])


def _runs(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of zeros of row (K,) starts, and its length."""
    edges = np.diff((row == 0).astype(np.int8), prepend=0, append=0)
    starts = np.flatnonzero(edges == 1)
    return starts, np.flatnonzero(edges == -1) - starts
