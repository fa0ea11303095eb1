"""Layers fitted anew, in order, to what they gave in the original network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.budget.products import Product, product_of
from pared.graph import Interpreted, Node, Operand, Program
from pared.site import duplicate
from pared.task import Batch, Task, batch_size

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
    kept: Callable[[int], Tensor | slice | None],
    task: Task,
    batch: Batch,
    *,
    ridge: float = RIDGE,
    used: Callable[[str], None] = lambda path: None,
) -> int:
    """Refit the weights of every product of a cut model, in place; gives the number of layers that were refitted.

    For each linear or convolution layer in the order of the program, with x' what it reads in the cut model (whose
    earlier layers are refitted already) and y what it gave in the original:

        min over W, b of   mean |y - W x' - b|^2 + ridge |W - W_0|^2

    Source: the least-squares reconstruction of He, Zhang & Sun 2017, arXiv:1707.06168, in sequence over the network.

    Args:
        program, cut: of the original and of the cut model, node by node the same.
        kept: for the number of a node, which of the original's outputs it still gives; None: it is left as it is.
        task: how the model is called.
        batch: calibration examples, all at once.
        used: called with the path of every tensor that an operator is about to read, refitted or not; it may change it.
    """
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
    n_refitted = 0
    seen: set[str] = set()  # by an operator: of tensors that are used again, the first use decides

    def refit(index: int, node: Node, op: str, inputs: list[Any], run: Callable[..., Any]) -> Any:
        nonlocal n_refitted
        product, place = product_of(op, node, inputs), _count(counts, index)
        target = targets.pop((index, place), None)
        rows = kept(index) if target is not None else None
        operands = [thing for thing in pytree.tree_leaves(inputs) if isinstance(thing, Operand) and thing.lineage is not None]
        paths = [operand.lineage.path for operand in operands if operand.lineage is not None]
        fits = product is not None and target is not None and _may_be_refitted(product, target)
        if fits and product is not None and target is not None and rows is not None and not seen & set(paths):
            n_refitted += _solve(product, _sample(product, index, place), target[0][:, rows], ridge)
        seen.update(paths)
        for path in paths:
            used(path)
        return run()

    try:
        model.requires_grad_(False)
        _run(task, cut, model, batch, refit)
    finally:
        for parameter, flag in zip(model.parameters(), requires, strict=True):
            parameter.requires_grad_(flag)
    return n_refitted


def _run(task: Task, program: Program, root: nn.Module, batch: Batch, observe: Callable[..., Any]) -> None:
    task.outputs(Interpreted(program, root, observe).eval(), batch)


def whole_batch(task: Task, n_examples: int = N_EXAMPLES) -> Batch | None:
    """Calibration examples as one batch: all that are like the first. Texts may come in several lengths, and what is not
    one per example (a mask for all of them) may differ."""
    batches = list(task.calibration(n_examples))
    if not batches:
        return None
    size = batch_size(batches[0])
    first, form = pytree.tree_flatten(batches[0])
    alike = []
    for batch in batches:
        leaves, its_form = pytree.tree_flatten(batch)
        its_size = batch_size(batch)
        if its_form == form and all(_alike(a, its_size, b, size) for a, b in zip(leaves, first, strict=True)):
            alike.append(leaves)
    joined = [
        torch.cat(list(parts)) if isinstance(parts[0], Tensor) and _is_per_example(parts[0], size) else parts[0]
        for parts in zip(*alike, strict=True)
    ]
    return pytree.tree_unflatten(joined, form)


def _is_per_example(leaf: Tensor, size: int) -> bool:
    return leaf.ndim > 0 and len(leaf) == size


def _alike(leaf: Any, size: int, other: Any, its_size: int) -> bool:
    """Whether leaves of two batches, of so many examples each, can stand in one batch."""
    if not isinstance(leaf, Tensor) or not isinstance(other, Tensor):
        return type(leaf) is type(other) and (not isinstance(leaf, (str, int, float)) or leaf == other)
    if leaf.dtype != other.dtype:
        return False
    if _is_per_example(leaf, size) and _is_per_example(other, its_size):
        return leaf.shape[1:] == other.shape[1:]
    return torch.equal(leaf, other)


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
    """Whether outputs are W x, and perhaps one number more for each output, of a weight that is no view."""
    lineage = product.operand.lineage
    added = product.added.value if isinstance(product.added, Operand) else product.added
    if lineage is None or lineage.views or target.shape[0] != 1 or not product.alone:
        return False
    n_outputs = product.as_matrix(product.operand.value).shape[1]
    return added is None or (isinstance(added, Tensor) and added.ndim == 1 and len(added) == n_outputs)


def _bias(product: Product) -> Tensor | None:
    """What is added, where it is a tensor of the model itself."""
    added = product.added
    if isinstance(added, Operand) and added.lineage is not None and not added.lineage.views and isinstance(added.value, Tensor):
        return added.value
    return None


def _solve(product: Product, positions: Tensor | None, target: Tensor, strength: float) -> bool:
    x = product.inputs(positions)[0].double()
    weight = product.as_matrix(product.operand.value)[0]
    bias = _bias(product)
    if x.shape[1] > WIDEST or x.shape[0] < 2:
        return False
    y = target.double()
    if product.added is not None:
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
    start = weight.double()
    rest = y - x @ start.T
    gram = x.T @ x / len(x)
    ridge = strength * gram.diagonal().mean().clamp_min(1e-12)
    step = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x.T @ rest / len(x))
    weight.copy_((start + step.T).to(weight.dtype))
    if bias is not None:
        bias.copy_((y_mean - (start + step.T) @ x_mean).to(bias.dtype))
    return True
