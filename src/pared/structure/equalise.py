"""Channels of a value brought to one size, by scaling the layers that make it and those that read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.site import Site
from pared.statistics import Flow, Histogram, Operation, Statistics
from pared.technique import Cost, Network, Structure, Technique

_LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
_NORMS = ("layer_norm", "batch_norm", "group_norm", "rms_norm")
_SAME = ("relu", "leaky_relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "dropout")
"""Operators that, on each channel alone, scale with what they are given."""
LARGEST = 64.0
"""No channel is scaled by more than this, or its inverse."""


class Coupled(BaseModel):
    """Layers, by their paths, whose channels have to be scaled together."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    makers: tuple[str, ...]
    readers: tuple[str, ...]


class EqualiseStructure(Structure):
    groups: tuple[Coupled, ...] = ()


class Equalise(Technique):
    """Scale the channels of a value so that they reach equally far, and undo it where the value is read.

    y = V f(W x)  =  (V / s) f(s W x),   s[c] = (max_c r / r[c]) ** strength,   r[c] = max |f(W x)[c]|

    for f that scales with its argument: none, ReLU, pooling. A residual stream is scaled as a whole: all layers that
    write to it, all that read it. After layer-norm its gain and shift are scaled (SmoothQuant). What the network
    computes stays the same; one range then fits all channels, so that integers lose less.

    Acts on   the whole network: groups of layers are found in its graph.
    Stores    nothing more; MACs unchanged.
    Reads     the flow of values, and how far each channel reaches.
    Refuses   values that something reads which does not scale along (a clipped ReLU, a sigmoid, an output).
    Paper     Nagel et al. 2019, arXiv:1906.04721; Xiao et al. 2023, arXiv:2211.10438.
    Differs   ranges of values instead of weights; residual streams, too.
    """

    acts_on: ClassVar = Network()
    reads: ClassVar = (Flow, Histogram)
    paper: ClassVar = "arXiv:1906.04721"
    structure_type: ClassVar = EqualiseStructure
    exact: ClassVar = True

    strength: float = Field(default=0.5, gt=0, le=1, description="from hardly (near 0) to fully (1) equal")

    def decide(self, site: Site, statistics: Statistics) -> EqualiseStructure:
        if statistics.flow is None:
            return EqualiseStructure()
        root = site.module
        pairs = [(group, _reach(root, group, values, statistics)) for group, values in coupled(root, statistics.flow)]
        return EqualiseStructure(groups=tuple(group for group, reach in pairs if reach is not None))

    def build(self, site: Site, structure: Structure) -> nn.Module:
        return site.module

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        """Scale once: the statistics are of the network as it was before."""

    def solve(self, site: Site, statistics: Statistics) -> tuple[Structure, nn.Module]:
        structure, root = self.decide(site, statistics), site.module
        if statistics.flow is None:
            return structure, root
        for group, values in coupled(root, statistics.flow):
            reach = _reach(root, group, values, statistics)
            if reach is not None:
                scale = (reach.max() / reach.clamp_min(1e-12)).pow(self.strength).clamp(1 / LARGEST, LARGEST)
                scale = torch.where(reach > 0, scale, torch.ones_like(scale))
                scale_(root, group, scale / scale.log().mean().exp())
        return structure, root

    def cost(self, site: Site, parts: nn.Module | None = None) -> Cost:
        return Cost()

    def damage(self, site: Site, parts: nn.Module, statistics: Statistics) -> float | None:
        return 0.0


def scale_(root: nn.Module, group: Coupled, scale: Tensor) -> None:
    """Multiply what the makers give by `scale` (channels,), and divide what the readers take by it."""
    for path in group.makers:
        maker = root.get_submodule(path)
        for name in ("weight", "bias"):
            tensor = cast(Tensor | None, getattr(maker, name))
            if tensor is not None:
                shape = [-1] + [1] * (tensor.ndim - 1)
                tensor.data = (tensor.data.double() * scale.to(tensor.device).reshape(shape)).to(tensor.dtype)
    for path in group.readers:
        reader = root.get_submodule(path)
        weight = cast(Tensor, reader.weight)
        n_groups, per_group = getattr(reader, "groups", 1), weight.shape[1]
        by_output = (1 / scale.to(weight.device)).reshape(n_groups, 1, per_group).expand(-1, weight.shape[0] // n_groups, -1)
        shape = [weight.shape[0], per_group] + [1] * (weight.ndim - 2)
        weight.data = (weight.data.double() * by_output.reshape(shape)).to(weight.dtype)


def coupled(root: nn.Module, flow: Flow) -> Iterator[tuple[Coupled, list[int]]]:
    """Groups of layers that can be scaled together, each with the values between them."""
    leader = {value: value for value in flow.shapes}

    def find(value: int) -> int:
        while leader[value] != value:
            value = leader[value]
        return value

    makers: dict[int, list[str]] = {}
    readers: dict[int, list[str]] = {}
    blocked = set(flow.results)
    made = {operation.output for operation in flow.operations}
    passed: set[int] = set()
    for operation in flow.operations:
        same_shape = len({flow.shapes[value] for value in (*operation.inputs, operation.output)}) == 1
        joins = operation.kind in _SAME and len(operation.inputs) == 1 and _keeps_channels(flow, operation)
        if joins or (operation.kind == "add" and len(operation.inputs) == 2 and same_shape):
            passed.add(operation.output)
            for value in operation.inputs:
                leader[find(value)] = find(operation.output)
    for operation in flow.operations:
        if operation.output in passed:
            continue
        kind = operation.kind
        path = operation.states.get(1, "").rpartition(".")[0]
        if kind in _LAYERS and _is_free(root, flow, path):
            readers.setdefault(operation.inputs[0], []).append(path)
            makers.setdefault(operation.output, []).append(path)
            continue
        name = operation.states.get(2 if kind in ("layer_norm", "rms_norm") else 1, "")
        if kind in _NORMS and _is_free(root, flow, name.rpartition(".")[0]):
            makers.setdefault(operation.output, []).append(name.rpartition(".")[0])
        else:
            blocked.add(operation.output)
        blocked.update(operation.inputs)
    members: dict[int, list[int]] = {}
    for value in flow.shapes:
        members.setdefault(find(value), []).append(value)
    for values in members.values():
        write = [path for value in values for path in makers.get(value, ())]
        read = [path for value in values for path in readers.get(value, ())]
        if write and read and not set(values) & blocked and set(values) <= made and not set(write) & set(read):
            yield Coupled(makers=tuple(dict.fromkeys(write)), readers=tuple(dict.fromkeys(read))), values


def _keeps_channels(flow: Flow, operation: Operation) -> bool:
    """Whether channels stay where they are: axis 1 of images; the mean only over what comes after it."""
    before, after = flow.shapes[operation.inputs[0]], flow.shapes[operation.output]
    if operation.kind == "mean":
        axes = operation.constants.get(1)
        return len(before) == 4 and isinstance(axes, list) and sorted(axis % 4 for axis in axes) == [2, 3]
    return len(before) == len(after) and before[:2] == after[:2]


def _is_free(root: nn.Module, flow: Flow, path: str) -> bool:
    """Whether the module's tensors are plain, its own, and used in one place."""
    module = root.get_submodule(path)
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None or len(flow.uses(f"{path}.weight" if path else "weight")) != 1:
        return False
    return sum(weight is parameter for _, parameter in root.named_parameters(remove_duplicate=False)) == 1


def _reach(root: nn.Module, group: Coupled, values: list[int], statistics: Statistics) -> Tensor | None:
    """How far each channel reaches, (channels,), as a share of the whole value; None where it was not seen."""
    flow = statistics.flow
    if flow is None:
        return None
    weights = {path: cast(Tensor, root.get_submodule(path).weight) for path in group.readers}
    images = any(weight.ndim > 2 for weight in weights.values())
    sizes = {weight.shape[1] * getattr(root.get_submodule(path), "groups", 1) for path, weight in weights.items()}
    found: Tensor | None = None
    for value in values:
        ports = flow.ports.get(value, ())
        seen = next((statistics.values[port] for port, _ in ports if port in statistics.values), None)
        if seen is None:
            continue
        n_axes = len(flow.shapes[value])
        reach = seen.reach.get(1 if n_axes == 4 or (n_axes == 3 and images) else n_axes - 1)
        if reach is None or {len(reach)} != sizes:
            return None
        share = reach.double() / reach.max().clamp_min(1e-30)
        found = share if found is None else torch.maximum(found, share)
    return found
