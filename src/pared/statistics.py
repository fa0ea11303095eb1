"""What calibration can observe about a tensor: second-order statistics on the one damage scale."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pared.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Where the matrix (groups, m, n) of an operator lies in a tensor; a view, so linear and differentiable.

    Element (g, i, j) is number `offset + g stride[0] + i stride[1] + j stride[2]` of the contiguous tensor: one form
    for slices of fused projections, transposed uses, filters of convolutions and depthwise groups.
    """

    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        return tensor.as_strided(self.size, self.stride, self.offset + tensor.storage_offset())


@dataclass(frozen=True, eq=False)
class Kronecker:
    """One use of a tensor as a matrix: y = W x, with loss ~ 1/2 tr(G dW A dW^T), summed over groups.

    Args:
        inputs: A, the mean over examples of the sum over positions of x x^T; (groups, n, n), or (groups, n) if only
            the diagonal is kept.
        gradients: G, the mean over examples and positions of g g^T, g = d loss / d y; (groups, m, m) or (groups, m).
        as_matrix: views the tensor as (groups, m, n), linear and differentiable: a `Layout` where it was observed.
    """

    inputs: Tensor
    gradients: Tensor
    as_matrix: Callable[[Tensor], Tensor]

    def quadratic(self, delta: Tensor) -> Tensor:
        """The damage of `delta`, a scalar; differentiable."""
        d = self.as_matrix(delta).to(self.inputs.dtype)
        left = torch.matmul(self.gradients, d) if self.gradients.ndim == 3 else self.gradients[:, :, None] * d
        right = torch.matmul(d, self.inputs) if self.inputs.ndim == 3 else d * self.inputs[:, None, :]
        return 0.5 * (left * right).sum(dtype=torch.float64)

    def diagonal(self) -> Tensor:
        """The Hessian's diagonal in matrix form: (groups, m, n)."""
        g, a = self._diagonals()
        return g[:, :, None] * a[:, None, :]

    def trace(self) -> float:
        """The sum of the Hessian's diagonal."""
        g, a = self._diagonals()
        return float((g.sum(1, dtype=torch.float64) * a.sum(1, dtype=torch.float64)).sum())

    def _diagonals(self) -> tuple[Tensor, Tensor]:
        g = self.gradients if self.gradients.ndim == 2 else self.gradients.diagonal(dim1=1, dim2=2)
        a = self.inputs if self.inputs.ndim == 2 else self.inputs.diagonal(dim1=1, dim2=2)
        return g, a


@dataclass(frozen=True, eq=False)
class Diagonal:
    """One use of a tensor element by element (bias, norm, scale): loss ~ 1/2 sum(h * d^2).

    Args:
        hessian: E over examples of (sum over positions of d loss / d w)^2; of the tensor's shape.
    """

    hessian: Tensor

    def trace(self) -> float:
        """The sum of the Hessian's diagonal."""
        return float(self.hessian.sum(dtype=torch.float64))

    def quadratic(self, delta: Tensor) -> Tensor:
        """The damage of `delta`, a scalar; differentiable."""
        return 0.5 * (self.hessian * delta.to(self.hessian.dtype) ** 2).sum(dtype=torch.float64)


@dataclass
class Curvature:
    """The second-order effect of changing one tensor on the loss, in the task's own unit (nats per example for cross
    entropy). A tensor that is used several times has several terms; they add up.

    Source: Kronecker-factored Fisher (Martens & Grosse 2015, arXiv:1503.05671), for convolutions Grosse & Martens 2016.
    """

    shape: torch.Size
    terms: list[Kronecker | Diagonal] = field(default_factory=list)
    _diagonal: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def damage(self, delta: Tensor) -> float:
        """The predicted increase of the loss when the tensor changes by `delta` (of the tensor's shape)."""
        return sum(float(term.quadratic(delta)) for term in self.terms)

    def diagonal(self) -> Tensor:
        """The Hessian's diagonal, of the tensor's shape: how much each single weight matters."""
        if self._diagonal is None:
            self._diagonal = self._sum_of_diagonals()
        return self._diagonal.clone()

    def _sum_of_diagonals(self) -> Tensor:
        total = torch.zeros(self.shape)
        for term in self.terms:
            if isinstance(term, Diagonal):
                total += term.hessian
                continue
            probe = torch.zeros(self.shape, requires_grad=True)
            with torch.enable_grad():
                (term.as_matrix(probe) * term.diagonal()).sum().backward()
            if probe.grad is not None:
                total += probe.grad
        return total

    def matrix(self) -> Kronecker | None:
        """The one matrix use that matters most, for techniques that need a Gram matrix; None if there is none."""
        uses = [term for term in self.terms if isinstance(term, Kronecker)]
        return max(uses, key=Kronecker.trace, default=None)


@dataclass(frozen=True, eq=False)
class Responses:
    """How a group of channels responds to data: arrays of its number of channels.

    Args:
        taylor: the mean over examples of the square of the sum over positions of x dL/dx, x the channel's value.
        fisher: the mean over examples of the sum over positions of (dL/dx)^2 x^2.
        apoz: the share of positions at which x is not zero.
    """

    taylor: np.ndarray
    fisher: np.ndarray
    apoz: np.ndarray


@dataclass(frozen=True)
class Port:
    """A place where values can be seen and changed from outside: what a module takes, or what it gives."""

    module: str
    side: Literal["input", "output"]

    def __str__(self) -> str:
        return f"{self.side} of {self.module or 'the network'}"


@dataclass(frozen=True)
class Operation:
    """One operator of a network's graph.

    Args:
        kind: such as "conv2d"; in place or not is the same.
        module: path of the innermost module in which it runs.
        inputs: numbers of the values that it reads, in the order of its arguments.
        states: paths of the parameters and buffers that it reads, by the position of the argument.
        output: number of the value that it gives.
        constants: its other arguments, by position.
    """

    kind: str
    module: str
    inputs: tuple[int, ...]
    states: dict[int, str]
    output: int
    constants: dict[int, Any]


@dataclass(frozen=True)
class Flow:
    """How values flow through a network: its operators in order, and the ports through which values pass.

    Args:
        ports: by value, where it can be changed from outside, each with the operations (by number) that then see it
            changed. Modules that are called more than once have no ports.
        results: values that the network returns.
        shapes: of the values in the example call.
    """

    operations: tuple[Operation, ...]
    ports: dict[int, tuple[tuple[Port, frozenset[int]], ...]]
    results: frozenset[int]
    shapes: dict[int, tuple[int, ...]]

    @cached_property
    def producers(self) -> dict[int, int]:
        """The number of the operation that gives a value."""
        return {operation.output: number for number, operation in enumerate(self.operations)}

    @cached_property
    def consumers(self) -> dict[int, tuple[int, ...]]:
        """The numbers of the operations that read a value."""
        found: dict[int, list[int]] = {}
        for number, operation in enumerate(self.operations):
            for value in dict.fromkeys(operation.inputs):
                found.setdefault(value, []).append(number)
        return {value: tuple(numbers) for value, numbers in found.items()}

    def uses(self, path: str) -> list[Operation]:
        """The operations that read the parameter or buffer at a path."""
        return [operation for operation in self.operations if path in operation.states.values()]

    def only_consumer(self, value: int) -> Operation | None:
        """The one operation that reads a value, if there is just one and the network does not return it."""
        numbers = self.consumers.get(value, ())
        return self.operations[numbers[0]] if len(numbers) == 1 and value not in self.results else None


@dataclass(frozen=True, eq=False)
class Histogram:
    """How the values at a port are distributed.

    Args:
        counts: (n,) in bins of equal width from `low` to `high`, the extremes that were seen.
        reach: by axis (1 and the last), the largest magnitude at each of its indices.
    """

    counts: Tensor
    low: float
    high: float
    reach: dict[int, Tensor]

    def centres(self) -> Tensor:
        """The middle of each bin."""
        n = len(self.counts)
        return self.low + (self.high - self.low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n


class Statistics:
    """What was observed on calibration data: curvature by tensor path, responses by group of channels, how values flow,
    how they are distributed; empty when there were no data.

    Args:
        flow: the graph as techniques that act on the whole network see it; None where it was not asked for.
        values: the distribution at every port of the flow.
    """

    def __init__(
        self,
        curvatures: dict[str, Curvature] | None = None,
        positions: dict[str, float] | None = None,
        flow: Flow | None = None,
        values: dict[Port, Histogram] | None = None,
        responses: dict[str, Responses] | None = None,
    ) -> None:
        self._curvatures = dict(curvatures or {})
        self.positions = dict(positions or {})
        self.flow = flow
        self.values = dict(values or {})
        self._responses = dict(responses or {})

    def responses(self, group: str) -> Responses | None:
        """What was observed for the channels of a group, or None if nothing was."""
        return self._responses.get(group)


    def curvature(self, path: str) -> Curvature | None:
        """What was observed for the tensor at this path (any of its owners), or None if nothing was."""
        return self._curvatures.get(path)

    def copy(self) -> Statistics:
        return Statistics(self._curvatures, self.positions, self.flow, self.values, self._responses)


    def update(self, curvatures: dict[str, Curvature]) -> None:
        """Add what the tensors inside new parts see."""
        self._curvatures.update(curvatures)

    def respond(self, responses: dict[str, Responses]) -> None:
        """Add how groups of channels respond."""
        self._responses.update(responses)

    def __iter__(self) -> Iterator[str]:
        return iter(self._curvatures)

    def __bool__(self) -> bool:
        return bool(self._curvatures)


def save(statistics: Statistics, path: str | Path) -> None:
    """Write observed statistics as a safetensors file (the matrices) with a JSON entry (what they belong to)."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    entries = {}
    for number, key in enumerate(statistics):
        curvature = statistics.curvature(key)
        terms: list[Any] = []
        for place, term in enumerate(curvature.terms if curvature is not None else ()):
            name = f"{number}.{place}"
            if isinstance(term, Diagonal):
                tensors[f"{name}.hessian"] = term.hessian.contiguous()
                terms.append(None)
                continue
            if not isinstance(term.as_matrix, Layout):
                raise TypeError(f"the use of {key} as a matrix must be a Layout to be saved, got {term.as_matrix!r}")
            tensors[f"{name}.inputs"] = term.inputs.contiguous()
            tensors[f"{name}.gradients"] = term.gradients.contiguous()
            terms.append([term.as_matrix.size, term.as_matrix.stride, term.as_matrix.offset])
        entries[key] = {"shape": list(curvature.shape) if curvature is not None else [], "terms": terms}
    save_file(tensors, path, {"statistics": json.dumps({"curvatures": entries, "positions": statistics.positions})})


def load(path: str | Path) -> Statistics:
    """The statistics that `save` wrote, bit for bit.

    Raises:
        InputError: the file is not whole.
    """
    from safetensors import SafetensorError, safe_open

    curvatures = {}
    try:
        with safe_open(path, "pt") as file:
            described = json.loads(file.metadata()["statistics"])
            for number, (key, entry) in enumerate(described["curvatures"].items()):
                found: list[Kronecker | Diagonal] = []
                for place, layout in enumerate(entry["terms"]):
                    name = f"{number}.{place}"
                    if layout is None:
                        found.append(Diagonal(file.get_tensor(f"{name}.hessian")))
                        continue
                    size, stride, offset = layout
                    matrices = file.get_tensor(f"{name}.inputs"), file.get_tensor(f"{name}.gradients")
                    where = Layout((size[0], size[1], size[2]), (stride[0], stride[1], stride[2]), offset)
                    found.append(Kronecker(*matrices, where))
                curvatures[key] = Curvature(torch.Size(entry["shape"]), found)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} must hold statistics but cannot be read: {error}; delete it to start anew") from error
    return Statistics(curvatures, described["positions"])
