"""Reading a result whose parts may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pared.report.wording import number

Result = Mapping[str, Any]


def string(value: Any) -> str:
    return "" if value is None else str(value)


def rows_of(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value or [] if isinstance(row, Mapping)]


def in_points(result: Result) -> bool:
    """Whether the metric is a share, shown in per cent."""
    drop = result.get("drop_pp") or {}
    if drop.get("unit") in ("pp", "%"):
        return bool(drop["unit"] == "pp")
    value = number((result.get("after") or {}).get("metric", {}).get("value"))
    return value is not None and 0 <= value <= 1


def unit_of(drop: Mapping[str, Any]) -> str:
    return "points" if drop.get("unit", "pp") == "pp" else "% of the original"


def path_of(edit: Mapping[str, Any]) -> str:
    paths = edit.get("paths") or [edit.get("path")]
    return string(paths[0]) if paths else ""


def or_empty(value: Any, write: Any) -> str:
    found = number(value)
    return "" if found is None else write(found)
