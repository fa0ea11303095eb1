"""Weight pruning by magnitude."""

from __future__ import annotations

import re
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pared.numerics import smallest
from pared.site import Site
from pared.statistics import Statistics
from pared.technique import Structure, Technique, Tensors


class SparseDecoder(nn.Module):
    """weight = dense, most of which are exactly zero: the file's coder stores zeros for next to nothing."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.zeros(shape, dtype=dtype))

    def forward(self) -> Tensor:
        return self.dense * (self.dense != 0)  # what is zero stays zero in training


class Magnitude(Technique):
    """Set the weights of smallest magnitude to zero: single ones, n of every m, or whole blocks.

    Unstructured: the share `sparsity` of the tensor. "n:m": of every m weights in a row, the n largest stay.
    "RxC": blocks of R rows and C columns of the weight matrix are ranked by their mean square. Which share each layer
    can bear is the allocator's work: give a list of sparsities.

    Trained (`relax`), the sparsity grows as s(t) = s (1 - (1 - t)**3); gradients reach the weights that are in.

    Acts on   parameters of two axes or more.
    Stores    the values as they are; zeros are cheap in the file's coder. MACs unchanged: see docs/how-it-works.md.
    Reads     nothing, weights only.
    Refuses   tensors whose rows do not divide into groups of m, or into blocks.
    Paper     Han et al. 2015, arXiv:1506.02626; schedule: Zhu & Gupta 2017, arXiv:1710.01878.
    """

    acts_on: ClassVar = Tensors(min_axes=2, min_elements=16)
    paper: ClassVar = "arXiv:1506.02626"
    ladder: ClassVar = ({"sparsity": 0.1}, {"sparsity": 0.5}, {"sparsity": 0.9})

    sparsity: float | None = Field(default=None, ge=0, lt=1, description="share of weights that become zero; not with n:m")
    pattern: str = Field(default="unstructured", description='"unstructured", "n:m" (n of every m stay) or "RxC" (blocks)')

    @model_validator(mode="after")
    def _consistent(self) -> Magnitude:
        if self.pattern == "unstructured" or re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.pattern):
            if self.sparsity is None:
                raise ValueError(f"sparsity must be given with the pattern {self.pattern}")
            return self
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.pattern)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f'pattern must be "unstructured", "n:m" with n < m, or "RxC", got "{self.pattern}"')
        if self.sparsity is not None:
            raise ValueError(f"the pattern {self.pattern} sets the sparsity; leave sparsity out")
        return self

    def refuse(self, site: Site) -> str | None:
        value = site.tensor
        rows, columns = value.shape[0], value.numel() // value.shape[0]
        if ":" in self.pattern and columns % int(self.pattern.split(":")[1]):
            return f"rows of {columns} weights do not divide into groups of {self.pattern.split(':')[1]}"
        if "x" in self.pattern:
            high, wide = map(int, self.pattern.split("x"))
            if rows % high or columns % wide:
                return f"a {rows} x {columns} matrix does not divide into blocks of {self.pattern}"
        return None

    def build(self, site: Site, structure: Structure) -> SparseDecoder:
        value = site.tensor
        return SparseDecoder(value.shape, value.dtype)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        value = site.tensor
        cast(SparseDecoder, parts).dense.data.copy_(value * self.kept(value))

    def passes(self, parts: nn.Module) -> Tensor:
        return (cast(SparseDecoder, parts).dense != 0).to(cast(SparseDecoder, parts).dense.dtype)

    def kept(self, value: Tensor) -> Tensor:
        """1 where a weight stays, 0 where it goes; of the value's shape."""
        magnitude = value.detach().abs().float()
        matrix = magnitude.reshape(value.shape[0], -1)
        if ":" in self.pattern:
            n, m = map(int, self.pattern.split(":"))
            groups = matrix.reshape(-1, m)
            chosen = torch.zeros_like(groups).scatter_(1, groups.topk(n, 1).indices, 1)
            return chosen.reshape(value.shape).to(value.dtype)
        sparsity = cast(float, self.sparsity)
        if "x" in self.pattern:
            high, wide = map(int, self.pattern.split("x"))
            blocks = matrix.reshape(matrix.shape[0] // high, high, matrix.shape[1] // wide, wide)
            score = (blocks**2).mean((1, 3))
            chosen = _largest(score, sparsity)[:, None, :, None].expand(blocks.shape)
            return chosen.reshape(value.shape).to(value.dtype)
        return _largest(magnitude, sparsity).to(value.dtype)

    def at(self, progress: float) -> Technique:
        if self.sparsity is None or progress >= 1:
            return self
        settings: dict[str, Any] = self.model_dump()
        return Magnitude(**{**settings, "sparsity": self.sparsity * (1 - (1 - progress) ** 3)})


def _largest(score: Tensor, sparsity: float) -> Tensor:
    """1 for the largest scores; ceil((1 - sparsity) * numel) of them, ties broken by position."""
    n_out = int(sparsity * score.numel())
    if n_out == 0:
        return torch.ones_like(score)
    threshold = smallest(score, n_out)
    kept = (score > threshold).to(score.dtype)
    missing = score.numel() - n_out - int(kept.sum(dtype=torch.float64))
    if missing:
        ties = (score == threshold).flatten().nonzero().flatten()
        kept.view(-1)[ties[len(ties) - missing :]] = 1
    return kept
