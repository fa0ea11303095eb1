"""The plots of the page and what is said beside them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from markupsafe import Markup

from pared.report import wording
from pared.report.plots import Axis, Plot, rank_correlation
from pared.report.reading import Result, in_points, or_empty, rows_of, string, unit_of
from pared.report.wording import number


def predicted(result: Result) -> dict[str, Any] | None:
    """Predicted against measured damage, with the diagonal."""
    rows = [
        (number(row.get("predicted")), number(row.get("measured")), row)
        for row in rows_of(result.get("predicted_measured"))
    ]
    pairs = [(p, m, row) for p, m, row in rows if p is not None and m is not None and p > 0 and m > 0]
    if not pairs:
        return None
    values = [value for p, m, _ in pairs for value in (p, m)]
    x, y = (
        Axis.around(f"{name} damage", values, lambda v: wording.significant(v, 1), log=True)
        for name in ("predicted", "measured")
    )
    ranks = rank_correlation([p for p, _, _ in pairs], [m for _, m, _ in pairs])
    middle = median(p / m for p, m, _ in pairs)
    text = f"{len(pairs)} options; predicted over measured {wording.significant(middle, 2)} in the median"
    text += "" if ranks is None else f"; rank correlation {ranks:.2f}".replace("-", "−")
    missing = len(rows) - len(pairs)
    plot = Plot(x, y, title=f"Predicted against measured damage: {text}")
    plot.line([(x.low, x.low), (x.high, x.high)], "level")
    for p, m, row in pairs:
        name = f"{string(row.get('path'))}, {wording.chain(string(row.get('technique')))}"
        plot.point(p, m, "mark", f"{name}: predicted {wording.significant(p)}, measured {wording.significant(m)}")
    if missing:
        text += f"; {missing} with no measurable damage {'is' if missing == 1 else 'are'} not shown"
    return {"plot": plot.draw(), "text": text}


def curve(result: Result) -> dict[str, Any] | None:
    """The least predicted damage at every size, and the plans that were carried out."""
    points = sorted(
        (b, d)
        for row in rows_of(result.get("curve"))
        if (b := number(row.get("bytes"))) and (d := number(row.get("damage"))) and b > 0 and d > 0
    )
    if len(points) < 2:
        return None
    tried = [
        (b, d, row)
        for row in rows_of(result.get("trials"))
        if (b := number(row.get("bytes"))) and (d := number(row.get("predicted_damage"))) and b > 0 and d > 0
    ]
    x = Axis.around("bytes", [b for b, _ in points] + [b for b, _, _ in tried], _round_size, log=True)
    y = Axis.around(
        "predicted damage", [d for _, d in points] + [d for _, d, _ in tried],
        lambda v: wording.significant(v, 1), log=True,
    )  # fmt: skip
    plot = Plot(x, y, title="The least predicted damage at every size of the file")
    plot.line(points, "curve")
    for b, d, row in tried:
        kind = "mark" if row.get("accepted") else "mark hollow"
        plot.point(b, d, kind, f"{wording.size(b)}: predicted damage {wording.significant(d)}", 4.5)
        if row.get("accepted"):
            plot.note(b, d, wording.size(b))
    return {"plot": plot.draw(), "tried": bool(tried)}


def _round_size(n_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * scale:
            return f"{wording.significant(n_bytes / scale, 3)} {unit}"
    return f"{n_bytes:.0f} B"


def trials(result: Result) -> dict[str, Any] | None:
    """What each carried-out plan weighed and lost, on validation data."""
    rows = [row for row in rows_of(result.get("trials")) if number(row.get("bytes"))]
    if not rows:
        return None
    before = (result.get("before") or {}).get("file_bytes")
    points = in_points(result)
    table = [
        {
            "bytes": wording.size(row["bytes"]),
            "ratio": f"{wording.fixed(smaller)}×" if (smaller := wording.ratio(before, row["bytes"])) else "",
            "damage": or_empty(row.get("predicted_damage"), lambda v: wording.significant(v, 2)),
            "metric": or_empty(row.get("metric"), lambda v: wording.score(v, points)),
            "drop": or_empty(row.get("drop_pp"), wording.signed),
            "epochs": or_empty(row.get("epochs"), lambda v: f"{v:.0f}" if v else "–"),
            "seconds": or_empty(row.get("seconds"), wording.seconds),
            "accepted": bool(row.get("accepted")),
        }
        for row in rows
    ]
    unit = unit_of(result.get("drop_pp") or {})
    return {"rows": table, "unit": unit, "plot": _trial_plot(result, rows, unit)}


def _trial_plot(result: Result, rows: list[Mapping[str, Any]], unit: str) -> Markup | None:
    pairs = [
        (float(row["bytes"]), drop, row)
        for row in rows
        if (drop := number(row.get("drop_pp"))) is not None and row["bytes"] > 0
    ]
    if len(pairs) < 2:
        return None
    limit = number((result.get("budget") or {}).get("max_drop"))
    drops = [drop for _, drop, _ in pairs] + [v for v in (limit,) if v is not None]
    x = Axis.around("bytes", [b for b, _, _ in pairs], _round_size, log=True)
    y = Axis.around(f"drop, {unit}", [*drops, 0.0], lambda v: wording.significant(v, 3))
    plot = Plot(x, y, title="The drop of every plan that was carried out, by its size")
    if limit is not None:
        plot.level(limit, "accepted")
    for b, drop, row in pairs:
        kind = "mark" if row.get("accepted") else "mark hollow"
        trained = number(row.get("epochs"))
        how = f" after {trained:.0f} epochs" if trained else ""
        plot.point(b, drop, kind, f"{wording.size(b)}: drop {wording.signed(drop)} {unit}{how}", 4.5)
        if row.get("accepted"):
            plot.note(b, drop, wording.size(b))
    return plot.draw()


def training(result: Result) -> list[Markup]:
    """Loss and validation score, epoch by epoch."""
    rows = rows_of(result.get("training"))
    parts_of = [(row.get("step"), row.get("part")) for row in rows]
    borders = [k + 0.5 for k in range(1, len(rows)) if parts_of[k] != parts_of[k - 1]]
    points = in_points(result)
    plots = []
    for key, name, write in (
        ("loss", "training loss", lambda v: wording.significant(v, 3)),
        ("score", "validation", lambda v: wording.score(v, points) if not points else f"{100 * v:.4g} %"),
    ):
        values = [(k + 1.0, value) for k, row in enumerate(rows) if (value := number(row.get(key))) is not None]
        if len(values) < 2:
            continue
        heights = [value for _, value in values]
        wide = min(heights) > 0 and max(heights) / min(heights) > 30
        x = Axis("epoch", 1, len(rows), lambda v: f"{v:g}" if v == int(v) else "")
        plot = Plot(x, Axis.around(name, heights, write, log=wide), title=f"{name} by epoch", height=210)
        for border in borders:
            plot.level(border, "", upright=True)
        plot.line(values, "curve")
        k, value = values[-1]
        plot.point(k, value, "mark", f"epoch {k:.0f}: {write(value)}", 3)
        plots.append(plot.draw())
    return plots
