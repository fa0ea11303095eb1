"""Integers with offsets, fitted to most weights rather than to the few large ones."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.numerics import FloatName, as_rows, channel_axis, from_rows, scale_dtype, table_dtype
from pared.quantize.integer import IntegerDecoder
from pared.site import Site
from pared.statistics import Statistics
from pared.technique import Structure, Technique, Tensors

_BETA, _GROWTH, _N_STEPS = 10.0, 1.01, 20
"""Of the half-quadratic solver: how strongly the two halves are tied at first, how that grows, and how often it does."""


class HqqStructure(Structure):
    scales: FloatName = "float16"
    offsets: FloatName = "float16"


class HqqDecoder(nn.Module):
    """weight = scale * codes + offset; codes and scale as in `quantize.integer`, offset (rows, groups)."""

    def __init__(self, integers: IntegerDecoder, offsets: FloatName) -> None:
        super().__init__()
        self.integers = integers
        self.offset = nn.Parameter(torch.zeros(integers.scale.shape, dtype=getattr(torch, offsets)))

    def forward(self) -> Tensor:
        held = self.integers
        codes = as_rows(cast(Tensor, held.codes), held.axis).to(torch.float32)
        offset = self.offset.to(torch.float32).repeat_interleave(held.group, 1)[:, : codes.shape[1]]
        return from_rows(codes * held.spread() + offset, held.shape, held.axis).to(held.dtype)


class Hqq(Technique):
    """Store each weight as a k-bit integer; the weights of a group share a scale and an offset, found without data.

    w[o, i] ~ s[o, g(i)] * q[o, i] + c[o, g(i)],   s = (max w - min w) / (2**k - 1)

    minimise over c   sum |w - s q - c|^p,   p < 1,

    which fits most weights well and gives up on a few. Half-quadratic splitting does it: with e standing for the error, in
    steps, and b growing from step to step,

    e = sign(r) * max(0, |r| - |r|**(p - 1) / b),  r = (w - c) / s - q;   c = mean(w - s (q + e));   q = round((w - c) / s)

    Acts on   every floating-point parameter and buffer with two axes or more; groups lie within an output channel.
    Stores    numel * bits + 32 * groups  [bits] before entropy coding;  MACs unchanged.
    Reads     nothing, weights only.
    Refuses   tensors that would grow.
    Paper     Badri & Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models,
              https://mobiusml.github.io/hqq_blog/; the splitting: Geman & Reynolds 1992, doi:10.1109/34.120331.
    Differs   an offset c = -s z in place of the zero point z, which stays finite where all weights of a group are alike;
              errors are measured in steps, so that the size of the weights does not matter; of all steps the best is kept.

    >>> Hqq(bits=4, group=64).cost(Site.of(nn.Linear(64, 32), "weight")).stored_bits
    9216
    """

    acts_on: ClassVar = Tensors(min_axes=2)
    paper: ClassVar = "doi:10.1109/34.120331"
    structure_type: ClassVar = HqqStructure
    ladder: ClassVar = ({"bits": 8}, {"bits": 4, "group": 32}, {"bits": 3})

    bits: int = Field(default=4, ge=2, le=8, description="bits per weight")
    group: Annotated[int, Field(ge=8)] | Literal["channel"] = Field(
        default=64, description="what shares a scale and an offset: so many weights of an output channel, or all of it"
    )
    norm: float = Field(
        default=0.7, gt=0, lt=1, allow_inf_nan=False,
        description="p of the error |w - v|^p that is minimised: the smaller, the less the weights that fit badly count",
    )  # fmt: skip

    def refuse(self, site: Site) -> str | None:
        value = site.tensor
        rows = value.shape[channel_axis(site.owner)]
        n_groups = rows * -(-value.numel() // rows // self._group(site))
        if value.numel() * self.bits + 32 * n_groups >= value.numel() * 8 * value.element_size():
            return f"{self.bits}-bit integers with their scales and offsets would be larger than the tensor"
        return None

    def decide(self, site: Site, statistics: Statistics) -> HqqStructure:
        if site.tensor.is_meta:
            return HqqStructure()
        rows = as_rows(site.tensor.float(), channel_axis(site.owner))
        low, high = _ends(rows, self._group(site))
        return HqqStructure(scales=scale_dtype((high - low) / (2**self.bits - 1)), offsets=table_dtype((high + low) / 2))

    def build(self, site: Site, structure: Structure) -> HqqDecoder:
        value, found = site.tensor, cast(HqqStructure, structure)
        axis = channel_axis(site.owner)
        return HqqDecoder(IntegerDecoder(value.shape, value.dtype, axis, self.bits, self._group(site), found.scales), found.offsets)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(HqqDecoder, parts)
        held = decoder.integers
        rows = as_rows(site.tensor.float(), held.axis)
        low, high = _ends(rows, held.group)
        scale = ((high - low) / (2**self.bits - 1)).clamp_min(torch.finfo(held.scale.dtype).tiny)
        held.scale.data.copy_(scale)
        scale = held.scale.detach().to(torch.float32)[:, :, None]
        inside, grouped = _grouped(torch.ones_like(rows), held.group), _grouped(rows, held.group)
        count = inside.sum(2, keepdim=True)
        bottom, top = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        offset = _as_stored(low[:, :, None] - scale * bottom, decoder.offset.dtype)
        best, least = offset, torch.full_like(offset, torch.inf)
        tie = _BETA
        for _ in range(_N_STEPS + 1):
            q = ((grouped - offset) / scale).round_().clamp_(bottom, top)
            rest = (grouped - offset) / scale - q
            error = (inside * rest.abs() ** self.norm).sum(2, keepdim=True)
            best, least = torch.where(error < least, offset, best), torch.minimum(error, least)
            size = rest.abs()
            given_up = rest.sign() * (size - size ** (self.norm - 1) / tie).clamp_min(0)
            offset = _as_stored((inside * (grouped - scale * (q + given_up))).sum(2, keepdim=True) / count, decoder.offset.dtype)
            tie *= _GROWTH
        decoder.offset.data.copy_(best[:, :, 0])
        self.encode(site, parts, statistics)

    def encode(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(HqqDecoder, parts)
        held = decoder.integers
        rows = as_rows(site.tensor.float(), held.axis)
        offset = decoder.offset.detach().to(torch.float32).repeat_interleave(held.group, 1)[:, : rows.shape[1]]
        codes = ((rows - offset) / held.spread().detach()).round_().clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        cast(Tensor, held.codes).copy_(from_rows(codes, held.shape, held.axis))

    def _group(self, site: Site) -> int:
        value = site.tensor
        columns = value.numel() // value.shape[channel_axis(site.owner)]
        return columns if self.group == "channel" else min(int(self.group), columns)


def _grouped(rows: Tensor, group: int, fill: float = 0.0) -> Tensor:
    """(rows, columns) as (rows, groups, group), the last group filled up."""
    return nn.functional.pad(rows, (0, -rows.shape[1] % group), value=fill).reshape(rows.shape[0], -1, group)


def _ends(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of each group, (rows, groups)."""
    return _grouped(rows, group, torch.inf).amin(2), _grouped(rows, group, -torch.inf).amax(2)


def _as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).to(torch.float32)
