"""Saving a model."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.artifact import container
from pared.artifact.body import Body
from pared.artifact.example import example_of
from pared.artifact.manifest import Manifest, dumps, loads
from pared.artifact.read import Contents
from pared.artifact.skeleton import listed, skeleton
from pared.artifact.streams import Streams
from pared.artifact.tensors import Entry, Kind, Place, check_storable, coded_in, digest, places, same_bits, to_array
from pared.errors import ArtifactError, InputError, TraceError
from pared.graph import Program, trace
from pared.graph.module import ProgramModule
from pared.record import Record, record_of
from pared.site import plain
from pared.task import to_device_of
from pared.technique import Edit


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any = None,
    store: str = "smallest",
    program: bool = True,
    *,
    edits: list[Edit] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a model to one file, which `pared.load` reads with or without the model's class.

    The file is read back before it takes its place, so that what is there decodes to the same bits. Equal models make
    equal files.

    Args:
        model: any module; compressed ones carry their edits and an example.
        path: the file; what is there stays whole if anything goes wrong.
        example: one call's arguments, from which the program is traced: a tensor, a tuple of positional ones, a dict of
            keyword ones, or (tuple, dict). Default: the one that the model carries.
        store: the entropy coder: "smallest", "fastest", or a coder's name.
        program: whether the file holds the program, without which it loads into the model's class only.
        edits: in place of those that the model carries.
        provenance: short facts to keep, as JSON can hold them.

    Raises:
        InputError: a tensor that no file can hold, a coded tensor that no edit explains, a path that cannot be written.
    """
    record = record_of(model) or Record()
    record = replace(
        record,
        edits=list(record.edits if edits is None else edits),
        example=record.example if example is None else call_of(example),
        program=record.program if example is None else None,
        provenance=dict(record.provenance if provenance is None else provenance),
    )
    container.write(path, to_bytes(model, record, store, program))


def to_bytes(model: nn.Module, record: Record, store: str = "smallest", with_program: bool = True) -> memoryview:
    """The bytes of a model's file."""
    root = model.root if isinstance(model, ProgramModule) else model
    held = places(root)
    for place in held:
        for paths, tensor in place.stored():
            check_storable(paths[0], tensor)
    twin = _plain(root)
    program = _program(model, twin, record) if with_program else None
    values = {path: place.held for place in places(twin) for path in place.paths if isinstance(place.held, Tensor)}
    values |= {path: tensor for path, tensor in program.constants.items() if path not in values} if program else {}
    entries = [replace(entry, transposed=_is_transposed(root, entry)) for entry in _entries(held, values, program)]
    by_path = {path: place for place in held for path in place.paths}
    stored: list[tuple[str, Tensor]] = []
    for entry in entries:
        if entry.path in by_path:
            stored += [(paths[0], tensor) for paths, tensor in by_path[entry.path].stored()]
        else:
            stored.append((entry.path, values[entry.path].detach()))
    manifest = Manifest(entries, record.edits, [], [], program and program.to_json(), record.recipe, record.provenance)
    _check_explained(root, manifest)
    file, contents, again = coded(manifest, stored, store)
    _check_decoded(contents, again, values)
    return file


def coded(
    manifest: Manifest, stored: Sequence[tuple[str, Tensor]], store: str
) -> tuple[memoryview, Contents, dict[str, Tensor]]:
    """The bytes of a file with these tensors, and what it gives when it is read: all come out bit for bit."""
    kinds = [Kind.of(tensor) for _, tensor in stored]
    arrays = [to_array(tensor) for _, tensor in stored]
    data = Streams([(path, array) for (path, _), array in zip(stored, arrays, strict=True)], store)
    text = _text(replace(manifest, coders=data.coders, groups=data.groups))
    file = container.wrap(Body(digest(zip(kinds, arrays, strict=True)), text, data.payloads).parts(len(data.coders)))
    contents = Contents(file, sys.maxsize, is_own=True)
    again = contents.tensors()
    for (path, tensor), read in zip(stored, again.values(), strict=True):
        if not same_bits(read, tensor):
            raise ArtifactError(f"{path} would be read as other values than those that the model holds")
    return file, contents, again


def _plain(root: nn.Module) -> nn.Module:
    try:
        return plain(root).eval()
    except Exception as error:
        raise InputError(f"{type(root).__name__} must be a module that can be copied, and is not: {error}") from error


def _entries(held: list[Place], values: Mapping[str, Tensor], program: Program | None) -> list[Entry]:
    """The tensors of the network, the program's states first and in its order; constants that no program reads are left out."""
    by_path = {path: place for place in held for path in place.paths}
    entries, done = [], set()
    for state in program.states if program else ():
        place = by_path.get(state.path)
        if state.path not in values:
            raise InputError(f"the program reads {state.path}, which the model does not hold; save with program=False")
        if place is None:
            entries.append(Entry(state.path, "constant", Kind.of(values[state.path])))
            continue
        done.add(place.path)
        aliases = tuple(path for path in place.paths if path != state.path)
        entries.append(Entry(state.path, place.role, Kind.of(values[state.path]), aliases))
    for place in held:
        if place.path not in done and place.role != "constant":
            value = place.held if isinstance(place.held, Tensor) else values[place.path]
            entries.append(Entry(place.path, place.role, Kind.of(value), tuple(place.aliases)))
    return entries


def _is_transposed(root: nn.Module, entry: Entry) -> bool:
    for path in entry.paths:
        parent, _, name = path.rpartition(".")
        owner = _module_at(root, parent)
        if isinstance(owner, nn.modules.conv._ConvTransposeNd) and name in coded_in(owner):
            return True
    return False


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = root
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module


def _check_explained(root: nn.Module, manifest: Manifest) -> None:
    """Raise an InputError unless the edits build just what the model holds."""
    read = Manifest.from_json(loads(_text(manifest)))
    if read.edits != manifest.edits:
        wrong = next(edit for edit, again in zip(manifest.edits, read.edits, strict=True) if edit != again)
        raise InputError(f"the settings or the structure of {wrong.technique} do not survive being written as JSON")
    built = listed(skeleton(read.entries, read.edits, device="meta"))
    for path, kind in listed(root).items():
        if built.get(path) != kind:
            decoder = path.partition(".parametrizations.")
            where = f"{decoder[0]}.{decoder[2].partition('.')[0]}" if decoder[1] else path
            raise InputError(
                f"{where} is held in a form that its edits do not rebuild: {path} is {kind} in the model and "
                f"{built.get(path, 'absent')} after building from shapes, settings and structure alone"
            )


def _check_decoded(contents: Contents, tensors: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Raise an ArtifactError unless the file gives every coded tensor bit for bit."""
    paths = contents.coded() & values.keys()
    tree = contents.tree(cache=False, tensors=tensors) if paths else None
    for entry in contents.manifest.entries:
        owner, _, name = entry.path.rpartition(".")
        if tree and entry.path in paths and not same_bits(getattr(tree.get_submodule(owner), name), values[entry.path]):
            raise ArtifactError(
                f"{entry.path} would be read as other values than those that the model holds; its decoder depends on more than "
                "shapes, settings and structure"
            )


def call_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an example as the user gives it."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], Mapping):
        return example[0], dict(example[1])
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def _text(manifest: Manifest) -> bytes:
    try:
        return dumps(manifest.to_json())
    except (TypeError, ValueError) as error:
        raise InputError(f"provenance must be what JSON can hold: {error}") from error


def _program(model: nn.Module, twin: nn.Module, record: Record) -> Program | None:
    """The program of the model, or None after a warning that says why there is none."""
    if isinstance(model, ProgramModule):
        return model.program
    try:
        if record.program is not None:
            try:
                return _still_valid(record.program, twin)
            except TraceError:
                if record.example is None:
                    raise
        if record.example is None:
            raise TraceError("there is no example to trace it from; pass example=")
        args, kwargs = to_device_of(twin, record.example)
        return trace(twin, args, kwargs, record.dynamic)
    except TraceError as error:
        warnings.warn(f"the file is saved without program and loads into the model's class only: {error}", stacklevel=4)
        return None


def _still_valid(program: Program, twin: nn.Module) -> Program:
    """The program of the file that the model came from, if the model still computes the same."""
    held = {path: place for place in places(twin) for path in place.paths}
    own = {path: place.held for path, place in held.items() if isinstance(place.held, Tensor)}
    missing = [state.path for state in program.states if state.path not in own and state.path not in program.constants]
    if missing:
        raise TraceError(f"the model was changed after it was loaded ({missing[0]} is gone); pass example=")
    args, kwargs = example_of(program)
    try:
        with torch.no_grad():
            expected, found = twin(*args, **kwargs), program.module(program.root(own))(*args, **kwargs)
    except Exception as error:
        raise TraceError(
            f"the program of the file that the model was loaded from could not be checked: {error}; pass example="
        ) from error
    pairs = list(zip(_tensors(expected), _tensors(found), strict=False))
    if not pairs or not all(a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in pairs):
        raise TraceError("the model computes something else than the file that it was loaded from; pass example=")
    return program


def _tensors(outputs: Any) -> list[Tensor]:
    plain_outputs = dict(outputs) if isinstance(outputs, Mapping) else outputs
    return [leaf for leaf in pytree.tree_leaves(plain_outputs) if isinstance(leaf, Tensor)]
