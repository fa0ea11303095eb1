"""Range asymmetric numeral systems: within a thousandth of the entropy of the histogram, and fast.

Small tensors are coded by one state that starts near zero and moves bytes, so that nothing but the table is added to
the information itself. Large ones are coded by eight interleaved states that move 16-bit words, so that eight symbols
are under way at once. Sparse tensors are split into gaps and symbols, a stream each, where that is smaller: where zeros
cluster.

Paper   Duda 2013, arXiv:1311.2540; Giesen 2014, arXiv:1402.3392 (interleaving).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pared.store import _frequencies, _gaps
from pared.store._bits import BitReader, BitWriter, damaged, gamma_bits
from pared.store._compiled import SMALL, compiled
from pared.store._symbols import LARGEST_ALPHABET, Symbols, check_range, entropy_bits, restore

DECODE_NS = 1.5  # per symbol, large tensors
INTERLEAVED_FROM = 1 << 17  # symbols; eight states cost 24 bytes more than one
_CLUSTERED = 0.995  # of the plain stream, from which gaps are looked at more closely
_LARGE = 1 << 18  # symbols
_LANES = 8
_STATE_BYTES = 5
_LANE_LOW = 1 << 24  # a lane's state is in [2**24, 2**40), exact in float64
_LOW = 1 << 23  # the single state is below 2**31
_NEAR_ZERO = 256


def encode(values: np.ndarray, symbols: Symbols | None) -> bytes | None:
    if symbols is None:
        return None
    plan = _plan(symbols)
    writer = plan.header
    if plan.gaps is None:
        return writer.to_bytes() + b"".join(_encode(symbols.codes, table) for table in plan.tables)
    tokens = _encode(plan.gaps.tokens(plan.limit), plan.tables[0])
    others = b"".join(_encode(plan.gaps.others(), table) for table in plan.tables[1:])
    writer.write_gamma(len(tokens), 6)
    return writer.to_bytes() + tokens + others


def decode(payload: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    bits = BitReader(payload)
    lowest = bits.read_signed(3)
    alphabet = 1 + bits.read_gamma(3, LARGEST_ALPHABET - 1)
    check_range(lowest, 0, dtype)
    n = math.prod(shape)
    if alphabet == 1:
        codes = _decode(bits.rest(), None, n)
    elif not bits.read(1):
        table = _frequencies.read(bits, alphabet, lowest)
        codes = _decode(bits.rest(), table, n)
    else:
        skipped, limit, n_tokens = _gaps.read(bits, alphabet, n)
        token_table = _frequencies.read(bits, limit + 1, 0)
        other_table = _frequencies.read(bits, alphabet - 1, 0) if alphabet > 2 else None
        length = bits.read_gamma(6, len(payload))
        body = bits.rest()
        tokens = _decode(body[:length], token_table, n_tokens)
        others = _decode(body[length:], other_table, _gaps.count_others(tokens, limit, n))
        codes = _gaps.join(tokens, others if alphabet <= 256 else others.astype(np.uint16), limit, skipped, n)
    return restore(codes, lowest, shape, dtype)


def estimate_bits(values: np.ndarray, symbols: Symbols | None) -> float | None:
    if symbols is None:
        return None
    plan = _plan(symbols)
    body_bits = sum(table.data_bits + (8 * 24 if table.n >= INTERLEAVED_FROM else 4) for table in plan.tables)
    if plan.gaps is not None:
        body_bits += gamma_bits(int(plan.tables[0].data_bits) // 8, 6)
    return 8 * len(plan.header.to_bytes()) + body_bits


class _Plan(NamedTuple):
    """What is written before the streams, the table of each stream, and the split into gaps if there is one."""

    header: BitWriter
    tables: list[_frequencies.Table]
    gaps: _gaps.Gaps | None = None
    limit: int = 0


def _plan(symbols: Symbols) -> _Plan:
    header = BitWriter()
    header.write_signed(symbols.lowest, 3)
    header.write_gamma(symbols.alphabet - 1, 3)
    if symbols.alphabet == 1:
        return _Plan(header, [])
    plain = _frequencies.choose(symbols.counts, symbols.lowest)
    gaps = symbols.gaps if _is_clustered(symbols) else None
    sparse = None if gaps is None else _sparse_tables(gaps, plain.bits)
    header.write(sparse is not None, 1)
    if gaps is None or sparse is None:
        plain.write(header)
        return _Plan(header, [plain])
    limit, tables = sparse
    gaps.write(header, limit)
    for table in tables:
        table.write(header)
    return _Plan(header, tables, gaps, limit)


def _is_clustered(symbols: Symbols) -> bool:
    """Whether gaps may be worth while, for a large tensor judged by a part of it."""
    if symbols.n <= _LARGE:
        return True
    part = Symbols.of(symbols.codes[(symbols.n - _LARGE) // 2 :][:_LARGE])
    return part is not None and (part.gaps is None or _sparse_tables(part.gaps, entropy_bits(part.counts)) is not None)


def _sparse_tables(gaps: _gaps.Gaps, plain_bits: float) -> tuple[int, list[_frequencies.Table]] | None:
    """The limit and the tables of tokens and of other symbols, or None when the plain stream is smaller."""
    limit = gaps.best_limit(lambda counts: entropy_bits(counts) + 3 * np.count_nonzero(counts))
    tokens = gaps.histogram(limit)
    if entropy_bits(tokens) + entropy_bits(gaps.counts) > _CLUSTERED * plain_bits:
        return None
    tables = [_frequencies.choose(counts, 0) for counts in (tokens, gaps.counts) if len(counts) > 1]
    token_bytes = int(tables[0].data_bits) // 8
    bits = gaps.header_bits(limit) + gamma_bits(token_bytes, 6) + 16 + sum(table.bits for table in tables)
    return (limit, tables) if bits < plain_bits else None


def _encode(codes: np.ndarray, table: _frequencies.Table) -> bytes:
    """The stream of codes (n,) uint8 or uint16, without its table."""
    n = codes.size
    start = np.concatenate([[0], np.cumsum(table.frequencies)[:-1]])
    if n >= INTERLEAVED_FROM:
        words = np.empty(n, np.uint16)
        states = np.empty(_LANES, np.int64)
        used = compiled(_encode_lanes)(codes, table.frequencies, start, table.precision, words, states)
        head = states.astype("<i8").view(np.uint8).reshape(_LANES, 8)[:, :_STATE_BYTES]
        return head.tobytes() + words[used:].astype("<u2").tobytes()
    first = _first_state(table.frequencies)
    if n > SMALL:
        stream = np.empty(2 * n + 8, np.uint8)
        used = compiled(_encode_single)(codes, table.frequencies, start, table.precision, first, stream)
        return stream[used:].tobytes()
    room = bytearray(2 * n + 8)
    used = _encode_single(codes.tolist(), table.frequencies.tolist(), start.tolist(), table.precision, first, room)
    return bytes(room[used:])


def _decode(body: memoryview, table: tuple[np.ndarray, int] | None, n: int) -> np.ndarray:
    """Codes (n,), uint8 or uint16, that fill body; table is frequencies and precision, None for zeros only."""
    if table is None:
        if len(body):
            raise damaged(f"nothing must follow the header of a constant tensor, got {len(body)} bytes")
        return np.zeros(n, np.uint8)
    frequencies, precision = table
    codes = np.zeros(n, np.uint8 if len(frequencies) <= 256 else np.uint16)
    start = np.concatenate([[0], np.cumsum(frequencies)[:-1]])
    symbol_of_slot = np.repeat(np.arange(len(frequencies), dtype=np.uint16), frequencies)
    if n >= INTERLEAVED_FROM:
        words, states = _read_lanes(body)
        whole = compiled(_decode_lanes)(words, states, symbol_of_slot, frequencies, start, precision, codes)
    elif n > SMALL:
        stream = np.frombuffer(body, np.uint8).copy()
        first = _first_state(frequencies)
        whole = compiled(_decode_single)(stream, symbol_of_slot, frequencies, start, precision, first, codes)
    else:
        decoded = [0] * n
        slots, listed = symbol_of_slot.tolist(), frequencies.tolist()
        whole = _decode_single(body, slots, listed, start.tolist(), precision, _first_state(frequencies), decoded)
        codes[:] = decoded
    if not whole:
        raise damaged(f"a stream of {n} rANS symbols must end in its first state, got another")
    return codes


def _first_state(frequencies: np.ndarray) -> int:
    """Where the single state starts: a state that has run dry falls below frequencies[0] and never rises again."""
    lowest = int(frequencies[0])
    return lowest if lowest < _NEAR_ZERO else 0


def _read_lanes(body: memoryview) -> tuple[np.ndarray, np.ndarray]:
    """Words, with as many spare ones at the end as a round may look at before it is found out, and the states."""
    head = _LANES * _STATE_BYTES
    if len(body) < head or (len(body) - head) % 2:
        raise damaged(f"interleaved rANS must have {head} bytes and then whole words, got {len(body)} bytes")
    wide = np.zeros((_LANES, 8), np.uint8)
    wide[:, :_STATE_BYTES] = np.frombuffer(body[:head], np.uint8).reshape(_LANES, _STATE_BYTES)
    words = np.zeros((len(body) - head) // 2 + _LANES, np.uint16)
    words[:-_LANES] = np.frombuffer(body[head:], "<u2")
    return words, wide.view("<i8").astype(np.int64).reshape(_LANES)


def _encode_single(codes, frequencies, start, precision, first, stream):
    """Fill stream from its end, return where it begins; a symbol has at most 16 bits and writes at most two bytes."""
    state = first
    position = len(stream)
    for i in range(len(codes) - 1, -1, -1):
        symbol = codes[i]
        frequency = frequencies[symbol]
        while state >= frequency << (31 - precision):
            position -= 1
            stream[position] = state & 255
            state >>= 8
        quotient = state // frequency
        state = (quotient << precision) + state - quotient * frequency + start[symbol]
    while state > 0:
        position -= 1
        stream[position] = state & 255
        state >>= 8
    return position


def _decode_single(stream, symbol_of_slot, frequencies, start, precision, first, codes):
    """Fill codes, return whether the stream ends where they end. Every index is masked or compared before its use."""
    state = 0
    position = 0
    size = len(stream)
    mask = (1 << precision) - 1
    for i in range(len(codes)):
        while state < _LOW and position < size:
            state = (state << 8) | stream[position]
            position += 1
        slot = state & mask
        symbol = symbol_of_slot[slot]
        codes[i] = symbol
        state = frequencies[symbol] * (state >> precision) + slot - start[symbol]
    return state == first and position == size


def _encode_lanes(codes, frequencies, start, precision, words, states):
    """Fill words from its end, one per symbol at most, and states; return where the words begin.

    The quotient is exact: a state is below 2**53, so that the nearest double to state / frequency has the same floor.
    """
    position = words.size
    shift = 40 - precision
    for lane in range(_LANES):
        states[lane] = _LANE_LOW
    for i in range(codes.size - 1, -1, -1):
        lane = i % _LANES
        symbol = codes[i]
        frequency = frequencies[symbol]
        state = states[lane]
        words[position - 1] = state & 0xFFFF
        full = state >= frequency << shift
        position -= full
        state = state >> 16 if full else state
        quotient = int(float(state) / float(frequency))
        states[lane] = (quotient << precision) + (state - quotient * frequency) + start[symbol]
    return position


def _decode_lanes(words, states, symbol_of_slot, frequencies, start, precision, codes):
    """Fill codes from words, which end in eight spare ones; return whether states and words end where they should.

    A lane reads at most one word per symbol, so a round that begins within the words stays within the spare ones. No
    state can grow or turn negative, whatever the words are, as frequency <= 2**precision.
    """
    n = codes.size
    mask = (1 << precision) - 1
    position = 0
    end = words.size - _LANES
    for i in range(0, n - _LANES + 1, _LANES):
        if position > end:
            return False
        for lane in range(_LANES):
            state = states[lane]
            slot = state & mask
            symbol = symbol_of_slot[np.uint32(slot)]
            codes[i + lane] = symbol
            state = frequencies[symbol] * (state >> precision) + slot - start[symbol]
            refilled = (state << 16) | words[np.uint64(position)]
            low = state < _LANE_LOW
            states[lane] = refilled if low else state
            position += low
    if position > end:
        return False
    for i in range(n - n % _LANES, n):
        state = states[i % _LANES]
        slot = state & mask
        symbol = symbol_of_slot[np.uint32(slot)]
        codes[i] = symbol
        state = frequencies[symbol] * (state >> precision) + slot - start[symbol]
        if state < _LANE_LOW:
            state = (state << 16) | words[np.uint64(position)]
            position += 1
        states[i % _LANES] = state
    whole = position == end
    for lane in range(_LANES):
        whole = whole and states[lane] == _LANE_LOW
    return whole
