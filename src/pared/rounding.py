"""Which multiples of given scales do the least damage together, and which scales with given multiples."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pared.statistics import Curvature, Kronecker

DAMPING = 0.01
"""Of the mean energy of the inputs, added to every one of them before the second moments are inverted."""
BLOCK = 128
"""Columns whose errors are carried further together."""
UNSURE = 0.02, 0.3
"""Off-diagonal shares of the second moments of inputs and of gradients that are not believed: they are estimates."""
N_PASSES, N_STEPS = 1, 4
"""How often all codes are chosen anew for the same scales; by how many steps of conjugate gradients scales are found."""
N_ROUNDINGS, RATE, WARM_UP = 500, 0.1, 0.2
"""Steps in which roundings are learned, their size, and the share of them in which nothing pulls towards an end."""
PULL, SHARPEST = 10.0, (20.0, 2.0)
"""How strongly roundings are pulled towards down or up, against the damage of the nearest ones; the exponent, from and to."""
STRETCH = -0.1, 1.1
"""The sigmoid's range before it is clipped to [0, 1], so that roundings come to rest at the ends."""


def compensated(curvature: Curvature, value: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Multiples of the scales, each makes good what those before it lost; the nearest ones where no second moments of inputs are
    at hand, or where those predict that nothing is gained.

    Args:
        scale, low, high: of every element, of the tensor's shape; and so is what is returned.
    """
    nearest = (value / scale).round_().clamp_(low, high)
    codes = nearest.flatten().clone()
    numbers = torch.arange(value.numel(), device=value.device).reshape(value.shape)
    uses = [term for term in curvature.terms if isinstance(term, Kronecker) and term.inputs.ndim == 3]
    for use in sorted(uses, key=Kronecker.trace):
        codes[use.as_matrix(numbers)] = _swept(use, value, scale, low, high)
    found = codes.reshape(value.shape)
    gains = curvature.damage((found * scale - value).cpu()) <= curvature.damage((nearest * scale - value).cpu())
    best = found if gains else nearest
    whole = only_use(curvature)
    return best if whole is None else descended(whole, best, value, scale, low, high)


def learned(curvature: Curvature, value: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Multiples of the scales, rounded down or up such that the damage of all together is small; the nearest ones where nothing
    better is found. Arguments as for `compensated`."""
    value, scale, low, high = value.cpu(), scale.cpu(), low.cpu(), high.cpu()
    down, nearest = (value / scale).floor(), (value / scale).round().clamp(low, high)
    at_first = curvature.damage(nearest * scale - value)
    if at_first <= 0:
        return nearest
    bottom, top = STRETCH
    with torch.enable_grad():
        inside = (value / scale - down).clamp(1e-4, 1 - 1e-4)
        leaning = torch.logit((inside - bottom) / (top - bottom)).requires_grad_()
        optimiser = torch.optim.Adam([leaning], RATE)
        for step in range(N_ROUNDINGS):
            up = (leaning.sigmoid() * (top - bottom) + bottom).clamp(0, 1)
            delta = (down + up).clamp(low, high) * scale - value
            loss = torch.stack([term.quadratic(delta) for term in curvature.terms]).sum() / at_first
            way = (step / N_ROUNDINGS - WARM_UP) / (1 - WARM_UP)
            if way >= 0:
                sharp = SHARPEST[1] + (SHARPEST[0] - SHARPEST[1]) * (1 + math.cos(math.pi * way)) / 2
                loss = loss + PULL * (1 - (2 * up - 1).abs() ** sharp).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    found = (down + (leaning.detach() > 0)).clamp(low, high)
    return found if curvature.damage(found * scale - value) < at_first else nearest


def only_use(curvature: Curvature) -> Kronecker | None:
    """The tensor's use as a matrix, with moments as far as they are believed, where that is all that is known of it."""
    first = curvature.terms[0] if len(curvature.terms) == 1 else None
    if not isinstance(first, Kronecker) or first.inputs.ndim < 3 or first.gradients.ndim < 3:
        return None
    if first.inputs.shape[0] * first.inputs.shape[1] * first.gradients.shape[1] != curvature.shape.numel():
        return None
    moments = []
    for known, share in zip((first.inputs, first.gradients), UNSURE, strict=True):
        diagonal = known.diagonal(dim1=1, dim2=2)
        least = 1e-4 * diagonal.mean(1, keepdim=True) + 1e-30
        moments.append(known * (1 - share) + torch.diag_embed(diagonal * share + least))
    return Kronecker(moments[0], moments[1], first.as_matrix)


def descended(use: Kronecker, codes: Tensor, value: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes of which none can be changed by itself for less damage, or nearly so: one after the other is set to where, with
    all others as they are, the damage is least."""
    numbers = use.as_matrix(torch.arange(value.numel()).reshape(value.shape))
    parts = (use.as_matrix(part.cpu()).float().contiguous().numpy() for part in (codes, value, scale, low, high))
    held, wanted, steps, least, most = parts
    held = held.copy()
    moments = use.inputs.float().numpy(), use.gradients.float().numpy()
    for a, g, q, w, s, bottom, top in zip(*moments, held, wanted, steps, least, most, strict=True):
        error = q * s - w
        for _ in range(N_PASSES):
            for start in range(0, a.shape[0], BLOCK // 2):
                here = slice(start, start + BLOCK // 2)
                slopes = g @ (error @ a[:, here])
                _columns()(q[:, here], s[:, here], error[:, here], slopes, a[here, here], g, bottom[:, here], top[:, here])
    found = torch.empty(value.numel()).index_copy_(0, numbers.reshape(-1), torch.from_numpy(held).reshape(-1))
    return found.reshape(value.shape).to(value)


def _set_columns(codes, steps, error, slopes, a, g, low, high):  # fmt: skip
    """slopes = g error a as it is at first; every code to its best place, column by column."""
    m, n = codes.shape
    moved = np.zeros((n, m), np.float32)  # g times what the errors of a column have changed by
    for j in range(n):
        slope = slopes[:, j].copy()
        for k in range(j):
            for i in range(m):
                slope[i] += moved[k, i] * a[k, j]
        for i in range(m):
            bend = g[i, i] * a[j, j] * steps[i, j]
            if bend == 0:  # nothing depends on it
                continue
            now = slope[i] + moved[j, i] * a[j, j]
            code = min(max(np.rint(codes[i, j] - now / bend), low[i, j]), high[i, j])
            if code != codes[i, j]:
                change = (code - codes[i, j]) * steps[i, j]
                codes[i, j] = code
                error[i, j] += change
                for k in range(m):
                    moved[j, k] += g[i, k] * change


@cache
def _columns() -> Any:
    """The loops in machine code; numba takes half a second to import, which nobody else shall pay."""
    import numba

    return numba.njit(_set_columns, cache=True)


def fitted_scales(use: Kronecker, codes: Tensor, value: Tensor, scale: Tensor, owners: Tensor) -> Tensor:
    """Scales of little damage for these codes, by preconditioned conjugate gradients from the ones that are."""
    q, w, at = use.as_matrix(codes), use.as_matrix(value), use.as_matrix(owners)

    def gathered(slopes: Tensor) -> Tensor:
        return torch.zeros_like(scale).index_add_(0, at.reshape(-1), slopes.reshape(-1))

    def slope(found: Tensor) -> Tensor:
        return gathered(use.gradients @ (q * found[at]) @ use.inputs * q)

    size = gathered(use.diagonal() * q * q)
    size = torch.where(size > 0, size, torch.inf)
    rest = gathered(use.gradients @ w @ use.inputs * q) - slope(scale)
    way = rest / size
    fall = rest @ way
    for _ in range(N_STEPS):
        turn = slope(way)
        bend = way @ turn
        if not bend > 0:
            break
        scale, rest = scale + fall / bend * way, rest - fall / bend * turn
        before, fall = fall, rest @ (rest / size)
        way = rest / size + fall / before * way
    return scale


def _swept(use: Kronecker, value: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes as (groups, m, n), column by column: what rounding a column costs is made good by those after it."""
    w, s, least, most = (use.as_matrix(part).double() for part in (value, scale, low, high))
    a = use.inputs.to(value.device).double()
    energy = a.diagonal(dim1=1, dim2=2)
    damping = DAMPING * energy.mean(1).clamp_min(1e-6 * float(energy.mean()) + 1e-30)
    order = energy.argsort(1, descending=True)
    n = order.shape[1]
    across = order[:, None].expand(w.shape)
    a = a.gather(1, order[:, :, None].expand(a.shape)).gather(2, order[:, None].expand(a.shape))
    a = a + damping[:, None, None] * torch.eye(n, dtype=a.dtype, device=a.device)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(a)), upper=True)
    w, s, least, most = (part.gather(2, across) for part in (w, s, least, most))
    codes = torch.zeros_like(w)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = torch.zeros_like(w[:, :, start:stop])
        for j in range(start, stop):
            codes[:, :, j] = (w[:, :, j] / s[:, :, j]).round().clamp(least[:, :, j], most[:, :, j])
            error = (w[:, :, j] - codes[:, :, j] * s[:, :, j]) / upper[:, j, j, None]
            w[:, :, j + 1 : stop] -= error[:, :, None] * upper[:, None, j, j + 1 : stop]
            errors[:, :, j - start] = error
        w[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.zeros_like(codes).scatter_(2, across, codes).to(value.dtype)
