"""Latency of several callables, interleaved, so that all of them see the same machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from pared.errors import InputError

Key = TypeVar("Key")
MIN_RUNS = 5
FASTER = 1.05
"""Ratios of medians closer to 1 than this are not told from noise."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: median, 10th and 90th percentile of n runs."""

    median: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, runs_ms: Sequence[float]) -> Latency:
        import numpy as np

        p10, median, p90 = np.quantile(runs_ms, [0.1, 0.5, 0.9])
        return cls(float(median), float(p10), float(p90), len(runs_ms))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def compare(
    callables: Mapping[Key, Callable[[], Any]],
    n_runs: int = 100,
    n_warmup: int = 3,
    seconds: float = 10.0,
    threads: int | None = None,
) -> dict[Key, Latency]:
    """Time the callables in turn (A B A B …) after a warm-up.

    Args:
        callables: what to time, by name; each must return only when its work is done.
        n_runs: timed calls of each.
        n_warmup: calls of each beforehand, not timed.
        seconds: stop early after so long, warm-up included, but not before each was timed MIN_RUNS times.
        threads: of torch during the measurement; other runtimes take theirs when their session is made.

    Raises:
        InputError: nothing to time, or counts below one.
    """
    if not callables:
        raise InputError("latency needs at least one callable, got none")
    if n_runs < 1 or n_warmup < 0:
        raise InputError(f"n_runs must be at least 1 and n_warmup at least 0, got {n_runs} and {n_warmup}")
    runs: dict[Key, list[float]] = {name: [] for name in callables}
    end = time.perf_counter() + seconds
    with torch_threads(threads), _no_garbage_collection():
        for done in range(n_warmup):
            if done and time.perf_counter() > end - 0.7 * seconds:
                break
            for function in callables.values():
                function()
        for done in range(n_runs):
            if done >= MIN_RUNS and time.perf_counter() > end:
                break
            for name, function in callables.items():
                start = time.perf_counter_ns()
                function()
                runs[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: Latency.of(times) for name, times in runs.items()}


def is_faster(before_ms: float, after_ms: float) -> bool:
    """Whether a ratio of median latencies is a gain that can be told from noise."""
    return before_ms / after_ms >= FASTER


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """So many threads of torch inside, the number of before afterwards; None leaves it."""
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
