"""The parts of the HTML page, each made from the result alone; a part without data is empty and does not appear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pared.measurement.latency import is_faster
from pared.report import charts, layers, wording
from pared.report.plots import interval
from pared.report.reading import Result, in_points, string, unit_of
from pared.report.wording import number


def parts(result: Result) -> dict[str, Any]:
    """Everything that the template shows."""
    return {
        "name": string((result.get("model") or {}).get("name")) or "model",
        "lead": lead(result),
        "met": result.get("met") if isinstance(result.get("met"), bool) else None,
        "budget": budget(result),
        "figures": figures(result),
        "warnings": [string(line) for line in result.get("warnings") or []],
        "comparison": comparison(result),
        "bars": layers.bars(result),
        "heat": layers.heat(result),
        "predicted": charts.predicted(result),
        "curve": charts.curve(result),
        "trials": charts.trials(result),
        "training": charts.training(result),
        "edits": layers.edits(result),
        "refusals": layers.grouped(result.get("refusals"), by=("technique", "reason")),
        "untouched": layers.grouped(result.get("untouched"), by=("reason",)),
        "recipe": string(result.get("recipe")),
        "command": string(result.get("command")),
        "facts": facts(result),
        "version": string(result.get("pared")),
        "created": string(result.get("created")),
    }


def lead(result: Result) -> list[str]:
    """The result in two or three sentences."""
    before, after, drop = (result.get(key) or {} for key in ("before", "after", "drop_pp"))
    said = []
    smaller = wording.ratio(before.get("file_bytes"), after.get("file_bytes"))
    if smaller is not None:
        said.append(
            f"{wording.size(after['file_bytes'])} instead of {wording.size(before['file_bytes'])}: "
            f"the file is {wording.fixed(smaller)} times smaller."
        )
    metric = after.get("metric") or {}
    if number(metric.get("value")) is not None:
        points = in_points(result)
        text = f"{string(metric.get('name')) or 'metric'} {wording.score(metric['value'], points)}"
        if number((before.get("metric") or {}).get("value")) is not None:
            text += f", {wording.score(before['metric']['value'], points)} before"
        said.append(_capital(text) + _examples(result) + ".")
    low, high = number(drop.get("low")), number(drop.get("high"))
    if low is not None and high is not None and number(drop.get("value")) is not None:
        said.append(
            f"The drop is {wording.signed(drop['value'])} {unit_of(drop)}, with 95 % confidence between "
            f"{wording.signed(low)} and {wording.signed(high)}"
            + ("; it cannot be told from none." if low <= 0 <= high else ".")
        )
    return said + _accepted(result)


def _accepted(result: Result) -> list[str]:
    """How the drop on validation data was held against the accepted one."""
    given = result.get("acceptance") or {}
    limit, drop, margin = (number(given.get(key)) for key in ("max_drop", "drop", "margin"))
    if limit is None or drop is None or margin is None:
        return []
    verdict = "accepted" if drop + margin <= limit + 1e-9 else "not accepted"
    return [
        f"On validation data the drop was {wording.signed(drop)} {unit_of(given)}; with a margin of "
        f"{wording.signed(margin)} for chance, against {wording.signed(limit)} asked for, it was {verdict}."
    ]


def _examples(result: Result) -> str:
    drop = result.get("drop_pp") or (result.get("after") or {}).get("metric") or {}
    n, n_groups = number(drop.get("n")), number(drop.get("n_groups"))
    if n is None:
        return ""
    kind = {"test": "test ", "val": "validation "}.get(string(drop.get("on")), "")
    text = f", on {n:,.0f} {kind}examples"
    return text + (f" from {n_groups:,.0f} independent groups" if n_groups is not None and n_groups < n else "")


def budget(result: Result) -> str:
    """What was asked for, in words."""
    asked = result.get("budget") or {}
    words = {"size": "size {}", "macs": "MACs {}", "latency": "latency {}", "max_drop": "drop at most {}"}
    return ", ".join(text.format(asked[key]) for key, text in words.items() if asked.get(key) is not None)


@dataclass(frozen=True)
class Figure:
    """A headline number: the number, what it is, and how it comes about."""

    value: str
    name: str
    note: str = ""
    picture: Markup | None = None
    worse: bool = False


def figures(result: Result) -> list[Figure]:
    """The headline numbers."""
    before, after = result.get("before") or {}, result.get("after") or {}
    found = []
    smaller = wording.ratio(before.get("file_bytes"), after.get("file_bytes"))
    if smaller is not None:
        change = f"{wording.size(before['file_bytes'])} → {wording.size(after['file_bytes'])}"
        found.append(Figure(f"{wording.fixed(smaller)}×", "smaller", change))
    drop = result.get("drop_pp") or {}
    value = number(drop.get("value"))
    if value is not None:
        limit = number((result.get("budget") or {}).get("max_drop"))
        picture = interval(value, number(drop.get("low")), number(drop.get("high")), limit, wording.signed)
        name = f"{unit_of(drop)} lost" if value >= 0 else f"{unit_of(drop)} gained"
        found.append(Figure(wording.signed(abs(value)), name, picture=picture))
    fewer = wording.ratio(before.get("macs"), after.get("macs"))
    if fewer is not None:
        change = f"{wording.count(before['macs'])} → {wording.count(after['macs'])} multiply-adds"
        if abs(fewer - 1) < 0.005:
            found.append(Figure("same", "MACs", f"{wording.count(after['macs'])} multiply-adds"))
        else:
            shown, name = (fewer, "fewer MACs") if fewer > 1 else (1 / fewer, "more MACs")
            found.append(Figure(f"{wording.fixed(shown)}×", name, change))
    found += [_speed(runtime, a, b) for runtime, a, b in _latencies(before, after)]
    return found


def _latencies(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterable[tuple[str, float, float]]:
    for runtime, timing in (after.get("latency_ms") or {}).items():
        old = number(((before.get("latency_ms") or {}).get(runtime) or {}).get("median"))
        new = number((timing or {}).get("median"))
        if old and new and old > 0 and new > 0:
            yield runtime, old, new


def speed(before_ms: float, after_ms: float) -> tuple[str, str]:
    """(value, name) of a change in latency; what is not faster is said to be not faster."""
    if is_faster(before_ms, after_ms):
        return f"{wording.fixed(before_ms / after_ms)}×", "faster"
    if is_faster(after_ms, before_ms):
        return f"{wording.fixed(after_ms / before_ms)}×", "slower"
    return "not faster", ""


def _speed(runtime: str, before_ms: float, after_ms: float) -> Figure:
    value, name = speed(before_ms, after_ms)
    change = f"{wording.milliseconds(before_ms)} → {wording.milliseconds(after_ms)}"
    return Figure(value, f"{name} in {runtime}".strip(), change, worse=name == "slower")


def comparison(result: Result) -> list[dict[str, Any]]:
    """Rows before, after, change, and whether the change is a gain."""
    before, after = result.get("before") or {}, result.get("after") or {}
    rows = []
    for key, name, write in (
        ("file_bytes", "Bytes of the file", wording.size),
        ("parameters", "Parameters", wording.count),
        ("macs", "MACs per example", wording.count),
        ("peak_activation_bytes", "Peak of activations", wording.size),
    ):
        if number(after.get(key)) is None:
            continue
        smaller = wording.ratio(before.get(key), after.get(key))
        rows.append(
            {
                "name": name,
                "before": write(before.get(key)),
                "after": write(after.get(key)),
                "change": "" if smaller is None else "same" if smaller == 1 else _change(smaller),
                "gain": smaller is not None and smaller > 1,
            }
        )
    for runtime in after.get("latency_ms") or {}:
        times = [(side.get("latency_ms") or {}).get(runtime) or {} for side in (before, after)]
        old, new = (number(timing.get("median")) for timing in times)
        change = " ".join(speed(old, new)).strip() if old and new else ""
        rows.append(
            {
                "name": f"Latency in {runtime}",
                "before": _timing(times[0]),
                "after": _timing(times[1]),
                "change": change,
                "gain": change.endswith("× faster"),
            }
        )
    metric = after.get("metric") or {}
    if number(metric.get("value")) is not None:
        points = in_points(result)
        drop = result.get("drop_pp") or {}
        lost = number(drop.get("value"))
        rows.append(
            {
                "name": _capital(string(metric.get("name")) or "metric"),
                "before": _with_interval(before.get("metric") or {}, points),
                "after": _with_interval(metric, points),
                "change": "" if lost is None else f"{_sign(-lost)}{wording.signed(abs(lost))} {unit_of(drop)}",
                "gain": lost is not None and lost < 0,
            }
        )
    agreement = result.get("agreement") or {}
    if number(agreement.get("value")) is not None:
        name = _capital(string(agreement.get("name")) or "agreement with the original")
        rows.append({"name": name, "before": "", "after": _with_interval(agreement, True), "change": "", "gain": False})
    return rows


def _sign(value: float) -> str:
    return "+" if value > 0 else "−" if value < 0 else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _change(smaller: float) -> str:
    return f"÷ {wording.fixed(smaller)}" if smaller > 1 else f"× {wording.fixed(1 / smaller)}"


def _timing(timing: Mapping[str, Any]) -> str:
    if number(timing.get("median")) is None:
        return "–"
    text = wording.milliseconds(timing["median"])
    low, high = timing.get("p10"), timing.get("p90")
    if number(low) is None or number(high) is None:
        return text
    return f"{text} ({wording.milliseconds(low)} – {wording.milliseconds(high)})"


def _with_interval(metric: Mapping[str, Any], points: bool) -> str:
    text = wording.score(metric.get("value"), points)
    if number(metric.get("low")) is None or number(metric.get("high")) is None:
        return text
    return f"{text} ({wording.score(metric['low'], points)} – {wording.score(metric['high'], points)})"


def facts(result: Result) -> list[tuple[str, str]]:
    """What a reader needs to repeat and to judge the figures."""
    model, data, environment = (result.get(key) or {} for key in ("model", "data", "environment"))
    found: list[tuple[str, str]] = []
    if model.get("class"):
        found.append(("Model", f"{model['class']}, {wording.count(model.get('parameters'))} parameters"))
    sizes = [
        f"{value:,.0f} {name}"
        for key, name in (("n_train", "training"), ("n_val", "validation"), ("n_test", "test"))
        if (value := number(data.get(key))) is not None
    ]
    described = ", ".join(part for part in (string(data.get("name")), " · ".join(sizes)) if part)
    groups = number(data.get("n_groups"))
    if groups is not None and groups != number(data.get("n_test")):
        described += f"; {groups:,.0f} independent groups measured"
    if described:
        found.append(("Data", described))
    if data.get("calibration"):
        found.append(("Calibration", string(data["calibration"])))
    if result.get("seed") is not None:
        found.append(("Seed", string(result["seed"])))
    if environment:
        words = {"torch": "torch {}", "python": "Python {}", "cpu": "{}", "threads": "{} threads"}
        shown = [text.format(environment[key]) for key, text in words.items() if environment.get(key)]
        shown += [f"{key} {value}" for key, value in environment.items() if key not in words]
        found.append(("Environment", ", ".join(shown)))
    times = result.get("seconds") or {}
    spent = [f"{name} {wording.seconds(value)}" for name, value in times.items() if number(value) is not None]
    if spent:
        found.append(("Time", ", ".join(spent)))
    return found
