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

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class GroupLasso(Technique):
    """Let whole channels shrink to nothing while training: the norm of all weights of a channel has a price.

    loss + price * sum over channels c of sqrt(n_c) |w_c|     w_c: all n_c weights of the channel, in every tensor it lies in

    The penalty acts through its proximal step, taken in every forward pass: what reads channel c is multiplied with

        max(0, 1 - price / r_c),   r_c = |w_c| / mean of |w| over the group's channels

    so a channel is exactly zero once its norm is below the price, all its weights at once. The root of n_c is in r_c: norms
    are compared within their group first. The price is one for the whole network and is raised until MACs (bits, where no
    MACs are asked for) of the channels above it come down to the plan's. After `anneal_until` of the training the others are
    closed for good, the rest of the training is for those that stay; then the closed ones are cut out of all tensors, which
    changes nothing, and what is left is tuned. How many of each group stay is learned, unless a later step of the recipe was
    planned for the numbers.

    With `norm: batch_norm` only the scale of the normalisation counts (network slimming): r_c = |scale_c| / mean |scale|.
    Without training the channels of the smallest norms go.

    Acts on   groups of coupled channels of the traced network.
    Stores    nothing: all tensors get smaller;  MACs fall with both sides of a layer.
    Reads     curvature, which tells the layers that read channels.
    Refuses   channels that reach outputs, operators without a rule, or sizes that the model's code computes for itself; with
              `batch_norm` also those that no normalisation scales.
    Paper     Wen et al. 2016, arXiv:1608.03665; batch_norm: Liu et al. 2017, arXiv:1708.06519; coupled groups: Fang et al.
              2023, arXiv:2301.12900.
    Differs   the proximal step is applied to what is shown, not to what is trained (as in regularised dual averaging), and where
              channels are read, since normalisation undoes a scale on what makes them.
    """

    acts_on: ClassVar = Groups()
    reads: ClassVar = (Curvature,)
    corrects: ClassVar = True
    keeps_size: ClassVar = True
    paper: ClassVar = "arXiv:1608.03665"
    structure_type: ClassVar = CutStructure
    ladder: ClassVar = ({"keep": 0.9}, {"keep": 0.6}, {"keep": 0.3})

    keep: float = Field(default=0.5, gt=0, lt=1, description="share of the channels that stay; where trained, the cost of this share")
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
        return [p for p, (owner, _, name) in owners.items() if name == "weight" and isinstance(site.root.get_submodule(owner), _NORMS)]

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
        weights = [(held[piece.path], piece) for piece in self._pieces(site)]
        return Proximal(group.n, weights, readers(site, statistics)).to(site.device)


class Proximal(nn.Module):
    """max(0, 1 - price / r) for the n channels of a group, r their norms in units of the group's mean.

    Args:
        weights: parameters and where the channels lie in them; they are shared with the layers, not copied.
        pieces: what is multiplied.
    """

    def __init__(self, n: int, weights: list[tuple[nn.Parameter, Slice]], pieces: tuple[Slice, ...]) -> None:
        super().__init__()
        self.n, self.pieces = n, pieces
        self.weights = nn.ParameterList(weight for weight, _ in weights)
        self.axes = [piece.axis for _, piece in weights]
        for k, (_, piece) in enumerate(weights):
            self.register_buffer(f"channel{k}", torch.as_tensor(piece.channel) % (n + 1), persistent=False)  # -1 comes last

    def scores(self) -> Tensor:
        """r; (n,)."""
        squares = self.weights[0].new_zeros(self.n + 1)
        for k, (weight, axis) in enumerate(zip(self.weights, self.axes)):
            per_place = weight.square().movedim(axis, 0).reshape(weight.shape[axis], -1).sum(1)
            squares = squares.index_add(0, getattr(self, f"channel{k}"), per_place)
        norms = (squares[:-1] + 1e-20).sqrt()
        return norms / norms.detach().mean()

    def forward(self, price: Tensor, draws: bool) -> Tensor:
        r = self.scores()
        return (1 - price.detach().clamp_min(0).to(r.dtype) / r).clamp_min(0)

    def kept(self, price: Tensor) -> Tensor:
        """1 where a channel is above the price, else 0; (n,)."""
        return (self.scores().detach() > price.detach()).float()

    def draw_(self) -> None:
        """Nothing is random."""
