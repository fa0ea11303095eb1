"""What a model carries along so that it can be saved: its edits, an example call, the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from pared.technique import Edit

if TYPE_CHECKING:
    from pared.graph import Program

_KEY = "_pared"


@dataclass
class Record:
    """What was done to a model, and how it is called.

    Args:
        edits: replacements in the order in which they were made.
        example: positional and keyword arguments of one call, from which the program is traced.
        recipe: the recipe with every choice resolved, as YAML.
        provenance: short facts for the file, as JSON can hold them; no dates, so that equal models make equal files.
        dynamic: free axes of the inputs beside the batch, as `pared.graph.trace` takes them.
        program: of the file that the model was loaded from, or the one left by the removal of channels; saved while it still
            agrees with the model, which is then not traced.
    """

    edits: list[Edit] = field(default_factory=list)
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    recipe: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    dynamic: Mapping[Any, Iterable[int]] | None = None
    program: Program | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        return replace(self, edits=list(self.edits), provenance=dict(self.provenance))


def record_of(model: nn.Module) -> Record | None:
    """The record that the model carries, if any."""
    return model.__dict__.get(_KEY)


def attach_(model: nn.Module, record: Record) -> None:
    """Let the model carry this record; deep copies of the model carry a copy."""
    model.__dict__[_KEY] = record
