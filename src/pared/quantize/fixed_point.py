"""Weights and biases in fixed point."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.lowered import Dequantized
from pared.numerics import as_rows, channel_axis
from pared.site import Site
from pared.statistics import Curvature, Statistics
from pared.technique import Structure, Technique, Tensors

_LARGEST_FRACTION = 120
_TRIED = 4
"""Numbers of fraction bits that are tried: the one that clips nothing, and finer ones."""


class FixedPointDecoder(nn.Module):
    """weight = codes * 2**-fraction; codes int8 or int16 of the weight's shape, fraction (rows,) int8."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, axis: int, bits: int, rows: int) -> None:
        super().__init__()
        self.dtype, self.axis, self.bits = dtype, axis, bits
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8 if bits <= 8 else torch.int16))
        self.register_buffer("fraction", torch.zeros(rows, dtype=torch.int8))
        self.code_bits = {"codes": bits}

    def scale(self) -> Tensor:
        """2**-fraction, exactly: the exponent bits of float32."""
        return ((127 - cast(Tensor, self.fraction).to(torch.int32)) << 23).view(torch.float32)

    def spread(self) -> Tensor:
        """The scale in a shape that goes with the weight."""
        shape = [1] * cast(Tensor, self.codes).ndim
        if len(cast(Tensor, self.fraction)) > 1:
            shape[self.axis] = -1
        return self.scale().reshape(shape)

    def forward(self) -> Tensor:
        return (cast(Tensor, self.codes).to(torch.float32) * self.spread()).to(self.dtype)

    def check(self) -> None:
        codes, fraction = cast(Tensor, self.codes), cast(Tensor, self.fraction)
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
            raise ValueError(f"codes must lie in [{low}, {high}], found [{int(codes.min())}, {int(codes.max())}]")
        if fraction.numel() and int(fraction.to(torch.int32).abs().max()) > _LARGEST_FRACTION:
            raise ValueError(f"fraction bits must lie within {_LARGEST_FRACTION} of zero, found {fraction.tolist()}")


class FixedPoint(Technique):
    """Store each weight as an integer of k bits of which f are fraction bits: the scale is a power of two.

    w ~ 2**-f * q,   q = clamp(round(w * 2**f), -2**(k-1), 2**(k-1) - 1)

    f is, of the number that clips nothing and the next finer ones, the one with the least squared error, weighted by the
    curvature's diagonal where statistics are at hand. With `quantize.activations(powers_of_two=true)` every multiplication by a
    scale is a shift, and `pared.runtimes.fixed_point` computes the network in integers alone, bit for bit the same.

    Acts on   every floating-point parameter and buffer, biases too; a tensor of one axis has one f.
    Stores    numel * bits + 8 * fs  [bits] before entropy coding;  MACs unchanged.
    Reads     curvature, if there is one.
    Refuses   tensors that would grow.
    Paper     Gysel, Motamedi & Ghiasi 2016, arXiv:1604.03168.
    Differs   ranges by least squares, not by the largest value.

    >>> FixedPoint(bits=8).cost(Site.of(nn.Linear(64, 32), "weight")).stored_bits
    16392
    """

    acts_on: ClassVar = Tensors()
    reads: ClassVar = (Curvature,)
    paper: ClassVar = "arXiv:1604.03168"
    ladder: ClassVar = ({"bits": 12}, {"bits": 8, "group": "channel"}, {"bits": 5})

    bits: int = Field(default=8, ge=2, le=16, description="bits per weight, sign included")
    group: Literal["tensor", "channel"] = Field(
        default="tensor", description="what shares its number of fraction bits: the tensor or an output channel"
    )

    def refuse(self, site: Site) -> str | None:
        value = site.tensor
        if value.numel() * self.bits + 8 * self._n_rows(site) >= value.numel() * 8 * value.element_size():
            return f"{self.bits}-bit integers with their numbers of fraction bits would be larger than the tensor"
        return None

    def build(self, site: Site, structure: Structure) -> FixedPointDecoder:
        value = site.tensor
        return FixedPointDecoder(value.shape, value.dtype, channel_axis(site.owner), self.bits, self._n_rows(site))

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(FixedPointDecoder, parts)
        rows, low, high = self._rows(site.tensor.float(), decoder), -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        curvature = statistics.curvature(site.covers[0])
        h = torch.ones_like(rows) if curvature is None else self._rows(curvature.diagonal().to(rows.device), decoder)
        h = h / h.mean().clamp_min(1e-30) + 1e-3
        largest = rows.abs().amax(1)
        first = torch.where(largest > 0, (high / largest.clamp_min(1e-38)).log2().floor(), 0.0)
        best, best_error = first, torch.full_like(first, torch.inf)
        for more in range(_TRIED):
            fraction = (first + more).clamp(-_LARGEST_FRACTION, _LARGEST_FRACTION)
            scale = torch.exp2(-fraction)[:, None]
            error = (h * (rows - (rows / scale).round().clamp(low, high) * scale) ** 2).sum(1)
            best = torch.where(error < best_error, fraction, best)
            best_error = torch.minimum(error, best_error)
        cast(Tensor, decoder.fraction).copy_(best)
        self.encode(site, parts, statistics)

    def encode(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(FixedPointDecoder, parts)
        codes = (site.tensor.float() / decoder.spread()).round_()
        cast(Tensor, decoder.codes).copy_(codes.clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1))

    def lower(self, parts: nn.Module) -> nn.Module | None:
        decoder = cast(FixedPointDecoder, parts)
        codes, scale = cast(Tensor, decoder.codes), decoder.scale()
        if codes.ndim < 2 or self.bits > 8:
            return None
        return Dequantized(codes, scale.reshape(()) if len(scale) == 1 else scale, decoder.axis, bits=4 if self.bits <= 4 else 8)

    def _n_rows(self, site: Site) -> int:
        shape = site.tensor.shape
        return 1 if self.group == "tensor" or len(shape) < 2 else shape[channel_axis(site.owner)]

    @staticmethod
    def _rows(value: Tensor, decoder: FixedPointDecoder) -> Tensor:
        return value.reshape(1, -1) if len(cast(Tensor, decoder.fraction)) == 1 else as_rows(value, decoder.axis)
