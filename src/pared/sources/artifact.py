"""`FILE.pared`: a file of pared's own."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pared.errors import InputError
from pared.sources.contents import Facts, facts_of


def model(spec: str) -> tuple[nn.Module, Facts]:
    """The module in the file, which needs no source code."""
    import pared

    if not Path(spec).is_file():
        raise InputError(f"FILE.pared must name a file, found no {spec!r}; check the path")
    loaded = pared.load(spec)
    return loaded, facts_of(loaded, spec)
