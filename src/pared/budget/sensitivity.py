"""Which layer hurts, with which technique."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pared.budget.calibrate import gather
from pared.budget.damage import held_out, measure, references
from pared.budget.options import N_MEASURED, candidates
from pared.budget.probe import correct_
from pared.place import Refusal
from pared.site import plain
from pared.statistics import Statistics
from pared.task import Task
from pared.technique import Technique


def sensitivity(
    model: nn.Module,
    task: Task,
    techniques: Sequence[Technique],
    *,
    statistics: Statistics | None = None,
    n_examples: int = N_MEASURED,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per site and option: site, technique, stored_bits, predicted and measured damage.

    Args:
        model: trained, in eval mode.
        techniques: with their settings; every one is tried wherever it acts.
        statistics: gathered here when None.
        n_examples: validation examples on which the divergence from the original's outputs is measured.
    """
    if statistics is None:
        bare = plain(model)
        statistics = gather(bare, task, progress=progress)
        correct_(bare, task, statistics, progress)
    batches = held_out(task, n_examples)
    originals = references(model, task, batches)
    refusals: dict[tuple[str, str, str], Refusal] = {}
    rows = []
    for candidate in candidates(model, techniques, statistics, task, refusals, progress=progress, measured=n_examples):
        option = candidate.option
        if option.technique is None:
            continue
        rows.append(
            {
                "path": option.site.path,
                "technique": str(option.technique),
                "stored_bits": option.cost.stored_bits,
                "predicted": option.damage,
                "measured": measure(model, option.site, candidate.parts, task, batches, originals),
            }
        )
    return rows
