"""A call that fits a program, made from the shapes and types of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pared.errors import TraceError
from pared.graph.program import UNSUPPLIED, Dynamic, Input, Program, Slot, Symbol

_LEAST = 2  # export takes sizes 0 and 1 for constants
_SIZES_TRIED = 4096


def example_of(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call: normally distributed floats, zeros for integers, True.

    Raises:
        TraceError: no size fits a free axis.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [_size(symbol) for symbol in program.symbols]
    tensors = [_tensor(given, sizes, generator) for given in program.inputs]
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    left_out = False
    for parameter in program.parameters:
        value = _fill(parameter.tree, tensors)
        if parameter.role == "*":
            args += value
        elif parameter.role == "**":
            kwargs.update(value)
        elif value is UNSUPPLIED:
            left_out = True
        elif parameter.role == "positional" and not left_out:
            args.append(value)
        else:
            kwargs[parameter.name] = value
    return tuple(args), kwargs


def _size(symbol: Symbol) -> int:
    start = max(_LEAST, symbol.smallest)
    for size in range(start, start + _SIZES_TRIED):
        if size % symbol.multiple == symbol.remainder and (symbol.largest is None or size <= symbol.largest):
            return size
    raise TraceError(f"no size from {start} on fits a free axis of the program; pass example=")


def _tensor(given: Input, sizes: list[int], generator: torch.Generator) -> Tensor:
    shape = [sizes[axis.symbol] if isinstance(axis, Dynamic) else axis for axis in given.shape]
    if given.dtype.is_floating_point or given.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(given.dtype)
    return torch.ones(shape, dtype=torch.bool) if given.dtype == torch.bool else torch.zeros(shape, dtype=given.dtype)


def _fill(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, Slot):
        return tensors[tree.index]
    if isinstance(tree, dict):
        return {key: _fill(branch, tensors) for key, branch in tree.items()}
    return type(tree)(_fill(branch, tensors) for branch in tree) if isinstance(tree, list | tuple) else tree
