"""Loading a model, with or without its class."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pared.artifact import container, streams
from pared.artifact.body import Reader
from pared.artifact.manifest import Manifest, loads
from pared.artifact.skeleton import check_decoders, listed, set_cache_, skeleton
from pared.artifact.tensors import Kind, check_total, digest, from_array, places
from pared.collector import paused
from pared.errors import ArtifactError, InputError, ParedError
from pared.graph import Program
from pared.record import Record, attach_
from pared.site import Decoded, meta_copy

FREE_BYTES = 1 << 30
LARGEST_GROWTH = 1000


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, cache: bool = True, max_bytes: int | None = None
) -> nn.Module:
    """The model in a file.

    Nothing in the file is evaluated, imported or unpickled; sizes are checked before anything is allocated.

    Args:
        path: a file that `pared.save` wrote.
        model: an instance of the model's original class. The edits are replayed on it in place, its tensors become those
            of the file, and it is returned in the mode in which it is. Without it, a module in eval mode that runs the
            program of the file.
        cache: keep decoded tensors while in eval mode; False decodes at every call and holds the codes only.
        max_bytes: what the tensors may take, decoded; default 1 GiB and 1,000 times the size of the file.

    Raises:
        ArtifactError: the file is cut off, damaged, altered, too large or of a newer version; or it holds no program and
            there is no `model`.
        InputError: the file cannot be read, or `model` has other tensors than the file; the first that differs is named.
    """
    data = container.read(path)
    with border(path), paused():
        contents = Contents(data, max_bytes)
        if model is None:
            loaded: nn.Module = contents.module(cache)
        else:
            loaded = contents.into(model, cache)
    return loaded


@contextlib.contextmanager
def border(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a file makes go wrong becomes an ArtifactError that names the file."""
    try:
        yield
    except _Mismatch as error:
        raise InputError(f"{path} does not fit the model: {error}") from error
    except ParedError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
        raise ArtifactError(f"{path} is damaged, or was made with another version of a technique ({reason})") from error


class _Mismatch(Exception):
    """The given model is not what the file was made from."""


class Contents:
    """A file taken apart, with its sizes checked; no tensor is decoded yet.

    Args:
        file: all its bytes.
        max_bytes: as for `load`.
        is_own: it was made a moment ago, so that neither seal nor digest need be computed once more.

    Attributes:
        manifest: what the file says about itself.
        stored: path, type and shape of every stored tensor, in order.
        owners: number of the entry that each stored tensor belongs to.
        payloads: number of the coder and bytes of every stream.
        manifest_bytes: of the compressed manifest.
    """

    def __init__(self, file: bytes | memoryview, max_bytes: int | None = None, is_own: bool = False) -> None:
        self.max_bytes = FREE_BYTES + LARGEST_GROWTH * len(file) if max_bytes is None else max_bytes
        self.is_own = is_own
        reader = Reader(container.unwrap(memoryview(file)), is_own)
        self.digest = reader.digest
        self.manifest_bytes = reader.manifest_bytes
        self.manifest_size = reader.size
        self.manifest = Manifest.from_json(loads(reader.manifest))
        entries = self.manifest.entries
        check_total((entry.kind for entry in entries), self.max_bytes)
        self._skeleton = skeleton(entries, self.manifest.edits, device="meta")
        by_path = {path: place for place in places(self._skeleton) for path in place.paths}
        self._first = {path: place.path for path, place in by_path.items()}
        self.stored: list[tuple[str, Kind]] = []
        self.owners: list[int] = []
        for number, entry in enumerate(entries):
            parts = [(paths[0], Kind.of(tensor)) for paths, tensor in by_path[entry.path].stored()]
            self.stored += parts
            self.owners += [number] * len(parts)
        kinds = [kind for _, kind in self.stored]
        check_total(kinds, self.max_bytes)
        streams.check_groups(kinds, self.manifest.groups)
        self.members = streams.members_of([kind.numel for kind in kinds], self.manifest.groups)
        self.payloads = reader.streams(len(self.members), len(self.manifest.coders))

    def coded(self) -> set[str]:
        """Paths of the entries that are held in coded form."""
        return {path for place in places(self._skeleton) if isinstance(place.held, Decoded) for path in place.paths}

    def arrays(self) -> list[np.ndarray]:
        """The carriers of all stored tensors, in order."""
        paths, kinds = [path for path, _ in self.stored], [kind for _, kind in self.stored]
        return streams.decode(self.payloads, kinds, paths, self.manifest.coders, self.manifest.groups)

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by its path, checked against the digest."""
        arrays = self.arrays()
        if not self.is_own and digest((kind, array) for (_, kind), array in zip(self.stored, arrays, strict=True)) != self.digest:
            raise ArtifactError("the tensors decode to others than those that were saved: their sha256 is another one")
        return {path: from_array(array, kind) for (path, kind), array in zip(self.stored, arrays, strict=True)}

    def tree(self, cache: bool = True, tensors: dict[str, Tensor] | None = None) -> nn.Module:
        """Plain modules that hold every tensor of the network at its paths, coded ones with their decoders."""
        tensors = self.tensors() if tensors is None else tensors
        coded = self.coded()
        own = {entry.path: tensors[self._first[entry.path]] for entry in self.manifest.entries if entry.path not in coded}
        root = skeleton(self.manifest.entries, self.manifest.edits, own)
        for place in places(root):
            if isinstance(place.held, Decoded):
                for (path, *_), slot in place.stored():
                    _check_slot(path, slot, tensors[path])
                    slot.data = tensors[path]
        set_cache_(root, cache)
        check_decoders(root, self._kinds())
        return root

    def module(self, cache: bool = True) -> nn.Module:
        """A module that runs the program of the file."""
        program = self.program()
        if program is None:
            raise ArtifactError("the file holds no program; load it into the model's class: pared.load(path, MyNet())")
        root = self.tree(cache)
        self._fill_constants(program, root)
        loaded = program.module(root)
        attach_(loaded, self.record(program))
        return loaded

    def into(self, model: nn.Module, cache: bool = True) -> nn.Module:
        """The given model, with the edits replayed and the tensors of the file."""
        self._check_fit(model)
        tensors = self.tensors()
        program = self.program()
        for edit in self.manifest.edits:
            edit.replay_(model)
        values = self._everywhere(tensors)
        with torch.no_grad():
            for place in places(model):
                if place.role == "constant":
                    continue
                for (path, *_), slot in place.stored():
                    slot.copy_(values[path])
                if place.role == "buffer" and isinstance(place.held, Decoded):
                    place.held.requires_grad_(False)  # batch norm, for one, takes no gradient for its statistics
        set_cache_(model, cache)
        check_decoders(model, self._kinds())
        if program is not None:
            constants = {entry.path for entry in self.manifest.entries if entry.role == "constant"}
            program.constants.update({path: tensors[path] for path in constants})
        attach_(model, self.record(program))
        return model

    def program(self) -> Program | None:
        row = self.manifest.program
        return None if row is None else Program.from_json(row, self.max_bytes)

    def record(self, program: Program | None) -> Record:
        manifest = self.manifest
        return Record(list(manifest.edits), None, manifest.recipe, dict(manifest.provenance), None, program)

    def _fill_constants(self, program: Program, root: nn.Module) -> None:
        held = {path: place.held for place in places(root) for path in place.paths}
        for state in program.states:
            value = held.get(state.path)
            if value is None:
                raise ArtifactError(f"the program reads {state.path}, which the file does not hold; it is damaged")
            if state.role == "constant" and isinstance(value, Tensor):
                program.constants[state.path] = value

    def _kinds(self) -> dict[str, Kind]:
        return {path: entry.kind for entry in self.manifest.entries for path in entry.paths}

    def _everywhere(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors by all the paths at which the model may hold them."""
        return {path: tensors[paths[0]] for place in places(self._skeleton) for paths, _ in place.stored() for path in paths}

    def _check_fit(self, model: nn.Module) -> None:
        """Replay the edits on a copy without values and compare all tensors; the model itself is not touched."""
        twin = meta_copy(model)
        for edit in self.manifest.edits:
            try:
                edit.replay_(twin)
            except Exception as error:
                raise _Mismatch(f"{edit.technique.name} cannot be applied at {edit.paths[0]} ({error})") from error
        found, expected = listed(twin), listed(self._skeleton)
        for path, kind in expected.items():
            if path not in found:
                raise _Mismatch(f"the file holds {path} ({kind}), which the model lacks")
            if found[path] != kind:
                raise _Mismatch(f"{path} is {kind} in the file and {found[path]} in the model")
        for path, kind in found.items():
            if path not in expected:
                raise _Mismatch(f"the model holds {path} ({kind}), which the file lacks")


def _check_slot(path: str, slot: Tensor, value: Tensor) -> None:
    if Kind.of(slot) != Kind.of(value):
        raise ArtifactError(f"{path} must be {Kind.of(slot)}, the file holds {Kind.of(value)}; it is damaged")
