"""Uniform integer quantization of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.lowered import Dequantized
from pared.numerics import FloatName, as_rows, channel_axis, from_rows, scale_dtype, stored
from pared.rounding import compensated, descended, fitted_scales, learned, only_use
from pared.site import Site, check_layers
from pared.statistics import Curvature, Statistics
from pared.technique import StraightThrough, Structure, Technique, Tensors, build

_CLIPS = {bits: (1.15, 0.2, 20) for bits in (2, 3, 4)} | {5: (1.0, 0.43, 20), 6: (1.0, 0.62, 20)}
_CLIPS |= {bits: (1.0, 0.86, 8) for bits in (7, 8)}
"""Scales that are tried, by bits: from, to and how many, in parts of the scale that clips nothing. More bits clip less."""
N_FITS = 3
"""How often codes and scales settle in turns."""


class IntegerStructure(Structure):
    scales: FloatName = "float16"


class IntegerDecoder(nn.Module):
    """weight = scale * (codes - zero); codes (any shape) int8, scale (rows, groups), zero (rows, groups) int8 if it is affine."""

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, axis: int, bits: int, group: int, scales: FloatName, affine: bool = False
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.axis, self.bits, self.group = shape, dtype, axis, bits, group
        rows, columns = _rows(shape, axis)
        n_groups = -(-columns // group)
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8))
        self.scale = nn.Parameter(torch.zeros(rows, n_groups, dtype=getattr(torch, scales)))
        self.code_bits = {"codes": bits}
        if affine:
            self.register_buffer("zero", torch.zeros(rows, n_groups, dtype=torch.int8))
            self.code_bits["zero"] = bits

    def spread(self) -> Tensor:
        """The scale of every element, (rows, columns)."""
        columns = _rows(self.shape, self.axis)[1]
        return self.scale.to(torch.float32).repeat_interleave(self.group, 1)[:, :columns]

    def over(self, part: Tensor) -> Tensor:
        """What each group has, (rows, groups), as every element has it: of the tensor's shape."""
        if part.numel() == 1:
            return part.reshape(()).expand(self.shape)
        columns = _rows(self.shape, self.axis)[1]
        return from_rows(part.repeat_interleave(self.group, 1)[:, :columns], self.shape, self.axis)

    def range(self) -> tuple[Tensor, Tensor]:
        """The least and the largest multiple of its scale that every element may be, of the tensor's shape."""
        zero = cast(Tensor, self.zero).to(torch.float32) if "zero" in self.code_bits else torch.zeros_like(self.scale[:1, :1])
        return self.over(-(2 ** (self.bits - 1)) - zero), self.over(2 ** (self.bits - 1) - 1 - zero)

    def multiples(self) -> Tensor:
        """Of its scale that every element is, as float32."""
        codes = cast(Tensor, self.codes).to(torch.float32)
        return codes - self.over(cast(Tensor, self.zero)) if "zero" in self.code_bits else codes

    def keep_(self, multiples: Tensor) -> None:
        """The multiples of the scales that the elements are, as codes."""
        codes = multiples.to(self.scale.device)
        if "zero" in self.code_bits:
            codes = codes + self.over(cast(Tensor, self.zero))
        cast(Tensor, self.codes).copy_(codes)

    def forward(self) -> Tensor:
        multiples, scale = self.multiples(), self.scale.to(torch.float32)
        if scale.shape[1] == 1 and scale.numel() > 1:
            shape = [1] * len(self.shape)
            shape[self.axis] = -1
            return (multiples * scale.reshape(shape)).to(self.dtype)
        return (multiples * self.over(scale)).to(self.dtype)

    def check(self) -> None:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        for name in self.code_bits:
            codes = cast(Tensor, getattr(self, name))
            if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
                raise ValueError(f"{name} must lie in [{low}, {high}], found [{int(codes.min())}, {int(codes.max())}]")


class Integer(Technique):
    """Store each weight as a k-bit integer; the weights of a group share one scale.

    w[o, i] ~ s[o, g(i)] * q[o, i],   q in [-2**(k-1), 2**(k-1) - 1]

    The scale of each group minimises the squared error, weighted by the curvature's diagonal where statistics are at
    hand: a search over clipping points, then least squares. Scales of fewer than 8 bits may be negative, so that the
    longer half of the integer range serves the longer tail. With `scheme: affine` every scale has a zero point z of its own, an
    integer of as many bits, and w[o, i] ~ s (q - z).

    With `rounding: compensated` each weight's rounding error is made good by the weights that are not rounded yet, as the
    second moments of the layer's inputs tell: columns in the order of their inputs' energy, after GPTQ. Then, in turns, every
    code is set to where the damage 1/2 tr(G dW A dW^T) is least with all others as they are, and the scales to where it is
    least with these codes; for A and G of which 2 % and 30 % off the diagonal are not believed.

    With `rounding: learned` gradient descent finds out which weights are rounded up, and which down (AdaRound):

    minimise over a   damage(s (floor(w / s) + h) - w) / damage of the nearest + pull * mean(1 - |2 h - 1|**b)

    for h = clamp(1.2 sigmoid(a) - 0.1, 0, 1), b falling from 20 to 2, damage = 1/2 tr(G dW A dW^T): no data are kept for it.
    The same turns follow. In training the weights start as they are rounded, either way, and from then on take the nearest code.

    With `steps: learned` the scales are trained along with the weights. For v = s q of one weight w,

    dv/dw = 1 where w / s is in the range, else 0;   dv/ds = q - w / s in the range, q outside;   times 1 / sqrt(n (2**(k-1) - 1))

    for the n weights that share s. Else scales follow the weights in training, or stay where `rounding` put them.

    Acts on   every floating-point parameter and buffer of 8 elements or more; a tensor of one axis is one channel.
    Stores    numel * bits + 16 * groups (affine: + bits * groups)  [bits] before entropy coding;  MACs unchanged.
    Reads     curvature, if there is one.
    Refuses   tensors that would grow.
    Paper     Jacob et al. 2018, arXiv:1712.05877; compensated rounding: Frantar et al. 2023, arXiv:2210.17323; learned
              rounding: Nagel et al. 2020, arXiv:2004.10568; learned steps: Esser et al. 2020, arXiv:1902.08153.
    Differs   scales in float16, and signed unless affine; learned ones start where they fit best, not at
              2 mean |w| / sqrt(2**(k-1) - 1), and are trained in the logarithm. Roundings are learned from the curvature, all
              examples at once.

    >>> from torch import nn
    >>> Integer(bits=4, group=64).cost(Site.of(nn.Linear(64, 32), "weight")).stored_bits
    8704
    """

    acts_on: ClassVar = Tensors(min_elements=8)
    reads: ClassVar = (Curvature,)
    paper: ClassVar = "arXiv:1712.05877"
    structure_type: ClassVar = IntegerStructure
    ladder: ClassVar = ({"bits": 8}, {"bits": 5, "steps": "learned"}, {"bits": 3})

    bits: int = Field(default=8, ge=2, le=8, description="bits per weight")
    scheme: Literal["symmetric", "affine"] = Field(
        default="symmetric", description="zero in the middle of the range, or anywhere in it: a zero point for each scale"
    )
    group: Annotated[int, Field(ge=2)] | Literal["tensor", "channel"] = Field(
        default="channel", description="what shares a scale: the tensor, an output channel, or so many weights of a channel"
    )
    tensors: Literal["all", "matrices"] = Field(
        default="all", description="all, or only those with two axes or more: biases and gains stay as they are"
    )
    rounding: Literal["nearest", "compensated", "learned"] = Field(
        default="nearest", description="each weight by itself; with data: errors made good by later weights, or up and down learned"
    )

    steps: Literal["fitted", "learned"] = Field(
        default="fitted",
        description="in training: scales follow from the weights (rounding: nearest; else they stay), or are trained with them",
    )
    keep: str = Field(
        default="", pattern=r"^[\w.,]*$", description="modules whose tensors stay as they are: their paths, with commas between"
    )

    def sites(self, model: nn.Module, graph: Any = None) -> Iterator[Site]:
        check_layers(model, self.keep, "keep")
        return super().sites(model, graph)

    def refuse(self, site: Site) -> str | None:
        kept = [f"{path}." for path in self.keep.split(",") if path]
        if any(f"{path}.".startswith(tuple(kept)) for path in site.paths):
            return "it is to be kept as it is"
        value = site.tensor
        group = self._group(site)
        rows, columns = _rows(value.shape, channel_axis(site.owner))
        if self.group == "tensor":
            rows, columns = 1, value.numel()
        if self.tensors == "matrices" and value.ndim < 2:
            return "it has one axis, and only matrices are asked for"
        per_group = 16 + self.bits * (self.scheme == "affine")
        bits = value.numel() * self.bits + per_group * rows * -(-columns // group)
        if bits >= value.numel() * 8 * value.element_size():
            return f"{self.bits}-bit integers with their scales would be larger than the tensor"
        return None

    def decide(self, site: Site, statistics: Statistics) -> IntegerStructure:
        if site.tensor.is_meta:
            return IntegerStructure()
        rows = self._rows(site, channel_axis(site.owner))
        reach = _grouped(rows, self._group(site)).abs().amax(2)
        return IntegerStructure(scales=scale_dtype(reach / 2 ** (self.bits - 1)))

    def build(self, site: Site, structure: Structure) -> IntegerDecoder:
        value = site.tensor
        axis = channel_axis(site.owner)
        scales, affine = cast(IntegerStructure, structure).scales, self.scheme == "affine"
        if self.group == "tensor":  # one row that holds everything
            decoder = IntegerDecoder(torch.Size((value.numel(),)), value.dtype, 0, self.bits, value.numel(), scales, affine)
            decoder.shape = value.shape
            decoder.codes = torch.zeros(value.shape, dtype=torch.int8)
            return decoder
        return IntegerDecoder(value.shape, value.dtype, axis, self.bits, self._group(site), scales, affine)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(IntegerDecoder, parts)
        rows, weights = self._rows(site, decoder.axis), self._weights(site, decoder, statistics)
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        grouped, importance = _grouped(rows, decoder.group), _grouped(weights, decoder.group)
        top, bottom = grouped.amax(2), grouped.amin(2)
        if self.scheme == "affine":
            top, bottom = top.clamp_min(0), bottom.clamp_max(0)
            reach = top - bottom
            widest = reach / (high - low)
            first = torch.where(widest > 0, low - bottom / widest, 0).round_()
        else:
            # the side that reaches further gets the longer half of the range
            reach = torch.where(top.abs() > bottom.abs(), -top, -bottom)
            if self.bits == 8:  # one step in 256 is not worth a sign that integer kernels do not expect
                reach = reach.abs()
            widest, first = reach / -low, torch.zeros_like(reach)
        widest = torch.where(widest == 0, torch.ones_like(widest), widest)
        best, best_zero = widest.clone(), first
        best_error = torch.full_like(widest, torch.inf)
        for shrink in torch.linspace(*_CLIPS[self.bits]).tolist():
            scale, zero = widest * shrink, first
            for _ in range(2 if self.bits <= 4 else 1):
                q = _nearest(grouped, scale, zero, low, high)
                if self.scheme == "affine":
                    zero = (zero - _offset(grouped, q, importance) / scale).round_().clamp_(low, high)
                    q = _nearest(grouped, scale, zero, low, high)
                weighted = importance * q
                norm = (weighted * q).sum(2)
                scale = torch.where(norm > 0, (weighted * grouped).sum(2) / norm.clamp_min(1e-30), scale)
            scale = _stored(scale, decoder.scale.dtype, widest)
            q = _nearest(grouped, scale, zero, low, high)
            error = (importance * (grouped - q * scale[:, :, None]) ** 2).sum(2)
            better = error < best_error
            best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
            best_error = torch.where(better, error, best_error)
        decoder.scale.data.copy_(_stored(best, decoder.scale.dtype, widest))
        if self.scheme == "affine":
            cast(Tensor, decoder.zero).copy_(best_zero)
        self.encode(site, parts, statistics)
        curvature = statistics.curvature(site.covers[0])
        if self.rounding != "nearest" and curvature is not None:
            _settle_scales_(decoder, curvature, site.tensor.float())

    def encode(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder, value = cast(IntegerDecoder, parts), site.tensor.float()
        scale, (low, high) = decoder.over(decoder.scale.detach().to(torch.float32)), decoder.range()
        curvature = statistics.curvature(site.covers[0]) if self.rounding != "nearest" else None
        if curvature is None:
            decoder.keep_((value / scale).round_().clamp_(low, high))
            return
        rounded = learned if self.rounding == "learned" else compensated
        decoder.keep_(rounded(curvature, value, scale, low, high))

    def relax(self, site: Site, structure: Structure, statistics: Statistics) -> nn.Module | None:
        if self.steps == "fitted" and self.rounding == "nearest":
            return StraightThrough(self, site, structure, statistics)
        parts = cast(IntegerDecoder, build(self, site, structure))
        self.fit(site, parts, statistics)
        if self.rounding == "nearest":
            return Stepped(site.tensor, parts)
        rounded = Stepped((parts.multiples() * parts.over(parts.scale)).detach(), parts)  # so that the nearest codes are those
        rounded.stretch.requires_grad_(self.steps == "learned")
        return rounded

    def lower(self, parts: nn.Module) -> nn.Module | None:
        decoder = cast(IntegerDecoder, parts)
        codes, scale = cast(Tensor, decoder.codes), decoder.scale.detach().to(torch.float32)
        zero = cast(Tensor, decoder.zero) if self.scheme == "affine" else None
        n_groups = scale.shape[1]
        if codes.ndim < 2 or (n_groups > 1 and codes.ndim > 2):
            return None
        if self.bits < 8 and n_groups == 1:  # integer kernels expect scales above zero
            codes, scale = torch.where(decoder.over(scale) < 0, -codes, codes), scale.abs()
        bits = 4 if codes.numel() and int(codes.min()) >= -8 and int(codes.max()) <= 7 else 8
        if n_groups > 1:
            return Dequantized(codes, scale, 1, decoder.group, bits, zero)
        shape = () if scale.numel() == 1 else (-1,)
        return Dequantized(codes, scale.reshape(shape), decoder.axis, bits=bits, zero=None if zero is None else zero.reshape(shape))

    def _group(self, site: Site) -> int:
        value = site.tensor
        columns = _rows(value.shape, channel_axis(site.owner))[1]
        if self.group == "tensor":
            return value.numel()
        return columns if self.group == "channel" else min(int(self.group), columns)

    def _rows(self, site: Site, axis: int) -> Tensor:
        value = site.tensor.float()
        return value.reshape(1, -1) if self.group == "tensor" else as_rows(value, axis)

    def _weights(self, site: Site, decoder: IntegerDecoder, statistics: Statistics) -> Tensor:
        curvature = statistics.curvature(site.covers[0])
        value = site.tensor
        h = torch.ones(value.shape) if curvature is None else curvature.diagonal()
        h = h / h.mean().clamp_min(1e-30) + 1e-3
        h = h.to(value.device)
        return h.reshape(1, -1) if self.group == "tensor" else as_rows(h, decoder.axis)


class Stepped(nn.Module):
    """A trainable weight that is seen as integers with trainable scales."""

    def __init__(self, value: Tensor, parts: IntegerDecoder) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.to(torch.float32, copy=True))
        self.parts = parts.requires_grad_(False)
        self.register_buffer("first", parts.scale.detach().to(torch.float32, copy=True))
        self.stretch = nn.Parameter(torch.zeros_like(cast(Tensor, self.first)))  # scale = first * exp(stretch)

    def scale(self) -> Tensor:
        """As it will be stored."""
        return stored(cast(Tensor, self.first) * self.stretch.exp(), self.parts.scale.dtype)

    def spread(self) -> Tensor:
        """The scale of every weight, of the weight's shape."""
        return self.parts.over(self.scale())

    def forward(self, original: Tensor | None = None) -> Tensor:
        n = self.weight.numel() / self.stretch.numel()
        share = 1 / math.sqrt(n * (2 ** (self.parts.bits - 1) - 1))
        value = _Rounded.apply(self.weight, self.spread(), *self.parts.range(), share)
        return cast(Tensor, value).to(self.parts.dtype)

    def settle(self) -> nn.Module:
        """The parts, with the present scales and codes."""
        with torch.no_grad():
            self.parts.scale.copy_(self.scale())
            self.parts.keep_((self.weight / self.spread()).round_().clamp_(*self.parts.range()))
        return self.parts


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, low: Tensor, high: Tensor, share: float) -> Tensor:
        scaled = weight / scale
        inside = (scaled >= low) & (scaled <= high)
        codes = scaled.round().clamp_(low, high)
        ctx.save_for_backward(inside, codes - inside * scaled)
        ctx.share = share
        return codes * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        inside, error = ctx.saved_tensors
        return gradient * inside, gradient * error * ctx.share, None, None, None


def _settle_scales_(decoder: IntegerDecoder, curvature: Curvature, value: Tensor) -> None:
    """In turns: the scales that do the least damage with these codes, and the codes that do with these scales."""
    use = only_use(curvature)
    if use is None:
        return
    value, (low, high) = value.cpu(), (bound.cpu() for bound in decoder.range())
    owners = decoder.over(torch.arange(decoder.scale.numel()).reshape(decoder.scale.shape)).contiguous()
    codes, scale = decoder.multiples().cpu(), decoder.scale.detach().cpu().float().flatten()
    least = curvature.damage(codes * scale[owners] - value)
    for _ in range(N_FITS):
        fitted = fitted_scales(use, codes, value, scale, owners)
        fitted = _stored(torch.where(fitted * scale > 0, fitted, scale), decoder.scale.dtype, scale)
        codes = descended(use, codes, value, fitted[owners], low, high)
        scale, damage = fitted, curvature.damage(codes * fitted[owners] - value)
        if not damage < least:
            return
        least = damage
        decoder.scale.data.copy_(fitted.reshape(decoder.scale.shape))
        decoder.keep_(codes)


def _rows(shape: torch.Size, axis: int) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[axis], shape.numel() // shape[axis]


def _grouped(rows: Tensor, group: int) -> Tensor:
    """(rows, columns) as (rows, groups, group), the last group filled with zeros."""
    missing = -rows.shape[1] % group
    padded = nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(rows.shape[0], -1, group)


def _nearest(grouped: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The multiples of each group's scale nearest to its weights, (rows, groups, group)."""
    return (grouped / scale[:, :, None]).round_().clamp_((low - zero)[:, :, None], (high - zero)[:, :, None])


def _offset(grouped: Tensor, multiples: Tensor, importance: Tensor) -> Tensor:
    """What each group's weights are above a line through their multiples where these are zero, (rows, groups)."""
    total = importance.sum(2, keepdim=True).clamp_min(1e-30)
    w, q = (grouped * importance).sum(2, keepdim=True) / total, (multiples * importance).sum(2, keepdim=True) / total
    slope = (importance * (multiples - q) * (grouped - w)).sum(2) / (importance * (multiples - q) ** 2).sum(2).clamp_min(1e-30)
    return w[:, :, 0] - slope * q[:, :, 0]


def _stored(scale: Tensor, dtype: torch.dtype, fallback: Tensor) -> Tensor:
    """The scale as it will be stored; one that vanishes in the stored type keeps its sign at the smallest normal value."""
    rounded = scale.to(dtype).to(torch.float32)
    tiny = torch.finfo(dtype).tiny
    return torch.where(rounded == 0, torch.where(fallback < 0, -tiny, tiny), rounded)
