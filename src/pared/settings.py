"""Settings are fields: what a field takes, in words, is derived from its type and range, for messages and docs alike."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo


class Settings(BaseModel):
    """Public fields: frozen, validated, printable, comparable; each has a range, a unit and a line of help."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Structure(BaseModel):
    """What `build` cannot know from shapes and settings; typed and versioned by its technique."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = 1


def allowed(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a field accepts, in words.

    >>> from pydantic import Field
    >>> allowed(int, Field(ge=2, le=8).metadata)
    'an int in [2, 8]'
    >>> allowed(Annotated[int, Field(ge=2)] | Literal["tensor"])
    'an int of 2 or more or "tensor"'
    """
    parts = _alternatives(annotation, list(metadata))
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _alternatives(annotation: Any, metadata: list[Any]) -> list[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extras = [extra.metadata if isinstance(extra, FieldInfo) else [extra] for extra in arguments[1:]]
        return _alternatives(arguments[0], sum(extras, metadata))
    if origin in (Union, types.UnionType):
        return [words for part in arguments if part is not type(None) for words in _alternatives(part, metadata)]
    if origin is Literal:
        return [f'"{value}"' if isinstance(value, str) else str(value) for value in arguments]
    if origin in (tuple, list):
        return [f"a list of which each is {allowed(arguments[0])}"]
    if annotation in (int, float):
        return [f"{'an int' if annotation is int else 'a number'}{_range(metadata)}"]
    return [{bool: "true or false", str: "a text"}.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")]


def _range(metadata: list[Any]) -> str:
    low = next((m for m in metadata if isinstance(m, annotated_types.Ge | annotated_types.Gt)), None)
    high = next((m for m in metadata if isinstance(m, annotated_types.Le | annotated_types.Lt)), None)
    at_low = low.ge if isinstance(low, annotated_types.Ge) else low.gt if low is not None else None
    at_high = high.le if isinstance(high, annotated_types.Le) else high.lt if high is not None else None
    if low is not None and high is not None:
        opening = "[" if isinstance(low, annotated_types.Ge) else "("
        closing = "]" if isinstance(high, annotated_types.Le) else ")"
        return f" in {opening}{at_low}, {at_high}{closing}"
    if low is not None:
        return f" of {at_low} or more" if isinstance(low, annotated_types.Ge) else f" above {at_low}"
    if high is not None:
        return f" of {at_high} or less" if isinstance(high, annotated_types.Le) else f" below {at_high}"
    return ""


def explain(cls: type[BaseModel], error: ValidationError, where: str = "") -> str:
    """The first fault of a validation in one line: what must hold, what was found, where."""
    fault = error.errors()[0]
    name = ".".join(cls.__module__.split(".")[-2:])
    place = f" ({where})" if where else ""
    told = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return f"{name}: {told}{place}"
    key = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, cls.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; its settings are {', '.join(cls.model_fields) or 'none'}"
        return f"{name} has no setting {key}{hint}{place}"
    field = cls.model_fields[key]
    must = allowed(field.annotation, field.metadata)
    if fault["type"] == "missing":
        return f"{name}.{key} must be given: {must}{place}"
    if fault["type"] == "value_error":
        return f"{name}.{key}: {told}, got {fault['input']!r}{place}"
    return f"{name}.{key} must be {must}, got {fault['input']!r}{place}"
