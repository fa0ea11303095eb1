"""Coupled channel groups of any network: found on its graph, checked by cutting them and running it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.cut import Coordinates, Cut, Group, Slice, cut_, owners_of
from pared.errors import ParedError
from pared.graph.axes import Axes
from pared.graph.call import PLACES
from pared.graph.cutting import ATTENTION, as_program, cut_program, difference, held, left
from pared.graph.ids import Factors
from pared.graph.load import Axis, Load
from pared.graph.module import ProgramModule
from pared.graph.operators import Ref, find
from pared.graph.program import Node, Program
from pared.graph.provenance import Provenance
from pared.graph.sizes import Sizes
from pared.graph.trace import trace
from pared.site import duplicate

TOLERANCE = 1e-4
"""Relative to the largest output: how far the cut model may be from its cut program."""
MAX_TRIALS = 40


@dataclass(frozen=True)
class Frozen:
    """Channels that stay, and why."""

    name: str
    n: int
    reason: str
    paths: tuple[str, ...]


@final
class Channels:
    """The channel groups of a network.

    Args:
        model: in eval mode; it is not changed.
        args, kwargs: an example call.
        rewrite: groups whose sizes the model's code computes for itself may be cut too: the model then runs as its
            program, no longer as its code.

    `groups` can be cut, alone and together: a copy cut at all of them ran, and gave what its cut program gives.
    `frozen` stay, each with the reason.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, rewrite: bool = False
    ) -> None:
        self.model, self.args, self.kwargs, self.rewrite = model, args, dict(kwargs or {}), rewrite
        self.program = trace(model, args, self.kwargs)
        self.axes = Axes(self.program, held(model, self.program), args, self.kwargs)
        self.trials = 0
        self._tied: set[str] = set()
        self._sizes = Sizes(model, self.axes)
        if not rewrite:
            self._sizes.relate(Provenance(self.program, self.axes.shapes, model, args, self.kwargs))
        self._find()
        self._settle()

    # -- groups ---------------------------------------------------------------------------------------------------------

    def _find(self) -> None:
        """Channels with the same places in the same tensors form a group."""
        ids = self.axes.ids
        keys: list[tuple[str, int, np.ndarray, int]] = []
        for path, origin in self.axes.origins.items():
            for axis, own in enumerate(origin):
                if len(own) < 2:
                    continue
                arrays = ids.factors(own)
                free = [a for a in arrays if ids.free(a)] if len(arrays) > 1 else []
                for array in arrays:
                    outermost = 0 if len(free) < 2 else 1 if array is free[0] else -1
                    keys.append((path, axis, array, outermost))
        roots = np.concatenate([array for _, _, array, _ in keys]) if keys else np.zeros(0, np.int64)
        slots = np.concatenate([np.full(len(array), k) for k, (_, _, array, _) in enumerate(keys)]) if keys else roots
        known = roots >= 0
        codes, counts = np.unique(roots[known] * len(keys) + slots[known], return_counts=True)
        pairs = np.stack(np.divmod(codes, max(1, len(keys))), 1)
        starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1)) if len(pairs) else np.zeros(0, np.int64)
        members: dict[tuple[Any, ...], list[int]] = {}
        for begin, end in zip(starts, [*starts[1:], len(pairs)]):
            root = int(pairs[begin, 0])
            signature = (ids.reason(root), pairs[begin:end, 1].tobytes(), counts[begin:end].tobytes())
            members.setdefault(signature, []).append(root)
        self.groups: list[Group] = []
        self.frozen: list[Frozen] = []
        self._number = np.full(ids.n + 1, -1)
        self._members: list[np.ndarray] = []
        names: dict[str, int] = {}
        used = {r for work in self.axes.works for axis in work.axes for a in ids.factors(*axis) for r in np.unique(a).tolist()}
        for (reason, raw, _), channels in members.items():
            places = [keys[k] for k in np.frombuffer(raw, pairs.dtype).tolist()]
            name = _name(places)
            if reason == PLACES:
                continue
            if reason is not None:
                self.frozen.append(Frozen(name, len(channels), reason, tuple(dict.fromkeys(p for p, *_ in places))))
                continue
            if len(channels) < 2:
                continue
            if not used.intersection(channels):
                self.frozen.append(Frozen(name, len(channels), "no product gets cheaper without it", tuple(p for p, *_ in places)))
                continue
            names[name] = names.get(name, 0) + 1
            self._number[channels] = len(self.groups)
            self._members.append(np.array(channels))
            places_of = np.full(ids.n + 1, -1)
            places_of[channels] = np.arange(len(channels))
            slices = tuple(Slice(path, axis, places_of[array]) for path, axis, array, _ in places)
            label = name if names[name] == 1 else f"{name}#{names[name]}"
            whole = sum(outermost for *_, outermost in places) > 0  # some code puts heads inside for once
            self.groups.append(Group(label, len(channels), slices, (), whole))
        for number, mends in self._sizes.mends(self._terms, self.groups).items():
            self.groups[number] = replace(self.groups[number], mends=mends)
        self._add_scales()

    def _terms(self, axis: Factors) -> Axis:
        """An axis as counts of positions by the groups that they belong to."""
        arrays = self.axes.ids.factors(*axis)
        groups = np.stack([self._number[a] for a in arrays], 1)
        rows, counts = np.unique(groups, axis=0, return_counts=True)
        return tuple((int(n), tuple(g for g in row if g >= 0)) for row, n in zip(rows.tolist(), counts))

    def weights(self) -> list[Load]:
        """The bits of every tensor at its own type, as a function of what the groups keep."""
        tensors = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        found = []
        for path, tensor in tensors.items():
            moving = [axis for axis in self.axes_of(path) if any(groups for _, groups in axis)]
            fixed = tensor.numel() * tensor.element_size() * 8 / math.prod(sum(n for n, _ in axis) for axis in moving)
            found.append(Load(fixed, tuple(moving)))
        return found

    def axes_of(self, path: str) -> list[Axis]:
        """Every axis of a tensor of the model, as in `Load`; none for a tensor that the program does not read."""
        return [self._terms((ids,)) for ids in self.axes.origins.get(path, ())]

    def macs(self, masks: Mapping[int, np.ndarray]) -> float:
        """Multiply-adds per example without the channels of the masks."""
        return self._sum(self.loads(), masks)

    def bits(self, masks: Mapping[int, np.ndarray]) -> float:
        """Bits of all tensors without the channels of the masks."""
        return self._sum(self.weights(), masks)

    def _sum(self, loads: Sequence[Load], masks: Mapping[int, np.ndarray]) -> float:
        keep = [1.0] * len(self.groups)
        for number, gone in masks.items():
            keep[number] = 1 - float(gone.mean())
        return sum(load.at(keep) for load in loads)

    def places(self, value: int) -> list[tuple[int, int, np.ndarray]]:
        """Where groups lie in a value of the program: axis, number of the group, channel at every position (or -1)."""
        found = []
        for axis, label in enumerate(self.axes.labels[value] or ()):
            for array in self.axes.ids.factors(*label) if isinstance(label, tuple) and axis else ():
                numbers = np.where(array >= 0, self._number[array], -1)
                for number in np.unique(numbers[numbers >= 0]).tolist():
                    order = {root: channel for channel, root in enumerate(self._members[number].tolist())}
                    channels = np.array([order.get(root, -1) for root in array.tolist()])
                    found.append((axis, number, channels))
        return found

    def rows(self, node: int, before: np.ndarray, after: np.ndarray) -> Tensor | None:
        """Which outputs (channels of a convolution, features of a linear layer) that a node still gives stay: positions.
        None for a node that gives several tensors."""
        number = self.program.first_node + node
        shape = self.axes.shapes[number]
        if not isinstance(shape, tuple):
            return None
        axis = 1 if "conv" in self.program.nodes[node].op else len(shape) - 1
        there, stays = (left(self.axes, self.axes.labels[number][axis], shape[axis], ids) for ids in (before, after))
        return torch.as_tensor(np.flatnonzero(stays[there]))

    def cut_program(self, going: np.ndarray) -> Program:
        """The program without the channels of the mask, for a model whose attention was rescaled with them."""
        return cut_program(self.program, self.axes, going, rescaled=True)

    def loads(self) -> list[Load]:
        """The multiply-adds of every product, as a function of what the groups keep."""
        found = []
        for work in self.axes.works:
            axes = [self._terms(axis) for axis in work.axes]
            found.append(Load(work.constant, tuple(axes)))
        return found

    # -- attention without an explicit scale -------------------------------------------------------------------------------

    def _add_scales(self) -> None:
        """Attention that divides by the root of its own width: queries grow smaller as that width does."""
        for _k, node in enumerate(self.program.nodes):
            if node.op != ATTENTION or node.arguments().get("scale") is not None:
                continue
            query = node.arguments()["query"]
            axis = self.axes.labels[query.index][-1]
            groups = {g for _, found in self._terms(axis) for g in found} if axis else set()
            if not groups:
                continue
            source = self._source(query)
            for number in groups:
                if source is None:
                    self._freeze_group(number, "the scale of its attention depends on it, and its queries cannot be rescaled")
                    continue
                weight, bias, rows = source
                rescaled = [(path, 0, rows) for path in (weight, bias) if path is not None]
                self.groups[number] = replace(self.groups[number], rescaled=(*self.groups[number].rescaled, *rescaled))

    def _source(self, ref: Ref) -> tuple[str, str | None, tuple[int, ...]] | None:
        """The layer whose outputs a value consists of: weight, bias, and which of its rows."""
        chain: list[Node] = []
        while (k := self.program.node_of(ref)) is not None:
            node = self.program.nodes[k]
            name = node.op.split(".")[1]
            if name in _AFFINE:
                break
            if name not in _ARRANGING or not isinstance(node.args[0], Ref):
                return None
            chain.append(node)
            ref = node.args[0]
        else:
            return None
        bound = node.arguments()
        weight, bias = (
            self.program.state_of(bound[name]) if isinstance(bound[name], Ref) else None for name in ("weight", "bias")
        )
        if weight is None or (isinstance(bound["bias"], Ref) and bias is None):
            return None
        shape = self.axes.shapes[ref.index]
        axis = len(shape) - 1 if name in ("linear", "layer_norm") else 1
        if self.axes.shapes[bound["weight"].index][0] != shape[axis]:
            return None
        rows = torch.arange(shape[axis], dtype=torch.float64).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        value: Any = rows.expand(shape)
        for step in reversed(chain):
            operator = find(step.op)
            if operator is None:
                return None
            rest = [self._plain(a) for a in step.args[1:]]
            value = operator.function(value, *rest, **{name: self._plain(a) for name, a in step.kwargs.items()})
        return weight.path, bias.path if bias else None, tuple(np.unique(value.numpy().round()).astype(int).tolist())

    def _plain(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self._plain(a) for a in argument]
        return self.axes.shapes[argument.index] if isinstance(argument, Ref) else argument

    # -- trial ------------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Cut a copy everywhere and run it; where its code does not follow, keep that neighbourhood whole."""
        while self.groups and self.trials < MAX_TRIALS:
            for suspects in self._parts():
                if (failure := self._trial(suspects)) is not None:
                    break
            else:
                return
            path, said = failure
            if path is None or not self._yield(path, said):
                self._keep_whole(self._culprits(suspects), f"the code does not follow its removal ({said})")
            self._find()
        for number in range(len(self.groups)):
            self._freeze_group(number, "the model did not run with its channels removed")
        self._find()

    def _parts(self) -> list[list[int]]:
        """All groups; where whole blocks can go also these alone, and the others alone."""
        numbers = list(range(len(self.groups)))
        blocks = [n for n in numbers if self.groups[n].whole]
        return [numbers, [n for n in numbers if n not in blocks], blocks] if blocks else [numbers]

    def _trial(self, numbers: Iterable[int]) -> tuple[str | None, str] | None:
        """None, or the module that failed (None: another than can be told) and what it said."""
        self.trials += 1
        masks = {number: _half(self.groups[number].n) for number in numbers}
        twin = plain = duplicate(self.model, shares=True)
        self.cut_(twin, masks)
        if any(self.groups[number].rescaled for number in masks):
            plain = duplicate(self.model, shares=True)
            self.cut_(plain, masks, rescale=False)
        try:
            with torch.no_grad():
                program = cut_program(self.program, self.axes, self.going(masks))
                expected = program.module(held(plain, program))(*self.args, **self.kwargs)
        except ParedError as error:
            return None, _first_line(error)
        if self.rewrite:
            return None
        stack: list[str] = []
        handles = []
        for path, module in twin.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: stack.append(path)))
            handles.append(module.register_forward_hook(lambda m, a, o: stack.remove(stack[-1])))
        try:
            with torch.no_grad():
                got = twin(*_clones(self.args), **_clones(self.kwargs))
        except Exception as error:
            return stack[-1] if stack else "", _first_line(error)
        finally:
            for handle in handles:
                handle.remove()
        distance = difference(got, expected)
        return None if distance <= TOLERANCE else (None, f"its outputs were off by {distance:.2g}")

    def _culprits(self, suspects: list[int]) -> list[int]:
        """Few of the groups that the model does not follow when they alone are cut."""
        while len(suspects) > 1 and self.trials < MAX_TRIALS:
            half = len(suspects) // 2
            for part in (suspects[:half], suspects[half:]):
                if self._trial(part) is not None:
                    suspects = part
                    break
            else:
                break  # only together
        return suspects

    def _keep_whole(self, numbers: list[int], reason: str) -> None:
        """These groups stay, and those of the same layer in modules of the same class."""
        kinds = {self._kind(n) for n in numbers}
        for number in range(len(self.groups)):
            if number in numbers or self._kind(number) in kinds:
                self._freeze_group(number, reason)

    def _kind(self, number: int) -> tuple[type, str]:
        owner, _, layer = self.groups[number].name.rpartition(".")
        return type(self.model.get_submodule(owner)), layer

    def _yield(self, path: str, said: str) -> bool:
        """What the failing module, and all of its class, shall not be asked again. False: it has none of the groups."""
        modules = dict(self.model.named_modules())
        while path and not any(True for _ in modules[path].children()):
            path = path.rpartition(".")[0]
        alike = [p for p, m in modules.items() if type(m) is type(modules[path])] if path else [""]
        if self._tie(alike):
            return True
        reason = f"the code of {type(modules[path]).__name__} computes sizes for itself ({said})"
        inside = [self._groups_in(p) for p in alike] if path else []
        numbers = {n for found in inside for n in found}
        slots = {n for n in numbers if not self.groups[n].whole and any(self.groups[m].whole for m in numbers)}
        for number in slots or numbers:
            self._freeze_group(number, reason)
        return bool(numbers)

    def _groups_in(self, path: str) -> set[int]:
        prefix = f"{path}." if path else ""
        local = set()
        for number, group in enumerate(self.groups):
            if any(piece.path.startswith(prefix) for piece in group.slices):
                local.add(number)
        private = {n for n in local if all(piece.path.startswith(prefix) for piece in self.groups[n].slices)}
        return private or local

    def _tie(self, paths: list[str]) -> bool:
        """Let the width inside of modules follow the width of what comes in, where the two are equal."""
        tied = False
        for path in paths:
            if path in self._tied:
                continue
            self._tied.add(path)
            ends = [(p, o[1]) for p, o in self.axes.origins.items() if p.startswith(f"{path}.") and len(o) >= 2]
            outer = [(p, ids) for p, ids in ends if self._reaches_out(ids, path)]
            inner = [(p, ids) for p, ids in ends if not self._reaches_out(ids, path)]
            for _, ids in inner:
                for _, other in outer:
                    if len(ids) == len(other):
                        before = self.axes.ids.find(ids), self.axes.ids.find(other)
                        if not np.array_equal(*before):
                            self.axes.ids.same((ids,), (other,), "its width is tied to another that stays")
                            tied = True
                        break
        return tied

    def _reaches_out(self, ids: np.ndarray, path: str) -> bool:
        numbers = {g for _, groups in self._terms((ids,)) for g in groups} if len(self.axes.ids.factors(ids)) else set()
        return any(not piece.path.startswith(f"{path}.") for n in numbers for piece in self.groups[n].slices)

    def _freeze_group(self, number: int, reason: str) -> None:
        self.axes.ids.freeze(self._members[number], reason)

    # -- cutting ------------------------------------------------------------------------------------------------------------

    def cut_(self, model: nn.Module, masks: Mapping[int, np.ndarray], *, rescale: bool = True) -> list[Cut]:
        """Remove channels of groups (number: mask of those that go), in place."""
        coordinates, owners = Coordinates(), owners_of(model)
        cuts = []
        for number, gone in masks.items():
            group = self.groups[number] if rescale else replace(self.groups[number], rescaled=())
            cuts.append(Cut(coordinates.structure(group, gone, model)))
            cut_(model, cuts[-1].structure, owners)
        return cuts

    def rewritten(self, masks: Mapping[int, np.ndarray]) -> ProgramModule:
        """The network without these channels, running its cut program in place of its code; it can be trained and saved."""
        cut = duplicate(self.model)
        self.cut_(cut, masks)
        return as_program(cut, self.cut_program(self.going(masks)))

    def going(self, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        """The same choice as a mask over all ids."""
        going = np.zeros(self.axes.ids.n + 1, bool)
        for number, gone in masks.items():
            going[self._members[number]] = gone
        return going


_AFFINE = frozenset("linear conv1d conv2d conv3d batch_norm layer_norm".split())
_ARRANGING = frozenset(
    "view reshape _unsafe_view permute transpose t contiguous clone select unbind getitem slice split chunk unflatten flatten "
    "squeeze unsqueeze split_with_sizes max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d".split()
)
"""What makes a value from weight and bias, and what leaves multiples of a value multiples."""


def _clones(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _half(n: int) -> np.ndarray:
    """Every other channel goes."""
    return np.arange(n) % 2 == 1


def _name(places: list[tuple[str, int, np.ndarray, bool]]) -> str:
    for path, axis, _array, _ in places:
        if axis == 0 and path.endswith("weight"):
            return path.rpartition(".")[0]
    return places[0][0].rpartition(".")[0] or places[0][0]


