"""One factor for all predicted damages: what a few rounded tensors do to unseen data, over what was predicted of them."""

from __future__ import annotations

import math
import statistics as middle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pared.budget.damage import held_out, measure, references
from pared.site import Site, tensor_sites
from pared.statistics import Curvature, Diagonal, Kronecker, Statistics
from pared.task import Task

N_PROBES = 16
N_EXAMPLES = 256
LEVELS = (7, 3)
"""Steps from zero to the largest weight: as many as four and three bits have, in turn."""
MOST = 100.0
"""The factor is between one hundredth and one hundred."""

_LEAST = 1e-9
_MACS = 4e11

Progress = Callable[[dict[str, Any]], None]


def correct_(model: nn.Module, task: Task, found: Statistics, progress: Progress | None = None) -> float:
    """Scale the statistics to what validation data say, by the factor that it gives.

    A network that knows its training data by heart is surer there than on others, so the curvature on calibration data
    cut from them is too small by much the same factor for every tensor. Tensors spread over the network's depth are
    rounded one at a time; the median of measured over predicted damage multiplies every curvature. The ranking stays.

    Args:
        model: in eval mode, without coded tensors; its values are changed and put back.
        found: the curvature that calibration gathered; it is changed in place, for it may be large.
    """
    sites = _spread([site for site in tensor_sites(model) if _is_probed(site, found)])
    batches = held_out(task, _n_examples(found, sites))
    originals = references(model, task, batches)
    ratios = []
    for number, site in enumerate(sites):
        rounded = _rounded(site.tensor.detach(), LEVELS[number % len(LEVELS)])
        curvature = found.curvature(site.path)
        predicted = curvature.damage((rounded - site.tensor.detach()).cpu()) if curvature is not None else 0.0
        measured = measure(model, site, _Fixed(rounded), task, batches, originals)
        if predicted > _LEAST and measured > _LEAST:
            ratios.append(measured / predicted)
        if progress is not None:
            progress({"doing": "probing", "done": number + 1, "total": len(sites)})
    if not ratios:
        return 1.0
    factor = min(max(middle.median(ratios), 1 / MOST), MOST)
    for path in list(found):
        if (curvature := found.curvature(path)) is not None:
            for term in curvature.terms:
                (term.hessian if isinstance(term, Diagonal) else term.gradients).mul_(factor)
            found.update({path: Curvature(curvature.shape, curvature.terms)})
    return factor


class _Fixed(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return self.get_buffer("value")


def _is_probed(site: Site, found: Statistics) -> bool:
    """Weights that act as a matrix: most of what is compressed."""
    curvature = found.curvature(site.path)
    return curvature is not None and any(isinstance(term, Kronecker) for term in curvature.terms)


def _spread(sites: list[Site]) -> list[Site]:
    if len(sites) <= N_PROBES // len(LEVELS):  # few tensors: each at every level
        return [site for site in sites for _ in LEVELS]
    if len(sites) <= N_PROBES:
        return sites
    return [sites[round(index * (len(sites) - 1) / (N_PROBES - 1))] for index in range(N_PROBES)]


def _n_examples(found: Statistics, sites: list[Site]) -> int:
    """As many as the measuring may cost, never fewer than 4."""
    macs = sum(n * numel for path, n in found.positions.items() if (numel := _numel(found.curvature(path))))
    return max(4, min(N_EXAMPLES, int(_MACS / max(macs * len(sites), 1.0))))


def _numel(curvature: Curvature | None) -> int:
    return math.prod(curvature.shape) if curvature is not None else 0


def _rounded(value: Tensor, levels: int) -> Tensor:
    step = value.abs().max() / levels
    return torch.where(step > 0, (value / step).round() * step, value)
