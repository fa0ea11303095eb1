"""Budgets as people write them: "20x", "5%", "1.2MB", "3x@onnxruntime"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pared.errors import InputError

_UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Target:
    """What compression must reach; None where nothing is asked.

    Args:
        file_bytes: bytes of the whole file on disk.
        macs: multiply-adds per example.
        speedup: latency of the original over that of the result in `runtime`.
        max_drop: accepted drop of the metric: points for scores in [0, 1], percent of the original's mean for others.
    """

    file_bytes: float | None = None
    macs: float | None = None
    speedup: float | None = None
    runtime: str = "torch"
    max_drop: float | None = None

    @property
    def is_empty(self) -> bool:
        return self.file_bytes is None and self.macs is None and self.speedup is None and self.max_drop is None


def parse_size(text: str | float | int, original_bytes: float) -> float:
    """Bytes from "20x" (a twentieth), "5%" or "1.2MB" (MB = 10**6 bytes); a bare number is bytes."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return _positive("size", text, float(text))
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(x|%|B|kB|KB|MB|GB)?\s*", str(text))
    if match is None or (number := _number(match[1])) is None or number <= 0:
        raise InputError(f'size must be like "20x", "5%" or "1.2MB", got "{text}"')
    return _relative(number, match[2], original_bytes, _UNITS, "size", text)


def parse_macs(text: str | float | int, original_macs: float) -> float:
    """MACs per example from "2x" (half), "50%" or "300M"; a bare number is MACs."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return _positive("macs", text, float(text))
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(x|%|k|K|M|G|T)?\s*", str(text))
    if match is None or (number := _number(match[1])) is None or number <= 0:
        raise InputError(f'macs must be like "2x", "50%" or "300M", got "{text}"')
    return _relative(number, match[2], original_macs, _SCALES, "macs", text)


def parse_latency(text: str) -> tuple[float, str]:
    """(speed-up, runtime) from "3x" or "3x@onnxruntime"."""
    match = re.fullmatch(r"\s*([0-9.]+)x(?:@([a-z]+))?\s*", str(text))
    if match is None or (number := _number(match[1])) is None or number <= 0:
        raise InputError(f'latency must be like "3x" or "3x@onnxruntime", got "{text}"')
    return number, match[2] or "torch"


def parse_drop(value: float | str) -> float:
    try:
        drop = float(value)
    except (ValueError, TypeError):
        drop = float("nan")
    if not 0 <= drop <= 100:
        raise InputError(f"max_drop must be a number of points between 0 and 100, got {value!r}")
    return drop


def _relative(
    number: float, unit: str | None, original: float, units: dict[str, float], name: str, text: object
) -> float:
    if unit == "x":
        if number < 1:
            raise InputError(f'{name} must be 1x or more, got "{text}"; "2x" means half')
        return original / number
    if unit == "%":
        return original * number / 100
    return number * units[(unit or ("B" if "B" in units else "")).upper()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _positive(name: str, given: object, number: float) -> float:
    if not number > 0:
        raise InputError(f"{name} must be positive, got {given!r}")
    return number
