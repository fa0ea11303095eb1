"""What a model costs and how good it is, measured: bytes, multiply-adds, activation memory, latency, quality."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.errors import InputError
from pared.measurement.bench import bench
from pared.measurement.compute import Compute, compute, macs
from pared.measurement.latency import Latency, compare, is_faster, torch_threads
from pared.measurement.mode import evaluating
from pared.measurement.quality import Drop, Quality, agreement, drop, evaluate
from pared.measurement.size import file_bytes, original_bytes, parameters
from pared.record import record_of
from pared.task import Batch, Task, batch_size, call_of, to_device_of

__all__ = [
    "Compute", "Drop", "Latency", "Measurement", "Quality", "agreement", "bench", "compare", "compute", "drop",
    "evaluate", "evaluating", "example_batch", "file_bytes", "is_faster", "latencies", "macs", "measure",
    "original_bytes", "parameters", "torch_threads",
]  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """What one model costs and how good it is; `to_json` gives the entries of result.json.

    Args:
        file_bytes: of the file, for a model in compressed form; of parameters and persistent buffers otherwise.
        parameters: weights that the model computes with.
        macs: multiply-adds per example.
        peak_activation_bytes: of one call with `batch_size` examples.
        latency_ms: of one call, by runtime.
        metric: the task's score with its interval.
        drop_pp: against the original, if there was one.
        agreement: of the outputs with the original's.
        on: the part of the data that quality was measured on.
        against: the original's own measurement, its latency interleaved with this one's.
    """

    file_bytes: int
    parameters: int
    macs: int
    peak_activation_bytes: int
    metric: Quality
    on: Literal["test", "val"]
    batch_size: int = 1
    latency_ms: dict[str, Latency] = field(default_factory=dict)
    drop_pp: Drop | None = None
    agreement: Quality | None = None
    against: Measurement | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "file_bytes": self.file_bytes,
            "parameters": self.parameters,
            "macs": self.macs,
            "peak_activation_bytes": self.peak_activation_bytes,
            "batch_size": self.batch_size,
            "latency_ms": {runtime: latency.to_json() for runtime, latency in self.latency_ms.items()},
            "metric": self.metric.to_json(),
        }
        if self.drop_pp is not None:
            found["drop_pp"] = {**self.drop_pp.to_json(), "on": self.on}
        if self.agreement is not None:
            found["agreement"] = self.agreement.to_json()
        return found


def measure(
    model: nn.Module,
    task: Task,
    against: nn.Module | None = None,
    runtimes: Sequence[str] = ("torch",),
    batch_size: int = 1,
    threads: int | None = None,
    *,
    on: Literal["test", "val"] = "test",
    file: str | Path | None = None,
    seconds: float = 10.0,
) -> Measurement:
    """Measure a model, and how much worse it is than the one that it was made from.

    Args:
        against: the original model; its latency is measured in turn with the model's.
        runtimes: where latency is measured: "torch", "compile", "onnxruntime", "openvino"; none for ().
        batch_size: examples per call for latency and activation memory.
        threads: of the runtimes; default: their own choice.
        on: "test", which falls back to val where the task has none, or "val".
        file: the model's file, if it is on disk already.
        seconds: time for the latency of each runtime.

    Raises:
        InputError: a task that does not fit the model, an unknown runtime, a score that is not finite.
        ExportError: a model that a runtime cannot express.
        MissingExtra: a runtime that is not installed.
    """
    part: Literal["test", "val"] = "test" if on == "test" and task.test is not None else "val"
    loader: Iterable[Batch] = task.test if part == "test" and task.test is not None else task.val
    timed = latencies(
        {"model": model} | ({} if against is None else {"against": against}),
        task, runtimes, batch_size=batch_size, threads=threads, seconds=seconds,
    )  # fmt: skip
    original = None
    if against is not None:
        original = _measurement(against, task, against, loader, part, batch_size, timed["against"], None)
    found = _measurement(model, task, against, loader, part, batch_size, timed["model"], file)
    if against is None or original is None:
        return found
    return replace(
        found,
        drop_pp=drop(original.metric, found.metric),
        agreement=agreement(model, against, task, loader),
        against=original,
    )


def _measurement(
    model: nn.Module,
    task: Task,
    reference: nn.Module | None,
    loader: Iterable[Batch],
    part: Literal["test", "val"],
    n: int,
    latency_ms: dict[str, Latency],
    file: str | Path | None,
) -> Measurement:
    batch = example_batch(task, n)
    counted = compute(model, call=lambda network: task.outputs(network, batch))
    return Measurement(
        file_bytes=_bytes_of(model, file),
        parameters=parameters(model),
        macs=round(counted.macs / n),
        peak_activation_bytes=counted.peak_activation_bytes,
        metric=evaluate(model, task, loader, reference),
        on=part,
        batch_size=n,
        latency_ms=latency_ms,
    )


def latencies(
    models: dict[str, nn.Module],
    task: Task,
    runtimes: Sequence[str] = ("torch",),
    batch_size: int = 1,
    threads: int | None = None,
    n_runs: int = 100,
    seconds: float = 10.0,
) -> dict[str, dict[str, Latency]]:
    """Latency of one call by model and runtime; in each runtime the models are timed in turn."""
    from pared.runtimes import session

    batch = example_batch(task, batch_size)
    found: dict[str, dict[str, Latency]] = {name: {} for name in models}
    for runtime in runtimes:
        sessions = {}
        for name, model in models.items():
            example = call_of(to_device_of(model, batch))
            sessions[name] = session(model, runtime, example, threads=threads, call=_call(task, batch))
        timed = compare(sessions, n_runs=n_runs, seconds=seconds, threads=threads)
        for name, latency in timed.items():
            found[name][runtime] = latency
    return found


def _call(task: Task, batch: Batch) -> Callable[[nn.Module], Any] | None:
    """How the task calls a model, where that is not `model(*inputs)`."""
    return None if task.forward is None else lambda model: task.outputs(model, batch)


def example_batch(task: Task, n: int) -> Batch:
    """A batch of n examples: those of the first validation batch, from the start again where it has fewer."""
    if n < 1:
        raise InputError(f"batch_size must be at least 1, got {n}")
    batch = next(iter(task.val), None)
    if batch is None:
        raise InputError("Task.val must hold at least one batch, got none; check the data it is made from")
    size = batch_size(batch)

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != size:
            return leaf
        return leaf[[i % size for i in range(n)]]

    return pytree.tree_map(resized, batch)


def _bytes_of(model: nn.Module, file: str | Path | None) -> int:
    if file is not None:
        return file_bytes(file)
    if record_of(model) is None:
        return original_bytes(model)
    from pared import artifact

    with tempfile.TemporaryDirectory(prefix="pared-") as folder:
        path = Path(folder) / "model.pared"
        artifact.save(model, path)
        return file_bytes(path)
