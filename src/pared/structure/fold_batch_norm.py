"""Batch-norms folded into the layers before them."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from pared.numerics import channel_axis
from pared.site import Site
from pared.statistics import Flow, Statistics
from pared.technique import Cost, Network, Structure, Technique

_LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


class FoldStructure(Structure):
    """Pairs of paths: a layer, and the batch-norm that is folded into it."""

    pairs: tuple[tuple[str, str], ...] = ()


class FoldBatchNorm(Technique):
    """Fold each batch-norm into the convolution or linear layer whose output it alone reads.

    w'[o] = w[o] g[o] / sqrt(var[o] + eps),   b'[o] = beta[o] + (b[o] - mean[o]) g[o] / sqrt(var[o] + eps)

    What the network computes in evaluation mode stays the same. The batch-norm gives way to an identity, or to what
    else it held (an activation). Runtimes fuse a convolution with what follows it only when no batch-norm is between.

    Acts on   the whole network: pairs are found in its graph.
    Stores    a bias more, four vectors fewer; MACs unchanged.
    Reads     the flow of values.
    Refuses   layers that are used twice, or whose output something else reads, too.
    Paper     Jacob et al. 2018, arXiv:1712.05877.
    """

    acts_on: ClassVar = Network()
    reads: ClassVar = (Flow,)
    paper: ClassVar = "arXiv:1712.05877"
    structure_type: ClassVar = FoldStructure
    exact: ClassVar = True

    def refuse(self, site: Site) -> str | None:
        if not any(isinstance(module, _BatchNorm) for module in site.module.modules()):
            return "there is no batch-norm in it"
        return None

    def decide(self, site: Site, statistics: Statistics) -> FoldStructure:
        flow = statistics.flow
        return FoldStructure(pairs=tuple(pairs(site.module, flow)) if flow is not None else ())

    def build(self, site: Site, structure: Structure) -> nn.Module:
        root = site.module
        for layer_path, norm_path in cast(FoldStructure, structure).pairs:
            layer, norm = root.get_submodule(layer_path), root.get_submodule(norm_path)
            weight = cast(Tensor, layer.weight)
            if layer.bias is None:
                n = weight.shape[channel_axis(layer)]
                layer.bias = nn.Parameter(torch.zeros(n, dtype=weight.dtype, device=weight.device))
            rest = OrderedDict(norm.named_children())
            parent, _, name = norm_path.rpartition(".")
            setattr(root.get_submodule(parent), name, nn.Sequential(rest).train(norm.training) if rest else nn.Identity())
        return root

    def solve(self, site: Site, statistics: Statistics) -> tuple[Structure, nn.Module]:
        structure = self.decide(site, statistics)
        values = {layer: folded(site.module, layer, norm) for layer, norm in structure.pairs}
        root = self.build(site, structure)
        for path, (weight, bias) in values.items():
            layer = root.get_submodule(path)
            cast(Tensor, layer.weight).data.copy_(weight)
            cast(Tensor, layer.bias).data.copy_(bias)
        return structure, root

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        """The values are there: `solve` reads them before `build` takes the batch-norms away."""

    def cost(self, site: Site, parts: nn.Module | None = None) -> Cost:
        return Cost()

    def damage(self, site: Site, parts: nn.Module, statistics: Statistics) -> float | None:
        return 0.0


def pairs(root: nn.Module, flow: Flow) -> list[tuple[str, str]]:
    """Layers and the batch-norms that can be folded into them, in the order in which they run."""
    found = []
    for operation in flow.operations:
        if operation.kind != "batch_norm" or set(operation.states) < {3, 4}:
            continue
        norm_path = operation.states[3].rpartition(".")[0]
        layer_number = flow.producers.get(operation.inputs[0])
        if layer_number is None or flow.only_consumer(operation.inputs[0]) is not operation:
            continue
        layer = flow.operations[layer_number]
        layer_path, _, name = layer.states.get(1, "").rpartition(".")
        if layer.kind in _LAYERS and name == "weight" and _can_fold(root, flow, layer_path, norm_path):
            found.append((layer_path, norm_path))
    return found


def _can_fold(root: nn.Module, flow: Flow, layer_path: str, norm_path: str) -> bool:
    layer, norm = root.get_submodule(layer_path), root.get_submodule(norm_path)
    used_once = len(flow.uses(f"{layer_path}.weight")) == len(flow.uses(f"{norm_path}.running_mean")) == 1
    plain = isinstance(norm, _BatchNorm) and not parametrize.is_parametrized(layer) and not parametrize.is_parametrized(norm)
    grouped = isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1
    # beside the norm itself, only children may run in it: they stay
    inside = [operation for operation in flow.operations if operation.module == norm_path]
    return used_once and plain and not grouped and hasattr(layer, "bias") and [o.kind for o in inside] == ["batch_norm"]


def folded(root: nn.Module, layer_path: str, norm_path: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer with the batch-norm in them, computed in float64."""
    layer, norm = root.get_submodule(layer_path), cast(_BatchNorm, root.get_submodule(norm_path))
    weight, bias = cast(Tensor, layer.weight).detach().double(), cast(Tensor | None, layer.bias)
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    gain = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    shift = (torch.zeros_like(mean) if bias is None else bias.detach().double()) - mean
    shift = shift * gain + (0 if norm.bias is None else norm.bias.detach().double())
    shape = [1] * weight.ndim
    shape[channel_axis(layer)] = -1
    return weight * gain.reshape(shape), shift
