"""Channels that live or die together, and their removal: tensors get shorter, sizes in the modules follow."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.errors import InputError
from pared.settings import Structure

Owners = dict[str, list[tuple[str, str]]]
"""For every path of a tensor, all (module, name) at which the same tensor is held."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Where channels of a group lie along one axis of one tensor.

    Args:
        path: of the tensor, from the root.
        axis: which of its axes.
        channel: for every position along the axis the number of the channel, -1 where it belongs to none of the group.
    """

    path: str
    axis: int
    channel: np.ndarray


@dataclass(frozen=True)
class Mend:
    """A size that a module keeps as a number and that follows when channels go.

    Args:
        module: path.
        attribute: its name there.
        place: which of its numbers, if it is a tuple or list.
        per_channel: how much it falls with every channel; None: it falls in proportion to the group.
    """

    module: str
    attribute: str
    place: int | None
    per_channel: int | None


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can be removed one by one, each from all the tensors at once.

    Args:
        name: path of the module that makes them.
        n: how many there are.
        slices: where they lie.
        mends: sizes in the modules that follow.
        whole: they are whole blocks (attention heads, groups of a convolution) of an axis on which another group lies too.
        rescaled: rows (path, axis, positions) to be multiplied with sqrt(kept / n): what feeds an attention whose scale
            is taken from the size of its heads.
    """

    name: str
    n: int
    slices: tuple[Slice, ...]
    mends: tuple[Mend, ...] = ()
    whole: bool = False
    rescaled: tuple[tuple[str, int, tuple[int, ...]], ...] = ()

    def gone(self, structure: CutStructure) -> np.ndarray:
        """Which channels a structure removes, in the coordinates of this group: a mask of n."""
        found = np.zeros(self.n, bool)
        places = {(piece.path, piece.axis): piece.channel for piece in self.slices}
        for marks, keys in structure.removed:
            for path, axis in keys:
                channels = places[path, axis][positions_of(marks)]
                found[channels[channels >= 0]] = True
        return found


class CutStructure(Structure):
    """What goes: positions with the tensors and axes from which they go; and the sizes that follow.

    Positions are marked by bits, the lowest first, as base64.

    Args:
        removed: [positions, [[path, axis], ...]] in the coordinates of the tensors before the cut.
        sizes: [module, attribute, new value].
        scales: [path, axis, positions before the cut, factor].
    """

    removed: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    sizes: tuple[tuple[str, str, int | tuple[int, ...]], ...] = ()
    scales: tuple[tuple[str, int, str, float], ...] = ()


def marks_of(positions: np.ndarray) -> str:
    """Ascending positions as text."""
    bits = np.zeros(int(positions[-1]) + 1 if len(positions) else 0, bool)
    bits[positions] = True
    return base64.b64encode(np.packbits(bits, bitorder="little").tobytes()).decode()


def positions_of(marks: str) -> np.ndarray:
    """The inverse of `marks_of`.

    Raises:
        InputError: the text is none that it gives.
    """
    try:
        data = base64.b64decode(marks, validate=True)
    except ValueError as error:
        raise InputError(f"positions must be bits in base64, got {marks[:40]!r}; the file is damaged") from error
    return np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))


class Cut(nn.Module):
    """The removal itself; called with a network, it changes it in place and gives a function that takes it back."""

    def __init__(self, structure: CutStructure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, root: nn.Module) -> Callable[[], None]:
        return cut_(root, self.structure)


class Coordinates:
    """Which positions of every axis are still there, while groups found in one analysis are removed one after another."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, int], np.ndarray] = {}
        self._gone: dict[str, np.ndarray] = {}

    def structure(self, group: Group, gone: np.ndarray, model: nn.Module) -> CutStructure:
        """What removing these channels (a mask over the group's) means for the model as it is now."""
        positions: dict[str, list[tuple[str, int]]] = {}
        for piece in group.slices:
            key = piece.path, piece.axis
            left = self._left.setdefault(key, np.arange(len(piece.channel)))
            channel = piece.channel[left]
            going = (channel >= 0) & gone[channel]
            if going.any():
                positions.setdefault(marks_of(np.flatnonzero(going)), []).append(key)
        first = self._gone.setdefault(group.name, np.zeros(group.n, bool))
        n_before, n_gone = group.n - int(first.sum()), int((gone & ~first).sum())
        self._gone[group.name] = first | gone
        sizes: dict[tuple[str, str], Any] = {}
        for mend in group.mends:
            owner = model.get_submodule(mend.module)
            value = sizes.get((mend.module, mend.attribute), getattr(owner, mend.attribute))
            old = value if mend.place is None else value[mend.place]
            new = old * (n_before - n_gone) // n_before if mend.per_channel is None else old - mend.per_channel * n_gone
            whole = new if mend.place is None else (*value[: mend.place], new, *value[mend.place + 1 :])
            sizes[mend.module, mend.attribute] = whole
        factor = ((n_before - n_gone) / n_before) ** 0.5
        scales = []
        for path, axis, rows in group.rescaled:
            now = np.flatnonzero(np.isin(self._left[path, axis], rows))
            scales.append((path, axis, marks_of(now), factor))
        for marks, keys in positions.items():
            for key in keys:
                self._left[key] = np.delete(self._left[key], positions_of(marks))
        return CutStructure(
            removed=tuple((marks, tuple(keys)) for marks, keys in positions.items()),
            sizes=tuple((module, name, value) for (module, name), value in sizes.items()),
            scales=tuple(scales),
        )


def cut_(root: nn.Module, structure: CutStructure, owners: Owners | None = None) -> Callable[[], None]:
    """Remove, in place. The function that comes back undoes it.

    Args:
        owners: `owners_of(root)`, where many cuts follow one another.

    Raises:
        InputError: a tensor is not there, is coded already, or has no such position.
    """
    undo: list[Callable[[], None]] = []
    changed: set[str] = set()
    owners = owners_of(root) if owners is None else owners
    for path, axis, marks, factor in structure.scales:
        value = _plain(root, path).detach().clone()
        rows = torch.as_tensor(_checked(positions_of(marks), value, axis, path), device=value.device)
        value.index_copy_(axis, rows, value.index_select(axis, rows) * factor)
        _replace_(root, path, value, owners, undo)
    for marks, keys in structure.removed:
        for path, axis in keys:
            value = _plain(root, path)
            positions = _checked(positions_of(marks), value, axis, path)
            stays = np.delete(np.arange(value.shape[axis]), positions)
            if not len(stays):
                raise InputError(f"a channel at least must stay on axis {axis} of {path}; all would be removed")
            index = torch.as_tensor(stays, device=value.device)
            _replace_(root, path, value.detach().index_select(axis, index), owners, undo)
            changed.update(owner for owner, _ in owners[path])
    for path, attribute, size in structure.sizes:
        module = root.get_submodule(path)
        _set_(module, attribute, size, undo)
        changed.add(path)
    for path in changed:
        _follow_(root.get_submodule(path), undo)

    def take_back() -> None:
        for step in reversed(undo):
            step()

    return take_back


def _checked(positions: np.ndarray, value: Tensor, axis: int, path: str) -> np.ndarray:
    if not 0 <= axis < value.ndim or not len(positions) or positions[-1] >= value.shape[axis] or len(positions) > value.shape[axis]:
        raise InputError(f"channels cannot be removed from axis {axis} of {path}, whose shape is {tuple(value.shape)}")
    return positions


def owners_of(root: nn.Module) -> Owners:
    """For every path of a tensor, all (module, name) at which the same tensor is held."""
    by_id: dict[int, list[tuple[str, str]]] = {}
    paths: list[tuple[str, int]] = []
    for prefix, module in root.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                by_id.setdefault(id(tensor), []).append((prefix, name))
                paths.append((f"{prefix}.{name}" if prefix else name, id(tensor)))
    return {path: by_id[key] for path, key in paths}


def _plain(root: nn.Module, path: str) -> Tensor:
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    if parametrize.is_parametrized(owner, name):
        raise InputError(f"{path} is coded already; channels must be removed before tensors are coded")
    value: Tensor | None = owner._parameters.get(name)
    value = owner._buffers.get(name) if value is None else value
    if value is None:
        raise InputError(f"channels are removed from {path}, which the model does not have; use the class of the file")
    return value


def _replace_(
    root: nn.Module, path: str, value: Tensor, owners: Owners, undo: list[Callable[[], None]]
) -> None:
    old = _plain(root, path)
    new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for prefix, name in owners[path]:
        module = root.get_submodule(prefix)
        held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        held[name] = new
        undo.append(_setter(held, name, old))


def _setter(held: dict[str, Any], name: str, old: Any) -> Callable[[], None]:
    return lambda: held.__setitem__(name, old)


def _set_(module: nn.Module, attribute: str, value: Any, undo: list[Callable[[], None]]) -> None:
    old = getattr(module, attribute)
    if isinstance(old, list | torch.Size) and not isinstance(value, type(old)):
        value = type(old)(value)
    if old != value:
        setattr(module, attribute, value)
        undo.append(lambda: setattr(module, attribute, old))


def _follow_(module: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Sizes that torch's own layers keep, read off their tensors."""
    for attribute, value in sizes_of(module):
        _set_(module, attribute, value, undo)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
        undo.append(module._init_flat_weights)


def sizes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The sizes that a layer of torch (or of a subclass) keeps, as its tensors have them now."""
    weight = module._parameters.get("weight")
    shape = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, nn.modules.conv._ConvNd) and shape:
        turned = isinstance(module, nn.modules.conv._ConvTransposeNd)
        groups = module.groups
        outer, inner = (shape[1] * groups, shape[0]) if turned else (shape[0], shape[1] * groups)
        yield from (("out_channels", outer), ("in_channels", inner))
    elif isinstance(module, nn.Linear) and shape:
        yield from (("out_features", shape[0]), ("in_features", shape[1]))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = [t for t in (weight, module._buffers.get("running_mean")) if t is not None]
        if held:
            yield "num_features", held[0].shape[0]
    elif isinstance(module, nn.GroupNorm) and shape:
        yield "num_channels", shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and shape:
        yield "normalized_shape", shape
    elif isinstance(module, nn.Embedding) and shape:
        yield from (("num_embeddings", shape[0]), ("embedding_dim", shape[1]))
    elif isinstance(module, nn.PReLU) and shape:
        yield "num_parameters", shape[0]
    elif isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        first, second = module._parameters["weight_ih_l0"], module._parameters["weight_hh_l0"]
        if first is not None and second is not None:
            yield from (("input_size", first.shape[1]), ("hidden_size", first.shape[0] // gates))
            if module.proj_size:
                yield "proj_size", second.shape[1]
    elif isinstance(module, nn.RNNCellBase):
        yield from (("input_size", module.weight_ih.shape[1]), ("hidden_size", module.weight_hh.shape[1]))
