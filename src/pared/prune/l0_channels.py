"""Channel pruning by gates that are trained with the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pared.cut import CutStructure, Slice
from pared.prune.channels import LAYERS, Channels, readers
from pared.site import Site
from pared.statistics import Curvature, Statistics
from pared.technique import Cost, Groups, Technique

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1
_UNIT = 100.0
"""Gates move so many times as fast as weights."""


class L0Channels(Technique):
    """Learn which channels stay: every channel has a random gate that is shut with a trained probability.

    z = clip(1.2 s - 0.1, 0, 1),   s = sigmoid((ln u - ln(1 - u) + log_alpha - price) / beta),   u uniform in (0, 1)
    P(z > 0) = sigmoid(log_alpha - price - beta ln(0.1 / 1.1)),   beta 2/3;   price: cost of the network at P = aim

    What reads a channel is multiplied with its gate; one draw per training step. Evaluated, s is sigmoid(log_alpha - price).
    The cost is the network's MACs, or bits where no MACs are asked for, an exact function of what all groups keep. The aim
    comes down to the plan's cost, and the price, one for all gates, is that at which it is met in each step. After
    `anneal_until` of the training the gates of the lowest log_alpha close, as many as the plan needs; the rest of the training
    is for those that stay. Then the gates are multiplied into the weights, and the closed channels are cut out of all tensors.
    How many of each group stay is learned, unless a later step of the recipe was planned for the numbers. log_alpha starts at
    the logarithm of the damage that removing the channel would do.

    Without training the channels of the least damage go, as in prune.channels.

    Acts on   groups of coupled channels of the traced network.
    Stores    nothing: all tensors get smaller;  MACs fall with both sides of a layer.
    Reads     curvature.
    Refuses   channels that reach outputs, operators without a rule, or sizes that the model's code computes for itself.
    Paper     Louizos, Welling & Kingma 2018, arXiv:1712.01312; a target instead of a weight: Wang, Wohlwend & Lei 2020,
              arXiv:1910.04732.
    Differs   the target is kept exactly in every step instead of by gradient ascent on two multipliers: the gradient goes
              through the price, so a gate sees the loss less the multiplier times its cost.
    """

    acts_on: ClassVar = Groups()
    reads: ClassVar = (Curvature,)
    corrects: ClassVar = True
    keeps_size: ClassVar = True
    paper: ClassVar = "arXiv:1712.01312"
    structure_type: ClassVar = CutStructure
    ladder: ClassVar = ({"keep": 0.9}, {"keep": 0.6}, {"keep": 0.3})

    keep: float = Field(
        default=0.5, gt=0, lt=1, description="share of the channels that stay; where trained, the cost of this share"
    )
    protect: str = Field(
        default="", pattern=LAYERS, description="layers whose channels stay: patterns such as layer4.*, with commas between"
    )
    heads: bool = Field(default=False, description="of attention, remove whole heads instead of the same slots of every head")

    def _as_cut(self) -> Channels:
        return Channels(keep=self.keep, protect=self.protect, heads=self.heads)

    def sites(self, model: nn.Module, graph: Any = None) -> Iterator[Site]:
        return self._as_cut().sites(model, graph)

    def refuse(self, site: Site) -> str | None:
        return self._as_cut().refuse(site)

    def decide(self, site: Site, statistics: Statistics) -> CutStructure:
        return self._as_cut().decide(site, statistics)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        """Nothing to fill: what stays has its values."""

    def cost(self, site: Site, parts: nn.Module | None = None) -> Cost:
        return self._as_cut().cost(site, parts)

    def damage(self, site: Site, parts: nn.Module, statistics: Statistics) -> float | None:
        return self._as_cut().damage(site, parts, statistics)

    def relax(self, site: Site, structure: Any, statistics: Statistics) -> HardConcrete:
        return HardConcrete(self._as_cut().scores(site, statistics), readers(site, statistics)).to(site.device)


class HardConcrete(nn.Module):
    """Gates of n channels: random while training, one draw per step; sigmoid(log_alpha), stretched and clipped, evaluated.

    The trained number is log_alpha / _UNIT, since all parameters share one learning rate.
    """

    def __init__(self, importance: np.ndarray, pieces: tuple[Slice, ...]) -> None:
        super().__init__()
        self.pieces = pieces
        start = torch.as_tensor(importance, dtype=torch.float32).clamp_min(1e-12).log()
        self.logit = nn.Parameter(start / _UNIT)
        self.register_buffer("noise", torch.zeros_like(start))

    def scores(self) -> Tensor:
        """log_alpha before the price; (n,)."""
        return self.logit * _UNIT

    def forward(self, price: Tensor, draws: bool) -> Tensor:
        s = self._log_alpha(price)
        s = ((s + cast(Tensor, self.noise)) / _BETA if draws else s).sigmoid()
        return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def kept(self, price: Tensor) -> Tensor:
        """The probability that each gate is open; (n,)."""
        return (self._log_alpha(price) - _BETA * math.log(-_GAMMA / _ZETA)).sigmoid()

    def draw_(self) -> None:
        """What is random in the next step."""
        noise = cast(Tensor, self.noise)
        u = torch.rand_like(noise).clamp_(1e-6, 1 - 1e-6)
        noise.copy_(u.log() - (-u).log1p())

    def adopt_(self, price: Tensor) -> None:
        """A new price asks nothing of the weights."""

    def _log_alpha(self, price: Tensor) -> Tensor:
        return self.scores() - price.to(self.logit.dtype)
