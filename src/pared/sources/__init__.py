"""Models and data by name.

A source is a file in this folder with a function `model` or `data`; it is found by its name.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from torch import nn

from pared.errors import InputError
from pared.sources.contents import Data, Facts, ImageFormat, facts_of
from pared.sources.loader import ArrayLoader

__all__ = ["ArrayLoader", "Data", "Facts", "ImageFormat", "data", "facts_of", "model"]

_MODEL_FORMS = "timm:NAME, hf:NAME, FILE.py:FUNCTION, FILE.pt2 or FILE.pared"
_DATA_FORMS = (
    "digits, mnist-5k, mnist:DIR, fashion-mnist[:DIR], photographs, folder:DIR, npz:FILE, text:FILE, hf:NAME or FILE.py:FUNCTION"
)
_BY_SUFFIX = {".py": "python_file", ".pt2": "exported", ".pared": "artifact"}
_NOT_NAMED = {*_BY_SUFFIX.values(), "contents", "idx", "images", "loader", "torchvision_schemas"}


def model(spec: str) -> tuple[nn.Module, Facts]:
    """The model that `spec` names, in evaluation mode, and what is known of its inputs.

    Args:
        spec: `timm:NAME` and `timm:NAME?pretrained`, `hf:NAME`, `FILE.py:FUNCTION`, `FILE.pt2`, `FILE.pared`.

    Raises:
        InputError: nothing of that name, or it does not give a module.
        MissingExtra: the library that knows it is not installed.
    """
    source, rest = _source(spec, "model", _MODEL_FORMS)
    network, facts = source.model(rest)
    return network.eval(), facts


def data(
    spec: str,
    model: nn.Module | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    facts: Facts | None = None,
) -> Data:
    """The data that `spec` names, split into train, validation and test.

    Args:
        spec: `digits`, `mnist-5k`, `mnist:DIR`, `fashion-mnist[:DIR]`, `photographs`, `folder:DIR`, `npz:FILE`, `text:FILE`,
            `hf:NAME` or `FILE.py:FUNCTION`.
        model: the model they are for; gives the size and normalisation of images, and the tokenizer.
        batch_size: examples per batch; every source has its own default.
        seed: order of the training batches. The split does not depend on it.
        facts: what `sources.model` told; default: what the module itself tells.

    Raises:
        InputError: nothing of that name, or files that are missing or not as they must be.
        MissingExtra: the library that reads it is not installed.
    """
    source, rest = _source(spec, "data", _DATA_FORMS)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if facts is None:
        facts = Facts() if model is None else facts_of(model)
    return source.data(rest, facts, batch_size, seed)


def _source(spec: str, what: str, forms: str) -> tuple[ModuleType, str]:
    """The module that has the function `what` for `spec`, and what to ask it for."""
    path, colon, _ = spec.rpartition(":")
    suffix = ".py" if colon and path.endswith(".py") else Path(spec).suffix
    if suffix == ".py" and not path.endswith(".py"):
        raise InputError(f"{spec} must name the function to call, as in {spec}:build")
    prefix, _, rest = spec.partition(":")
    named = {
        module.name.replace("_", "-"): module.name
        for module in pkgutil.iter_modules(__path__)
        if module.name not in _NOT_NAMED
    }
    if prefix in named:
        name = named[prefix]
    elif suffix in _BY_SUFFIX:
        name, rest = _BY_SUFFIX[suffix], spec
    else:
        near = difflib.get_close_matches(prefix, named, n=1)
        raise InputError(f"{what} must be {forms}, got {spec!r}" + (f"; did you mean {near[0]}?" if near else ""))
    source = importlib.import_module(f"{__name__}.{name}")
    if not hasattr(source, what):
        raise InputError(f"{what} must be {forms}, got {spec!r}; {prefix} names no {what}")
    return source, rest
