"""Adaptive binary coding in context: the smallest files for sparse matrices, decoded thirty times slower than rans.

An integer is coded as decisions: is it zero, its sign, is its magnitude at least 2, 3, ... Every decision has four
adaptive estimates: from elements of which the same magnitude was expected, judging by the means of their row and
column so far and by their neighbours; from its row; from elements with the same neighbours to the left and above; and
from its column. They are mixed in the logistic domain, with weights that learn, and an arithmetic coder writes the
decision with the mixed probability. No tables are sent. Integers only, so that every machine decodes the same.

Paper   Mahoney 2005, Florida Tech CS-2005-16 (mixing); Wiedemann et al. 2020, arXiv:1907.11900 (DeepCABAC: decisions).
Differs rows, columns and mixing instead of one context of two neighbours.
"""

from __future__ import annotations

import math
import sys
from functools import cache

import numpy as np

from pared.store._bits import BitReader, BitWriter, damaged, gamma_bits
from pared.store._compiled import compiled
from pared.store._symbols import LARGEST_ALPHABET, Symbols, check_range, entropy_bits, restore

DECODE_NS = 30.0
_SMALL = 1024  # symbols: up to here numba is not imported for the loop
_SAMPLE, _LARGE_SAMPLE = 1 << 16, 1 << 20  # symbols, rounded to whole rows
_PROMISING = 0.995  # of the entropy, on the sample
_MOST_DECISIONS = 6.0  # per symbol, on average: wider alphabets are for the other coders

_MEASURE, _ENCODE, _DECODE = 0, 1, 2
_N_SLOTS = 20  # decisions with estimates of their own: zero, sign, magnitude >= 2 ... 19
_N_OWN = 4  # of them, those that columns estimate for themselves
_N_LEVELS = 25  # of the magnitude that is expected, two an octave
_N_NEIGHBOURHOODS = 64
_WEIGHTS = 36045, 14418, 10813, 10813  # of level, row, neighbours and column at first, in 1/65536
_UNSEEN = 32768 << 10
_HEAD_START = 2  # decisions that a first estimate counts for
_FEWEST_ROWS = 8  # of a matrix whose columns learn; it also bounds the memory for them by that of the matrix
_REACH = 2816  # of the logistic domain, in 1/256: a probability of 1/65536 either way
_LEAST = 24  # of 65536: no decision is surer than this
_LONGEST_MEMORY = 1023  # decisions
_LONGEST_RECIPROCAL = 65536
_SQUASH = (  # 65536 / (1 + exp(-x / 2)) for x = -22 ... 22, rounded
    1, 2, 3, 5, 8, 13, 22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768,
    40793, 47911, 53581, 57724, 60565, 62428, 63615, 64357, 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514,
    65523, 65528, 65531, 65533, 65534, 65535,
)  # fmt: skip


def encode(values: np.ndarray, symbols: Symbols | None) -> bytes | None:
    if symbols is None or _n_decisions(symbols) > _MOST_DECISIONS * symbols.n:
        return None
    zero = _zero(symbols)
    writer = BitWriter()
    writer.write_signed(symbols.lowest, 3)
    writer.write_gamma(symbols.alphabet - 1, 3)
    if symbols.alphabet == 1:
        return writer.to_bytes()
    writer.write(zero != -symbols.lowest, 1)
    if zero != -symbols.lowest:
        writer.write_gamma(zero, 3)
    columns = _columns(values.shape)
    codes = symbols.codes.astype(np.uint16)
    room = np.zeros(64 + int(entropy_bits(symbols.counts) * 0.14), np.uint8)
    size, _ = _run(_ENCODE, codes, symbols.alphabet, zero, columns, room)
    if size > len(room):
        room = np.zeros(size, np.uint8)
        _run(_ENCODE, codes, symbols.alphabet, zero, columns, room)
    return writer.to_bytes() + room[:size].tobytes().rstrip(b"\0")


def decode(payload: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    bits = BitReader(payload)
    lowest = bits.read_signed(3)
    alphabet = 1 + bits.read_gamma(3, LARGEST_ALPHABET - 1)
    check_range(lowest, 0, dtype)
    codes = np.zeros(math.prod(shape), np.uint16)
    if alphabet == 1:
        if len(bits.rest()):
            raise damaged("nothing must follow the value of a constant tensor")
        return restore(codes, lowest, shape, dtype)
    zero = bits.read_gamma(3) if bits.read(1) else -lowest
    if not 0 <= zero < alphabet:
        raise damaged(f"the middle of the alphabet must be one of its {alphabet} symbols, got {zero}")
    body = bits.rest()
    size, _ = _run(_DECODE, codes, alphabet, zero, _columns(shape), np.frombuffer(body, np.uint8).copy())
    if not 0 <= len(body) <= size:
        raise damaged(f"{codes.size} context-coded symbols must take all of {len(body)} bytes")
    return restore(codes, lowest, shape, dtype)


def estimate_bits(values: np.ndarray, symbols: Symbols | None) -> float | None:
    if symbols is None or _n_decisions(symbols) > _MOST_DECISIONS * symbols.n:
        return None
    header = 9 + gamma_bits(symbols.alphabet - 1, 3) + gamma_bits(abs(2 * symbols.lowest), 3)
    if symbols.alphabet == 1:
        return header
    order_0_bits = entropy_bits(symbols.counts)
    columns = _columns(values.shape)
    ratio = 1.0
    for size in (_SAMPLE, _LARGE_SAMPLE):
        rows = symbols.codes.reshape(-1, columns)
        sample = rows[:: max(1, symbols.n // size)].astype(np.uint16).reshape(-1)
        _, bits = _run(_MEASURE, sample, symbols.alphabet, _zero(symbols), columns, np.zeros(0, np.uint8))
        sample_bits = entropy_bits(np.bincount(sample))
        ratio = bits / sample_bits if sample_bits else 1.0
        if sample.size == symbols.n or ratio > _PROMISING:
            break
    return header + ratio * order_0_bits


def _n_decisions(symbols: Symbols) -> int:
    """How many decisions there are, but for the signs."""
    magnitude = np.abs(np.arange(symbols.alphabet) - _zero(symbols))
    return int((1 + np.minimum(magnitude, _N_SLOTS)) @ symbols.counts)


def _zero(symbols: Symbols) -> int:
    """The symbol that magnitudes are counted from: that of the value 0, or the most frequent one."""
    return -symbols.lowest if 0 <= -symbols.lowest < symbols.alphabet else int(symbols.counts.argmax())


def _columns(shape: tuple[int, ...]) -> int:
    """Columns of the matrix that the tensor is read as."""
    return math.prod(shape[1:]) if len(shape) > 1 and shape[0] >= _FEWEST_ROWS else 1


@cache
def _tables() -> tuple[np.ndarray, ...]:
    """Squash (probabilities of the logistic domain), stretch (its inverse), learning rates, levels, reciprocals, bits."""
    knots = np.array([*_SQUASH, 0], np.int64)
    knot, fraction = np.divmod(np.arange(2 * _REACH + 1), 128)
    squash = (knots[knot] * (128 - fraction) + knots[knot + 1] * fraction + 64) // 128
    stretch = np.minimum(np.searchsorted(squash, 16 * np.arange(4096) + 8), 2 * _REACH) - _REACH
    rate = 131072 // (2 * np.arange(_LONGEST_MEMORY + 1) + 3)
    squares = (np.arange(1, 4097, dtype=np.int64)) ** 2  # floor(2 log2 x) is the number of bits of x^2, less one
    level = (squares[:, None] >> np.arange(1, 25) > 0).sum(1)
    reciprocal = (1 << 20) // np.maximum(np.arange(_LONGEST_RECIPROCAL + 1), 1)
    cost = 12 - np.log2(np.arange(4096) + 0.5)  # for measuring only
    # small types: all tables together stay in the first cache
    return (
        squash.astype(np.uint16), stretch.astype(np.int16), rate.astype(np.uint16), level.astype(np.uint8), reciprocal, cost,
    )  # fmt: skip


def _states(columns: int) -> tuple[np.ndarray, ...]:
    """Estimates, weights, sums of magnitudes by column, and by slot the level that it saw last, before the first element."""
    n_states = (1 + _N_LEVELS + _N_NEIGHBOURHOODS) * _N_SLOTS + columns * _N_OWN
    return (
        np.full(n_states, _UNSEEN, np.int32),
        np.tile(np.array(_WEIGHTS, np.int64), _N_SLOTS),
        np.zeros(columns, np.int64),
        np.full(_N_SLOTS, -1, np.int64),
    )


def _run(mode: int, codes: np.ndarray, alphabet: int, zero: int, columns: int, stream: np.ndarray) -> tuple[int, float]:
    """What _pass returns, from machine code or, for few codes, from Python. codes uint16, stream uint8."""
    states = _states(columns)
    if codes.size > _SMALL or "numba" in sys.modules:
        size, bits = compiled(_pass)(mode, codes, alphabet, zero, columns, stream, states, _tables())
        return int(size), float(bits)
    lists = [[array.tolist() for array in arrays] for arrays in ((codes, stream), states, _tables())]
    size, bits = _pass(mode, lists[0][0], alphabet, zero, columns, lists[0][1], *lists[1:])
    if mode == _DECODE and size >= 0:
        codes[:] = lists[0][0]
    if mode == _ENCODE:
        stream[:] = lists[0][1]
    return size, bits


def _pass(mode, codes, alphabet, zero, columns, stream, states, tables):
    """Go through all decisions, learn from each, and measure, encode or decode it; return bytes of the stream and bits.

    Encoding writes what fits into stream and returns how much it would take. Decoding fills codes, takes the bytes
    after the end of stream for zeros, and returns how far it read, or -1 for a magnitude outside of the alphabet.

    A state is a probability of 16 bits and, below it, a count of 10; states of the row come first, then those of levels,
    of neighbourhoods and of columns. What was not seen yet starts as its level, a level as the one used before it.
    """
    state, weight, in_column, last = states
    squash, stretch, rate, level_of, reciprocal, cost = tables
    low, high, value = 0, 0xFFFFFFFF, 0
    position = 0
    length = len(stream)
    bits = 0.0
    if mode == _DECODE:
        for _ in range(4):
            value = value << 8 | (stream[position] if position < length else 0)
            position += 1
    neighbours_from = (1 + _N_LEVELS) * _N_SLOTS
    columns_from = neighbours_from + _N_NEIGHBOURHOODS * _N_SLOTS
    column, row = 0, 0
    in_row, in_all = 0, 0
    mean, inverse, share = 1, 1, 0
    left, left2, above = 0, 0, 0
    for i in range(len(codes)):
        if column == columns:
            column, in_row, left, left2 = 0, 0, 0, 0
            row += 1
            for k in range(_N_SLOTS):
                state[k] = _UNSEEN
        if column & 63 == 0:  # means are of 256 times the magnitude
            mean = (256 * in_all + 64) // (i + 1) + 1
            inverse = 16777216 // mean
            share = reciprocal[min(row + 2, _LONGEST_RECIPROCAL)]
        if row > 0:
            above = codes[i - columns] - zero
        size_left, size_above = min(abs(left), 15), min(abs(above), 15)
        mean_row = (256 * in_row + 4 * mean) * reciprocal[min(column + 4, _LONGEST_RECIPROCAL)] >> 20
        mean_column = (256 * in_column[column] + 2 * mean) * share >> 20
        expected = (3 * (mean_row * mean_column * inverse >> 24) + 128 * (size_left + size_above)) >> 2
        level_from = (1 + level_of[min(expected, 4095)]) * _N_SLOTS
        sizes = 16 * min(size_left, 3) + 4 * min(size_above, 3) + min(abs(left2), 3)
        signs = 13 + 9 * ((left > 0) - (left < 0)) + 3 * ((above > 0) - (above < 0)) + (left2 > 0) - (left2 < 0)
        own_from = columns_from + _N_OWN * column
        target = codes[i] - zero
        magnitude, limit, raw = 0, alphabet, 0
        negative = zero == alphabet - 1
        slot = 0
        while magnitude < limit or raw > 0:
            one = 32768
            first = second = third = fourth = 0
            at_level = at_neighbours = at_column = 0
            of_level = of_row = of_neighbours = of_column = 0
            if raw == 0:
                at_level = level_from + slot
                at_neighbours = neighbours_from + _N_SLOTS * (signs if slot == 1 else sizes) + slot
                at_column = own_from + min(slot, _N_OWN - 1)
                of_level, of_row = state[at_level], state[slot]
                of_neighbours, of_column = state[at_neighbours], state[at_column]
                if of_level & 1023 == 0 and last[slot] >= 0:
                    of_level = (state[last[slot]] & -1024) | _HEAD_START
                last[slot] = at_level
                start = (of_level & -1024) | _HEAD_START
                if of_row & 1023 == 0:
                    of_row = start
                if of_neighbours & 1023 == 0:
                    of_neighbours = start
                if of_column & 1023 == 0:
                    of_column = start
                first, second = stretch[of_level >> 14], stretch[of_row >> 14]
                third, fourth = stretch[of_neighbours >> 14], stretch[of_column >> 14]
                k = 4 * slot
                mixed = weight[k] * first + weight[k + 1] * second + weight[k + 2] * third + weight[k + 3] * fourth
                one = squash[min(max(mixed >> 16, -_REACH), _REACH) + _REACH]
                one = min(max(one, _LEAST), 65536 - _LEAST)
            bit = False
            if mode != _DECODE:
                if raw > 0:
                    bit = ((abs(target) - _N_SLOTS + 1) >> (raw - 1)) & 1 == 1
                else:
                    bit = target < 0 if slot == 1 else abs(target) > magnitude

            if mode == _MEASURE:
                bits += cost[one >> 4] if bit else cost[(65536 - one) >> 4]
            else:
                middle = low + ((high - low) * one >> 16)
                if mode == _DECODE:
                    bit = value <= middle
                if bit:
                    high = middle
                else:
                    low = middle + 1
                while (low ^ high) >> 24 == 0:
                    if mode == _DECODE:
                        value = (value << 8 & 0xFFFFFFFF) | (stream[position] if position < length else 0)
                    elif position < length:
                        stream[position] = high >> 24
                    position += 1
                    low = low << 8 & 0xFFFFFFFF
                    high = (high << 8 & 0xFFFFFFFF) | 255

            if raw > 0:
                raw -= 1
                magnitude += (1 << raw) if bit else 0
                continue
            missed = (65536 if bit else 0) - one
            aim = 65535 if bit else 0
            k = 4 * slot
            weight[k] += (first * missed + 32768) >> 16
            weight[k + 1] += (second * missed + 32768) >> 16
            weight[k + 2] += (third * missed + 32768) >> 16
            weight[k + 3] += (fourth * missed + 32768) >> 16
            n = of_level & 1023
            state[at_level] = of_level + ((aim - (of_level >> 10)) * rate[n] >> 16 << 10) + (n < _LONGEST_MEMORY)
            n = of_row & 1023
            state[slot] = of_row + ((aim - (of_row >> 10)) * rate[n] >> 16 << 10) + (n < _LONGEST_MEMORY)
            n = of_neighbours & 1023
            state[at_neighbours] = of_neighbours + ((aim - (of_neighbours >> 10)) * rate[n] >> 16 << 10) + (n < _LONGEST_MEMORY)
            n = of_column & 1023
            state[at_column] = of_column + ((aim - (of_column >> 10)) * rate[n] >> 16 << 10) + (n < _LONGEST_MEMORY)
            if slot == 1:
                negative = bit
            elif not bit:
                break
            else:
                magnitude += 1
            if slot == 0 and 0 < zero < alphabet - 1:
                slot = 1
                continue
            limit = zero if negative else alphabet - 1 - zero
            slot = magnitude + 1
            if slot == _N_SLOTS:
                while (limit - magnitude) >> raw > 0:
                    raw += 1
                limit = magnitude
        if mode == _DECODE:
            if magnitude > (zero if negative else alphabet - 1 - zero):
                return -1, bits
            target = -magnitude if negative else magnitude
            codes[i] = zero + target
        size = min(abs(target), 15)
        in_row += size
        in_column[column] += size
        in_all += size
        left2, left = left, target
        column += 1
    if mode == _ENCODE:  # the shortest number from low to high, zeros following it
        shift = 32
        while ((low + (1 << shift) - 1) >> shift) << shift > high:
            shift -= 8
        last_bytes = ((low + (1 << shift) - 1) >> shift) << shift
        for k in range(24, shift - 1, -8):
            if position < length:
                stream[position] = last_bytes >> k & 255
            position += 1
    return position, bits
