"""Inputs for a model that nobody gave any: those that it carries along, or random ones of the shapes in its program."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.artifact.example import example_of as of_program
from pared.errors import InputError
from pared.graph import Dynamic
from pared.graph.module import ProgramModule
from pared.record import record_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


def example_of(model: nn.Module, n: int | None = None) -> Call:
    """Arguments of one call of the model, with n examples where that is asked and the batch axis is free.

    Raises:
        InputError: the model carries neither an example nor a program.
    """
    record = record_of(model)
    if record is not None and record.example is not None:
        return record.example if n is None else resized(record.example, batch_size_of(record.example), n)
    program = record.program if record is not None and record.program is not None else None
    if isinstance(model, ProgramModule):
        program = model.program
    if program is None:
        raise InputError("an example of the inputs is needed: give a tensor, a tuple of them or a dict")
    call = of_program(program)
    free = program.inputs and program.inputs[0].shape and isinstance(program.inputs[0].shape[0], Dynamic)
    return resized(call, batch_size_of(call), n) if n is not None and free else call


def on_the_processor(call: Call) -> Call:
    """The call with its tensors where runtimes read them."""
    moved: Call = pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, call)
    return moved


def batch_size_of(call: Call) -> int:
    """The first axis of the first tensor; 0 if there is none."""
    leaves = (leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim)
    first = next(leaves, None)
    return 0 if first is None else len(first)


def resized(call: Any, size: int, n: int) -> Any:
    """The call with n examples instead of `size`: those at hand, from the start again where there are fewer."""

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != size:
            return leaf
        return leaf[[i % size for i in range(n)]]

    return pytree.tree_map(taken, call)
