"""Integers of any type as symbols 0 .. K-1, with their histogram."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from pared.store._bits import damaged
from pared.store._gaps import SPARSE, Gaps

LARGEST_ALPHABET = 1 << 16
_SAMPLE = 1024  # elements
_CHUNK = 1 << 20  # elements: numpy widens to int64 while counting, so count piece by piece


class Symbols:
    """The integers of a tensor, shifted so that the smallest is symbol 0.

    values: any shape, at least one element, native byte order. `lowest` is the value of symbol 0, `counts` (K,) int64
    the histogram, whose first and last entries are not zero, `codes` the flat symbols: uint8 if K <= 256, else uint16.
    """

    def __init__(self, values: np.ndarray, lowest: int, counts: np.ndarray) -> None:
        self._values = values
        self.lowest = lowest
        self.counts = counts
        self.n = values.size
        self.alphabet = len(counts)

    @classmethod
    def of(cls, values: np.ndarray, judge: bool = True) -> Symbols | None:
        """None when the values are not integers, are none at all, span more than 65,536 values, or are judged to be noise."""
        if values.dtype.kind not in "iub" or values.size == 0 or (judge and _is_noise(values)):
            return None
        if values.dtype.itemsize <= 2:
            raw = _as_unsigned(values)
            counts = _count(raw, 1 << (8 * raw.itemsize))
            origin = 0
            if values.dtype.kind == "i":
                counts = np.roll(counts, len(counts) // 2)
                origin = -(len(counts) // 2)
            used = np.flatnonzero(counts)
            low, high = int(used[0]), int(used[-1])
            return cls(values, origin + low, counts[low : high + 1])
        low, high = int(values.min()), int(values.max())
        if high - low >= LARGEST_ALPHABET:
            return None
        return cls(values, low, _count(_shift_down(values, low), high - low + 1))

    @cached_property
    def codes(self) -> np.ndarray:
        codes = _shift_down(self._values, self.lowest).astype(np.uint8 if self.alphabet <= 256 else np.uint16, copy=False)
        return codes if codes.flags.writeable else codes.copy()  # numba compiles again for arrays that are not

    @cached_property
    def gaps(self) -> Gaps | None:
        """None for a dense or a constant tensor."""
        return Gaps(self.codes, self.counts) if self.n > self.counts.max() >= SPARSE * self.n else None


def restore(codes: np.ndarray, lowest: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Undo Symbols: codes are flat uint8 or uint16. StoreError when a value does not fit in dtype."""
    check_range(lowest, int(codes.max()) if codes.size else 0, dtype)
    if dtype == np.bool_:
        return (codes + np.uint8(lowest)).astype(np.bool_).reshape(shape)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    values = codes.astype(unsigned, copy=False)
    if lowest:
        values = values + unsigned.type(lowest % (1 << (8 * dtype.itemsize)))
    return values.view(dtype).reshape(shape)


def check_range(lowest: int, span: int, dtype: np.dtype) -> None:
    """StoreError unless lowest and lowest + span are values of the integer type dtype."""
    if dtype.kind not in "iub":
        raise damaged(f"coded integers must decode to an integer type, got {dtype}")
    least, most = (0, 1) if dtype == np.bool_ else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if lowest < least or lowest + span > most:
        raise damaged(f"values must fit in {dtype}, got {lowest} .. {lowest + span}")


def entropy_bits(counts: np.ndarray) -> float:
    """Of all symbols together, under their own histogram."""
    used = counts[counts > 0]
    return float(used @ np.log2(used.sum() / used))


def _is_noise(values: np.ndarray) -> bool:
    """Whether so many values occur in a sample that they can only be bfloat16, whose planes say more."""
    if values.dtype != np.uint16 or values.size < 4 * _SAMPLE:
        return False
    return len(np.unique(values.reshape(-1)[:: values.size // _SAMPLE])) > _SAMPLE // 4


def _as_unsigned(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.dtype(f"u{values.dtype.itemsize}"))


def _shift_down(values: np.ndarray, lowest: int) -> np.ndarray:
    raw = _as_unsigned(values)
    if lowest:
        raw = raw - raw.dtype.type(lowest % (1 << (8 * raw.itemsize)))  # wraps round, as the difference is small
    return raw


def _count(raw: np.ndarray, length: int) -> np.ndarray:
    counts = np.zeros(length, np.int64)
    for start in range(0, raw.size, _CHUNK):
        counts += np.bincount(raw[start : start + _CHUNK].astype(np.int64), minlength=length)
    return counts
