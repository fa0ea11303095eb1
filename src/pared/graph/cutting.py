"""A program without some of its channels, and how far two networks' outputs are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.graph.axes import Axes
from pared.graph.call import Size
from pared.graph.ids import Factors
from pared.graph.module import ProgramModule
from pared.graph.operators import find
from pared.graph.program import Node, Program

ATTENTION = "aten.scaled_dot_product_attention.default"


def left(axes: Axes, axis: Factors, size: int, going: np.ndarray) -> np.ndarray:
    """Which positions of an axis stay."""
    stays = np.ones(size, bool)
    for array in axes.ids.factors(*axis):
        stays &= ~((array >= 0) & going[array])
    return stays


def cut_program(program: Program, axes: Axes, going: np.ndarray, *, rescaled: bool = False) -> Program:
    """The program with every number that is the size of an axis made to fit what stays of the axis; node for node the same.

    Args:
        rescaled: queries are scaled for the new size of the heads already (`Group.rescaled`).
    """
    changes: dict[int, list[Size]] = {}
    for size in axes.sizes:
        if not left(axes, size.axis, size.size, going).all():
            changes.setdefault(size.node, []).append(size)
    nodes = []
    for k, node in enumerate(program.nodes):
        implied = not rescaled and node.op == ATTENTION and node.arguments().get("scale") is None
        operator = find(node.op)
        if operator is None or not (k in changes or implied):
            nodes.append(node)
            continue
        bound = dict(operator.bind(node.args, node.kwargs))
        for size in changes.get(k, ()):
            new = -1 if size.computed else int(left(axes, size.axis, size.size, going).sum())
            if size.place is None:
                bound[size.argument] = new
                continue
            whole = list(bound[size.argument])
            if size.computed and -1 in whole:  # the batch is in the other number, so this one is known
                place = whole.index(-1)
                number = program.first_node + k
                whole[place] = int(left(axes, axes.labels[number][place], axes.shapes[number][place], going).sum())
            whole[size.place] = new
            bound[size.argument] = whole
        if implied:
            bound["scale"] = axes.shapes[bound["query"].index][-1] ** -0.5
        names = [a.name for a in operator.arguments if not a.keyword_only]
        args, kwargs = operator.trim(
            [bound[name] for name in names], {a.name: bound[a.name] for a in operator.arguments if a.keyword_only}
        )
        nodes.append(Node(node.op, args, kwargs))
    return Program(
        program.parameters, program.inputs, program.symbols, program.states, tuple(nodes), program.outputs,
        program.constants, program.static_reason,
    )  # fmt: skip


def as_program(model: nn.Module, program: Program) -> ProgramModule:
    """The program in place of the model's code, with the model's tensors; it can be trained."""
    return ProgramModule(program, held(model, program), trains=True)


def held(root: nn.Module, program: Program) -> nn.Module:
    state = dict([*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)])
    return program.root(state)


def difference(got: Any, expected: Any) -> float:
    """The largest difference of outputs, relative to the largest expected value."""
    a = [t for t in pytree.tree_leaves(_tree(got)) if isinstance(t, Tensor)]
    b = [t for t in pytree.tree_leaves(_tree(expected)) if isinstance(t, Tensor)]
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b):
        if x.is_floating_point() and x.numel():
            worst = max(worst, float((x - y).detach().abs().max() / y.detach().abs().max().clamp_min(1e-12)))
    return worst


def _tree(outputs: Any) -> Any:
    return dict(outputs.items()) if hasattr(outputs, "items") else outputs
