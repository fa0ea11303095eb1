"""What result.json holds and the report shows: the keys of docs/report.md."""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pared
from pared import artifact
from pared.budget import damage
from pared.budget.allocate import curve
from pared.budget.options import N_MEASURED
from pared.job import Job
from pared.measurement import Measurement
from pared.search import Search, margin
from pared.task import batch_size
from pared.technique import value_at
from pared.trials import Trial

MEASURED, MEASURED_MACS = (8, 48), 1e13
"""How many options are measured one by one at the end, at least and at most, and the multiply-adds that may take."""


def describe(
    job: Job, search: Search, best: Trial, met: bool, before: Measurement, after: Measurement
) -> dict[str, Any]:
    """Everything there is to say about a finished run, as JSON values.

    Args:
        best: the trial that is kept.
        met: whether the whole budget is met.
        before, after: measurements of the original and of the compressed model.
    """
    measured = after.to_json()
    sources = {"n_train": job.task.train, "n_val": job.task.val, "n_test": job.task.test}
    found = {"pared": pared.__version__, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    return {
        **found,
        "model": {
            "name": type(job.original).__name__,
            "class": f"{type(job.original).__module__}.{type(job.original).__qualname__}",
            "parameters": sum(p.numel() for p in job.original.parameters()),
        },
        "data": {
            **{name: count(loader) for name, loader in sources.items()},
            "n_groups": after.metric.n_groups,
            "calibration": job.task.calibration_source,
        },
        "budget": job.asked,
        "seed": job.seed,
        "before": before.to_json(),
        "after": {key: value for key, value in measured.items() if key not in ("drop_pp", "agreement")},
        "drop_pp": measured.get("drop_pp"),
        "agreement": measured.get("agreement"),
        "acceptance": _acceptance(best, job),
        "edits": _edit_rows(best, job.store),
        "refusals": [vars(refusal) for refusal in search.refusals],
        "untouched": _untouched(best, job, search),
        "sensitivity": [
            {
                "path": option.site.path,
                "technique": str(option.technique),
                "stored_bits": option.cost.stored_bits,
                "damage": option.damage,
            }
            for option in search.first_options
            if option.technique is not None
        ],
        "predicted_measured": _predicted_measured(best, job, after.macs),
        "curve": [{"bytes": bits / 8, "damage": damage} for bits, damage in _curve(best)],
        "trials": [trial.row(trial is best) for trial in search.trials.done],
        "training": best.history,
        "recipe": job.resolved(best.levels),
        "command": job.command,
        "seconds": {**job.seconds, "total": time.perf_counter() - job.started},
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "warnings": job.warnings,
        "met": met,
    }


def _curve(best: Trial) -> list[tuple[float, float]]:
    """Size against damage of what the last step could do; what groups of channels cost does not add up to one."""
    return curve(best.way.options) if best.way.graph is None else []


def _acceptance(best: Trial, job: Job) -> dict[str, Any] | None:
    """How the drop on validation data was held against the accepted one, if there is one."""
    limit, drop = job.target.max_drop, best.drop
    if limit is None:
        return None
    return {
        "max_drop": limit,
        "drop": drop.value,
        "standard_error": drop.standard_error,
        "margin": margin(drop, limit),
        "n": drop.n,
        "n_groups": drop.n_groups,
        "unit": drop.unit,
    }


def _edit_rows(best: Trial, store: str) -> list[dict[str, Any]]:
    sizes = _coded_bytes(best.model, store)
    chosen = {option.site.path: option for option in best.chosen}
    rows = []
    for edit in best.edits:
        option = chosen.get(edit.paths[0])
        value = value_at(option.site.root, option.site.covers[0]) if option is not None and option.site.covers else None
        shape = list(value.shape) if value is not None else []
        numel = math.prod(shape) if shape else 0
        coded = sizes(edit.paths[0], edit.technique.kind)
        rows.append(
            {
                "paths": list(edit.paths),
                "technique": str(edit.technique),
                "settings": edit.technique.model_dump(mode="json"),
                "shape": shape,
                "bits_per_weight": 8 * coded / numel if numel else None,
                "bytes_before": numel * value.element_size() if value is not None else 0,
                "bytes_after": coded,
                "damage_predicted": option.damage if option is not None else None,
            }
        )
    return rows


def _untouched(best: Trial, job: Job, search: Search) -> list[dict[str, Any]]:
    covered = {path for option in best.chosen for path in option.site.covers}
    reasons = {refusal.path: refusal.reason for refusal in search.refusals}
    rows = []
    for path, tensor in [*job.base.named_parameters(), *job.base.named_buffers()]:
        if path not in covered:
            reason = reasons.get(path) or (
                "left as it is by the plan" if tensor.is_floating_point() else "not a floating-point tensor"
            )
            rows.append({"path": path, "bytes": tensor.numel() * tensor.element_size(), "reason": reason})
    return rows


def _predicted_measured(best: Trial, job: Job, macs: float) -> list[dict[str, Any]]:
    """The options that harm most, each measured by itself: fewer of a network that takes many multiply-adds an example."""
    if best.way.graph is not None:  # what layers make up for is in the prediction, but not in a cut alone
        return []
    n_examples = damage.kept(best.way.model, job.task, N_MEASURED)
    n_options = int(min(max(MEASURED_MACS / (n_examples * max(macs, 1.0)), MEASURED[0]), MEASURED[1]))
    chosen = sorted(best.plan.options, key=lambda option: -option.damage)[:n_options]
    batches = damage.held_out(job.task, n_examples)
    model = best.way.model
    references = damage.references(model, job.task, batches)
    rows = []
    for number, option in enumerate(chosen):
        job.progress({"doing": "measuring layers one by one", "done": number, "total": len(chosen)})
        if option.technique is None:
            continue
        site = replace(option.site, root=model)
        parts = option.technique.solve(site, best.way.statistics)[1]
        rows.append(
            {
                "path": option.site.path,
                "technique": str(option.technique),
                "predicted": option.damage,
                "measured": damage.measure(model, site, parts, job.task, batches, references),
            }
        )
    return rows


def _coded_bytes(model: nn.Module, store: str) -> Callable[[str, str | None], int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pared"
        artifact.save(model, path, store=store, program=False)
        rows = artifact.inspect(path)["tensors"]

    def coded(path: str, kind: str | None) -> int:
        return sum(row["bytes"] for row in rows if row["path"] == path or row["path"].startswith(f"{path}."))

    return coded


def count(loader: Any) -> int | None:
    """Examples of a loader, None where it cannot say."""
    if loader is None:
        return None
    if hasattr(loader, "dataset") and hasattr(loader.dataset, "__len__"):
        return len(loader.dataset)
    if hasattr(loader, "n_examples"):
        return int(loader.n_examples)
    return sum(batch_size(batch) for batch in loader) if isinstance(loader, list) else None
