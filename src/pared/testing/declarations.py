"""What a technique says of itself: capabilities, paper, settings and their ranges."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from pared.errors import RecipeError
from pared.recipe import load
from pared.technique import Chain, Network, Technique, parse
from pared.testing.observing import Nonconformance, is_registered, must


def replaces(cls: type[Technique]) -> bool:
    return cls.acts_on is not None or cls.sites is not Technique.sites


def is_of_networks(cls: type[Technique]) -> bool:
    return isinstance(cls.acts_on, Network)


def shapes_training(cls: type[Technique]) -> bool:
    return cls.loss is not Technique.loss


def prepares(cls: type[Technique]) -> bool:
    return cls.prepare is not Technique.prepare


def it_has_a_capability(cls: type[Technique]) -> None:
    must(
        replaces(cls) or shapes_training(cls) or prepares(cls),
        f"{cls.__name__} must replace something (acts_on), shape training (loss) or prepare; it does none of these",
    )


def it_is_final(cls: type[Technique]) -> None:
    must(cls.__bases__ == (Technique,), f"{cls.__name__} must inherit from Technique alone, got {cls.__bases__}")


def it_names_its_paper(cls: type[Technique]) -> None:
    found = re.search(r"arXiv:\d{4}\.\d{4,5}|arXiv:[a-z-]+/\d{7}|doi:10\.", cls.paper)
    must(found is not None, f"{cls.__name__}.paper must name a paper as arXiv:... or doi:..., got {cls.paper!r}")
    lines = inspect.cleandoc(cls.__doc__ or "")
    for word in ("Acts on", "Reads", "Refuses", "Paper"):
        must(f"\n{word} " in lines, f"the docstring of {cls.__name__} must have a line that starts with {word!r}")
    must(cls.paper in lines, f"the docstring of {cls.__name__} must cite {cls.paper}")


def every_setting_is_described(cls: type[Technique]) -> None:
    for key, field in cls.model_fields.items():
        must(bool(field.description), f"{cls.__name__}.{key} must have a description")


def every_setting_rejects_bad_values(cls: type[Technique]) -> None:
    good = dict(cls.ladder[0]) if cls.ladder else {}
    for key, field in cls.model_fields.items():
        for value in bad_values(field.annotation, field.metadata):
            _must_reject(cls, {**good, key: value}, key)
    _must_reject(cls, {**good, "no_such_setting": 1}, "no_such_setting")


def settings_survive_a_recipe(technique: Technique) -> None:
    if not isinstance(technique, Chain):
        again = type(technique)(**technique.model_dump())
        must(again == technique, f"{technique} must equal itself after model_dump, got {again}")
    if is_registered(technique):
        written = yaml.safe_dump({"steps": [_entry(technique)]})
        read = load(yaml.safe_load(written)).steps[0].candidates
        must(read == (technique,), f"{technique} must survive a recipe, got {read} from {written!r}")


def bad_values(annotation: Any, metadata: list[Any]) -> list[Any]:
    """Values just outside the range of a field, and values of other types."""
    found: list[Any] = [{"a": "mapping"}, object(), "no such value"]
    step = 1 if annotation is int or int in get_args(annotation) else 1e-6
    for rule in _rules(annotation, metadata):
        if isinstance(rule, annotated_types.Ge):
            found.append(rule.ge - step)  # type: ignore[operator]
        elif isinstance(rule, annotated_types.Gt):
            found.append(rule.gt)
        elif isinstance(rule, annotated_types.Le):
            found.append(rule.le + step)  # type: ignore[operator]
        elif isinstance(rule, annotated_types.Lt):
            found.append(rule.lt)
    if annotation is float or float in get_args(annotation):
        found += [float("nan"), float("inf")]
    return found


def _entry(technique: Technique) -> dict[str, Any]:
    """The technique as a recipe would name it."""
    if isinstance(technique, Chain):
        return {"chain": [_entry(link) for link in technique.techniques]}
    return {technique.name: technique.model_dump(mode="json", exclude_none=True)}


def _rules(annotation: Any, metadata: list[Any]) -> list[Any]:
    found, arguments = list(metadata), get_args(annotation)
    if get_origin(annotation) is Annotated:
        for extra in arguments[1:]:
            found += extra.metadata if isinstance(extra, FieldInfo) else [extra]
        return found
    for part in arguments:
        found += _rules(part, [])
    return found


def _must_reject(cls: type[Technique], settings: dict[str, Any], key: str) -> None:
    try:
        accepted = parse(cls, settings, "recipe.yaml, step 1")
    except RecipeError as error:
        told = str(error)
        must(key in told and "step 1" in told, f"the message must name {key} and the place, got: {told}")
        return
    raise Nonconformance(f"{cls.__name__}.{key} must reject {settings[key]!r}, but gave {accepted}")
