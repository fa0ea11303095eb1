"""Channel pruning by a penalty on the norms of whole channels while training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pared.cut import CutStructure, Group, Slice
from pared.prune.channels import LAYERS, Channels, readers
from pared.site import Site
from pared.statistics import Curvature, Statistics
from pared.technique import Cost, Groups, Technique

_CONTRAST = 6.0
"""Of the prices in a group: the weakest channel pays 2 ** 6 times as much as the strongest."""
_MOST = 0.1
"""Of the mean norm: what the strongest channel loses at most in a step."""
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class GroupLasso(Technique):
    """Let whole channels shrink to nothing while training: the norm of all weights of a channel has a price.

    loss + price * sum over channels c of gamma_c sqrt(n_c) |w_c|     w_c: all n_c weights of the channel, wherever it lies

    Every few training steps (those between two calls of `anneal`) one proximal step of the penalty is taken,

        w_c <- w_c max(0, 1 - price gamma_c / r_c),   r_c = |w_c| / mean of |w| over the group's channels
        gamma_c = 2 ** (6 (max r - r_c) / (max r - min r))

    so all weights of a channel become zero at once, and stay so. In units of its group's mean the root of n_c cancels:
    norms are comparable between groups of any size. The price is one for the whole network; at every step it is raised until
    the MACs (bits, where no MACs are asked for) of the channels that are left come down to an aim that falls to the plan's
    cost, or until the strongest would lose more than a tenth of the mean norm. After `anneal_until` of the training the
    channels of the smallest norms are closed, as many as the plan needs, the rest of the training is for those that stay; then
    the closed ones are cut out of all tensors. How many of each group stay is learned, unless a later step of the recipe
    was planned for the numbers.

    With `norm: batch_norm` only the scale of the normalisation counts and shrinks (network slimming). Without training
    the channels of the smallest norms go.

    Acts on   groups of coupled channels of the traced network.
    Stores    nothing: all tensors get smaller;  MACs fall with both sides of a layer.
    Reads     curvature, which tells the layers that read channels.
    Refuses   channels that reach outputs, operators without a rule, or sizes that the model's code computes for itself; with
              `batch_norm` also those that no normalisation scales.
    Paper     Wen et al. 2016, arXiv:1608.03665; batch_norm: Liu et al. 2017, arXiv:1708.06519; coupled groups and gamma: Fang
              et al. 2023, arXiv:2301.12900.
    Differs   proximal steps instead of a gradient, a price that follows from the target, and 2 ** 6 instead of 2 ** 4 in gamma.
    """

    acts_on: ClassVar = Groups()
    reads: ClassVar = (Curvature,)
    corrects: ClassVar = True
    keeps_size: ClassVar = True
    paper: ClassVar = "arXiv:1608.03665"
    structure_type: ClassVar = CutStructure
    ladder: ClassVar = ({"keep": 0.9}, {"keep": 0.6}, {"keep": 0.3})

    keep: float = Field(
        default=0.5, gt=0, lt=1, description="share of the channels that stay; where trained, the cost of this share"
    )
    norm: Literal["group", "batch_norm"] = Field(
        default="group", description="of all weights of a channel, or of its scale in the normalisation alone"
    )
    protect: str = Field(
        default="", pattern=LAYERS, description="layers whose channels stay: patterns such as layer4.*, with commas between"
    )
    heads: bool = Field(default=False, description="of attention, remove whole heads instead of the same slots of every head")

    def _as_cut(self) -> Channels:
        importance: Any = "group_l2" if self.norm == "group" else "batch_norm"
        return Channels(keep=self.keep, importance=importance, protect=self.protect, heads=self.heads)

    def sites(self, model: nn.Module, graph: Any = None) -> Iterator[Site]:
        return self._as_cut().sites(model, graph)

    def refuse(self, site: Site) -> str | None:
        if self.norm == "batch_norm" and not self._pieces(site):
            return "no normalisation scales its channels"
        return self._as_cut().refuse(site)

    def _pieces(self, site: Site) -> list[Slice]:
        """Where the weights lie whose norm counts."""
        held = dict(site.root.named_parameters(remove_duplicate=False))
        pieces = [piece for piece in cast(Group, site.group).slices if piece.path in held]
        if self.norm == "group":
            return pieces
        owners = {piece: piece.path.rpartition(".") for piece in pieces}
        return [
            p for p, (owner, _, name) in owners.items() if name == "weight" and isinstance(site.root.get_submodule(owner), _NORMS)
        ]

    def decide(self, site: Site, statistics: Statistics) -> CutStructure:
        return self._as_cut().decide(site, statistics)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        """Nothing to fill: what stays has its values."""

    def cost(self, site: Site, parts: nn.Module | None = None) -> Cost:
        return self._as_cut().cost(site, parts)

    def damage(self, site: Site, parts: nn.Module, statistics: Statistics) -> float | None:
        return self._as_cut().damage(site, parts, statistics)

    def relax(self, site: Site, structure: Any, statistics: Statistics) -> Proximal:
        group = cast(Group, site.group)
        held = dict(site.root.named_parameters(remove_duplicate=False))
        weights = {(id(held[piece.path]), piece.axis): (held[piece.path], piece) for piece in self._pieces(site)}
        return Proximal(group.n, list(weights.values()), readers(site, statistics)).to(site.device)


class Proximal(nn.Module):
    """The channels of a group, whose weights it shrinks at a price; multiplied with 1 while they are there.

    Args:
        n: how many.
        weights: parameters and where the channels lie in them; they are shared with the layers, not copied.
        pieces: what is multiplied with 0 where a channel is gone.
    """

    def __init__(self, n: int, weights: list[tuple[nn.Parameter, Slice]], pieces: tuple[Slice, ...]) -> None:
        super().__init__()
        self.n, self.pieces = n, pieces
        self.weights = nn.ParameterList(weight for weight, _ in weights)
        self.axes = [piece.axis for _, piece in weights]
        self.alive: Tensor
        self.register_buffer("alive", torch.ones(n))
        for k, (_, piece) in enumerate(weights):
            self.register_buffer(f"channel{k}", torch.as_tensor(piece.channel) % (n + 1), persistent=False)  # -1 comes last

    def scores(self) -> Tensor:
        """r; (n,)."""
        squares = self.weights[0].new_zeros(self.n + 1, dtype=torch.float32)
        for k, (weight, axis) in enumerate(zip(self.weights, self.axes)):
            places = weight.detach().float().square().movedim(axis, 0).reshape(weight.shape[axis], -1).sum(1)
            squares = squares.index_add(0, getattr(self, f"channel{k}"), places)
        norms = squares[:-1].sqrt() * self.alive
        return norms / norms.mean().clamp_min(1e-20)

    def forward(self, price: Tensor, draws: bool) -> Tensor:
        return (self.scores() > 0).float()

    def kept(self, price: Tensor) -> Tensor:
        """Which channels a proximal step at this price leaves, 1 or 0; (n,)."""
        return (self._shrunk(price) > 0).float()

    def draw_(self) -> None:
        """Nothing is random."""

    def adopt_(self, price: Tensor) -> None:
        """One proximal step."""
        factor = self._shrunk(price)
        self.alive.mul_(factor > 0)  # for good: an optimiser's momentum moves weights that are zero, too
        factor = torch.cat([factor, factor.new_ones(1)])
        for k, (weight, axis) in enumerate(zip(self.weights, self.axes)):
            shape = [1] * weight.ndim
            shape[axis] = -1
            weight.data.mul_(factor[getattr(self, f"channel{k}")].reshape(shape).to(weight.dtype))

    def _shrunk(self, price: Tensor) -> Tensor:
        """What a proximal step leaves of the norms, as a factor; (n,)."""
        r = self.scores()
        alive = torch.where(r > 0, r, r.max())
        weakness = ((r.max() - r) / (r.max() - alive.min()).clamp_min(1e-6)).clamp(0, 1)
        charged = price.clamp(0, _MOST).to(r.dtype) * 2 ** (_CONTRAST * weakness)
        return (1 - charged / r.clamp_min(1e-20)).clamp_min(0)
