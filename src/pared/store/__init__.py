"""Entropy coders of the file: integers, bits and floats to as few bytes as can be, and back, bit for bit.

A coder is a module of this folder whose name does not start with an underscore, with three functions and a figure:

    encode(values, symbols) -> bytes | memoryview | None   None: does not apply; one element or more, native byte order
    decode(payload, shape, dtype) -> array           StoreError for bytes that it cannot have written
    estimate_bits(values, symbols) -> float | None   close to 8 * len(encode(values, symbols))
    DECODE_NS                                        time per element of a large tensor, in ns; only the order matters

A payload carries its own tables; shape, type and the coder's name are kept by the caller. A tensor without elements
has no bytes.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import numpy as np

from pared.errors import InputError, StoreError
from pared.store._symbols import Symbols

__all__ = ["decode", "encode", "estimate_bits", "names"]

_SLOW_NS = 20.0  # a coder that takes longer per element is slow
_SLOW_SAVES = 0.97  # and is the smallest only below this part of the best of the quick ones
_WITHIN = 1.05  # of the smallest quick one, for "fastest"
_SLACK = 1.01, 256.0  # ratio and bits: coders whose estimates are this close to the best are tried


class Coder(Protocol):
    DECODE_NS: float

    def encode(self, values: np.ndarray, symbols: Symbols | None) -> bytes | memoryview | None: ...

    def decode(self, payload: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray: ...

    def estimate_bits(self, values: np.ndarray, symbols: Symbols | None) -> float | None: ...


def names() -> list[str]:
    """All coders, in alphabetical order."""
    return sorted(_coders())


def encode(values: np.ndarray, prefer: str = "smallest") -> tuple[str, bytes | memoryview]:
    """The coder's name and the payload of a tensor of integers, bool or floats, of any shape.

    A payload may be the memory of values itself: write it before they change.

    prefer: "smallest", where a slow coder (context) has to save 3 %; "fastest", the one that decodes fastest of the
    quick coders within 5 % of the smallest of them; or a coder's name. Where the named coder does not apply (huffman
    on floats) the smallest of rans, planes and raw takes its place.
    """
    values = _native(values)
    if values.size == 0:
        return ("raw" if prefer in ("smallest", "fastest") else _known(prefer)), b""
    symbols = Symbols.of(values, judge=prefer in ("smallest", "fastest"))
    if prefer not in ("smallest", "fastest"):
        payload = _coders()[_known(prefer)].encode(values, symbols)
        if payload is not None:
            return prefer, payload
    if symbols is None:  # few coders apply, and trying them takes no longer than estimating what they would take
        written = _written(values, None, _candidates(prefer))
        name = _pick({name: len(payload) for name, payload in written.items()}, prefer)
        return name, written[name]
    estimates = _estimates(values, symbols, prefer)
    weighed = _weighed(estimates)
    limit = min(weighed.values()) * (_WITHIN if prefer == "fastest" else 1) * _SLACK[0] + _SLACK[1]
    written = _written(values, symbols, [name for name, bits in weighed.items() if bits <= limit])
    name = _pick({name: len(payload) for name, payload in written.items()}, prefer)
    return name, written[name]


def decode(coder: str, payload: bytes | memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The tensor, bit for bit. StoreError for a payload that is damaged, or belongs to another shape or type.

    Allocates a small multiple of what shape and dtype say, whatever the payload holds.
    """
    if coder not in _coders():
        raise StoreError(f"a coder must be one of {', '.join(names())}; got {coder!r}: the file is damaged or of a newer version")
    dtype = np.dtype(dtype)
    if not _is_storable(dtype):
        raise StoreError(f"a coded tensor must be of integers, bool or floats of at most 64 bits, got {dtype}")
    if math.prod(shape) == 0:
        if len(payload):
            raise StoreError(f"a tensor of shape {shape} must have no bytes, got {len(payload)}")
        return np.empty(shape, dtype)
    values = _coders()[coder].decode(memoryview(payload), tuple(shape), dtype.newbyteorder("="))
    return values.astype(dtype, copy=False)


def estimate_bits(values: np.ndarray, prefer: str = "smallest") -> int:
    """About 8 * len(encode(values, prefer)[1]), from histograms: within 1 % or 16 bytes."""
    values = _native(values)
    if values.size == 0:
        return 0
    estimates = _estimates(values, Symbols.of(values, judge=prefer in ("smallest", "fastest")), prefer)
    return math.ceil(estimates[_pick(estimates, prefer)])


@cache
def _coders() -> dict[str, Coder]:
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return {name: cast(Coder, import_module(f"{__name__}.{name}")) for name in modules if not name.startswith("_")}


def _known(prefer: str) -> str:
    if prefer not in _coders():
        raise InputError(f"store must be smallest, fastest or one of {', '.join(names())}; got {prefer!r}")
    return prefer


def _is_storable(dtype: np.dtype) -> bool:
    return dtype.kind in "iubf" and dtype.itemsize <= 8


def _native(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if not _is_storable(values.dtype):
        raise InputError(f"a stored tensor must be of integers, bool or floats of at most 64 bits, got {values.dtype}")
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _estimates(values: np.ndarray, symbols: Symbols | None, prefer: str) -> dict[str, float]:
    """Estimated bits of the coders that prefer allows and that apply to values."""
    if prefer not in ("smallest", "fastest"):
        bits = _coders()[_known(prefer)].estimate_bits(values, symbols)
        if bits is not None:
            return {prefer: bits}
    estimates = {name: _coders()[name].estimate_bits(values, symbols) for name in _candidates(prefer)}
    return {name: bits for name, bits in estimates.items() if bits is not None}


def _candidates(prefer: str) -> list[str]:
    """The coders to choose from; of those in place of a named one that does not apply, one always does."""
    if prefer == "smallest":
        return names()
    if prefer == "fastest":
        return [name for name in names() if not _is_slow(name)]
    return ["rans", "planes", "raw"]


def _written(values: np.ndarray, symbols: Symbols | None, allowed: list[str]) -> dict[str, bytes | memoryview]:
    payloads = {name: _coders()[name].encode(values, symbols) for name in allowed}
    return {name: payload for name, payload in payloads.items() if payload is not None}


def _pick(sizes: Mapping[str, float], prefer: str) -> str:
    """The coder that prefer asks for among those of sizes, estimated or real, in any unit."""
    weighed = _weighed(sizes)
    limit = _WITHIN * min(weighed.values()) if prefer == "fastest" else 0
    return min(weighed, key=lambda name: (max(weighed[name], limit), _coders()[name].DECODE_NS))


def _weighed(sizes: Mapping[str, float]) -> dict[str, float]:
    """Sizes, larger for slow coders."""
    return {name: size / _SLOW_SAVES if _is_slow(name) else size for name, size in sizes.items()}


def _is_slow(name: str) -> bool:
    return _coders()[name].DECODE_NS > _SLOW_NS
