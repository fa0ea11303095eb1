"""Canonical Huffman codes, of the symbols themselves or, for sparse tensors, of gaps and of what stands between them.

Which of the two is chosen by size. Gaps and symbols have a stream and a table each; tables are code lengths.

Paper   Huffman 1952; Han et al. 2016, arXiv:1510.00149.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np

from pared.store import _gaps, _sequences
from pared.store._bits import BitReader, BitWriter, damaged, gamma_bits
from pared.store._compiled import SMALL, compiled
from pared.store._symbols import LARGEST_ALPHABET, Symbols, check_range, restore

DECODE_NS = 4.0
_LONGEST_CODE = 16  # bits; the table that decodes has 2**16 entries at most


class _Table(NamedTuple):
    """Code lengths (K,), 0 where a symbol does not occur, with what it takes to send them and the data, in bits."""

    lengths: np.ndarray
    way: int
    bits: int


class _Sparse(NamedTuple):
    gaps: _gaps.Gaps
    limit: int
    token_table: _Table
    symbol_table: _Table
    bits: int


def encode(values: np.ndarray, symbols: Symbols | None) -> bytes | None:
    if symbols is None:
        return None
    writer = BitWriter()
    writer.write_signed(symbols.lowest, 3)
    writer.write_gamma(symbols.alphabet - 1, 3)
    if symbols.alphabet == 1:
        return writer.to_bytes()
    table = _table(symbols.counts)
    sparse = _sparse(symbols)
    writer.write(sparse is not None and sparse.bits < table.bits, 1)
    if sparse is None or sparse.bits >= table.bits:
        _write_table(writer, table)
        return writer.to_bytes() + _pack(symbols.codes, table.lengths)
    sparse.gaps.write(writer, sparse.limit)
    _write_table(writer, sparse.token_table)
    _write_table(writer, sparse.symbol_table)
    tokens = _pack(sparse.gaps.tokens(sparse.limit), sparse.token_table.lengths)
    return writer.to_bytes() + tokens + _pack(sparse.gaps.others(), sparse.symbol_table.lengths)


def decode(payload: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    bits = BitReader(payload)
    lowest = bits.read_signed(3)
    alphabet = 1 + bits.read_gamma(3, LARGEST_ALPHABET - 1)
    check_range(lowest, 0, dtype)
    n = math.prod(shape)
    code_type = np.uint8 if alphabet <= 256 else np.uint16
    if alphabet == 1:
        codes, body = np.zeros(n, code_type), bits.rest()
    elif not bits.read(1):
        lengths = _sequences.read(bits, alphabet)
        codes, body = _unpack(bits.rest(), lengths, n)
    else:
        skipped, limit, n_tokens = _gaps.read(bits, alphabet, n)
        token_lengths = _sequences.read(bits, limit + 1)
        symbol_lengths = _sequences.read(bits, alphabet - 1)
        tokens, body = _unpack(bits.rest(), token_lengths, n_tokens)
        others, body = _unpack(body, symbol_lengths, _gaps.count_others(tokens, limit, n))
        codes = _gaps.join(tokens, others.astype(code_type, copy=False), limit, skipped, n)
    if len(body):
        raise damaged(f"a Huffman stream must end with its last symbol, got {len(body)} bytes more")
    return restore(codes.astype(code_type, copy=False), lowest, shape, dtype)


def estimate_bits(values: np.ndarray, symbols: Symbols | None) -> float | None:
    if symbols is None:
        return None
    header = 9 + gamma_bits(symbols.alphabet - 1, 3) + gamma_bits(abs(2 * symbols.lowest), 3)
    if symbols.alphabet == 1:
        return header
    table, sparse = _table(symbols.counts), _sparse(symbols)
    return header + (table.bits if sparse is None else min(table.bits, sparse.bits))


def _table(counts: np.ndarray) -> _Table:
    lengths = _code_lengths(counts)
    ways, table_bits = _sequences.cost(lengths[None])
    return _Table(lengths, int(ways[0]), int(table_bits[0]) + int(lengths @ counts))


def _write_table(writer: BitWriter, table: _Table) -> None:
    for value, width in _sequences.fields(table.lengths, table.way):
        writer.write(value, width)


def _code_lengths(counts: np.ndarray) -> np.ndarray:
    """Lengths of a Huffman code, flattened by halving the counts until none is longer than _LONGEST_CODE."""
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.int64)
    if len(used) == 1 < len(counts):
        lengths[used] = 1
    weights = counts[used]
    while len(used) > 1:
        depths = _depths(weights.tolist())
        if max(depths) <= _LONGEST_CODE:
            lengths[used] = depths
            break
        weights = (weights + 1) // 2
    return lengths


def _depths(weights: list[int]) -> list[int]:
    """Depth of every leaf of the Huffman tree; among equal weights the older go first, which keeps the tree flat."""
    heap = [(weight, index) for index, weight in enumerate(weights)]
    heapq.heapify(heap)
    parent = [0] * (2 * len(weights) - 1)
    for node in range(len(weights), len(parent)):
        weight, child = heapq.heappop(heap)
        other_weight, other = heap[0]
        parent[child] = parent[other] = node
        heapq.heapreplace(heap, (weight + other_weight, node))
    depths = [0] * len(parent)
    for node in range(len(parent) - 2, -1, -1):
        depths[node] = depths[parent[node]] + 1
    return depths[: len(weights)]


def _sparse(symbols: Symbols) -> _Sparse | None:
    gaps = symbols.gaps
    if gaps is None:
        return None
    limit = gaps.best_limit(lambda counts: _table(counts).bits)
    token_table, symbol_table = _table(gaps.histogram(limit)), _table(gaps.counts)
    bits = gaps.header_bits(limit) + token_table.bits + symbol_table.bits
    return _Sparse(gaps, limit, token_table, symbol_table, bits)


def _canonical(lengths: np.ndarray) -> np.ndarray:
    """Codewords (K,) in the canonical order: by length, then by symbol."""
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    sizes = np.int64(1) << (_LONGEST_CODE - lengths[order])
    words = np.zeros(len(lengths), np.int64)
    words[order] = (np.cumsum(sizes) - sizes) >> (_LONGEST_CODE - lengths[order])
    return words


def _pack(codes: np.ndarray, lengths: np.ndarray) -> bytes:
    """codes (n,), any integers below K, as one bit stream; an alphabet of one symbol takes no bits."""
    if len(lengths) == 1:
        return b""
    n_bits = int(np.bincount(codes, minlength=len(lengths)) @ lengths) if codes.size else 0
    words = _canonical(lengths)
    if codes.size > SMALL:
        stream = np.zeros(n_bits // 32 + 1, np.uint32)
        compiled(_encode_stream)(codes, words, lengths, stream)
        whole = stream.astype(">u4").tobytes()
    else:
        room = [0] * (n_bits // 32 + 1)
        _encode_stream(codes.tolist(), words.tolist(), lengths.tolist(), room)
        whole = np.array(room, ">u4").tobytes()
    return whole[: (n_bits + 7) // 8]


def _unpack(body: memoryview, lengths: np.ndarray, n: int) -> tuple[np.ndarray, memoryview]:
    """n symbols (n,) uint8 or uint16 from the front of body, and the bytes after them."""
    alphabet = len(lengths)
    codes = np.zeros(n, np.uint8 if alphabet <= 256 else np.uint16)
    if alphabet == 1:
        return codes, body
    longest = int(lengths.max())
    if longest > _LONGEST_CODE:
        raise damaged(f"a Huffman code must have at most {_LONGEST_CODE} bits, got {longest}")
    kraft = int((np.int64(1) << (longest - lengths[lengths > 0])).sum()) if longest else 0
    lonely = longest == 1 and np.count_nonzero(lengths) == 1
    if kraft != 1 << longest and not lonely and (n or longest):
        raise damaged("the code lengths of a Huffman table must make a complete code (Kraft sum 1)")
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    spans = np.int64(1) << (longest - lengths[order])
    symbol_of_word = np.resize(np.repeat(order, spans), 1 << longest).astype(np.uint16)
    length_of_word = lengths[symbol_of_word].astype(np.uint8)
    padded = np.zeros(len(body) // 4 + 2, ">u4")
    padded.view(np.uint8)[: len(body)] = np.frombuffer(body, np.uint8)
    stream = padded.astype(np.uint32)
    if n > SMALL:
        n_bits = compiled(_decode_stream)(stream, symbol_of_word, length_of_word, longest, codes)
    else:
        decoded = [0] * n
        n_bits = _decode_stream(stream.tolist(), symbol_of_word.tolist(), length_of_word.tolist(), longest, decoded)
        codes[:] = decoded
    if not 0 <= n_bits <= 8 * len(body):
        raise damaged(f"{n} Huffman codes must fit in {len(body)} bytes")
    n_bytes = (n_bits + 7) // 8
    if n_bits % 8 and body[n_bytes - 1] & (255 >> n_bits % 8):
        raise damaged("padding bits after the last Huffman code must be zero")
    return codes, body[n_bytes:]


def _encode_stream(codes, words, lengths, stream):
    """Fill stream, 32-bit words that have room for all codes, from the highest bit of the first."""
    buffer = 0
    pending = 0
    position = 0
    for i in range(len(codes)):
        symbol = codes[i]
        buffer = (buffer << lengths[symbol]) | words[symbol]
        pending += lengths[symbol]
        if pending >= 32:
            pending -= 32
            stream[position] = buffer >> pending
            buffer &= (1 << pending) - 1
            position += 1
    if pending > 0:
        stream[position] = buffer << (32 - pending)


def _decode_stream(stream, symbol_of_word, length_of_word, longest, codes):
    """Fill codes, return how many bits they took, or -1 when stream (with a spare word at its end) is too short."""
    buffer = 0
    available = 0
    position = 0
    size = len(stream)
    for i in range(len(codes)):
        if available < longest:
            if position == size:
                return -1
            buffer = (buffer << 32) | stream[position]
            position += 1
            available += 32
        word = buffer >> (available - longest)
        codes[i] = symbol_of_word[word]
        available -= length_of_word[word]
        buffer &= (1 << available) - 1
    return 32 * position - available
