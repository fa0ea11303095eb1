"""Uniform quantization whose size after entropy coding is set, and traded against the loss while training."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pared import store
from pared.numerics import as_rows, channel_axis, from_rows
from pared.site import Site
from pared.statistics import Statistics
from pared.technique import Structure, Technique, Tensors

_LARGEST = 32767
_HALVINGS = 16


class StepDecoder(nn.Module):
    """weight = step * codes; codes int16 of the weight's shape, one float32 step."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, bits: float) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int16))
        self.step = nn.Parameter(torch.ones(1))
        self.code_bits = {"codes": bits}

    def forward(self) -> Tensor:
        return (cast(Tensor, self.codes).to(torch.float32) * self.step).to(self.dtype)


class EntropyConstrained(Technique):
    """Round each weight to a multiple of one step per tensor; the step is the finest whose coded size is within `bits`.

    w ~ s q,   q = round(w / s);   trained:  loss + price * sum of R(q),   the step learned, too

    R is an estimate of what the file's coder needs: -log2 of the probability that q is zero, from the frequency of zeros in
    its row and column, then of sign and magnitude. Most weights become zero, whole rows and columns first: pruning and
    quantization are one. The price is one for the whole network, and the training loop steers it so that the sizes of all
    tensors together come from START_BITS down to what was asked; which tensor gets how much, training finds.

    Acts on   every floating-point parameter and buffer of 8 elements or more.
    Stores    bits * numel + 32  [bits];  MACs unchanged.
    Reads     nothing, weights only.
    Refuses   tensors that would grow.
    Paper     Oktay et al. 2020, arXiv:1906.06624.
    Differs   the probabilities are counted, not learned, by row and column; steps are learned as in Esser et al. 2020,
              arXiv:1902.08153.
    """

    acts_on: ClassVar = Tensors(min_elements=8)
    paper: ClassVar = "arXiv:1906.06624"
    keeps_size: ClassVar = True
    ladder: ClassVar = ({"bits": 7}, {"bits": 4}, {"bits": 2})

    START_BITS: ClassVar[float] = 3.0
    """Bits per weight at which training starts, where fewer are asked for."""

    bits: float = Field(default=2, gt=0, le=8, description="bits per weight in the file, entropy coded, on average")

    def refuse(self, site: Site) -> str | None:
        value = site.tensor
        if value.numel() * self.bits + 32 >= value.numel() * 8 * value.element_size():
            return f"codes of {self.bits:g} bits with their step would be larger than the tensor"
        return None

    def build(self, site: Site, structure: Structure) -> StepDecoder:
        return StepDecoder(site.tensor.shape, site.tensor.dtype, self.bits)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(StepDecoder, parts)
        value, scale = _normal(site.tensor)
        step = self.finest(value)
        decoder.step.data.copy_(step * scale)
        cast(Tensor, decoder.codes).copy_(_codes(value, step))

    def encode(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        decoder = cast(StepDecoder, parts)
        cast(Tensor, decoder.codes).copy_(_codes(site.tensor.float(), decoder.step))

    def finest(self, value: Tensor) -> Tensor:
        """The finest step whose codes take at most `bits` per weight, by bisection on the logarithm; of shape (1,)."""
        largest = float(value.abs().max())
        if largest == 0:
            return torch.ones(1, device=value.device)
        fine, coarse = math.log(largest / _LARGEST), math.log(2.01 * largest)
        for _ in range(_HALVINGS):
            middle = (fine + coarse) / 2
            codes = _codes(value, torch.full((1,), middle, device=value.device).exp())
            fits = store.estimate_bits(codes.cpu().numpy()) <= self.bits * value.numel()
            fine, coarse = (fine, middle) if fits else (middle, coarse)
        return torch.full((1,), coarse, device=value.device).exp()

    def relax(self, site: Site, structure: Structure, statistics: Statistics) -> nn.Module | None:
        parts = self.build(site, structure).to(site.device)
        with torch.no_grad():
            value, scale = _normal(site.tensor)
            start = EntropyConstrained(bits=max(self.bits, self.START_BITS))
            steps = start.finest(value), self.finest(value)
        return Priced(site.tensor, parts, scale, steps, (start.bits, self.bits), channel_axis(site.owner))


class Priced(nn.Module):
    """A trainable weight that is seen rounded, with a trainable step, and knows what its codes cost.

    The weight is trained in units of its first root mean square: a step of the optimiser is as large a part of it in every tensor.
    Gradients: straight through to the weight; to the step as in LSQ (arXiv:1902.08153). `coded_bits` has as slope in a weight the
    difference that the next code makes.
    """

    RECOUNT: ClassVar[int] = 20
    """Training steps between two counts of the frequencies."""
    WEIGH: ClassVar[int] = 100
    """Training steps between two comparisons with what the file's coder makes of the codes."""

    def __init__(
        self, value: Tensor, parts: StepDecoder, scale: Tensor, steps: tuple[Tensor, Tensor], bits: tuple[float, float], axis: int
    ) -> None:
        super().__init__()
        self.axis, self.dtype = axis, value.dtype
        self.first_bits, self.bits = bits
        self.weight = nn.Parameter(_normal(value)[0].detach())
        self.parts = parts.requires_grad_(False)
        self.register_buffer("scale", scale)
        self.register_buffer("first_unit", steps[0])
        self.register_buffer("unit", steps[1])
        self.stretch = nn.Parameter(torch.zeros_like(parts.step))  # step = unit * exp(stretch)
        self.register_buffer("costs", torch.zeros_like(self.weight.data))
        self.register_buffer("rest", torch.zeros(2, device=value.device))
        self.register_buffer("ratio", torch.ones((), device=value.device))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.progress = 1.0

    @property
    def aim_bits(self) -> float:
        """How many bits the codes should take by now."""
        return float(self.weight.numel() * self.bits * (self.first_bits / self.bits) ** (1 - self.progress))

    def step(self) -> Tensor:
        """In units of `scale`, like the weight."""
        return cast(Tensor, self.unit) * self.stretch.exp()

    def anneal(self, progress: float) -> None:
        """Training begins with a fine step; from then on only the aim moves."""
        self.progress = progress
        if progress == 0:
            cast(Tensor, self.unit).copy_(cast(Tensor, self.first_unit))

    def forward(self, original: Tensor | None = None) -> Tensor:
        return cast(Tensor, _Rounded.apply(self.weight, self.step(), self.scale)).to(self.dtype)

    def coded_bits(self) -> Tensor:
        """What the codes cost, as the frequencies of zeros and magnitudes tell it."""
        calls, ratio = int(cast(Tensor, self.calls)), cast(Tensor, self.ratio)
        cast(Tensor, self.calls).add_(1)
        if calls % self.RECOUNT == 0:
            self._count()
        bits = cast(Tensor, _Bits.apply(self.weight, self.step(), self.costs, self.rest))
        if calls % self.WEIGH == 0:
            codes = _codes(self.weight.detach(), self.step().detach())
            ratio.fill_(store.estimate_bits(codes.cpu().numpy()) / max(bits.item(), 1.0))
        return ratio * bits

    @torch.no_grad()
    def _count(self) -> None:
        """costs: bits that the first magnitude takes more than zero; rest: bits of all zeros, bits of each further magnitude."""
        q = as_rows(_codes(self.weight, self.step()), self.axis).abs().float()
        used = (q > 0).float()
        n_rows, n_columns = used.shape
        share = (used.sum() + 0.5) / (used.numel() + 1)
        by_row = torch.logit((used.sum(1, keepdim=True) + 2 * share) / (n_columns + 2))
        by_column = torch.logit((used.sum(0, keepdim=True) + 2 * share) / (n_rows + 2))
        logit = (by_row + by_column - torch.logit(share)).clamp(-9, 9) if n_rows > 1 else torch.logit(share).expand_as(q)
        go_on = (1 - (used.sum() + 1) / (q.sum() + 1.1)).clamp(0.02, 0.98)  # a geometric law of magnitudes
        first = -logit / math.log(2) + 1 - (1 - go_on).log2()
        cast(Tensor, self.costs).copy_(from_rows(first.clamp_min(0.5), self.weight.shape, self.axis))
        cast(Tensor, self.rest).copy_(torch.stack([F.softplus(logit).sum() / math.log(2), -go_on.log2()]))

    def settle(self) -> nn.Module:
        """The parts, with the present step and codes."""
        with torch.no_grad():
            self.parts.step.copy_(self.step() * cast(Tensor, self.scale))
            cast(Tensor, self.parts.codes).copy_(_codes(self.weight, self.step()))
        return self.parts


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, scale: Tensor) -> Tensor:
        scaled = weight / step
        rounded = scaled.round().clamp_(-_LARGEST, _LARGEST)
        ctx.save_for_backward(rounded - scaled, scale)
        return rounded * (step * scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        error, scale = ctx.saved_tensors
        return gradient * scale, ((gradient * error).sum() * scale).reshape(1), None


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, costs: Tensor, rest: Tensor) -> Tensor:
        scaled = weight / step
        size = scaled.abs()
        slope = torch.where(size < 1, costs, rest[1]) * scaled.sign()
        ctx.save_for_backward(slope, step, weight)
        steps = size.round_()
        return rest[0] + (costs * steps.clamp(max=1)).sum() + rest[1] * (steps - 1).clamp_(min=0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slope, step, weight = ctx.saved_tensors
        by_weight = slope * (gradient / step)
        return by_weight, -((by_weight * weight).sum() / step).reshape(1), None, None


def _codes(value: Tensor, step: Tensor) -> Tensor:
    return (value / step).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int16)


def _normal(value: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor in units of its root mean square, float32; and that unit."""
    value = value.float()
    scale = value.square().mean().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return value / scale, scale
