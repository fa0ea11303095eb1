"""Bytes of a model and of a file; the number of parameters."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.errors import InputError
from pared.site import Decoded


def original_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers at their stored types; what is shared counts once."""
    by_storage: dict[int, dict[int, Tensor]] = {}
    for module in model.modules():
        skipped = module._non_persistent_buffers_set
        entries = [*module._parameters.items(), *((n, b) for n, b in module._buffers.items() if n not in skipped)]
        for _, tensor in entries:
            if tensor is not None:
                by_storage.setdefault(tensor.untyped_storage()._cdata, {})[id(tensor)] = tensor
    total = 0
    for views in by_storage.values():
        # several views of one storage count at most the storage; one view of a larger storage counts what it shows
        shown = sum(tensor.numel() * tensor.element_size() for tensor in views.values())
        total += min(shown, next(iter(views.values())).untyped_storage().nbytes())
    return total


def file_bytes(path: str | Path) -> int:
    """Bytes of a file on disk."""
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read: {error.strerror}; check the path") from error


def parameters(model: nn.Module) -> int:
    """The number of weights that the model computes with: coded tensors count as decoded, shared ones once."""
    coded = [module for module in model.modules() if isinstance(module, Decoded)]
    inside = {id(p) for module in coded for p in module.parameters()}
    total = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    counted: set[int] = set()
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr,operator]
            decoder = chain[0]
            if isinstance(decoder, Decoded) and id(decoder) not in counted and "original" in chain._parameters:
                counted.add(id(decoder))
                total += getattr(module, name).numel()
    return total
