"""Channel pruning: the tensors get smaller."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pared.cut import Coordinates, CutStructure, Group, Slice
from pared.errors import InputError
from pared.site import Site, check_layers
from pared.statistics import Curvature, Kronecker, Responses, Statistics
from pared.technique import Cost, Groups, Technique, value_at

Importance = Literal["curvature", "taylor", "fisher", "apoz", "l1", "l2", "group_l2", "batch_norm", "geometric_median", "random"]

LAYERS = r"^([\w.*?\[\]!-]+(,[\w.*?\[\]!-]+)*)?$"
"""Patterns of layers' names, with commas between."""

_BLOCKS = (8, 16)
"""Channels that kernels work on together: what is left of a block takes as long as the whole."""

_OF_RESPONSES = ("taylor", "fisher", "apoz")


class Channels(Technique):
    """Remove whole channels: filters, hidden units, attention heads and their slots; whatever reads them gets narrower.

    Channels that are added, concatenated or multiplied with one another are found on the network's graph and go together.
    The damage of removing the set S is that of the layers that read it, after they have made up for it as well as they
    can from the channels that stay:

        1/2 tr(G W_S ((A^-1)_SS)^-1 W_S^T)

    with A and G of the reading layer. Importance, which says which channels of a group go first:

    curvature          the same for one channel; without statistics l2
    taylor, fisher     E (sum over positions of x dL/dx)^2;  E sum (dL/dx)^2   of the channel's value x
    apoz               how often x is not zero
    l1, l2             norm of what makes the channel;  group_l2: of all its weights;  batch_norm: of its scale
    geometric_median   sum of the distances to the other channels' weights

    Acts on   groups of coupled channels of the traced network.
    Stores    nothing: all tensors get smaller;  MACs fall with both sides of a layer.
    Reads     curvature, or responses for taylor, fisher and apoz.
    Refuses   channels that reach outputs, operators without a rule, or sizes that the model's code computes for itself.
    Paper     coupling: Fang et al. 2023, arXiv:2301.12900; taylor: Molchanov et al. 2019, arXiv:1906.10771; fisher: Theis et
              al. 2018, arXiv:1801.05787; apoz: Hu et al. 2016, arXiv:1607.03250; batch_norm: Liu et al. 2017,
              arXiv:1708.06519; geometric_median: He et al. 2019, arXiv:1811.00250.
    Differs   damage counts what the following layers can make up for (optimal brain surgeon on whole channels).
    """

    acts_on: ClassVar = Groups()
    reads: ClassVar = (Curvature, Responses)
    corrects: ClassVar = True
    keeps_size: ClassVar = True
    paper: ClassVar = "arXiv:2301.12900"
    structure_type: ClassVar = CutStructure
    ladder: ClassVar = ({"keep": 0.9}, {"keep": 0.6}, {"keep": 0.3})

    keep: float = Field(default=0.5, gt=0, lt=1, description="share of the channels of a group that stay")
    importance: Importance = Field(default="curvature", description="what says which channels go first")
    round_to: int = Field(default=1, ge=1, le=256, description="channels that stay are a multiple of this, where there are as many")
    protect: str = Field(
        default="",
        pattern=LAYERS,
        description="layers whose channels stay: patterns such as layer4.*, with commas between",
    )
    heads: bool = Field(default=False, description="of attention, remove whole heads instead of the same slots of every head")

    rewrite: bool = Field(
        default=False, description="let the network run as its graph, where its code computes sizes for itself; by hand only"
    )

    @property
    def rewrites(self) -> bool:
        return self.rewrite

    def wants(self, statistic: type) -> bool:
        return super().wants(statistic) and (statistic is not Responses or self.importance in _OF_RESPONSES)

    def widths(self) -> Sequence[Channels]:
        if "round_to" in self.model_fields_set or self.learns:
            return (self,)
        return (self, *(self.model_copy(update={"round_to": multiple}) for multiple in _BLOCKS))

    def sites(self, model: nn.Module, graph: Any = None) -> Iterator[Site]:
        found = list(super().sites(model, graph))
        if found:
            check_layers(model, self.protect, "protect")
        for site in found:
            group = cast(Group, site.group)
            if group.whole == self.heads or not (group.whole or _lies_in_blocks(group, found)):
                yield site

    def refuse(self, site: Site) -> str | None:
        group = cast(Group, site.group)
        owners = {piece.path.rpartition(".")[0] for piece in group.slices}
        for pattern in filter(None, self.protect.split(",")):
            if hit := fnmatch.filter(owners, pattern):
                return f"{hit[0]} is protected by the pattern {pattern}"
        if self._stays(group) >= group.n:
            return f"of {group.n} channels, {self._stays(group)} stay at keep {self.keep}"
        return None

    def _stays(self, group: Group) -> int:
        n = max(1, round(self.keep * group.n))
        if self.round_to > 1 and group.n >= self.round_to:
            n = max(self.round_to, round(self.keep * group.n / self.round_to) * self.round_to)
        return min(n, group.n)

    def decide(self, site: Site, statistics: Statistics) -> CutStructure:
        group = cast(Group, site.group)
        gone = np.zeros(group.n, bool)
        n_gone = group.n - self._stays(group)
        order = np.arange(group.n)[::-1] if site.tensor_at(group.slices[0].path).is_meta else self._order(site, statistics)
        gone[order[:n_gone]] = True
        return Coordinates().structure(group, gone, site.root)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        """Nothing to fill: what stays has its values."""

    def cost(self, site: Site, parts: nn.Module | None = None) -> Cost:
        """Of the tensors that the group lies in, at their own types, when nothing else is removed from them."""
        group = cast(Group, site.group)
        share = self._stays(group) / group.n
        bits = 0.0
        for path in site.covers:
            value = site.tensor_at(path)
            kept = 1.0
            for piece in group.slices:
                if piece.path == path:
                    mine = float((piece.channel >= 0).mean())
                    kept *= 1 - mine + mine * share
            bits += value.numel() * 8 * value.element_size() * kept
        return Cost(bits, site.positions * share)

    def damage(self, site: Site, parts: nn.Module, statistics: Statistics) -> float | None:
        group = cast(Group, site.group)
        gone = group.gone(cast(CutStructure, parts.structure))
        found = [loss for use in _uses(site, group, statistics) if (loss := use.loss(gone)) is not None]
        return float(sum(found)) if found else None

    def _order(self, site: Site, statistics: Statistics) -> np.ndarray:
        """Channels, the least important first."""
        return np.argsort(self.scores(site, statistics), kind="stable")

    def scores(self, site: Site, statistics: Statistics) -> np.ndarray:
        """How important each channel of the site's group is."""
        group = cast(Group, site.group)
        responses = statistics.responses(group.name)
        if self.importance in _OF_RESPONSES and responses is None:
            raise InputError(f"importance {self.importance} is observed on data, but there was none; give a task, or use l2")
        if self.importance == "random":
            return np.argsort(np.random.default_rng(group.n).permutation(group.n)).astype(float)
        if responses is not None and self.importance in _OF_RESPONSES:
            return np.asarray(getattr(responses, self.importance))
        if self.importance == "curvature" and (uses := _uses(site, group, statistics)):
            return np.asarray(sum(use.scores() for use in uses))
        score = np.zeros(group.n)
        held = dict(site.root.named_parameters(remove_duplicate=False))
        for piece in group.slices:
            value = site.tensor_at(piece.path).detach().double().cpu().movedim(piece.axis, 0)
            value = value.reshape(len(value), -1)
            mine = piece.channel >= 0
            if self.importance == "batch_norm":
                if value.shape[1] == 1 and piece.path.endswith("weight") and value.ndim == 2:
                    np.add.at(score, piece.channel[mine], value[:, 0].abs().numpy()[mine])
                continue
            if self.importance == "group_l2":
                if piece.path in held:
                    np.add.at(score, piece.channel[mine], value.square().sum(1).numpy()[mine])
                continue
            if piece.axis != 0 or value.shape[1] < 2:  # what makes the channel
                continue
            if self.importance == "geometric_median":
                rows = torch.cdist(value, value).sum(1)
            else:
                rows = value.abs().sum(1) if self.importance == "l1" else value.square().sum(1)
            np.add.at(score, piece.channel[mine], rows.numpy()[mine])
        return score


def _lies_in_blocks(group: Group, sites: list[Site]) -> bool:
    """Whether whole blocks of the same axis are a group too."""
    own = {(piece.path, piece.axis) for piece in group.slices}
    return any(
        other.group is not group and other.group.whole and any((p.path, p.axis) in own for p in other.group.slices)
        for other in sites
        if other.group is not None
    )


class _Use:
    """A layer that reads the channels (or, where none does, one that makes them) as a matrix with its curvature."""

    def __init__(self, weight: Tensor, term: Kronecker, columns: np.ndarray, n: int) -> None:
        self.n, self.columns = n, columns
        self.weight, self.gradients = weight.double(), term.gradients.double()
        self.inputs = term.inputs.double()
        self.inverse: Tensor | None = None

    def _invert(self) -> Tensor | None:
        if self.inverse is None and self.inputs.ndim == 3:
            damping = 1e-2 * self.inputs.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
            eye = torch.eye(self.inputs.shape[1], dtype=torch.float64)
            self.inverse = torch.linalg.inv(self.inputs + damping[:, None, None] * eye)
        return self.inverse

    def loss(self, gone: np.ndarray) -> float | None:
        """1/2 tr(G W_S M W_S^T), M = ((A^-1)_SS)^-1; without the whole A, M = A_SS."""
        total = 0.0
        inverse = self._invert()
        for g in range(len(self.weight)):
            chosen = torch.as_tensor((self.columns[g] >= 0) & gone[self.columns[g]])
            if not bool(chosen.any()):
                continue
            w = self.weight[g][:, chosen]
            gw = self.gradients[g] @ w if self.gradients.ndim == 3 else self.gradients[g][:, None] * w
            if inverse is None:
                total += 0.5 * float((gw * w * self.inputs[g][chosen]).sum())
            else:
                inner = torch.linalg.solve(inverse[g][chosen][:, chosen], w.T)
                total += 0.5 * float((gw * inner.T).sum())
        return total

    def scores(self) -> np.ndarray:
        """The same for every single channel."""
        found = np.zeros(self.n)
        inverse = self._invert()
        for g in range(len(self.weight)):
            w = self.weight[g]
            gw = self.gradients[g] @ w if self.gradients.ndim == 3 else self.gradients[g][:, None] * w
            gram = w.T @ gw
            for channel in range(self.n):
                own = np.flatnonzero(self.columns[g] == channel)
                if not len(own):
                    continue
                block = gram[own][:, own]
                if inverse is None:
                    found[channel] += 0.5 * float((block.diagonal() * self.inputs[g][own]).sum())
                else:
                    found[channel] += 0.5 * float((torch.linalg.inv(inverse[g][own][:, own]) * block).sum())
        return found


def _uses(site: Site, group: Group, statistics: Statistics) -> list[_Use]:
    reads: list[_Use] = []
    makes: list[_Use] = []
    for piece in group.slices:
        curvature = statistics.curvature(piece.path)
        if curvature is None:
            continue
        value = value_at(site.root, piece.path)
        for term in curvature.terms:
            if not isinstance(term, Kronecker):
                continue
            channels = term.as_matrix(_spread(piece, value)).numpy()
            matrix = term.as_matrix(value.float().cpu())
            if (channels == channels[:, :1]).all():
                reads.append(_Use(matrix, term, channels[:, 0], group.n))
            elif (channels == channels[:, :, :1]).all():
                turned = Kronecker(term.gradients, term.inputs, term.as_matrix)
                makes.append(_Use(matrix.transpose(1, 2), _alone(turned), channels[:, :, 0], group.n))
    return reads or makes


def readers(site: Site, statistics: Statistics) -> tuple[Slice, ...]:
    """Where the layers that read the channels of a group hold them; where no layer does, where they are made; without
    curvature, every parameter in which they lie."""
    group = cast(Group, site.group)
    held = dict(site.root.named_parameters(remove_duplicate=False))
    pieces = [piece for piece in group.slices if piece.path in held]
    reads: list[Slice] = []
    makes: list[Slice] = []
    for piece in pieces:
        curvature = statistics.curvature(piece.path)
        for term in curvature.terms if curvature is not None else ():
            if isinstance(term, Kronecker):
                channels = term.as_matrix(_spread(piece, value_at(site.root, piece.path)))
                is_read = bool((channels == channels[:, :1]).all()) and not bool((channels == channels[:, :, :1]).all())
                (reads if is_read else makes).append(piece)
    return tuple(dict.fromkeys(reads or makes or pieces))


def _alone(term: Kronecker) -> Kronecker:
    """Rows cannot make up for one another: only the diagonal counts."""
    a = term.inputs if term.inputs.ndim == 2 else term.inputs.diagonal(dim1=1, dim2=2)
    return Kronecker(a, term.gradients, term.as_matrix)


def _spread(piece: Slice, value: Tensor) -> Tensor:
    """The channel of every element of a tensor."""
    shape = [1] * value.ndim
    shape[piece.axis] = -1
    return torch.as_tensor(piece.channel).reshape(shape).expand(value.shape).contiguous()
