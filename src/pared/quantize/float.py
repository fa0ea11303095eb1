"""Weights as shorter floats."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.numerics import as_rows, channel_axis, from_rows
from pared.site import Site
from pared.statistics import Statistics
from pared.technique import Structure, Technique, Tensors

FORMATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
_LARGEST = 126
"""Exponents up to here are those of ordinary float32 numbers."""
FormatName = Literal["float16", "bfloat16", "float8_e4m3", "float8_e5m2"]


class FloatDecoder(nn.Module):
    """weight = 2**exponent * (the number whose bits are codes); exponent (rows,) int8, without elements where there are none."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, axis: int, form: FormatName, rows: int) -> None:
        super().__init__()
        self.dtype, self.axis, self.form = dtype, axis, FORMATS[form]
        whole = torch.int16 if self.form.itemsize == 2 else torch.uint8
        self.register_buffer("codes", torch.zeros(shape, dtype=whole))
        self.register_buffer("exponent", torch.zeros(rows, dtype=torch.int8))

    def scale(self) -> Tensor:
        """2**exponent, exactly, by row: the exponent bits of float32."""
        return ((127 + cast(Tensor, self.exponent).to(torch.int32)) << 23).view(torch.float32)

    def forward(self) -> Tensor:
        codes = cast(Tensor, self.codes)
        value = codes.view(self.form).to(torch.float32)
        if len(cast(Tensor, self.exponent)) == 1:
            value = value * self.scale()
        elif len(cast(Tensor, self.exponent)) > 1:
            value = from_rows(as_rows(value, self.axis) * self.scale()[:, None], codes.shape, self.axis)
        return value.to(self.dtype)

    def check(self) -> None:
        exponent = cast(Tensor, self.exponent)
        if len(exponent) and not -_LARGEST <= int(exponent.min()) <= int(exponent.max()) <= _LARGEST:
            raise ValueError(f"exponents must lie within {_LARGEST}, found {int(exponent.min())} to {int(exponent.max())}")
        if not bool(torch.isfinite(cast(Tensor, self.codes).view(self.form).to(torch.float32)).all()):
            raise ValueError("codes must stand for finite numbers")


class Float(Technique):
    """Store each weight as a float of 16 or 8 bits, the nearest one.

    w[o, i] ~ 2**e[o] * v,   v in the format;   e[o] the least with which the largest weight is in the format's range

    float16 has 10 bits of mantissa and 5 of exponent, bfloat16 7 and 8, float8_e4m3 3 and 4, float8_e5m2 2 and 5. What lies
    beyond a format's range becomes its largest number. Eight bits need e: without it most weights are below what e4m3 resolves.

    Acts on   every floating-point parameter and buffer that is longer than the format; a tensor of one axis has one e.
    Stores    16 or 8 bits for each weight, 8 for each e, before entropy coding;  MACs unchanged.
    Reads     nothing, weights only.
    Refuses   tensors that are as short already or would grow, and weights beyond the range where there is no e.
    Paper     Micikevicius et al. 2022, arXiv:2209.05433.
    Differs   scales are powers of two, so that they add no rounding.

    >>> Float(format="float8_e4m3", group="channel").cost(Site.of(nn.Linear(64, 32), "weight")).stored_bits
    16640
    """

    acts_on: ClassVar = Tensors()
    paper: ClassVar = "arXiv:2209.05433"
    ladder: ClassVar = (
        {"format": "float16"},
        {"format": "bfloat16"},
        {"format": "float8_e4m3", "group": "channel"},
        {"format": "float8_e5m2", "group": "channel"},
    )

    format: FormatName = Field(default="float16", description="which floats: their bits, of these mantissa and exponent")
    group: Literal["none", "tensor", "channel"] = Field(
        default="none", description="what shares a power of two as its scale: nothing, the tensor or an output channel"
    )

    def refuse(self, site: Site) -> str | None:
        value, form = site.tensor, FORMATS[self.format]
        if 8 * (value.numel() * form.itemsize + self._n_rows(site)) >= 8 * value.numel() * value.element_size():
            return f"in {self.format} it would not be smaller than it is"
        if self.group == "none" and not value.is_meta and float(value.abs().max()) > torch.finfo(form).max:
            return f"it has weights beyond {self.format}'s largest number, {torch.finfo(form).max:g}; give it a scale by group"
        return None

    def build(self, site: Site, structure: Structure) -> FloatDecoder:
        value = site.tensor
        return FloatDecoder(value.shape, value.dtype, channel_axis(site.owner), self.format, self._n_rows(site))

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(FloatDecoder, parts)
        value, n_rows, largest = site.tensor.float(), self._n_rows(site), torch.finfo(decoder.form).max
        rows = as_rows(value, decoder.axis) if n_rows > 1 else value.reshape(1, -1)
        if n_rows:
            share = rows.abs().amax(1) / largest
            mantissa, exponent = torch.frexp(torch.where(share > 0, share, torch.ones_like(share)))
            exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
            cast(Tensor, decoder.exponent).copy_(exponent.clamp(-120, 120))
            rows = rows / decoder.scale()[:, None]
        rows = rows.clamp(-largest, largest)
        value = from_rows(rows, value.shape, decoder.axis) if n_rows > 1 else rows.reshape(value.shape)
        codes = cast(Tensor, decoder.codes)
        codes.copy_(value.to(decoder.form).view(codes.dtype))

    def _n_rows(self, site: Site) -> int:
        shape = site.tensor.shape
        if self.group == "none":
            return 0
        return 1 if self.group == "tensor" or len(shape) < 2 else shape[channel_axis(site.owner)]
