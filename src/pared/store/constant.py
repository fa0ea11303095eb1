"""One value for every element: its little-endian bytes without those that follow from the rest.

Integers lose the high bytes that repeat the sign, floats the low bytes that are zero; a zero takes no bytes at all.
"""

from __future__ import annotations

import numpy as np

from pared.store._bits import damaged
from pared.store._symbols import Symbols, check_range

DECODE_NS = 0.05
_FIRST = 64  # which are nearly always enough to see that there is more than one value


def encode(values: np.ndarray, symbols: Symbols | None) -> bytes | None:
    if symbols is not None and symbols.alphabet > 1:
        return None
    raw = values.reshape(-1).view(np.uint8 if values.dtype == np.bool_ else f"u{values.dtype.itemsize}")
    if not ((raw[:_FIRST] == raw[0]).all() and (raw == raw[0]).all()):
        return None
    if values.dtype.kind == "f":
        return raw[:1].astype(raw.dtype.newbyteorder("<")).tobytes().lstrip(b"\0")
    value = int(values.reshape(-1)[0])
    n_bytes = 0 if value == 0 else (value if value >= 0 else ~value).bit_length() // 8 + 1
    return value.to_bytes(n_bytes, "little", signed=True)


def decode(payload: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if len(payload) > dtype.itemsize + (dtype.kind == "u"):
        raise damaged(f"one value of type {dtype} must have at most {dtype.itemsize} bytes, got {len(payload)}")
    if dtype.kind == "f":
        raw = bytes(payload).rjust(dtype.itemsize, b"\0")
        return np.full(shape, np.frombuffer(raw, f"<u{dtype.itemsize}")[0], f"u{dtype.itemsize}").view(dtype)
    value = int.from_bytes(payload, "little", signed=True)
    check_range(value, 0, dtype)
    return np.full(shape, value, dtype)


def estimate_bits(values: np.ndarray, symbols: Symbols | None) -> float | None:
    payload = encode(values, symbols)
    return None if payload is None else 8 * len(payload)
