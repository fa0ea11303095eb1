"""What is in a file or a model, tensor by tensor, without decoding or running anything."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pared import store
from pared.artifact import container
from pared.artifact.body import VERSION
from pared.artifact.compression import pack
from pared.artifact.manifest import Manifest, dumps, short_path
from pared.artifact.read import Contents, border
from pared.artifact.skeleton import links
from pared.artifact.tensors import NAMES, Kind, places, to_array
from pared.graph.module import ProgramModule
from pared.record import Record, record_of
from pared.site import plain
from pared.technique import Edit


def inspect(path: str | os.PathLike[str], max_bytes: int | None = None) -> dict[str, Any]:
    """What is in a file, as JSON can hold it.

    Args:
        path: a file that `pared.save` wrote.
        max_bytes: as for `pared.load`.

    Returns:
        file_bytes = header_bytes + manifest_bytes + data_bytes; program_bytes: the program's share of the manifest;
        original_bytes, n_elements: of the decoded tensors; ratio: original_bytes / file_bytes; bits_per_weight: of the file;
        tensors: a row for each, with path, aliases, role, technique (None: stored as it is), shape, dtype, bytes,
        bits_per_weight, coders; edits, recipe, provenance.

    Raises:
        ArtifactError: the file is cut off, damaged or altered.
        InputError: the file cannot be read.
    """
    data = container.read(path)
    with border(path):
        contents = Contents(data, max_bytes)
    manifest = contents.manifest
    n_bytes = [0.0] * len(manifest.entries)
    coders: list[set[str]] = [set() for _ in manifest.entries]
    for (coder, payload), members in zip(contents.payloads, contents.members, strict=True):
        total = sum(contents.stored[member][1].n_bytes for member in members)
        for member in members:
            owner = contents.owners[member]
            n_bytes[owner] += len(payload) * contents.stored[member][1].n_bytes / total
            coders[owner].add(manifest.coders[coder])
    of = _techniques(manifest.edits)
    rows = []
    for entry, size, names in zip(manifest.entries, n_bytes, coders, strict=True):
        technique = next((of[path] for path in entry.paths if path in of), None)
        rows.append(_row(entry.path, entry.aliases, entry.role, technique, entry.kind, size) | {"coders": sorted(names)})
    data_bytes = sum(len(payload) for _, payload in contents.payloads)
    return {
        "version": VERSION,
        **_totals(rows, len(data), manifest.provenance),
        "header_bytes": len(data) - contents.manifest_bytes - data_bytes,
        "manifest_bytes": contents.manifest_bytes,
        "program_bytes": _program_bytes(manifest),
        "data_bytes": data_bytes,
        "tensors": rows,
        "edits": _edits(manifest.edits),
        "program": manifest.program is not None,
        "recipe": manifest.recipe,
        "provenance": manifest.provenance,
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """What is in a model, as `inspect` tells of a file; bytes are what the coders would make of the tensors."""
    root = model.root if isinstance(model, ProgramModule) else model
    record = record_of(model) or Record()
    of = _techniques(record.edits)
    values = {path: place.held for place in places(plain(root)) for path in place.paths if isinstance(place.held, Tensor)}
    rows = []
    for place in places(root):
        if place.role == "constant":
            continue
        value = place.held if isinstance(place.held, Tensor) else values[place.path]
        size = sum(store.estimate_bits(to_array(part)) for _, part in place.stored()) / 8
        rows.append(_row(place.path, tuple(place.aliases), place.role, of.get(place.path), Kind.of(value), size))
    return {
        **_totals(rows, round(sum(row["bytes"] for row in rows)), record.provenance),
        "tensors": rows,
        "edits": _edits(record.edits),
        "recipe": record.recipe,
        "provenance": record.provenance,
    }


def _techniques(edits: list[Edit]) -> dict[str, str]:
    """What codes each tensor, by its first path, and after it what codes the tensors in its decoder."""
    found: dict[str, str] = {}
    for technique, paths, _ in links(edits):
        path, _, inner = short_path(paths[0]).partition("/")
        found[path] = f"{found[path]}, {inner}: {technique}" if inner and path in found else str(technique)
    return found


def _edits(edits: list[Edit]) -> list[dict[str, Any]]:
    return [
        {
            "technique": str(edit.technique),
            "paths": list(edit.paths),
            "structure": edit.structure.model_dump(mode="json", exclude_defaults=True),
        }
        for edit in edits
    ]


def _row(path: str, aliases: tuple[str, ...], role: str, technique: str | None, kind: Kind, n_bytes: float) -> dict[str, Any]:
    return {
        "path": path,
        "aliases": list(aliases),
        "role": role,
        "technique": technique,
        "shape": list(kind.shape),
        "dtype": NAMES.get(kind.dtype, str(kind.dtype)),
        "original_bytes": kind.n_bytes,
        "bytes": round(n_bytes, 1),
        "bits_per_weight": round(8 * n_bytes / kind.numel, 3) if kind.numel else 0.0,
    }


def _totals(rows: list[dict[str, Any]], file_bytes: int, provenance: dict[str, Any]) -> dict[str, Any]:
    own = [row for row in rows if row["role"] != "constant"]
    decoded = sum(row["original_bytes"] for row in own)
    told = provenance.get("original_bytes")  # layers may have been replaced: then the decoded ones are not the original's
    original = told if isinstance(told, int) and told > 0 else decoded
    n_elements = sum(math.prod(row["shape"]) for row in own)
    return {
        "file_bytes": file_bytes,
        "original_bytes": original,
        "ratio": round(original / file_bytes, 2) if file_bytes else 0.0,
        "n_elements": n_elements,
        "bits_per_weight": round(8 * file_bytes / n_elements, 4) if n_elements else 0.0,
    }


def _program_bytes(manifest: Manifest) -> int:
    """By how much the program makes the compressed manifest longer."""
    without = replace(manifest, program=None)
    return len(pack(dumps(manifest.to_json()))[1]) - len(pack(dumps(without.to_json()))[1])
