"""How groups of channels respond to calibration data: for the importance measures that need more than weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
from torch import Tensor

from pared.budget.products import product_of
from pared.graph import Interpreted, Node, Operand, Ref
from pared.graph.channels import Channels
from pared.site import duplicate
from pared.statistics import Responses
from pared.task import Task, batch_size

N_EXAMPLES = 256


def responses(graph: Channels, task: Task) -> dict[str, Responses]:
    """Taylor, Fisher and activity of the channels of every group, by its name; the loss is the task's own.

    A channel's value is what the products that read it are given (after normalisation and activation); where no product
    reads a group, what the products that make it give.
    """
    return _Gathering(graph, task).run()


@final
class _Gathering:
    def __init__(self, graph: Channels, task: Task) -> None:
        self.graph, self.task = graph, task
        self.root = duplicate(graph.model).eval().requires_grad_(True)
        numbers = range(len(graph.groups))
        self.sums = {number: {key: np.zeros(graph.groups[number].n) for key in ("taylor", "fisher", "apoz")} for number in numbers}
        self.n_examples = 0
        self.read = {number for value in self._read() for _, number, _ in graph.places(value)}
        self.seen: set[int] = set()

    def _read(self) -> set[int]:
        """The values that products are given."""
        found = set()
        for node in self.graph.program.nodes:
            if _is_product(node.op) and isinstance(ref := node.args[0], Ref):
                found.add(ref.index)
        return found

    def run(self) -> dict[str, Responses]:
        for batch in self.task.calibration(N_EXAMPLES):
            self.seen.clear()
            twin = Interpreted(self.graph.program, self.root, self._observe)
            self.n_examples += batch_size(batch)
            self.task.batch_loss(self.task.outputs(twin, batch), batch).backward()
        return {
            self.graph.groups[number].name: Responses(**{key: value / self.n_examples for key, value in sums.items()})
            for number, sums in self.sums.items()
        }

    def _observe(self, index: int, node: Node, op: str, inputs: list[Any], run: Callable[..., Any]) -> Any:
        if product_of(op, node, inputs) is None or op != node.op:
            return run()
        ref, operand = node.args[0], inputs[0]
        if isinstance(ref, Ref) and isinstance(operand, Operand) and isinstance(operand.value, Tensor):
            self._watch(ref.index, operand.value, whole=True)
        output = run()
        self._watch(self.graph.program.first_node + index, output, whole=False)
        return output

    def _watch(self, number: int, value: Tensor, whole: bool) -> None:
        """Note a value's part when the gradient arrives; `whole`: it is what products read."""
        places = [place for place in self.graph.places(number) if whole or place[1] not in self.read]
        if number in self.seen or not places or not value.requires_grad:
            return
        self.seen.add(number)
        kept = value.detach()

        def see(gradient: Tensor) -> None:
            product = kept * gradient
            for axis, group, channels in places:
                mine = channels >= 0
                other = [a for a in range(1, kept.ndim) if a != axis]
                per_example = product.sum(other) if other else product
                n = len(kept)
                for key, rows in (
                    ("taylor", (n * per_example).square().sum(0)),
                    ("fisher", (n * product).square().sum([0, *other])),
                    ("apoz", n * (kept != 0).double().mean([0, *other])),
                ):
                    np.add.at(self.sums[group][key], channels[mine], rows.double().cpu().numpy()[mine])

        value.register_hook(see)


def _is_product(op: str) -> bool:
    return op.split(".")[1] in ("linear", "conv1d", "conv2d", "conv3d", "convolution", "matmul", "mm", "bmm", "addmm")
