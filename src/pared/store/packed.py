"""Integers of k bits, k = 0 .. 16, packed one after another, counted from the smallest value.

The first byte holds k and how the smallest value is written; values of more than eight bits are split into a plane of
low bytes and a packed plane of the rest.
"""

from __future__ import annotations

import math

import numpy as np

from pared.store._bits import BitReader, BitWriter, damaged
from pared.store._symbols import Symbols, check_range, restore

DECODE_NS = 1.0
_CHUNK = 1 << 17  # groups of eight values


def encode(values: np.ndarray, symbols: Symbols | None) -> bytes | None:
    if symbols is None:
        return None
    width = (symbols.alphabet - 1).bit_length()
    return _header(symbols, width) + _pack(symbols.codes, width)


def decode(payload: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    bits = BitReader(payload)
    width = bits.read(5)
    if width > 16:
        raise damaged(f"packed integers must have at most 16 bits, got {width}")
    usual = _usual_lowest(width)
    choice = bits.read(3)
    if choice > len(usual):
        raise damaged(f"the smallest packed value must be written in one of {len(usual) + 1} ways, got {choice}")
    lowest = usual[choice] if choice < len(usual) else bits.read_signed(3)
    check_range(lowest, 0, dtype)
    n = math.prod(shape)
    body = bits.rest()
    if len(body) != _packed_bytes(n, width):
        raise damaged(f"{n} values of {width} bits must take {_packed_bytes(n, width)} bytes, got {len(body)}")
    return restore(_unpack(np.frombuffer(body, np.uint8), n, width), lowest, shape, dtype)


def estimate_bits(values: np.ndarray, symbols: Symbols | None) -> float | None:
    if symbols is None:
        return None
    width = (symbols.alphabet - 1).bit_length()
    return 8 * (len(_header(symbols, width)) + _packed_bytes(symbols.n, width))


def _usual_lowest(width: int) -> tuple[int, ...]:
    return (0, -(1 << width >> 1), 1 - (1 << width >> 1), 1)


def _header(symbols: Symbols, width: int) -> bytes:
    usual = _usual_lowest(width)
    writer = BitWriter()
    writer.write(width, 5)
    if symbols.lowest in usual:
        writer.write(usual.index(symbols.lowest), 3)
    else:
        writer.write(len(usual), 3)
        writer.write_signed(symbols.lowest, 3)
    return writer.to_bytes()


def _packed_bytes(n: int, width: int) -> int:
    return (n * width + 7) // 8 if width <= 8 else n + _packed_bytes(n, width - 8)


def _pack(codes: np.ndarray, width: int) -> bytes:
    """Little-endian bit order: the first value is in the lowest bits of the first byte."""
    if width > 8:
        return (codes & 0xFF).astype(np.uint8).tobytes() + _pack(codes >> 8, width - 8)
    if width == 0:
        return b""
    if width == 8:
        return codes.astype(np.uint8).tobytes()
    pieces = []
    for start in range(0, codes.size, 8 * _CHUNK):
        part = codes[start : start + 8 * _CHUNK]
        groups = np.zeros((-(-part.size // 8), 8), np.uint64)
        groups.reshape(-1)[: part.size] = part
        word = groups[:, 0].copy()
        for j in range(1, 8):
            word |= groups[:, j] << np.uint64(width * j)
        pieces.append(word.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes())
    return b"".join(pieces)[: _packed_bytes(codes.size, width)]


def _unpack(packed: np.ndarray, n: int, width: int) -> np.ndarray:
    """packed has the length that _packed_bytes says."""
    if width > 8:
        return packed[:n] | _unpack(packed[n:], n, width - 8).astype(np.uint16) << 8
    if width == 0:
        return np.zeros(n, np.uint8)
    if width == 8:
        return packed
    codes = np.empty((-(-n // 8), 8), np.uint8)
    mask = np.uint64((1 << width) - 1)
    for start in range(0, len(codes), _CHUNK):
        part = codes[start : start + _CHUNK]
        raw = packed[start * width : (start + len(part)) * width]
        words = np.zeros((len(part), 8), np.uint8)
        words[:, :width] = np.concatenate([raw, np.zeros(len(part) * width - raw.size, np.uint8)]).reshape(-1, width)
        word = words.view("<u8")[:, 0]
        for j in range(8):
            part[:, j] = (word >> np.uint64(width * j)) & mask
    return codes.reshape(-1)[:n]
