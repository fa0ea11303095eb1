"""Small numerical parts that several techniques need."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

FloatName = Literal["float16", "float32"]


def table_dtype(values: Tensor) -> FloatName:
    """float16 where the largest magnitude has its full precision and a sixteenth of it most of it; float32 elsewhere."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return "float16" if largest == 0 or 2.0**-12 <= largest < 6e4 else "float32"


def channel_axis(owner: nn.Module) -> int:
    """The axis of a weight that counts output channels: the first, except in transposed convolutions."""
    return 1 if isinstance(owner, nn.modules.conv._ConvTransposeNd) else 0


def as_rows(tensor: Tensor, axis: int) -> Tensor:
    """(channels, everything else); a tensor of one axis is one row."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def from_rows(rows: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """The inverse of `as_rows`."""
    if len(shape) < 2:
        return rows.reshape(shape)
    moved = [shape[axis], *(size for index, size in enumerate(shape) if index != axis)]
    return rows.reshape(moved).movedim(0, axis)


def matrix_roots(matrix: Tensor, damping: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The square root and its inverse of a symmetric positive semi-definite matrix (n, n), or of a diagonal one (n,),
    with its diagonal raised by `damping` times its mean so that both are finite; float64."""
    if matrix.ndim == 1:
        root = (matrix.double() + damping * matrix.double().mean().clamp_min(1e-30)).sqrt()
        return root, 1 / root
    m = matrix.double()
    m = (m + m.T) / 2
    mean = m.diagonal().mean().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh(m + damping * mean * torch.eye(len(m), dtype=m.dtype, device=m.device))
    root = values.clamp_min(damping * float(mean)).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
