"""The bytes of the tensor as they are, little-endian."""

from __future__ import annotations

import math

import numpy as np

from pared.store._bits import damaged
from pared.store._symbols import Symbols

DECODE_NS = 0.1


def encode(values: np.ndarray, symbols: Symbols | None) -> memoryview:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data


def decode(payload: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    n_bytes = math.prod(shape) * dtype.itemsize
    if len(payload) != n_bytes:
        raise damaged(f"a raw tensor of shape {shape} and type {dtype} must have {n_bytes} bytes, got {len(payload)}")
    if dtype == np.bool_ and np.frombuffer(payload, np.uint8).max(initial=0) > 1:
        raise damaged("a raw bool tensor must hold zeros and ones only")
    return np.frombuffer(payload, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def estimate_bits(values: np.ndarray, symbols: Symbols | None) -> float:
    return 8 * values.nbytes
