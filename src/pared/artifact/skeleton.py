"""The tree of plain modules that stands for a network whose class is not at hand, with decoders where tensors are coded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pared.artifact.tensors import Entry, Kind, places
from pared.errors import ArtifactError
from pared.graph.module import Holder
from pared.site import Decoded, Site, install_
from pared.technique import Chain, ChainStructure, Edit, Structure, Technique, build


def links(edits: Iterable[Edit]) -> Iterator[tuple[Technique, tuple[str, ...], Structure]]:
    """What the edits do to tensors: each decoder's technique, paths and structure, in order.

    What an edit does to modules is in the program; the tensors that a chain codes inside the new modules are listed.
    Where a path occurs twice, the module around it was replaced in between: the last one counts.
    """
    last: dict[tuple[str, ...], tuple[Technique, tuple[str, ...], Structure]] = {}
    for link in _links(edits):
        last.pop(link[1], None)
        last[link[1]] = link
    return iter(last.values())


def _links(edits: Iterable[Edit]) -> Iterator[tuple[Technique, tuple[str, ...], Structure]]:
    for edit in edits:
        if edit.technique.kind == "tensor":
            yield edit.technique, edit.paths, edit.structure
        elif isinstance(edit.technique, Chain):
            rest = cast(ChainStructure, edit.structure).rest
            for technique, inner in zip(edit.technique.techniques[1:], rest, strict=True):
                for path, fields in inner:
                    paths = tuple(f"{module}.{path}" if module else path for module in edit.paths)
                    yield technique, paths, technique.structure_type.model_validate(fields)


def skeleton(
    entries: Iterable[Entry],
    edits: Iterable[Edit],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    device: str = "cpu",
) -> nn.Module:
    """Holders with every entry at all its paths, from `tensors` by first path, and decoders built where edits say so.

    Entries without a tensor get one of their type and shape that takes no memory. An edit of a tensor that is not there
    was undone by a later edit of the module around it.
    """
    entries = list(entries)
    transposed = {path.rpartition(".")[0] for entry in entries if entry.transposed for path in entry.paths}
    root = _holder("", transposed)
    for entry in entries:
        tensor = (tensors or {}).get(entry.path)
        if tensor is None:
            tensor = torch.empty((), dtype=entry.kind.dtype, device=device).expand(entry.kind.shape)
        held = nn.Parameter(tensor, requires_grad=False) if entry.role == "parameter" else tensor
        for path in entry.paths:
            _hang(root, path, held, entry.role == "buffer", transposed)
    root.eval()
    for technique, paths, structure in links(edits):
        present = tuple(path for path in paths if _is_tensor(root, path))
        if present:
            site = Site(root, present, "tensor", (present[0],))
            with torch.no_grad():
                install_(site, build(technique, site, structure))
    return root.eval().requires_grad_(False)


class TransposedHolder(nn.modules.conv._ConvTransposeNd):
    """Holds tensors where the network has a transposed convolution, so that techniques find the axis of its channels."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def extra_repr(self) -> str:
        return ""


def _holder(path: str, transposed: set[str]) -> nn.Module:
    return TransposedHolder() if path in transposed else Holder()


def _hang(root: nn.Module, path: str, held: Tensor, persistent: bool, transposed: set[str]) -> None:
    *owners, name = path.split(".")
    module = root
    for depth, owner in enumerate(owners):
        child = module._modules.get(owner)
        if child is None:
            child = _holder(".".join(owners[: depth + 1]), transposed)
            module.add_module(owner, child)
        module = child
    if isinstance(held, nn.Parameter):
        module.register_parameter(name, held)
    else:
        module.register_buffer(name, held, persistent=persistent)


def _is_tensor(root: nn.Module, path: str) -> bool:
    """Whether an ordinary tensor hangs at the path."""
    *owners, name = path.split(".")
    module: nn.Module | None = root
    for owner in owners:
        module = module._modules.get(owner) if module is not None else None
    return module is not None and (name in module._parameters or name in module._buffers)


def listed(root: nn.Module, *, constants: bool = False) -> dict[str, Kind]:
    """Type and shape of everything that the file stores for a model, by all its paths."""
    found = {}
    for place in places(root):
        if constants or place.role != "constant":
            found.update({path: Kind.of(tensor) for paths, tensor in place.stored() for path in paths})
    return found


def set_cache_(root: nn.Module, cache: bool) -> None:
    """Let coded tensors keep what they decode to, or not; those inside other decoders never do. Forgets what was kept."""
    decoded = [module for module in root.modules() if isinstance(module, Decoded)]
    inner = {id(module) for outer in decoded for module in outer.decoder.modules()}
    for module in decoded:
        module.cache = cache and id(module) not in inner
        module.train(module.training)


def check_decoders(root: nn.Module, kinds: Mapping[str, Kind]) -> None:
    """Let every decoder check what it holds, and decode once.

    Args:
        kinds: what each coded tensor must decode to, by any of its paths.

    Raises:
        ArtifactError: a decoder finds fault with its tensors, or gives a tensor of another type or shape.
    """
    for place in places(root):
        if not isinstance(place.held, Decoded):
            continue
        for module in place.held.decoder.modules():
            check = getattr(module, "check", None)
            if callable(check):
                try:
                    check()
                except ValueError as error:
                    raise ArtifactError(f"{place.path}: {error}; the file is damaged") from error
        owner, _, name = place.path.rpartition(".")
        with torch.no_grad():
            found = Kind.of(getattr(root.get_submodule(owner), name))
        expected = next((kinds[path] for path in place.paths if path in kinds), found)
        if found != expected:
            raise ArtifactError(f"{place.path} must decode to {expected}, got {found}; the file is damaged")
