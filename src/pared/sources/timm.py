"""`timm:NAME`: an image model of timm, with random weights; `timm:NAME?pretrained` fetches the trained ones."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from pared.errors import InputError, MissingExtra
from pared.sources.contents import Facts, facts_of
from pared.sources.torchvision_schemas import declare_missing_schemas


def model(name: str) -> tuple[nn.Module, Facts]:
    """Raises InputError for a name that timm does not know, or weights that cannot be fetched."""
    declare_missing_schemas()
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "timm", "models") from error

    name, mark, option = name.partition("?")
    if mark and option != "pretrained":
        raise InputError(f"timm:NAME may end in ?pretrained, got ?{option}")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise InputError(f"timm knows no model {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        network = timm.create_model(name, pretrained=bool(mark))
    except Exception as error:  # the hub's client raises classes of several libraries
        if not mark:
            raise
        lines = str(error).strip().splitlines()
        raise InputError(
            f"the weights of timm:{name} must be reachable: {lines[0] if lines else type(error).__name__}; "
            f"connect to the hub, or leave out ?pretrained for random weights"
        ) from error
    facts = facts_of(network, f"timm:{name}")
    if facts.image is None:
        return network, facts
    example = torch.randn(
        2, facts.image.channels, facts.image.height, facts.image.width, generator=torch.Generator().manual_seed(0)
    )
    return network, Facts(facts.spec, facts.image, example=(example,))
