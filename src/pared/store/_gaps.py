"""A sparse tensor as gaps between its rarer symbols, and these symbols.

The most frequent symbol (zero, in a pruned layer) is not coded: a token says how many of it come before each other
symbol. The largest token, the limit, stands for a part of a longer gap, and no other symbol follows it. The symbols
keep their numbers without the skipped one.

Paper   Han et al. 2016, arXiv:1510.00149.
Differs the limit is chosen by size, not fixed at 2**8 or 2**5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pared.store._bits import BitReader, BitWriter, damaged, gamma_bits

LIMITS = (3, 7, 15, 31, 63, 127, 255)
SPARSE = 0.5  # share of the most frequent symbol from which gaps are worth a try
_CHUNK = 1 << 20  # tokens: places are counted in int64, so count piece by piece


class Gaps:
    """The split of flat codes (n,) with histogram counts (K,), not all equal.

    `skipped` is the most frequent symbol, `counts` (K - 1,) the histogram of the others.
    """

    def __init__(self, codes: np.ndarray, counts: np.ndarray) -> None:
        self.skipped = int(counts.argmax())
        self.counts = np.delete(counts, self.skipped)
        self._codes = codes
        places = np.flatnonzero(codes != self.skipped)
        self._gaps = np.diff(places, prepend=-1) - 1
        self._rest = codes.size - 1 - int(places[-1])
        gap_counts = np.bincount(self._gaps)
        self._sizes = np.flatnonzero(gap_counts)
        self._size_counts = gap_counts[self._sizes]

    def histogram(self, limit: int) -> np.ndarray:
        """Counts (limit + 1,) of the tokens."""
        counts = np.zeros(limit + 1, np.int64)
        np.add.at(counts, self._sizes % limit, self._size_counts)
        counts[limit] = self._sizes // limit @ self._size_counts + self._rest // limit
        if self._rest % limit:
            counts[self._rest % limit] += 1
        return counts

    def best_limit(self, cost: Callable[[np.ndarray], float]) -> int:
        """The limit whose histogram of tokens costs least."""
        return min(LIMITS, key=lambda limit: cost(self.histogram(limit)))

    def tokens(self, limit: int) -> np.ndarray:
        """(m,) uint8, m <= n."""
        gaps = np.append(self._gaps, self._rest)
        last_of_gap = np.cumsum(gaps // limit + 1) - 1
        tokens = np.full(last_of_gap[-1] + 1, limit, np.uint8)
        tokens[last_of_gap] = gaps % limit
        return tokens if self._rest % limit else tokens[:-1]

    def others(self) -> np.ndarray:
        """The symbols that are not skipped, 0 .. K - 2."""
        others = self._codes[self._codes != self.skipped]
        return others - (others > self.skipped).astype(others.dtype)

    def write(self, writer: BitWriter, limit: int) -> None:
        writer.write_gamma(self.skipped, 3)
        writer.write(LIMITS.index(limit), 3)
        writer.write_gamma(int(self.histogram(limit).sum()), 6)

    def header_bits(self, limit: int) -> int:
        return gamma_bits(self.skipped, 3) + 3 + gamma_bits(int(self.histogram(limit).sum()), 6)


def read(bits: BitReader, alphabet: int, n: int) -> tuple[int, int, int]:
    """The skipped symbol, the limit and the number of tokens, as written by Gaps.write."""
    skipped = bits.read_gamma(3, alphabet - 1)
    index = bits.read(3)
    if index >= len(LIMITS):
        raise damaged(f"the largest gap must be one of {len(LIMITS)} sizes, got number {index}")
    return skipped, LIMITS[index], bits.read_gamma(6, n)


def count_others(tokens: np.ndarray, limit: int, n: int) -> int:
    """How many other symbols there are; StoreError unless they and the gaps fill n places."""
    n_others = int(np.count_nonzero(tokens != limit))
    filled = int(tokens.sum(dtype=np.int64)) + n_others
    if filled == n + 1 and tokens[-1] != limit:  # the last gap runs to the end, and nothing follows
        return n_others - 1
    if filled != n:
        raise damaged(f"gaps and symbols must fill {n} places, got {filled}")
    return n_others


def join(tokens: np.ndarray, others: np.ndarray, limit: int, skipped: int, n: int) -> np.ndarray:
    """The codes (n,) of the type of others, of which there are as many as count_others says."""
    codes = np.full(n, skipped, others.dtype)
    end = used = 0
    for start in range(0, len(tokens), _CHUNK):
        part = tokens[start : start + _CHUNK].astype(np.int64)
        ends = end + np.cumsum(part + (part != limit))
        places = ends[part != limit][: len(others) - used] - 1
        chosen = others[used : used + len(places)]
        codes[places] = chosen + (chosen >= skipped).astype(others.dtype)
        end, used = int(ends[-1]), used + len(places)
    return codes
