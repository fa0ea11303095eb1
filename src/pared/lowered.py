"""The operators that techniques lower themselves to: what a runtime can execute without decoding to floating point.

`torch.ops.pared.quantize`, `dequantize` and `lookup` run in torch as the formulas below, stand in a program as one node
each, and are translated one to one by an exporter. Runtimes know these operators and no technique.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

LIBRARY = torch.library.Library("pared", "FRAGMENT")
OPERATORS = ("quantize", "dequantize", "lookup")

LIBRARY.define("quantize(Tensor input, Tensor scale, Tensor zero_point, int bits) -> Tensor")
LIBRARY.define("dequantize(Tensor codes, Tensor scale, Tensor? zero_point, int axis, int group, int bits) -> Tensor")
LIBRARY.define("lookup(Tensor table, Tensor codes) -> Tensor")


def _quantize(input: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """codes = clamp(round(input / scale) + zero_point, 0, 2**bits - 1) as uint8; scale and zero point are scalars."""
    if not 1 <= bits <= 8 or scale.numel() != 1 or zero_point.numel() != 1:
        raise ValueError(f"quantize takes 1 to 8 bits and one scale, got {bits} bits and {scale.numel()} scales")
    codes = (input.to(torch.float32) / scale.to(torch.float32).reshape(())).round_()
    return codes.add_(zero_point.to(torch.float32).reshape(())).clamp_(0, 2**bits - 1).to(torch.uint8)


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group: int, bits: int) -> Tensor:
    """scale * (codes - zero_point) in float32.

    One scale: of the whole tensor. One per index of `axis`: scale (n,). With a group: scale has the shape of the codes
    but along `axis`, where one scale is for `group` codes in a row.
    """
    value = codes.to(torch.float32)
    factor, zero = scale.to(torch.float32), None if zero_point is None else zero_point.to(torch.float32)
    if scale.numel() == 1:
        factor, zero = factor.reshape(()), None if zero is None else zero.reshape(())
    elif group:
        size = codes.shape[axis]
        factor = factor.repeat_interleave(group, axis).narrow(axis, 0, size)
        zero = None if zero is None else zero.repeat_interleave(group, axis).narrow(axis, 0, size)
    else:
        shape = [1] * codes.ndim
        shape[axis] = -1
        factor, zero = factor.reshape(shape), None if zero is None else zero.reshape(shape)
    return (value if zero is None else value - zero) * factor


def _lookup(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes]; a table of one axis, codes of any shape and integer type."""
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


LIBRARY.impl("quantize", _quantize, "CompositeExplicitAutograd")
LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
LIBRARY.impl("lookup", _lookup, "CompositeExplicitAutograd")


def quantize(input: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    return cast(Tensor, torch.ops.pared.quantize(input, scale, zero_point, bits))


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = 0, group: int = 0, bits: int = 8
) -> Tensor:
    return cast(Tensor, torch.ops.pared.dequantize(codes, scale, zero_point, axis, group, bits))


def lookup(table: Tensor, codes: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.pared.lookup(table, codes))


class Dequantized(nn.Module):
    """A tensor held as integer codes with scales: what a runtime keeps is the codes.

    Args:
        codes: int8, of the tensor's shape.
        scale: one, (n,) along `axis`, or one for `group` codes in a row along `axis`.
        bits: that the codes need; 4 or fewer may be stored as half bytes.
        zero: int8, of the scale's shape; None for zeros.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, axis: int = 0, group: int = 0, bits: int = 8, zero: Tensor | None = None
    ) -> None:
        super().__init__()
        self.axis, self.group, self.bits = axis, group, bits
        self.register_buffer("codes", codes.detach().clone())
        self.register_buffer("scale", scale.detach().to(torch.float32).clone())
        self.register_buffer("zero", None if zero is None else zero.detach().clone())

    def forward(self) -> Tensor:
        zero = cast("Tensor | None", self.zero)
        return dequantize(cast(Tensor, self.codes), cast(Tensor, self.scale), zero, self.axis, self.group, self.bits)


class LookedUp(nn.Module):
    """A tensor held as indices into a table."""

    def __init__(self, table: Tensor, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table.detach().to(torch.float32).clone())
        self.register_buffer("codes", codes.detach().clone())

    def forward(self) -> Tensor:
        return lookup(cast(Tensor, self.table), cast(Tensor, self.codes))


class Quantizer(torch.autograd.Function):
    """quantize and dequantize in one. Gradients pass where nothing is clipped (Bengio et al. 2013, arXiv:1308.3432); the scale's
    is the sum of q - z - x / s there, and of q - z elsewhere, times 1 / sqrt(features (2**bits - 1)) (Esser et al. 2020,
    arXiv:1902.08153)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        top, zero, factor = 2**bits - 1, zero_point.to(torch.float32), scale.to(torch.float32)
        scaled = input.to(torch.float32) / factor
        inside = (scaled >= -zero) & (scaled <= top - zero)
        codes = scaled.round().add_(zero).clamp_(0, top).sub_(zero)
        error = codes - inside * scaled if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, error)
        ctx.share = 1 / math.sqrt(max(1, input[:1].numel()) * top)
        return codes.mul_(factor).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        inside, error = ctx.saved_tensors
        by_scale = None if error is None else (gradient * error).sum() * ctx.share
        return gradient * inside, by_scale, None, None


def through_integers(input: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    """The input as it comes back from integers of so many bits, in its own type; differentiable straight through."""
    if torch.is_grad_enabled() and (input.requires_grad or scale.requires_grad):
        return cast(Tensor, Quantizer.apply(input, scale, zero_point, bits))
    return dequantize(quantize(input, scale, zero_point, bits), scale, zero_point, bits=bits).to(input.dtype)
