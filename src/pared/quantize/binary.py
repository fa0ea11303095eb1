"""Weights as signs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.lowered import Dequantized
from pared.numerics import FloatName, channel_axis, scale_dtype, scale_rows
from pared.site import Site
from pared.statistics import Curvature, Statistics
from pared.technique import Structure, Technique, Tensors, build


class BinaryStructure(Structure):
    scales: FloatName = "float16"


class BinaryDecoder(nn.Module):
    """weight = sum over terms of scale * (2 * signs - 1); signs (terms, *shape) are 0 or 1, scale (terms, rows)."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, axis: int, rows: int, terms: int, scales: FloatName) -> None:
        super().__init__()
        self.dtype, self.axis = dtype, axis
        self.register_buffer("signs", torch.zeros((terms, *shape), dtype=torch.uint8))
        self.scale = nn.Parameter(torch.zeros(terms, rows, dtype=getattr(torch, scales)))
        self.code_bits = {"signs": 1}

    def spread(self, term: int) -> Tensor:
        """The scales of one term, float32, in a shape that goes with the weight."""
        shape = [1] * (cast(Tensor, self.signs).ndim - 1)
        shape[self.axis] = -1
        return self.scale[term].to(torch.float32).reshape(shape)

    def forward(self) -> Tensor:
        signs = 2 * cast(Tensor, self.signs).to(torch.float32) - 1
        return torch.stack([signs[term] * self.spread(term) for term in range(len(signs))]).sum(0).to(self.dtype)

    def check(self) -> None:
        signs = cast(Tensor, self.signs)
        if signs.numel() and int(signs.max()) > 1:
            raise ValueError(f"signs must be 0 or 1, found {int(signs.max())}")


class Binary(Technique):
    """Store each weight as a sign; the weights of an output channel, or of the tensor, share a scale.

    w ~ s[o] * b,   b in {-1, 1};   b = sign(w),   s = sum h |w| / sum h

    with h the curvature's diagonal where statistics are at hand, else 1: the least squares of the rounding error. Each
    further term codes in the same way what the ones before it left: `terms` signs per weight.

    Trained, a weight is seen as its signs, and gradients pass straight through, but for those that would push a weight
    further than CLIP scales away from zero. Stochastic signs are +1 with probability (r / s + 1) / 2, cut at 0 and 1, with r
    what the term has to code; in eval mode, and in the file, they are sign(r). With `warm_up`, weights go from what they are
    to their signs on a straight line, in that share of the time that schedules take (`train.anneal_until`).

    Acts on   floating-point parameters and buffers of two axes or more.
    Stores    terms * (numel + 16 * scales)  [bits] before entropy coding;  MACs unchanged.
    Reads     curvature, if there is one.
    Refuses   tensors that would grow.
    Paper     Rastegari et al. 2016, arXiv:1603.05279; training: Courbariaux, Bengio & David 2015, arXiv:1511.00363;
              several terms: Guo et al. 2017, arXiv:1706.02021.
    Differs   scales are the curvature's least squares; a clipped gradient in place of clipped weights.

    >>> Binary().cost(Site.of(nn.Linear(64, 32), "weight")).stored_bits
    2560
    """

    acts_on: ClassVar = Tensors(min_axes=2, min_elements=8)
    reads: ClassVar = (Curvature,)
    paper: ClassVar = "arXiv:1603.05279"
    structure_type: ClassVar = BinaryStructure
    ladder: ClassVar = ({"terms": 4}, {"terms": 2}, {"terms": 1})

    CLIP: ClassVar[float] = 3.0
    """In scales: gradients push no weight further out."""

    terms: int = Field(default=1, ge=1, le=8, description="signs per weight: each further one codes what is left")
    group: Literal["tensor", "channel"] = Field(
        default="channel", description="what shares a scale: the tensor or an output channel"
    )
    importance: Literal["curvature", "none"] = Field(
        default="curvature", description="what counts in the scales: every weight as the loss feels it, or all the same"
    )
    signs: Literal["deterministic", "stochastic"] = Field(default="deterministic", description="how weights are seen in training")
    warm_up: float = Field(default=0, ge=0, le=1, description="share of the schedule in which weights become their signs")

    def refuse(self, site: Site) -> str | None:
        value = site.tensor
        if self.terms * (value.numel() + 16 * self._n_rows(site)) >= value.numel() * 8 * value.element_size():
            return f"{self.terms} signs per weight with their scales would be larger than the tensor"
        return None

    def decide(self, site: Site, statistics: Statistics) -> BinaryStructure:
        if site.tensor.is_meta:
            return BinaryStructure()
        means = self._rows(site).abs().mean(1)
        return BinaryStructure(scales=scale_dtype(torch.cat([means, means * 0.5 ** (self.terms - 1)])))

    def build(self, site: Site, structure: Structure) -> BinaryDecoder:
        value, scales = site.tensor, cast(BinaryStructure, structure).scales
        return BinaryDecoder(value.shape, value.dtype, channel_axis(site.owner), self._n_rows(site), self.terms, scales)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        _fit(cast(BinaryDecoder, parts), site.tensor, self._importance(site, statistics))

    def lower(self, parts: nn.Module) -> nn.Module | None:
        decoder = cast(BinaryDecoder, parts)
        if self.terms > 1:
            return None
        scale = decoder.scale.detach()[0].to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
        codes = 2 * cast(Tensor, decoder.signs)[0].to(torch.int8) - 1
        return Dequantized(codes, scale.reshape(()) if scale.numel() == 1 else scale, decoder.axis, bits=4)

    def relax(self, site: Site, structure: Structure, statistics: Statistics) -> nn.Module | None:
        return Signed(self, site.tensor, build(self, site, structure), self._importance(site, statistics))

    def _n_rows(self, site: Site) -> int:
        return 1 if self.group == "tensor" else site.tensor.shape[channel_axis(site.owner)]

    def _rows(self, site: Site) -> Tensor:
        return scale_rows(site.tensor.float(), channel_axis(site.owner), self._n_rows(site))

    def _importance(self, site: Site, statistics: Statistics) -> Tensor:
        """(rows, columns)"""
        curvature = statistics.curvature(site.covers[0]) if self.importance == "curvature" else None
        rows = self._rows(site)
        if curvature is None:
            return torch.ones_like(rows)
        h = scale_rows(curvature.diagonal().to(rows.device), channel_axis(site.owner), len(rows))
        return h / h.mean().clamp_min(1e-30) + 1e-3


class Signed(nn.Module):
    """A trainable weight that is seen as its signs."""

    def __init__(self, technique: Binary, value: Tensor, parts: nn.Module, importance: Tensor) -> None:
        super().__init__()
        self.technique = technique
        self.weight = nn.Parameter(value.clone())
        self.parts = cast(BinaryDecoder, parts.requires_grad_(False))
        self.register_buffer("importance", importance)
        self.share = 1.0
        self.settle()

    def anneal(self, progress: float) -> None:
        self.share = min(1.0, progress / self.technique.warm_up) if self.technique.warm_up else 1.0

    def forward(self, original: Tensor | None = None) -> Tensor:
        self.settle()
        with torch.no_grad():
            drawn = self.training and self.technique.signs == "stochastic"
            value = _drawn(self.weight, self.parts) if drawn else self.parts()
            if self.share < 1:
                value = self.weight + self.share * (value - self.weight)
            limit = self.technique.CLIP * self.parts.spread(0)
        return cast(Tensor, _Clipped.apply(self.weight, value, limit))

    def settle(self) -> nn.Module:
        """The parts, fitted to the present weight."""
        with torch.no_grad():
            _fit(self.parts, self.weight, cast(Tensor, self.importance))
        return self.parts



def _fit(decoder: BinaryDecoder, value: Tensor, importance: Tensor) -> None:
    rest = value.float()
    for term in range(len(decoder.scale)):
        sizes = scale_rows(rest.abs(), decoder.axis, len(importance))
        decoder.scale.data[term] = (importance * sizes).sum(1) / importance.sum(1)
        positive, scale = rest >= 0, decoder.spread(term).detach()
        cast(Tensor, decoder.signs)[term] = positive
        rest = rest - torch.where(positive, scale, -scale)


def _drawn(weight: Tensor, decoder: BinaryDecoder) -> Tensor:
    """The weight with signs drawn at random, so that each term is on average what it has to code, where that is in reach."""
    wanted, drawn = weight.float(), torch.zeros_like(weight, dtype=torch.float32)
    for term in range(len(decoder.scale)):
        scale = decoder.spread(term)
        positive = torch.rand_like(wanted) * 2 * scale < wanted - drawn + scale
        drawn = drawn + torch.where(positive, scale, -scale)
    return drawn


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, limit: Tensor) -> Tensor:
        ctx.save_for_backward(weight, limit)
        return value.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, limit = ctx.saved_tensors
        outwards = (weight.abs() > limit) & (gradient * weight < 0)
        return gradient.masked_fill(outwards, 0.0), None, None
