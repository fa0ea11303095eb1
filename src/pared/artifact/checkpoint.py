"""A checkpoint as it is, in a smaller file, and back: every tensor bit for bit, floats and integers of any type."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from pared.artifact import container
from pared.artifact.manifest import Manifest
from pared.artifact.read import Contents, border
from pared.artifact.skeleton import skeleton
from pared.artifact.tensors import Entry, Kind, check_storable, places
from pared.artifact.write import coded
from pared.errors import ArtifactError, InputError
from pared.site import Decoded

_METADATA, _NAMES = "checkpoint", "names"


def pack(source: str | os.PathLike[str], target: str | os.PathLike[str], store: str = "smallest") -> None:
    """Write the tensors of a safetensors file, and its metadata, as a `.pared` file.

    Raises:
        InputError: the source is no safetensors file, or holds a tensor that no file can hold.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(source, "pt") as file:
            metadata: dict[str, Any] = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118  a handle is no mapping
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{source} must be a safetensors file, but it cannot be read: {error}") from error
    if not tensors:
        raise InputError(f"{source} must hold at least one tensor, found none")
    provenance: dict[str, Any] = {_METADATA: metadata}
    try:
        tree = _tree(tensors)
    except KeyError:  # names that no module could have: they are kept beside numbers
        provenance[_NAMES] = list(tensors)
        tree = _tree({f"tensor.{number}": tensor for number, tensor in enumerate(tensors.values())})
    stored = [(place.path, place.held) for place in places(tree) if isinstance(place.held, Tensor)]
    for path, tensor in stored:
        check_storable(path, tensor)
    entries = [Entry(path, "buffer", Kind.of(tensor)) for path, tensor in stored]
    container.write(target, coded(Manifest(entries, provenance=provenance), stored, store)[0])


def _tree(tensors: dict[str, Tensor]) -> nn.Module:
    return skeleton([Entry(name, "buffer", Kind.of(tensor)) for name, tensor in tensors.items()], [], tensors)


def unpack(source: str | os.PathLike[str], target: str | os.PathLike[str], max_bytes: int | None = None) -> None:
    """Write the tensors of a `.pared` file as safetensors; coded ones as they decode, shared ones once.

    Raises:
        ArtifactError: the file is cut off, damaged or altered.
        InputError: a file cannot be read or written.
    """
    from safetensors.torch import save_file

    data = container.read(source)
    tensors: dict[str, Tensor] = {}
    with border(source):
        contents = Contents(data, max_bytes)
        if contents.coded():
            for place in places(contents.tree()):
                if place.role != "constant":
                    held = place.held() if isinstance(place.held, Decoded) else place.held
                    tensors[place.path] = held.detach().contiguous()
        else:
            own = contents.tensors()
            tensors = {entry.path: own[entry.path] for entry in contents.manifest.entries if entry.role != "constant"}
        metadata = contents.manifest.provenance.get(_METADATA, {})
        names = contents.manifest.provenance.get(_NAMES, list(tensors))
        known = isinstance(metadata, dict) and isinstance(names, list)
        if not known or not all(isinstance(text, str) for text in [*metadata.values(), *names]) or len(set(names)) != len(tensors):
            raise ArtifactError("a checkpoint must have texts as metadata and a name for each tensor; the file is damaged")
        if _NAMES in contents.manifest.provenance:
            numbered = sorted(tensors, key=lambda path: int(path.rpartition(".")[2]))
            tensors = {name: tensors[path] for name, path in zip(names, numbered, strict=True)}
    try:
        save_file(tensors, target, dict(metadata) or None)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error}") from error
