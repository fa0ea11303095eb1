"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pared.report import page, wording
from pared.report.reading import path_of, rows_of
from pared.report.wording import number

MAX_EDITS = 24
"""Layers shown in the summary, the largest first."""


def summary(result: Mapping[str, Any], console: Console) -> None:
    """Before and after, the largest layers, warnings."""
    found = page.comparison(result)
    if found:
        table = _table("", "before", "after", "")
        for row in found:
            table.add_row(
                Text(row["name"]),
                row["before"],
                Text(row["after"], "bold"),
                Text(row["change"], "green" if row["gain"] else ""),
            )
        console.print(table)
    layers = sorted(rows_of(result.get("edits")), key=lambda edit: -(number(edit.get("bytes_before")) or 0.0))
    if layers:
        table = _table("layer", "technique", "bits per weight", "before", "after")
        table.columns[1].justify = "left"
        for edit in layers[:MAX_EDITS]:
            bits = number(edit.get("bits_per_weight"))
            table.add_row(
                Text(path_of(edit)),
                Text(wording.chain(edit.get("technique"))),
                "" if bits is None else f"{bits:.2f}",
                wording.size(edit.get("bytes_before")),
                wording.size(edit.get("bytes_after")),
            )
        console.print(table)
        if len(layers) > MAX_EDITS:
            console.print(Text(f"{len(layers) - MAX_EDITS} smaller layers are in the report", "dim"))
    for sentence in page.lead(result):
        console.print(Text(sentence))
    asked = page.budget(result)
    if asked and isinstance(result.get("met"), bool):
        verdict = Text("met", "green") if result["met"] else Text("not met", "bold red")
        console.print(Text.assemble(f"Asked for {asked}: ", verdict))
    for line in result.get("warnings") or []:
        console.print(Text.assemble(("Note: ", "yellow"), str(line)))


def inspection(found: Mapping[str, Any], console: Console) -> None:
    """What is in a file or a model: its size first, then one row per tensor."""
    line = Text.assemble((wording.size(found.get("file_bytes")), "bold"))
    if (smaller := number(found.get("ratio"))) is not None:
        line.append(f", {wording.fixed(smaller)} times smaller than {wording.size(found.get('original_bytes'))}")
    if (bits := number(found.get("bits_per_weight"))) is not None:
        line.append(f"; {bits:.3g} bits per weight, everything counted")
    console.print(line)
    shares = [
        f"{name} {wording.size(found[key])}"
        for key, name in (("data_bytes", "tensors"), ("manifest_bytes", "manifest"), ("program_bytes", "of it program"))
        if number(found.get(key)) is not None
    ]
    if shares:
        console.print(Text(", ".join(shares), "dim"))
    table = _table("tensor", "technique", "shape", "bits per weight", "bytes")
    table.columns[1].justify = "left"
    rows = rows_of(found.get("tensors"))
    for row in rows:
        bits = number(row.get("bits_per_weight"))
        technique = row.get("technique")
        table.add_row(
            Text(", ".join([str(row.get("path", "")), *map(str, row.get("aliases") or [])])),
            Text(wording.chain(technique)) if technique else Text(f"as it is, {row.get('dtype', '')}", "dim"),
            " × ".join(map(str, row.get("shape") or [])),
            "" if bits is None else f"{bits:.2f}",
            wording.size(row.get("bytes")),
        )
    if rows:
        console.print(table)


def sensitivity(rows: list[dict[str, Any]], console: Console) -> None:
    """One row per option, layer by layer."""
    table = _table("layer", "option", "bytes", "predicted damage")
    table.columns[1].justify = "left"
    before = None
    for row in rows:
        path = str(row.get("path", ""))
        if before is not None and path != before:
            table.add_section()
        bits, damage = number(row.get("stored_bits")), number(row.get("damage"))
        table.add_row(
            Text(path if path != before else ""),
            Text(wording.chain(row.get("technique"))),
            "" if bits is None else wording.size(bits / 8),
            "" if damage is None else wording.significant(damage, 2),
        )
        before = path
    console.print(table)


def bench(rows: list[dict[str, Any]], console: Console) -> None:
    """One row per runtime and target; the first target is the baseline."""
    table = _table("model", "runtime", "size", "median", "10 %", "90 %", "against the first")
    table.columns[1].justify = "left"
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        base = first.setdefault(str(row["runtime"]), row)
        change = "" if base is row else " ".join(page.speed(base["median"], row["median"])).strip()
        table.add_row(
            Text(str(row["target"])),
            str(row["runtime"]),
            wording.size(row.get("bytes")),
            *(wording.milliseconds(row[key]) for key in ("median", "p10", "p90")),
            Text(change, "green" if change.endswith("× faster") else ""),
        )
    console.print(table)
    if rows:
        console.print(Text(f"batch of {rows[0]['batch_size']}; {rows[0]['n']} calls of each, in turn", "dim"))
        fastest = min(rows, key=lambda row: row["median"])
        console.print(Text(f"fastest: {fastest['target']} in {fastest['runtime']}, {wording.milliseconds(fastest['median'])}"))


def techniques(rows: list[dict[str, Any]], details: bool, console: Console) -> None:
    """Names and what they do; with details, every setting."""
    if not details:
        table = _table("technique", "what it does")
        table.columns[1].justify = "left"
        for row in rows:
            table.add_row(Text(str(row["name"]), "bold"), Text(str(row.get("summary", ""))))
        console.print(table)
        return
    for row in rows:
        console.print(Text.assemble((str(row["name"]), "bold"), "  ", str(row.get("summary", ""))))
        if row.get("paper"):
            console.print(Text(str(row["paper"]), "dim"))
        table = _table("setting", "type", "range", "default", "")
        for column in table.columns[1:]:
            column.justify = "left"
        for setting in row.get("settings", []):
            shown = (setting.get(key) for key in ("name", "type", "range", "default", "help"))
            table.add_row(*(Text("" if value is None else str(value)) for value in shown))
        console.print(table)


def _table(*columns: str) -> Table:
    """Names on the left, figures on the right, no lines but one."""
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table
