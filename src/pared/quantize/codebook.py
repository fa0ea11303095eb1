"""Weight clustering: a table of shared values and short indices."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.lowered import LookedUp
from pared.numerics import FloatName, nearest, table_dtype
from pared.site import Site
from pared.statistics import Curvature, Statistics
from pared.technique import Structure, Technique, Tensors


class CodebookStructure(Structure):
    zero: bool = False
    table: FloatName = "float16"


class _Lookup(torch.autograd.Function):
    """table[codes]; the gradient of a table entry is the sum over the weights that share it."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.size = len(table)
        return table.index_select(0, codes.flatten().int()).view(codes.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        summed = torch.bincount(codes.flatten().int(), weights=gradient.flatten(), minlength=ctx.size)
        return summed.to(gradient.dtype), None


class CodebookDecoder(nn.Module):
    """weight = table[codes]; with `zero`, code 0 is exactly 0 and the table holds the rest."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, bits: int, structure: CodebookStructure) -> None:
        super().__init__()
        self.dtype, self.zero = dtype, structure.zero
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.uint8))
        n_values = 2**bits - int(structure.zero)
        self.table = nn.Parameter(torch.zeros(n_values, dtype=getattr(torch, structure.table)))
        self.code_bits = {"codes": bits}

    def values(self) -> Tensor:
        """The table with its zero, float32."""
        table = self.table.to(torch.float32)
        return nn.functional.pad(table, (1, 0)) if self.zero else table

    def forward(self) -> Tensor:
        return cast(Tensor, _Lookup.apply(self.values(), self.codes)).to(self.dtype)

    def check(self) -> None:
        codes = cast(Tensor, self.codes)
        n_values = len(self.table) + int(self.zero)
        if codes.numel() and int(codes.max()) >= n_values:
            raise ValueError(f"codes must be less than {n_values}, found {int(codes.max())}")


class Codebook(Technique):
    """Cluster the weights of a tensor by k-means; store a table of 2**bits values and an index per weight.

    w ~ c[q],   q in [0, 2**bits),   minimising sum_i h_i (w_i - c[q_i])**2

    with h the curvature's diagonal, or 1. Centroids start on a line between the extremes. Where weights are exactly
    zero (pruned), one code is kept for zero, which stays exact; training the table sums gradients per cluster.

    Acts on   every floating-point parameter and buffer of 64 elements or more.
    Stores    numel * bits + 16 * 2**bits  [bits] before entropy coding;  MACs unchanged.
    Reads     curvature, if there is one.
    Refuses   tensors that would grow.
    Paper     Han, Mao & Dally 2016, arXiv:1510.00149; Hessian-weighted k-means: Choi et al. 2017, arXiv:1612.01543.
    Differs   k-means runs on sorted values with prefix sums, so a step costs O(2**bits * log numel).
    """

    acts_on: ClassVar = Tensors(min_elements=64)
    reads: ClassVar = (Curvature,)
    paper: ClassVar = "arXiv:1510.00149"
    structure_type: ClassVar = CodebookStructure
    ladder: ClassVar = ({"bits": 6}, {"bits": 4}, {"bits": 2})

    bits: int = Field(default=4, ge=1, le=8, description="bits per index")
    iterations: int = Field(default=40, ge=1, le=1000, description="steps of k-means")

    def refuse(self, site: Site) -> str | None:
        value = site.tensor
        if value.numel() * self.bits + 16 * 2**self.bits >= value.numel() * 8 * value.element_size():
            return f"{self.bits}-bit indices with their table would be larger than the tensor"
        return None

    def decide(self, site: Site, statistics: Statistics) -> CodebookStructure:
        value = site.tensor
        if value.is_meta:
            return CodebookStructure()
        return CodebookStructure(zero=bool((value == 0).any()), table=table_dtype(value))

    def build(self, site: Site, structure: Structure) -> CodebookDecoder:
        value = site.tensor
        return CodebookDecoder(value.shape, value.dtype, self.bits, cast(CodebookStructure, structure))

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(CodebookDecoder, parts)
        value = site.tensor.float().flatten()
        importance = self._importance(site, statistics)
        if decoder.zero:
            kept = value != 0
            value, importance = value[kept], importance[kept]
        order = value.argsort()
        centroids = _kmeans(value[order].double(), importance[order].double(), len(decoder.table), self.iterations)
        decoder.table.data.copy_(centroids)
        self.encode(site, parts, statistics)

    def encode(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(CodebookDecoder, parts)
        value = site.tensor.float()
        table, order = decoder.table.to(torch.float32).sort()
        codes = nearest(value, (table[1:] + table[:-1]) / 2)
        if not torch.equal(order, torch.arange(len(order), device=order.device)):  # training may have swapped values
            codes = order[codes.long()]
        if decoder.zero:
            codes = (codes + 1) * (value != 0)
        cast(Tensor, decoder.codes).copy_(codes)

    def lower(self, parts: nn.Module) -> nn.Module:
        decoder = cast(CodebookDecoder, parts)
        return LookedUp(decoder.values(), cast(Tensor, decoder.codes))

    @staticmethod
    def _importance(site: Site, statistics: Statistics) -> Tensor:
        curvature = statistics.curvature(site.covers[0])
        value = site.tensor
        if curvature is None:
            return torch.ones(value.numel(), device=value.device)
        h = curvature.diagonal().flatten().to(value.device)
        return h / h.mean().clamp_min(1e-30) + 1e-3


def _kmeans(values: Tensor, weights: Tensor, k: int, iterations: int) -> Tensor:
    """Weighted one-dimensional k-means of sorted values: prefix sums make a step independent of their number."""
    if len(values) == 0:
        return torch.zeros(k, dtype=values.dtype, device=values.device)
    total = nn.functional.pad(weights.cumsum(0), (1, 0))
    moment = nn.functional.pad((weights * values).cumsum(0), (1, 0))
    centroids = torch.linspace(float(values[0]), float(values[-1]), k, dtype=values.dtype, device=values.device)
    for _ in range(iterations):
        edges = torch.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        bounds = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(values))])
        mass = total[bounds[1:]] - total[bounds[:-1]]
        sums = moment[bounds[1:]] - moment[bounds[:-1]]
        moved = torch.where(mass > 0, sums / mass.clamp_min(1e-300), centroids).sort().values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids
