"""What a file says about itself: tensors, edits, coders, program; to compact JSON and back, with every element checked.

    tensors     [[names, ...], [owner, ...], [which names, ...]] in the order of the data: owner "conv1" with the names
                ["weight", "bias"]; "!" before a name is a buffer, "~" a constant of the program; ":f16" after it is a
                type other than f32
    shapes      one per tensor, [20, 1, 5, 5]; 0 for [n], where n is the first size of the tensor before
    aliases     [[tensor, path, ...], ...]    further paths of shared tensors
    transposed  [tensor, ...]                 coded weights of transposed convolutions
    techniques  [[name, {setting: value}?], ...]; a chain is [[technique, ...]] of numbers in this list
    edits       [[technique, structure or 0, target, ...], ...]; a target is the number of a tensor, [number, path
                inside its decoder], a path, or a list of paths; in paths, "fc.weight/codes" stands for
                "fc.parametrizations.weight.0.decoder.codes"
    coders      the names of the entropy coders used
    groups      [[stored tensor, steps to the next, ...], ...] that are coded as one
    program     as `Program.to_json`, with the number of its states, which are the first tensors, in place of the states
    recipe, provenance

Settings and structures leave out what has its default value. Keys without content are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from pydantic import ValidationError

from pared import registry
from pared.artifact.tensors import DTYPES, NAMES, Entry, Kind, Role, inside
from pared.errors import ArtifactError, InputError
from pared.graph.program import check_paths
from pared.technique import Chain, ChainStructure, Edit, Structure, Technique, explain, parse

KEYS = (
    "tensors", "shapes", "aliases", "transposed", "techniques", "edits", "coders", "groups", "program", "recipe", "provenance",
)  # fmt: skip
LARGEST_SIZE = 1 << 48
_OF_TENSORS: dict[str, Any] = {"tensors": [[], [], []], "shapes": [], "aliases": [], "transposed": []}
_MARKS: dict[Role, str] = {"parameter": "", "buffer": "!", "constant": "~"}
_ROLES: dict[str, Role] = {"!": "buffer", "~": "constant"}
_LONGEST_CHAIN = 16


@dataclass
class Manifest:
    """The contents of a file without its data.

    Args:
        entries: the tensors of the network; the states of the program first.
        edits: what was done, in order.
        coders: names of the entropy coders that the data uses.
        groups: numbers of stored tensors that are coded as one.
        program: the JSON form of the program, or None.
        recipe: YAML text.
        provenance: short facts.
    """

    entries: list[Entry] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    coders: list[str] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    program: list[Any] | None = None
    recipe: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        techniques = _TechniqueTable()
        found = {
            "tensors": _columns(self.entries),
            "shapes": _shapes(self.entries),
            "aliases": [[number, *entry.aliases] for number, entry in enumerate(self.entries) if entry.aliases],
            "transposed": [number for number, entry in enumerate(self.entries) if entry.transposed],
            "edits": _edit_rows(self.edits, techniques, self.entries),
            "techniques": techniques.rows,
            "coders": self.coders,
            "groups": [_steps(group) for group in self.groups],
            "program": _without_states(self.program),
            "recipe": self.recipe,
            "provenance": self.provenance,
        }
        return {key: found[key] for key in KEYS if found[key]}

    @classmethod
    def from_json(cls, obj: Any) -> Manifest:
        """The manifest that `to_json` gave; ArtifactError says what is wrong with it."""
        if not isinstance(obj, dict) or set(obj) - set(KEYS):
            unknown = sorted(set(obj) - set(KEYS))[:1] if isinstance(obj, dict) else [type(obj).__name__]
            raise ArtifactError(f"a manifest must be a dict of {', '.join(KEYS)}, found {unknown[0]!r:.60}")
        entries = _entries(*(obj.get(key, default) for key, default in _OF_TENSORS.items()))
        techniques = _techniques(obj.get("techniques", []))
        edits = [edit for row in _list(obj.get("edits", []), "edits") for edit in _edits(row, techniques, entries)]
        coders = [_text(name, "a coder") for name in _list(obj.get("coders", []), "coders")]
        groups = [_members(group) for group in _list(obj.get("groups", []), "groups")]
        program = _with_states(obj["program"], entries) if "program" in obj else None
        recipe = _text(obj["recipe"], "the recipe") if "recipe" in obj else None
        provenance = obj.get("provenance", {})
        if not isinstance(provenance, dict):
            raise ArtifactError(f"provenance must be a dict, found {_show(provenance)}")
        return cls(entries, edits, coders, groups, program, recipe, provenance)


def dumps(obj: Any) -> bytes:
    """The shortest JSON of an object, in UTF-8."""
    return json.dumps(obj, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def loads(text: bytes) -> Any:
    """The object of a JSON text; ArtifactError if it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the manifest must be JSON and is not; the file is damaged") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# -- tensors ---------------------------------------------------------------------------------------------------------------


def _columns(entries: Sequence[Entry]) -> list[Any]:
    groups: list[tuple[str, list[str]]] = []
    for entry in entries:
        owner, _, name = entry.path.rpartition(".")
        marked = _MARKS[entry.role] + name
        if entry.kind.dtype != torch.float32 or ":" in name:
            marked += ":" + NAMES[entry.kind.dtype]
        if groups and groups[-1][0] == owner:
            groups[-1][1].append(marked)
        else:
            groups.append((owner, [marked]))
    patterns: dict[tuple[str, ...], int] = {}
    which = [patterns.setdefault(tuple(names), len(patterns)) for _, names in groups]
    return [[list(names) for names in patterns], [owner for owner, _ in groups], which]


def _shapes(entries: Sequence[Entry]) -> list[Any]:
    rows: list[Any] = []
    before: tuple[int, ...] = ()
    for entry in entries:
        shape = entry.kind.shape
        rows.append(0 if before and shape == before[:1] else list(shape))
        before = shape
    return rows


def _entries(columns: Any, shapes: Any, aliases: Any, transposed: Any) -> list[Entry]:
    patterns, owners, which = _list(columns, "tensors", 3)
    named = [
        [_named(_text(name, "the name of a tensor")) for name in _list(names, "names")]
        for names in _list(patterns, "patterns of names")
    ]
    owners = _list(owners, "owners of tensors")
    rows = _list(shapes, "shapes")
    heads: list[tuple[str, Role, torch.dtype]] = []
    for owner, number in zip(owners, _list(which, "patterns of owners", len(owners)), strict=True):
        prefix = _text(owner, "the owner of a tensor")
        for name, role, dtype in named[_int(number, "a pattern", len(named))]:
            heads.append((f"{prefix}.{name}" if prefix else name, role, dtype))
        if len(heads) > len(rows):
            break
    if len(heads) != len(rows):
        raise ArtifactError(f"as many shapes as tensors must be listed, found {len(rows)} shapes")
    further: dict[int, tuple[str, ...]] = {}
    for row in _list(aliases, "aliases"):
        number, *paths = _list(row, "an alias") or [None]
        further[_int(number, "a shared tensor", len(heads))] = tuple(_text(path, "a path") for path in paths)
    turned = {_int(number, "a transposed weight", len(heads)) for number in _list(transposed, "transposed weights")}
    entries = []
    before: tuple[int, ...] = ()
    for number, ((path, role, dtype), row) in enumerate(zip(heads, rows, strict=True)):
        before = _shape(row, before)
        entries.append(Entry(path, role, Kind(dtype, before), further.get(number, ()), number in turned))
    check_paths([path for entry in entries for path in entry.paths])
    return entries


def _named(marked: str) -> tuple[str, Role, torch.dtype]:
    role = _ROLES.get(marked[:1], "parameter")
    name = marked if role == "parameter" else marked[1:]
    if ":" not in name:
        return name, role, torch.float32
    name, _, dtype = name.rpartition(":")
    if dtype not in DTYPES:
        raise ArtifactError(f"the type of a tensor must be one of {', '.join(DTYPES)}, found {dtype[:40]!r}")
    return name, role, DTYPES[dtype]


def _shape(row: Any, before: tuple[int, ...]) -> tuple[int, ...]:
    if type(row) is int and row == 0 and before:
        return before[:1]
    sizes = _list(row, "a shape")
    if len(sizes) > 64:
        raise ArtifactError(f"a tensor may have at most 64 axes, found {len(sizes)}")
    return tuple(_int(size, "the size of an axis", LARGEST_SIZE) for size in sizes)


def _steps(group: Sequence[int]) -> list[int]:
    return [number - before for before, number in pairwise([0, *group])]


def _members(steps: Any) -> list[int]:
    return list(accumulate(_int(step, "a step in a group", LARGEST_SIZE) for step in _list(steps, "a group")))


# -- techniques and edits ------------------------------------------------------------------------------------------------------


class _TechniqueTable:
    """Techniques as rows, equal ones once."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self._numbers: dict[bytes, int] = {}

    def number(self, technique: Technique) -> int:
        if isinstance(technique, Chain):
            row: list[Any] = [[self.number(link) for link in technique.techniques]]
        else:
            if registry.get(technique.name) is not type(technique):
                raise InputError(
                    f"{type(technique).__name__} must be the technique that the registry knows as {technique.name}, and is "
                    "another one; give it a file of its own, or an entry point of the group pared.techniques"
                )
            settings = technique.model_dump(mode="json", exclude_defaults=True)
            row = [technique.name, settings] if settings else [technique.name]
        key = dumps(row)
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            self.rows.append(row)
        return self._numbers[key]


def _techniques(rows: Any) -> list[Technique]:
    found: list[Technique] = []
    for number, row in enumerate(_list(rows, "techniques")):
        name, *rest = _list(row, "a technique") or [None]
        if isinstance(name, list) and not rest:
            members = [found[_int(link, "a link of a chain", number)] for link in name]
            if not 0 < len(members) <= _LONGEST_CHAIN or any(isinstance(link, Chain) for link in members):
                raise ArtifactError(f"a chain must have 1 to {_LONGEST_CHAIN} links which are no chains, found {len(members)}")
            found.append(Chain(*members))
            continue
        settings = rest[0] if rest else {}
        if len(rest) > 1 or not isinstance(settings, dict):
            raise ArtifactError(f"a technique must be a name and its settings, found {_show(row)}")
        found.append(parse(registry.get(_text(name, "the name of a technique")), settings, "in the file"))
    return found


def _edit_rows(edits: Sequence[Edit], techniques: _TechniqueTable, entries: Sequence[Entry]) -> list[list[Any]]:
    numbers = {entry.paths: number for number, entry in enumerate(entries)}
    first = {entry.path: number for number, entry in enumerate(entries)}
    rows: list[list[Any]] = []
    for edit in edits:
        head = [techniques.number(edit.technique), _bare(edit.technique, edit.structure) or 0]
        if not rows or rows[-1][:2] != head:
            rows.append(head)
        rows[-1].append(_target(edit, numbers, first, entries))
    return rows


def _target(edit: Edit, numbers: dict[tuple[str, ...], int], first: dict[str, int], entries: Sequence[Entry]) -> Any:
    paths = edit.paths
    if edit.technique.kind == "tensor" and paths in numbers:
        return numbers[paths]
    short = short_path(paths[0])
    coded, slash, rest = short.partition("/")
    number = first.get(coded) if slash and short[0] != "=" else None
    if number is not None and paths == _inside(entries[number], rest):
        return [number, rest]
    return short if len(paths) == 1 else [short_path(path) for path in paths]


def _inside(entry: Entry, rest: str) -> tuple[str, ...]:
    return tuple(inside(path) + long_path(rest) for path in entry.paths)


_DECODER = re.compile(r"parametrizations\.([^.]+)\.0\.decoder\.")


def short_path(path: str) -> str:
    """The path with every step into a decoder written as a slash; "=" before a path that has slashes of its own."""
    return "=" + path if "/" in path or path.startswith("=") else _DECODER.sub(r"\1/", path)


def long_path(path: str) -> str:
    """The inverse of `short_path`."""
    if path.startswith("="):
        return path[1:]
    *owners, name = path.split("/")
    return "".join(map(inside, owners)) + name


def _edits(row: Any, techniques: list[Technique], entries: list[Entry]) -> list[Edit]:
    items = _list(row, "an edit")
    if len(items) < 3:
        raise ArtifactError(f"an edit must be a technique, a structure and targets, found {_show(row)}")
    technique = techniques[_int(items[0], "the technique of an edit", len(techniques))]
    structure = _structure(technique, None if items[1] == 0 else items[1])
    return [Edit(technique, _paths(target, entries), structure) for target in items[2:]]


def _paths(target: Any, entries: list[Entry]) -> tuple[str, ...]:
    if isinstance(target, str):
        return (long_path(target),)
    if type(target) is int:
        return entries[_int(target, "the target of an edit", len(entries))].paths
    if not _list(target, "the target of an edit"):
        raise ArtifactError("an edit must have a target, found an empty list")
    if type(target[0]) is int and len(target) == 2:
        return _inside(entries[_int(target[0], "the target of an edit", len(entries))], _text(target[1], "a path"))
    return tuple(long_path(_text(path, "a path")) for path in target)


def _bare(technique: Technique, structure: Structure) -> Any:
    """A structure without what has its default value; of a chain [first, [[path, structure?], ...], ...]."""
    if not isinstance(technique, Chain):
        return structure.model_dump(mode="json", exclude_defaults=True)
    chained = cast(ChainStructure, structure)
    row: list[Any] = [_bare(technique.first, technique.first.structure_type.model_validate(chained.first))]
    for link, places in zip(technique.techniques[1:], chained.rest, strict=True):
        rows = [[short_path(path), _bare(link, link.structure_type.model_validate(fields))] for path, fields in places]
        row.append([pair if pair[1] else pair[:1] for pair in rows])
    return row


def _structure(technique: Technique, row: Any) -> Structure:
    if isinstance(technique, Chain):
        first, *rest = _list(row, "the structure of a chain", len(technique.techniques))
        links = []
        for link, places in zip(technique.techniques[1:], rest, strict=True):
            pairs = []
            for place in _list(places, "the structures of a link"):
                path, *fields = _list(place, "a structure in a chain") or [None]
                inner = _structure(link, fields[0] if fields else None)
                pairs.append((long_path(_text(path, "a path")), inner.model_dump()))
            links.append(tuple(pairs))
        return ChainStructure(first=_structure(technique.first, first).model_dump(), rest=tuple(links))
    if row is not None and not isinstance(row, dict):
        raise ArtifactError(f"a structure must be a dict, found {_show(row)}")
    try:
        return technique.structure_type.model_validate(row or {})
    except ValidationError as error:
        raise ArtifactError(explain(technique.structure_type, error, "in the file")) from error


# -- program ---------------------------------------------------------------------------------------------------------------


def _without_states(program: list[Any] | None) -> list[Any] | None:
    return program and [*program[:2], sum(len(program[2][0][which]) for which in program[2][2]), *program[3:]]


def _with_states(row: Any, entries: Sequence[Entry]) -> list[Any]:
    program = _list(row, "the program")
    if len(program) < 3:
        raise ArtifactError(f"the program must have 6 elements or more, found {len(program)}")
    n_states = _int(program[2], "the number of states", len(entries) + 1)
    names, owners = [], []
    for entry in entries[:n_states]:
        owner, _, name = entry.path.rpartition(".")
        names.append([_MARKS[entry.role] + name])
        owners.append(owner)
    return [*program[:2], [names, owners, list(range(n_states))], *program[3:]]


# -- checks ----------------------------------------------------------------------------------------------------------------


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _list(value: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ArtifactError(f"{what} must be a list{f' of {length}' if length is not None else ''}, found {_show(value)}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ArtifactError(f"{what} must be a text, found {_show(value)}")
    return value


def _int(value: Any, what: str, below: int) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ArtifactError(f"{what} must be a whole number below {below}, found {_show(value)}")
    return value
