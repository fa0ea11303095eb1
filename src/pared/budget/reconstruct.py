"""Layers fitted anew, in order, to what they gave in the original network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pared.budget.products import Product, product_of
from pared.graph import Interpreted, Node, Operand, Program
from pared.site import duplicate
from pared.task import Batch, Task

N_EXAMPLES = 256
N_POSITIONS = 16384
"""Rows of the least squares of one layer: pixels or time steps drawn over all examples."""
RIDGE = 1e-3
"""Of the mean square of the inputs: how strongly weights are held where they are."""
WIDEST = 4608


def reconstruct_(
    model: nn.Module,
    original: nn.Module,
    program: Program,
    cut: Program,
    kept: Callable[[int], Tensor | None],
    task: Task,
) -> int:
    """Refit the weights of every product of a cut model, in place; gives the number of layers that were refitted.

    For each linear or convolution layer in the order of the program, with x' what it reads in the cut model (whose
    earlier layers are refitted already) and y what it gave in the original:

        min over W, b of   mean |y - W x' - b|^2 + ridge |W - W_0|^2

    Source: the least-squares reconstruction of He, Zhang & Sun 2017, arXiv:1707.06168, in sequence over the network.

    Args:
        program, cut: of the original and of the cut model, node by node the same.
        kept: for the number of a node, which of the original's outputs it still gives; None: it is left as it is.
        task: calibration data.
    """
    batch = _whole_batch(task)
    if batch is None:
        return 0
    twin = duplicate(original).eval().requires_grad_(False)
    targets: dict[tuple[int, int], Tensor] = {}
    counts: dict[int, int] = {}

    def see(index: int, node: Node, op: str, inputs: list[Any], run: Callable[..., Any]) -> Any:
        output = run()
        product, place = product_of(op, node, inputs), _count(counts, index)
        if product is not None and product.counts_macs and isinstance(output, Tensor):
            rows = product.gradients(output.detach(), _sample(product, index, place))
            targets[index, place] = rows
        return output

    _run(task, program, twin, batch, see)
    counts = {}
    requires = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    n_refitted = 0

    def refit(index: int, node: Node, op: str, inputs: list[Any], run: Callable[..., Any]) -> Any:
        nonlocal n_refitted
        product, place = product_of(op, node, inputs), _count(counts, index)
        target = targets.pop((index, place), None)
        rows = kept(index) if target is not None else None
        if product is not None and target is not None and rows is not None and _may_be_refitted(product, target):
            n_refitted += _solve(product, _sample(product, index, place), target[0][:, rows], _bias(inputs))
        return run()

    _run(task, cut, model, batch, refit)
    for parameter, flag in zip(model.parameters(), requires, strict=True):
        parameter.requires_grad_(flag)
    return n_refitted


def _run(task: Task, program: Program, root: nn.Module, batch: Batch, observe: Callable[..., Any]) -> None:
    task.outputs(Interpreted(program, root, observe).eval(), batch)


def _whole_batch(task: Task) -> Batch | None:
    """Calibration examples as one batch."""
    batches = list(task.calibration(N_EXAMPLES))
    if not batches:
        return None
    return batches[0] if len(batches) == 1 else _joined(batches)


def _joined(batches: Sequence[Batch]) -> Batch:
    from torch.utils import _pytree as pytree

    leaves = [pytree.tree_flatten(batch) for batch in batches]
    joined = [torch.cat(list(parts)) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*(l for l, _ in leaves))]
    return pytree.tree_unflatten(joined, leaves[0][1])


def _count(counts: dict[int, int], index: int) -> int:
    counts[index] = counts.get(index, -1) + 1
    return counts[index]


def _sample(product: Product, index: int, place: int) -> Tensor | None:
    """The same positions in both runs."""
    if product.n_positions <= N_POSITIONS:
        return None
    generator = torch.Generator().manual_seed(index * 1009 + place)
    return torch.randint(product.n_positions, (N_POSITIONS,), generator=generator).to(product.operand.value.device)


def _may_be_refitted(product: Product, target: Tensor) -> bool:
    lineage = product.operand.lineage
    return lineage is not None and not lineage.views and target.shape[0] == 1


def _bias(inputs: list[Any]) -> Tensor | None:
    given = inputs[2] if len(inputs) > 2 else None
    if isinstance(given, Operand) and given.lineage is not None and not given.lineage.views and isinstance(given.value, Tensor):
        return given.value
    return None


def _solve(product: Product, positions: Tensor | None, target: Tensor, bias: Tensor | None) -> bool:
    x = product.inputs(positions)[0].double()
    weight = product.as_matrix(product.operand.value)[0]
    if x.shape[1] > WIDEST or x.shape[0] < 2:
        return False
    y = target.double()
    if bias is not None:
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
    start = weight.double()
    rest = y - x @ start.T
    gram = x.T @ x / len(x)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    step = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x.T @ rest / len(x))
    weight.copy_((start + step.T).to(weight.dtype))
    if bias is not None:
        bias.copy_((y_mean - (start + step.T) @ x_mean).to(bias.dtype))
    return True
