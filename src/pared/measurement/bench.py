"""Latency of models and files against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pared.errors import InputError
from pared.measurement.latency import compare
from pared.measurement.size import file_bytes, original_bytes


def bench(
    targets: Sequence[str],
    runtimes: Sequence[str] = ("torch",),
    batch_size: int = 1,
    threads: int | None = None,
    seconds: float = 10.0,
    input_shape: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """One row per target and runtime; all of them are timed in turn, in one run.

    Args:
        targets: models as the command line names them, or .pared files; the first one is the baseline.
        input_shape: of one example, where the model does not tell; otherwise what it was saved or is known with.

    Returns:
        Rows with target, runtime, bytes (of the file, or of the weights), batch_size, median, p10, p90 (milliseconds
        per call), n, ratio (the first target's median in that runtime over this one's), and whether it is the fastest.
    """
    from pared import sources
    from pared.runtimes import session

    if not targets:
        raise InputError("bench needs at least one model or file, got none")
    models: dict[str, tuple[nn.Module, Any, int]] = {}
    for target in targets:
        if target in models:
            raise InputError(f"bench times every model once, got {target} twice; leave one out")
        model, facts = sources.model(target)
        size = file_bytes(target) if Path(target).suffix == ".pared" else original_bytes(model)
        models[target] = model, _example(target, model, facts, batch_size, input_shape), size
    sessions = {
        (target, runtime): session(model, runtime, example, threads=threads)
        for runtime in runtimes
        for target, (model, example, _) in models.items()
    }
    timed = compare(sessions, n_runs=1000, seconds=seconds * len(runtimes), threads=threads)
    quickest = min(timed, key=lambda pair: timed[pair].median)
    return [
        {
            "target": target,
            "runtime": runtime,
            "bytes": models[target][2],
            "batch_size": batch_size,
            **latency.to_json(),
            "ratio": timed[targets[0], runtime].median / latency.median,
            "fastest": (target, runtime) == quickest,
        }
        for (target, runtime), latency in timed.items()
    ]


def _example(target: str, model: nn.Module, facts: Any, n: int, shape: Sequence[int] | None) -> Any:
    """Positional and keyword arguments of a call with n examples."""
    from pared.runtimes.example import batch_size_of, example_of, resized

    generator = torch.Generator().manual_seed(0)
    if shape is not None:
        return (torch.randn(n, *shape, generator=generator),), {}
    if facts.example is not None:
        call = facts.example, facts.example_kwargs
        return resized(call, batch_size_of(call), n)
    if facts.image is not None:
        image = facts.image
        return (torch.randn(n, image.channels, image.height, image.width, generator=generator),), {}
    try:
        return example_of(model, n)
    except InputError as error:
        raise InputError(
            f'the inputs of {target} are not known; give their shape, such as --input-size "3,224,224"'
        ) from error
