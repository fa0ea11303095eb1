"""What a run found, for people: one HTML page, and tables on the terminal. Everything shown is in result.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["bench_table", "html", "inspection", "report", "sensitivity_table", "techniques_table", "terminal"]

_LISTS = (
    "edits", "refusals", "untouched", "sensitivity", "predicted_measured", "curve", "trials", "training", "warnings",
)  # fmt: skip
_OBJECTS = ("model", "data", "budget", "before", "after", "drop_pp", "agreement", "acceptance", "seconds", "environment")


def report(result: Mapping[str, Any], path: str | Path) -> None:
    """Write the result as one self-contained HTML page.

    Args:
        result: as in result.json; parts that are missing do not appear.

    Raises:
        InputError: not a result, or a path that cannot be written.
    """
    page = html(result)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the report must be written to {path}, but it cannot be: {error.strerror}") from error


def html(result: Mapping[str, Any]) -> str:
    """The page as text."""
    import jinja2

    from pared.report import page

    _check(result)
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    style = (here / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(**page.parts(result), style=style)


def terminal(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the summary of a result."""
    from pared.report import tables

    _check(result)
    tables.summary(result, _console(console))


def inspection(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `pared.artifact.inspect` found in a file, or `describe` in a model."""
    from pared.report import tables

    tables.inspection(found, _console(console))


def sensitivity_table(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print predicted damage by layer and option; rows as in result.json's `sensitivity`."""
    from pared.report import tables

    tables.sensitivity(rows, _console(console))


def bench_table(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print the rows of `pared.measurement.bench`."""
    from pared.report import tables

    tables.bench(rows, _console(console))


def techniques_table(rows: list[dict[str, Any]], details: bool = False, console: Console | None = None) -> None:
    """Print the rows of `pared.registry.describe`, with their settings if asked."""
    from pared.report import tables

    tables.techniques(rows, details, _console(console))


def _console(console: Console | None) -> Console:
    if console is not None:
        return console
    from rich.console import Console

    return Console()


def _check(result: Any) -> None:
    """A result is an object; its parts are lists of objects or objects."""
    if not isinstance(result, Mapping):
        raise InputError(f"a result must be an object with the keys of result.json, got {type(result).__name__}")
    for keys, kind, name in ((_LISTS, list, "a list"), (_OBJECTS, Mapping, "an object")):
        for key in keys:
            if result.get(key) is not None and not isinstance(result[key], kind):
                raise InputError(
                    f"{key} of a result must be {name}, got {type(result[key]).__name__}; see docs/report.md"
                )
    for side in ("before", "after"):
        for key in ("latency_ms", "metric"):
            part = (result.get(side) or {}).get(key)
            if part is not None and not isinstance(part, Mapping):
                raise InputError(
                    f"{side}.{key} of a result must be an object, got {type(part).__name__}; see docs/report.md"
                )
