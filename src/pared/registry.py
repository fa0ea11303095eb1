"""Techniques by name: found by file, or through the entry-point group `pared.techniques` of other packages."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

from pared.errors import RecipeError
from pared.settings import allowed
from pared.technique import Technique

FAMILIES = ("prune", "quantize", "factor", "structure", "redesign", "distill", "dynamic")


@cache
def names() -> tuple[str, ...]:
    """The names of all techniques, without importing them."""
    found = set()
    for family in FAMILIES:
        if _is_module(f"pared.{family}"):
            package = importlib.import_module(f"pared.{family}")
            found |= {f"{family}.{entry.name}" for entry in pkgutil.iter_modules(package.__path__)}
    found |= {entry.name for entry in metadata.entry_points(group="pared.techniques")}
    return tuple(sorted(found))


@cache
def get(name: str) -> type[Technique]:
    """The technique class of a name such as `quantize.integer`."""
    family, _, own = name.partition(".")
    named = own.isidentifier() and not own.startswith("_")
    if family in FAMILIES and named and _is_module(f"pared.{family}") and _is_module(f"pared.{name}"):
        return technique_in(f"pared.{name}")
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names())}"
        raise RecipeError(f"there is no technique {name}; {hint}")
    entry = next(entry for entry in metadata.entry_points(group="pared.techniques") if entry.name == name)
    return _of_another_package(entry)


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _of_another_package(entry: metadata.EntryPoint) -> type[Technique]:
    found = entry.load()
    if not (inspect.isclass(found) and issubclass(found, Technique)):
        raise RecipeError(f"the entry point {entry.name} must name a technique class, but {entry.value} is none")
    own = ".".join(found.__module__.split(".")[-2:])
    if own != entry.name:
        raise RecipeError(f"the entry point of {entry.value} must be called {own}, like its file, but it is {entry.name}")
    return found


def technique_in(module_name: str) -> type[Technique]:
    """The one technique class that a technique's file defines; its name is the file's: low_rank.py holds LowRank."""
    module = importlib.import_module(module_name)
    wanted = "".join(part.capitalize() for part in module_name.rpartition(".")[2].split("_"))
    found = getattr(module, wanted, None)
    if not (inspect.isclass(found) and issubclass(found, Technique)):
        raise RecipeError(f"{module_name.replace('.', '/')}.py must define the technique class {wanted}; it does not")
    return found


def describe(name: str) -> dict[str, Any]:
    """A technique in words and its settings, as JSON values: what lists, help and docs are made from."""
    cls = get(name)
    settings = []
    for key, info in cls.model_fields.items():
        annotation = info.annotation
        settings.append(
            {
                "name": key,
                "type": annotation.__name__ if isinstance(annotation, type) else "",
                "range": allowed(annotation, info.metadata),
                "default": None if info.is_required() else info.default,
                "help": info.description or "",
            }
        )
    does = [
        word
        for word, method in (("replaces", "build"), ("shapes training", "loss"), ("prepares", "prepare"))
        if getattr(cls, method) is not getattr(Technique, method)
    ]
    text = inspect.getdoc(cls) or ""
    return {
        "name": name,
        "summary": text.split("\n\n")[0].replace("\n", " "),
        "does": does,
        "paper": cls.paper,
        "settings": settings,
        "text": text,
    }


def family(package: str) -> tuple[Callable[[str], type[Technique]], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a family package: `prune.Magnitude` finds prune/magnitude.py when it is asked for."""
    path = importlib.import_module(package).__path__

    def classes() -> dict[str, str]:
        files = [entry.name for entry in pkgutil.iter_modules(path)]
        return {"".join(part.capitalize() for part in name.split("_")): f"{package}.{name}" for name in files}

    def find(attribute: str) -> type[Technique]:
        found = classes()
        if attribute not in found:
            raise AttributeError(f"{package} has no technique {attribute}; it has {', '.join(sorted(found))}")
        return technique_in(found[attribute])

    return find, lambda: sorted(classes())
