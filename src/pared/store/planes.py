"""Numbers of two bytes or more as planes of bytes, each coded or left raw. Bit-exact.

Floats are first turned left by one bit, so that the highest byte is the exponent (float32, bfloat16) and the sign joins
the incompressible low bits; for small tensors of uint16, which may hold bfloat16, that is chosen by size, and large tensors
of all types are turned. Integers that span more than 65,536 values end up here too. The planes of small tensors are coded by
rANS, those of large ones block by block.

Paper   the split is that of Zhang et al. 2025, arXiv:2504.11651.
"""

from __future__ import annotations

import math

import numpy as np

from pared.store import _blocks, rans
from pared.store._bits import BitReader, BitWriter, damaged
from pared.store._compiled import SMALL
from pared.store._symbols import Symbols, entropy_bits

DECODE_NS = 2.0
_BYTE = np.dtype(np.uint8)


def encode(values: np.ndarray, symbols: Symbols | None) -> bytes | memoryview | None:
    if values.dtype.itemsize == 1:
        return None
    if values.size > SMALL:
        words = _words(values)
        return _blocks.encode(words, _blocks.plan(words))
    turned = _better_turned(values)
    writer = BitWriter()
    writer.write(turned, 1)
    bodies, lengths = [], []
    for plane in _split(values, turned):
        body = _code(plane)
        writer.write(body is not None, 1)
        if body is not None:
            lengths.append(len(body))
        bodies.append(plane.tobytes() if body is None else body)
    for length in lengths[:-1]:
        writer.write_gamma(length, 4)
    return writer.to_bytes() + b"".join(bodies)


def decode(payload: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = dtype.itemsize
    if size == 1:
        raise damaged(f"byte planes must decode to a type of two bytes or more, got {dtype}")
    n = math.prod(shape)
    unsigned = np.dtype(f"u{size}")
    if n > SMALL:
        return _blocks.decode(payload, n, unsigned).reshape(shape).view(dtype)
    bits = BitReader(payload)
    turned = bits.read(1)
    coded = [bool(bits.read(1)) for _ in range(size)]
    lengths = [bits.read_gamma(4, len(payload)) for _ in range(sum(coded) - 1)]
    body = bits.rest()
    last = len(body) - sum(lengths) - n * (size - sum(coded))
    if last < 0 or (last > 0 and not any(coded)):
        raise damaged(f"{size} planes of {n} bytes must have {-last} bytes more, got {len(body)}")
    lengths.append(last)
    raw = np.empty((n, size), np.uint8)
    for i, is_coded in enumerate(coded):
        length = lengths.pop(0) if is_coded else n
        raw[:, i] = rans.decode(body[:length], (n,), _BYTE) if is_coded else np.frombuffer(body[:length], np.uint8)
        body = body[length:]
    words = raw.reshape(-1).view(unsigned.newbyteorder("<")).astype(unsigned, copy=False).reshape(shape)
    if turned:
        words = (words >> unsigned.type(1)) | (words << unsigned.type(8 * size - 1))
    return words.view(dtype)


def estimate_bits(values: np.ndarray, symbols: Symbols | None) -> float | None:
    if values.dtype.itemsize == 1:
        return None
    if values.size > SMALL:
        return _blocks.plan(_words(values)).bits
    return 16 + min(_planes_bits(values, turned) for turned in _turns(values))


def _words(values: np.ndarray) -> np.ndarray:
    words = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    words.flags.writeable = False  # numba would compile again for what is
    return words


def _turns(values: np.ndarray) -> tuple[bool, ...]:
    if values.dtype.kind == "f":
        return (True,)
    return (False, True) if values.dtype == np.uint16 else (False,)


def _better_turned(values: np.ndarray) -> bool:
    turns = _turns(values)
    return turns[0] if len(turns) == 1 else min(turns, key=lambda turned: _planes_bits(values, turned))


def _split(values: np.ndarray, turned: bool) -> list[np.ndarray]:
    """Byte planes (n,) from the lowest to the highest."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    words = values.reshape(-1).view(unsigned)
    if turned:
        words = (words << unsigned.type(1)) | (words >> unsigned.type(8 * unsigned.itemsize - 1))
    raw = words.astype(unsigned.newbyteorder("<"), copy=False).view(np.uint8).reshape(-1, unsigned.itemsize)
    return [np.ascontiguousarray(raw[:, i]) for i in range(unsigned.itemsize)]


def _code(plane: np.ndarray) -> bytes | None:
    """The plane by rANS, or None when it is no smaller so, or hardly."""
    symbols = Symbols.of(plane)
    return rans.encode(plane, symbols) if _plane_bits(plane, symbols) < 8 * plane.size else None


def _planes_bits(values: np.ndarray, turned: bool) -> float:
    return sum(_plane_bits(plane, Symbols.of(plane)) for plane in _split(values, turned))


def _plane_bits(plane: np.ndarray, symbols: Symbols | None) -> float:
    raw = 8 * plane.size
    if symbols is None or entropy_bits(symbols.counts) > _blocks.WORTH * raw:
        return raw
    coded = rans.estimate_bits(plane, symbols)
    return raw if coded is None else min(coded, raw)
