"""The parts of the page that go layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pared.report import wording
from pared.report.reading import Result, or_empty, path_of, rows_of, string
from pared.report.wording import number

MAX_BARS = 40
"""Layers with a bar of their own; the smaller ones share a line."""
MAX_TALL_ROWS = 30
"""A heat map with more layers than these has lower rows."""
MAX_NUMBERED_COLUMNS = 20
"""A heat map with more options than these shows colours without figures."""
MANY = 6
"""Longer lists of paths are folded."""


def bars(result: Result) -> dict[str, Any] | None:
    """Bytes per layer, before and after, the largest first."""
    layers = []
    for edit in rows_of(result.get("edits")):
        before, after = number(edit.get("bytes_before")), number(edit.get("bytes_after"))
        if before is not None and after is not None and before > 0:
            layers.append((path_of(edit), before, after))
    if not layers:
        return None
    layers.sort(key=lambda layer: -layer[1])
    shown, rest = (layers[:MAX_BARS], layers[MAX_BARS:]) if len(layers) > MAX_BARS + 1 else (layers, [])
    widest = max(max(before, after) for _, before, after in shown)
    names = wording.shortened([path for path, _, _ in shown], 44)
    return {
        "rows": [
            {
                "path": path,
                "name": names[path],
                "before": wording.size(before),
                "after": wording.size(after),
                "before_width": f"{100 * before / widest:.2f}",
                "after_width": f"{100 * after / widest:.2f}",
                "ratio": f"{wording.fixed(before / after)}×" if after else "",
            }
            for path, before, after in shown
        ],
        "rest": f"{len(rest)} smaller ones together: {wording.size(sum(before for _, before, _ in rest))} → "
        f"{wording.size(sum(after for _, _, after in rest))}"
        if rest
        else "",
    }


def heat(result: Result) -> dict[str, Any] | None:
    """Predicted damage of every option at every layer, on a logarithmic colour scale."""
    cells: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows_of(result.get("sensitivity")):
        if number(row.get("damage")) is not None:
            cells[string(row.get("path")), string(row.get("technique"))] = row
    if not cells:
        return None
    paths = list(dict.fromkeys(path for path, _ in cells))
    techniques = list(dict.fromkeys(technique for _, technique in cells))
    positive = [d for row in cells.values() if (d := float(row["damage"])) > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    low = max(low, high * 1e-9)
    chosen = {path_of(edit): string(edit.get("technique")) for edit in rows_of(result.get("edits"))}
    numbered = len(techniques) <= MAX_NUMBERED_COLUMNS
    names = wording.shortened(paths, 32)

    def cell(path: str, technique: str) -> dict[str, Any] | None:
        row = cells.get((path, technique))
        if row is None:
            return None
        damage = float(row["damage"])
        depth = 0.0
        if damage > 0 and high > low:
            depth = min(1.0, max(0.0, math.log(damage / low) / math.log(high / low)))
        bits = number(row.get("stored_bits"))
        return {
            "depth": f"{0.04 + 0.88 * depth:.2f}",
            "text": _power(damage) if numbered else "",
            "title": f"{path}, {wording.chain(technique)}: damage {wording.significant(damage)}"
            + (f", {wording.size(bits / 8)}" if bits is not None else ""),
            "deep": depth > 0.82,
            "chosen": chosen.get(path) == technique,
        }

    return {
        "columns": [{"name": _short(technique), "title": wording.chain(technique)} for technique in techniques],
        "rows": [
            {"path": path, "name": names[path], "cells": [cell(path, technique) for technique in techniques]}
            for path in paths
        ],
        "compact": len(paths) > MAX_TALL_ROWS,
        "low": wording.significant(low, 2),
        "high": wording.significant(high, 2),
        "numbered": numbered,
        "any_chosen": any((path, technique) in cells for path, technique in chosen.items()),
    }


def _power(damage: float) -> str:
    """The decimal logarithm, as short as it gets."""
    return f"{math.log10(damage):.1f}".replace("-", "−") if damage > 0 else "0"


def _short(technique: str) -> str:
    """A column's head: names without family, a single setting without its name."""
    heads = []
    for name, settings in wording.links_of(technique):
        value = settings if "," in settings else settings.partition(" ")[2]
        heads.append(f"{name.rpartition('.')[2]} {value}".strip())
    return " → ".join(heads)


def edits(result: Result) -> dict[str, Any] | None:
    """One row per replaced part: what was done, shape, bits per weight, bytes, damage."""
    rows = rows_of(result.get("edits"))
    if not rows:
        return None
    shown = []
    for edit in rows:
        shown.append(
            {
                "path": path_of(edit),
                "others": [string(path) for path in (edit.get("paths") or [])[1:]],
                "links": wording.links_of(edit.get("technique")),
                "shape": " × ".join(str(n) for n in edit.get("shape") or []),
                "bits": or_empty(edit.get("bits_per_weight"), lambda v: f"{v:.2f}"),
                "before": or_empty(edit.get("bytes_before"), wording.size),
                "after": or_empty(edit.get("bytes_after"), wording.size),
                "predicted": or_empty(edit.get("damage_predicted"), lambda v: wording.significant(v, 2)),
                "measured": or_empty(edit.get("damage_measured"), lambda v: wording.significant(v, 2)),
            }
        )
    sums = [
        sum(number(edit.get(key)) or 0.0 for edit in rows)
        if any(number(e.get(key)) is not None for e in rows)
        else None
        for key in ("bytes_before", "bytes_after", "damage_predicted")
    ]
    return {
        "rows": shown,
        "has_damage": any(row["predicted"] for row in shown),
        "has_measured": any(row["measured"] for row in shown),
        "before": or_empty(sums[0], wording.size),
        "after": or_empty(sums[1], wording.size),
        "predicted": or_empty(sums[2], lambda v: wording.significant(v, 2)),
    }


def grouped(rows: Any, by: tuple[str, ...]) -> list[dict[str, Any]]:
    """Paths that share a reason (and a technique) together, the most bytes first."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows_of(rows):
        key = tuple(string(row.get(name)) for name in by)
        group = groups.setdefault(key, {"paths": [], "n_bytes": 0.0, **dict(zip(by, key, strict=True))})
        group["paths"].append(string(row.get("path")))
        group["n_bytes"] += number(row.get("bytes")) or 0.0
    for group in groups.values():
        group["bytes"] = wording.size(group["n_bytes"]) if group["n_bytes"] else ""
        group["folded"] = len(group["paths"]) > MANY
        if "technique" in group:
            group["technique"] = wording.chain(group["technique"])
    return sorted(groups.values(), key=lambda group: -group["n_bytes"])
