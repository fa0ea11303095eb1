"""Weights as a sign or nothing."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.lowered import Dequantized, LookedUp
from pared.numerics import FloatName, channel_axis, from_rows, scale_dtype, scale_rows, stored
from pared.site import Site
from pared.statistics import Curvature, Statistics
from pared.technique import StraightThrough, Structure, Technique, Tensors, build


class TernaryStructure(Structure):
    scales: FloatName = "float16"


class TernaryDecoder(nn.Module):
    """weight = sum over terms of scale * codes; codes (terms, *shape) in {-1, 0, 1}, scale (terms, sides, rows).

    With two sides, the first scale is for +1, the second for -1.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, axis: int, rows: int, terms: int, sides: int, scales: FloatName
    ) -> None:
        super().__init__()
        self.dtype, self.axis = dtype, axis
        self.register_buffer("codes", torch.zeros((terms, *shape), dtype=torch.int8))
        self.scale = nn.Parameter(torch.zeros(terms, sides, rows, dtype=getattr(torch, scales)))
        self.code_bits = {"codes": math.log2(3)}

    def term(self, number: int, codes: Tensor, scale: Tensor) -> Tensor:
        """What one term with these codes stands for, float32; scale (terms, sides, rows)."""
        shape = [1] * codes.ndim
        shape[self.axis] = -1
        sides = [side.reshape(shape) for side in scale[number].to(torch.float32)]
        signs = codes.to(torch.float32)
        return signs * (sides[0] if len(sides) == 1 else torch.where(signs > 0, sides[0], sides[1]))

    def forward(self) -> Tensor:
        codes = cast(Tensor, self.codes)
        return torch.stack([self.term(n, codes[n], self.scale) for n in range(len(codes))]).sum(0).to(self.dtype)

    def check(self) -> None:
        codes = cast(Tensor, self.codes)
        if codes.numel() and not -1 <= int(codes.min()) <= int(codes.max()) <= 1:
            raise ValueError(f"codes must be -1, 0 or 1, found {int(codes.min())} to {int(codes.max())}")


class Ternary(Technique):
    """Store each weight as -1, 0 or 1; the weights of an output channel, or of the tensor, share a scale.

    w[o, i] ~ s[o] * q,   q = sign(w) where |w| > threshold * mean |w|, else 0;   s = sum h |w| / sum h over q != 0

    with h the curvature's diagonal where statistics are at hand, else 1: the least squares of the rounding error. Each
    further term codes in the same way what the ones before it left.

    With `scales: learned`, +1 and -1 have a scale each, first as above, then trained along with the weights: its slope is
    the sum of the slopes of the weights that share it. Else scales follow the weights in training.

    Acts on   floating-point parameters and buffers of two axes or more.
    Stores    terms * (1.585 numel + 16 * scales)  [bits], codes entropy coded;  MACs unchanged.
    Reads     curvature, if there is one.
    Refuses   tensors that would grow.
    Paper     Li, Zhang & Liu 2016, arXiv:1605.04711; learned scales: Zhu et al. 2017, arXiv:1612.01064; several terms:
              Kundu et al. 2017, arXiv:1707.04679.
    Differs   scales are the curvature's least squares; learned ones start there, keep the threshold of fitted ones, and are
              trained in the logarithm; gradients pass to the weights as they are.

    >>> Ternary().cost(Site.of(nn.Linear(64, 32), "weight")).stored_bits / (64 * 32)
    1.83...
    """

    acts_on: ClassVar = Tensors(min_axes=2, min_elements=8)
    reads: ClassVar = (Curvature,)
    paper: ClassVar = "arXiv:1605.04711"
    structure_type: ClassVar = TernaryStructure
    ladder: ClassVar = ({"terms": 3}, {"terms": 2, "scales": "learned"}, {"terms": 1})

    terms: int = Field(default=1, ge=1, le=5, description="codes per weight: each further one codes what is left")
    group: Literal["tensor", "channel"] = Field(
        default="channel", description="what shares a scale: the tensor or an output channel"
    )
    scales: Literal["fitted", "learned"] = Field(
        default="fitted", description="one that follows from the weights, or one for each sign, trained"
    )
    threshold: float = Field(default=0.7, ge=0, le=2, description="up to which weights become zero, in parts of the mean magnitude")

    def refuse(self, site: Site) -> str | None:
        value = site.tensor
        bits = self.terms * (math.log2(3) * value.numel() + 16 * self._n_sides * self._n_rows(site))
        if bits >= value.numel() * 8 * value.element_size():
            return f"{self.terms} ternary codes per weight with their scales would be larger than the tensor"
        return None

    def decide(self, site: Site, statistics: Statistics) -> TernaryStructure:
        if site.tensor.is_meta:
            return TernaryStructure()
        rows = scale_rows(site.tensor.float(), channel_axis(site.owner), self._n_rows(site)).abs()
        return TernaryStructure(scales=scale_dtype(torch.cat([rows.amax(1), rows.mean(1) * 0.5 ** (self.terms - 1)])))

    def build(self, site: Site, structure: Structure) -> TernaryDecoder:
        value, scales = site.tensor, cast(TernaryStructure, structure).scales
        axis, n_rows = channel_axis(site.owner), self._n_rows(site)
        return TernaryDecoder(value.shape, value.dtype, axis, n_rows, self.terms, self._n_sides, scales)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(TernaryDecoder, parts)
        n_rows = self._n_rows(site)
        rest, curvature = site.tensor.float(), statistics.curvature(site.covers[0])
        importance = torch.ones_like(rest) if curvature is None else curvature.diagonal().to(rest.device)
        importance = importance / importance.mean().clamp_min(1e-30) + 1e-3
        for term in range(self.terms):
            codes = self.codes(rest, decoder.axis, n_rows)
            for number in range(self._n_sides):
                side = codes != 0 if self._n_sides == 1 else codes == 1 - 2 * number
                mass = scale_rows(importance * side, decoder.axis, n_rows).sum(1)
                total = scale_rows(importance * side * rest.abs(), decoder.axis, n_rows).sum(1)
                decoder.scale.data[term, number] = total / mass.clamp_min(1e-30)
            if self._n_sides == 2:  # a sign that no weight has yet starts at the other's scale: from zero nothing is learnt
                scale = decoder.scale.data[term]
                scale.copy_(torch.where(scale > 0, scale, scale.flip(0)))
            cast(Tensor, decoder.codes)[term] = codes
            rest = rest - decoder.term(term, codes, decoder.scale.detach())

    def codes(self, value: Tensor, axis: int, n_rows: int) -> Tensor:
        """-1, 0 or 1 for each element."""
        rows = scale_rows(value, axis, n_rows)
        signs = rows.sign() * (rows.abs() > self.threshold * rows.abs().mean(1, keepdim=True))
        return (signs.reshape(value.shape) if n_rows == 1 else from_rows(signs, value.shape, axis)).to(torch.int8)

    def lower(self, parts: nn.Module) -> nn.Module | None:
        decoder = cast(TernaryDecoder, parts)
        scale, codes = decoder.scale.detach().to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny), decoder.codes
        if self.terms > 1:
            return None
        if self._n_sides == 1:
            one = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1)
            return Dequantized(cast(Tensor, codes)[0], one, decoder.axis, bits=4)
        if scale.shape[2] > 1:
            return None
        table = torch.stack([-scale[0, 1, 0], scale.new_zeros(()), scale[0, 0, 0]])
        return LookedUp(table, (cast(Tensor, codes)[0] + 1).to(torch.uint8))

    def relax(self, site: Site, structure: Structure, statistics: Statistics) -> nn.Module | None:
        if self.scales == "fitted":
            return StraightThrough(self, site, structure, statistics)
        parts = build(self, site, structure)
        self.fit(site, parts, statistics)
        return Scaled(self, site.tensor, cast(TernaryDecoder, parts), self._n_rows(site))

    @property
    def _n_sides(self) -> int:
        return 2 if self.scales == "learned" else 1

    def _n_rows(self, site: Site) -> int:
        return 1 if self.group == "tensor" else site.tensor.shape[channel_axis(site.owner)]


class Scaled(nn.Module):
    """A trainable weight that is seen as ternary codes with trainable scales."""

    def __init__(self, technique: Ternary, value: Tensor, parts: TernaryDecoder, n_rows: int) -> None:
        super().__init__()
        self.technique, self.n_rows = technique, n_rows
        self.weight = nn.Parameter(value.clone())
        self.parts = parts.requires_grad_(False)
        self.register_buffer("first", parts.scale.detach().to(torch.float32, copy=True))
        self.stretch = nn.Parameter(torch.zeros_like(cast(Tensor, self.first)))  # scale = first * exp(stretch)

    def scale(self) -> Tensor:
        """As it will be stored."""
        return stored(cast(Tensor, self.first) * self.stretch.exp(), self.parts.scale.dtype)

    def forward(self, original: Tensor | None = None) -> Tensor:
        parts, scale = self._encoded(), self.scale()
        codes = cast(Tensor, parts.codes)
        value = torch.stack([parts.term(n, codes[n], scale) for n in range(len(codes))]).sum(0)
        through = self.weight - self.weight.detach()  # zero, with the gradient that the value has
        return (value + through).to(self.weight.dtype)

    @torch.no_grad()
    def _encoded(self) -> TernaryDecoder:
        rest, scale = self.weight.float(), self.scale()
        for term in range(len(scale)):
            codes = self.technique.codes(rest, self.parts.axis, self.n_rows)
            cast(Tensor, self.parts.codes)[term] = codes
            rest = rest - self.parts.term(term, codes, scale)
        return self.parts

    def settle(self) -> nn.Module:
        """The parts, with the present scales and codes."""
        with torch.no_grad():
            self.parts.scale.copy_(self.scale())
        return self._encoded()

