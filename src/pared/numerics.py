"""Small numerical parts that several techniques need."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

FloatName = Literal["float16", "float32"]


def table_dtype(values: Tensor) -> FloatName:
    """float16 where its errors are below 2**-11 of the largest magnitude; float32 elsewhere."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return "float16" if largest == 0 or 2.0**-14 <= largest < 6e4 else "float32"


def scale_dtype(scales: Tensor) -> FloatName:
    """float16 where it holds every scale that matters, those above 2**-16 of the largest, to 8 bits; float32 elsewhere."""
    magnitude = scales.abs()
    largest = magnitude.max()
    if largest == 0:
        return "float16"
    smallest = magnitude[magnitude > largest * 2.0**-16].min()
    return "float16" if smallest >= 2.0**-17 and largest < 6e4 else "float32"


def channel_axis(owner: nn.Module) -> int:
    """The axis of a weight that counts output channels: the first, except in transposed convolutions."""
    return 1 if isinstance(owner, nn.modules.conv._ConvTransposeNd) else 0


def as_rows(tensor: Tensor, axis: int) -> Tensor:
    """(channels, everything else); a tensor of one axis is one row."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def scale_rows(tensor: Tensor, axis: int, n_rows: int) -> Tensor:
    """(n_rows, everything else): what shares a scale, the whole tensor or a channel."""
    return tensor.reshape(1, -1) if n_rows == 1 else as_rows(tensor, axis)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 as it comes back from another type, with the gradient of the scale as it is."""
    return scale + (scale.to(dtype).to(torch.float32) - scale).detach()


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


def smallest(values: Tensor, n: int) -> float:
    """The n-th smallest value, counted from 1: on the CPU by numpy's partition, ten times as fast as torch's."""
    if values.device.type == "cpu":
        return float(np.partition(values.detach().flatten().numpy(), n - 1)[n - 1])
    return float(values.flatten().kthvalue(n).values)


def nearest(values: Tensor, edges: Tensor) -> Tensor:
    """How many of the ascending edges lie below each value: for few edges by comparing, three times as fast as searching."""
    if len(edges) > 15:
        return torch.bucketize(values, edges)
    counts = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for edge in edges.tolist():
        counts += values > edge
    return counts
