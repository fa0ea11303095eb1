"""A model in the form that runtimes execute: coded weights as their techniques lower them."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from pared.artifact.skeleton import links
from pared.graph.module import ProgramModule
from pared.record import record_of
from pared.site import Decoded, plain


def lowered(model: nn.Module) -> nn.Module:
    """A copy whose coded weights are written in the operators of `pared.lowered`, or dense where a technique has no
    such form."""
    record = record_of(model)
    root, prefix = (model.root, "root.") if isinstance(model, ProgramModule) else (model, "")
    coded: dict[str, nn.Module] = {}
    for technique, paths, _ in links(record.edits if record is not None else ()):
        parent, _, name = paths[0].rpartition(".")
        owner = root.get_submodule(parent)
        if not parametrize.is_parametrized(owner, name):
            continue
        decoded = cast(Decoded, owner.parametrizations[name][0])  # type: ignore[index]
        module = technique.lower(decoded.decoder)
        if module is not None:
            coded.update({f"{prefix}{path}": module for path in paths})
    return plain(model, coded).eval()
