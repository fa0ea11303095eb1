"""pared makes a trained PyTorch network smaller and faster, and proves it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pared.collector import paused

__version__ = "0.1.0"

_WHERE = {
    "Task": "pared.task",
    "Technique": "pared.technique",
    "Chain": "pared.technique",
    "Settings": "pared.technique",
    "Structure": "pared.technique",
    "Site": "pared.site",
    "compress": "pared.pipeline",
    "apply": "pared.place",
    "Result": "pared.pipeline",
    "save": "pared.artifact",
    "load": "pared.artifact",
    "export": "pared.runtimes",
    "run": "pared.runtimes",
    "measure": "pared.measurement",
    "ParedError": "pared.errors",
    "InputError": "pared.errors",
    "RecipeError": "pared.errors",
    "BudgetError": "pared.errors",
    "ArtifactError": "pared.errors",
    "TraceError": "pared.errors",
    "ExportError": "pared.errors",
}
_ROOMS = ("prune", "quantize", "factor", "structure", "distill")

__all__ = [
    "apply",
    "ArtifactError",
    "BudgetError",
    "Chain",
    "compress",
    "distill",
    "export",
    "ExportError",
    "factor",
    "InputError",
    "load",
    "measure",
    "ParedError",
    "prune",
    "quantize",
    "RecipeError",
    "Result",
    "run",
    "save",
    "Settings",
    "Site",
    "Structure",
    "structure",
    "Task",
    "Technique",
    "TraceError",
]

if TYPE_CHECKING:
    from pared import distill, factor, prune, quantize, structure
    from pared.artifact import load, save
    from pared.errors import ArtifactError, BudgetError, ExportError, InputError, ParedError, RecipeError, TraceError
    from pared.measurement import measure
    from pared.pipeline import Result, compress
    from pared.place import apply
    from pared.runtimes import export, run
    from pared.site import Site
    from pared.task import Task
    from pared.technique import Chain, Settings, Structure, Technique


def __getattr__(name: str) -> Any:
    with paused():
        if name in _WHERE:
            value = getattr(importlib.import_module(_WHERE[name]), name)
        elif name in _ROOMS:
            value = importlib.import_module(f"pared.{name}")
        else:
            raise AttributeError(f"module 'pared' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
