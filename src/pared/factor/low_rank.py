"""Truncated SVD of linear and convolution layers, on the damage scale."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.numerics import matrix_roots
from pared.site import Site
from pared.statistics import Curvature, Kronecker, Statistics
from pared.technique import Modules, Structure, Technique

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRankStructure(Structure):
    rank: int


class LowRankLinear(nn.Module):
    """y = up (down x) + bias; down (rank, in), up (out, rank)."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        like: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.down = nn.Parameter(torch.zeros(rank, layer.in_features, **like))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, **like))
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), for owners that read it instead of calling the layer."""
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)


class LowRankConv(nn.Module):
    """A convolution to `rank` channels, then a 1x1 one to all; down (rank, in, *kernel), up (out, rank, 1, ...)."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        conv = cast(nn.Conv2d, layer)
        like: dict[str, Any] = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        self.n_axes = conv.weight.ndim - 2
        self.stride, self.dilation, self.padding, self.padding_mode = conv.stride, conv.dilation, conv.padding, conv.padding_mode
        self.border = tuple(conv._reversed_padding_repeated_twice)
        self.down = nn.Parameter(torch.zeros(rank, *conv.weight.shape[1:], **like))
        self.up = nn.Parameter(torch.zeros(conv.out_channels, rank, *[1] * self.n_axes, **like))
        self.bias = conv.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in, *kernel), for owners that read it instead of calling the layer."""
        return (self.up.flatten(1) @ self.down.flatten(1)).unflatten(1, self.down.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        convolve: Any = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self.n_axes - 1]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self.border, mode=self.padding_mode)
            padding = 0
        return convolve(convolve(x, self.down, None, self.stride, padding, self.dilation), self.up, self.bias)


class LowRank(Technique):
    """Replace a linear or convolution layer by two thinner ones: W (M x N) ~ U (M x K) V (K x N).

    The factors minimise tr(G' dW A dW^T), G' = G + mean(diag G) I: the SVD is of G'^(1/2) W A^(1/2), truncated, with
    the roots taken back. Raising G keeps outputs in view for which an accurate network shows no gradient on the
    calibration data. Without statistics it is the plain SVD. A convolution is the matrix (out, in * prod(kernel)): its first
    factor is a convolution to K channels, the second a 1x1 convolution.

    Acts on   Linear (out, in); Conv1d/2d/3d (out, in, *kernel).
    Stores    K * (M + N) weights;  MACs: positions * K * (M + N).
    Reads     curvature, if there is one.
    Refuses   ranks at which the layer would grow; grouped and transposed convolutions; layers with a forward of their own.
    Paper     Denton et al. 2014, arXiv:1404.0736; whitening: Wang et al. 2025, arXiv:2403.07378.
    Differs   whitened on both sides, by inputs and by output gradients.

    >>> from torch import nn
    >>> technique = LowRank(rank=8)
    >>> technique.cost(next(technique.sites(nn.Sequential(nn.Linear(64, 32))))).stored_bits
    24576
    """

    acts_on: ClassVar = Modules((nn.Linear, *_CONVOLUTIONS))
    reads: ClassVar = (Curvature,)
    paper: ClassVar = "arXiv:1404.0736"
    structure_type: ClassVar = LowRankStructure
    ladder: ClassVar = ({"keep": 0.95}, {"keep": 0.6}, {"keep": 0.3})

    keep: float | None = Field(default=None, gt=0, lt=1, description="share of the layer's weights that stay")
    rank: int | None = Field(default=None, ge=1, description="the rank itself, instead of keep")

    @model_validator(mode="after")
    def _one_of(self) -> LowRank:
        if (self.keep is None) == (self.rank is None):
            raise ValueError("exactly one of keep and rank must be given")
        return self

    def sites(self, model: nn.Module, graph: Any = None) -> Iterator[Site]:
        for site in super().sites(model, graph):
            weights = [path for path in site.covers if path.rpartition(".")[2] == "weight"]
            yield replace(site, covers=tuple(weights[:1]) or (f"{site.path}.weight",))

    def refuse(self, site: Site) -> str | None:
        layer = site.module
        if parametrize.is_parametrized(layer):
            return "its weight is already coded; put factor.low_rank before what codes tensors"
        if not any(type(layer).forward is cls.forward for cls in (nn.Linear, *_CONVOLUTIONS)):
            return f"{type(layer).__name__} has a forward of its own"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return "it has forward hooks, which what takes its place would not run"
        if isinstance(layer, _CONVOLUTIONS) and layer.groups > 1:
            return "grouped convolutions are thin already"
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            return f"{type(layer).__name__} is read by its owner, not only called"
        m, n = _matrix_shape(layer)
        if (owners := _shared_with(site)) is not None:
            return f"its weight is shared with {owners}"
        rank = self._rank(layer)
        if rank < 1 or rank * (m + n) >= m * n:
            return f"rank {max(rank, 1)} would make this {m} x {n} layer larger"
        return None

    def decide(self, site: Site, statistics: Statistics) -> LowRankStructure:
        return LowRankStructure(rank=max(1, self._rank(site.module)))

    def build(self, site: Site, structure: Structure) -> nn.Module:
        rank = cast(LowRankStructure, structure).rank
        layer = site.module
        return LowRankLinear(layer, rank) if isinstance(layer, nn.Linear) else LowRankConv(layer, rank)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        weight = cast(Tensor, site.module.weight).detach()
        matrix = weight.flatten(1).double()
        up, down = cast(Tensor, parts.up), cast(Tensor, parts.down)
        uses = _uses(site, statistics)
        if uses:
            use = max(uses, key=lambda use: float(use.diagonal().sum()))
            left, right = _whitened(matrix, use, up.shape[1])
        else:
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            root = s[: up.shape[1]].sqrt()
            left, right = u[:, : up.shape[1]] * root, root[:, None] * v[: up.shape[1]]
        up.data.copy_(left.reshape(up.shape))
        down.data.copy_(right.reshape(down.shape))

    def weight(self, site: Site, parts: nn.Module) -> Tensor:
        return cast(Tensor, parts.weight).detach()

    def inner(self, site: Site, parts: nn.Module, statistics: Statistics) -> Statistics:
        up, down = cast(Tensor, parts.up).detach(), cast(Tensor, parts.down).detach()
        of_up, of_down = Curvature(up.shape), Curvature(down.shape)
        for use in _uses(site, statistics):
            a, g = use.inputs[0], use.gradients[0]
            u, d = up.flatten(1).to(a), down.flatten(1).to(a)
            inputs = d @ (a @ d.T if a.ndim == 2 else a[:, None] * d.T)
            gradients = u.T @ (g @ u if g.ndim == 2 else g[:, None] * u)
            of_down.terms.append(Kronecker(use.inputs, gradients[None], _as_matrix))
            of_up.terms.append(Kronecker(inputs[None], use.gradients, _as_matrix))
        return Statistics({"up": of_up, "down": of_down} if of_up.terms else {})

    def _rank(self, layer: nn.Module) -> int:
        m, n = _matrix_shape(layer)
        return self.rank if self.rank is not None else int(cast(float, self.keep) * m * n / (m + n))


def _matrix_shape(layer: nn.Module) -> tuple[int, int]:
    shape = cast(Tensor, layer.weight).shape
    return shape[0], math.prod(shape[1:])


def _shared_with(site: Site) -> str | None:
    """Where else the layer's weight is used, if it is tied."""
    weight = site.module._parameters.get("weight")
    for path, parameter in site.root.named_parameters(remove_duplicate=False):
        if parameter is weight and path.rpartition(".")[0] not in site.paths:
            return path
    return None


def _uses(site: Site, statistics: Statistics) -> list[Kronecker]:
    """What was observed where the weight was used as the layer's own matrix (out, in * prod(kernel))."""
    curvature = statistics.curvature(site.covers[0]) if site.covers else None
    weight = cast(Tensor, site.module.weight).detach().float().cpu()
    matrix = _as_matrix(weight)
    terms = [term for term in curvature.terms if isinstance(term, Kronecker)] if curvature is not None else []
    seen = [term.as_matrix(weight) for term in terms]
    return [term for term, view in zip(terms, seen, strict=True) if torch.equal(view, matrix)]


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)[None]


_ROOM = 4
_factored: OrderedDict[tuple[int, int], tuple[Kronecker, Tensor, Tensor, Tensor]] = OrderedDict()
"""Factors at full rank by (use, weight): every rank is a slice of them, and finding them is the whole cost."""


def _whitened(matrix: Tensor, use: Kronecker, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-K factors that minimise tr(G dW A dW^T), with both diagonals raised (G's by its mean)."""
    known = _factored.get((id(use), matrix.numel()))
    if known is None or known[0] is not use or not torch.equal(known[1], matrix):
        known = (use, matrix, *_factors(matrix, use.inputs[0], use.gradients[0]))
        _factored[id(use), matrix.numel()] = known
        while len(_factored) > _ROOM:
            _factored.popitem(last=False)
    up, down = known[2][:, :rank], known[3][:rank]
    # both factors on one scale, so that they suffer alike from quantization
    balance = (down.norm() / up.norm().clamp_min(1e-30)).sqrt().clamp(1e-6, 1e6)
    return up * balance, down / balance


def _factors(matrix: Tensor, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    a, a_back = (root.to(matrix.device) for root in matrix_roots(inputs))
    g, g_back = (root.to(matrix.device) for root in matrix_roots(gradients, damping=1.0))
    right = matrix @ a if a.ndim == 2 else matrix * a
    u, s, v = torch.linalg.svd(g @ right if g.ndim == 2 else g[:, None] * right, full_matrices=False)
    root = s.sqrt()
    up = (g_back @ u if g_back.ndim == 2 else g_back[:, None] * u) * root
    down = root[:, None] * (v @ a_back if a_back.ndim == 2 else v * a_back)
    return up, down
