"""`FILE.pt2`: a program that torch.export saved. torch's loader trusts the file; load only files that you trust."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import fx, nn

from pared.errors import InputError
from pared.sources.contents import Facts


def model(spec: str) -> tuple[nn.Module, Facts]:
    """The program as a module, with the example that it was exported with. It stays in the mode it was exported in."""
    path = Path(spec)
    if not path.is_file():
        raise InputError(f"FILE.pt2 must name a file, found no {spec!r}; check the path")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{spec} must be a program saved by torch.export.save, it is no zip archive; save it again")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch promises no particular class for a file that it cannot read
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"{spec} must be a program saved by torch.export.save: {reason}") from error
    unlifted = program.module()
    args, kwargs = program.example_inputs or (None, {})
    # torch's own module refuses train() and eval(); one rebuilt from its graph takes them, and neither changes it.
    return fx.GraphModule(unlifted, unlifted.graph), Facts(spec, example=args, example_kwargs=dict(kwargs))
