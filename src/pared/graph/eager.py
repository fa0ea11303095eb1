"""A model without graph run as it is, so that every use of every parameter can be seen and changed all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pared.graph.interpret import RECURRENT, Inputs, Lineage, Linears, Observe, Operand
from pared.graph.operators import find
from pared.graph.program import Node


@final
class Eager(nn.Module):
    """Calls the model; `observe` stands around every function of torch that takes one of its tensors.

    It sees what it sees of a program (`pared.graph.interpret`): linear maps, convolutions, embeddings, batch norms and
    unrolled recurrent layers as operators of torch's table; all else as "python.NAME", with the tensors among its arguments
    as inputs. A view of a tensor counts as such a use of it.
    """

    def __init__(self, model: nn.Module, observe: Observe) -> None:
        super().__init__()
        self.model = model
        self.watching = _Watching(model, observe)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.enable_grad(), self.watching:
                return self.model(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


class _Watching(TorchFunctionMode):
    def __init__(self, model: nn.Module, observe: Observe) -> None:
        super().__init__()
        self.observe = observe
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.lineages: dict[int, Lineage] = {}
        for path, tensor in named:
            self.lineages.setdefault(id(tensor), Lineage(path))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, spec = pytree.tree_flatten((tuple(args), kwargs))
        if not any(id(leaf) in self.lineages for leaf in given if isinstance(leaf, Tensor)):
            return function(*args, **kwargs)
        op, args, kwargs = _operator(function, tuple(args), kwargs)
        operator = find(op) if op is not None else None
        if op is None or operator is None:
            return self._other(function, given, spec)
        bound = operator.bind(args, kwargs)
        operands = [self._operand(bound[a.name]) for a in operator.arguments if not a.keyword_only]
        named = {a.name: bound[a.name] for a in operator.arguments if a.keyword_only and a.name in kwargs}
        if op in RECURRENT:
            return RECURRENT[op](Linears(lambda *shown: self._show(Node(op, (), {}), *shown)), operator.bind(operands, {}))
        return self._show(Node(op, (), named), op, operands, lambda *values: operator.function(*values, **named))

    def _operand(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._operand(each) for each in value]
        return Operand(value, self.lineages.get(id(value)))

    def _show(self, node: Node, op: str, operands: Inputs, compute: Callable[..., Any]) -> Any:
        return self.observe(0, node, op, operands, lambda *replaced: compute(*(replaced or map(_value, operands))))

    def _other(self, function: Any, given: list[Any], spec: Any) -> Any:
        """A function that is not in the table, or one that asks a tensor's shape: nothing is made of its values then."""

        def run(*values: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(list(values), spec)
            return function(*args, **kwargs)

        result = run(*given)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result
        op = f"python.{getattr(function, '__name__', 'call')}"
        operands = [self._operand(leaf) for leaf in given]
        return self.observe(0, Node(op, (), {}), op, operands, lambda *replaced: run(*replaced) if replaced else result)


def _value(operand: Any) -> Any:
    return [_value(each) for each in operand] if isinstance(operand, list) else operand.value


_OPERATORS = {
    function: f"aten.{name}.{overload}"
    for overload, names in (
        ("default", "conv1d conv2d conv3d mm bmm matmul addmm baddbmm lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
        ("input", "lstm gru rnn_tanh rnn_relu conv_transpose2d conv_transpose3d"),
    )
    for name in names.split()
    for function in (getattr(torch, name), getattr(Tensor, name, None))
    if function is not None
} | {
    torch._C._nn.linear: "aten.linear.default",
    torch.conv_transpose1d: "aten.conv_transpose1d.default",
    Tensor.__matmul__: "aten.matmul.default",
}

_STACKS = [op for op in RECURRENT if op.endswith(".input")]


def _operator(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, tuple[Any, ...], dict[str, Any]]:
    """The operator that a function of torch calls, with its arguments in the order of torch's schema; None for others."""
    if function is F.embedding:
        indices, weight = _arguments(("input", "weight"), args, kwargs)
        options = _arguments(("max_norm", "scale_grad_by_freq", "sparse"), args[3:4] + args[5:], kwargs)
        return (None if any(options) else "aten.embedding.default"), (weight, indices), {}
    if function is F.batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        x, mean, var, gain, bias, training, momentum, eps = _arguments(names, args, kwargs)
        momentum, eps = 0.1 if momentum is None else momentum, 1e-5 if eps is None else eps
        return (None if training else "aten.batch_norm.default"), (x, gain, bias, mean, var, False, momentum, eps, False), {}
    op = _OPERATORS.get(function)
    if op in _STACKS and not isinstance(args[3], bool):
        return None, args, kwargs  # a packed sequence
    if op is not None and any(isinstance(each, str) for each in (*args, *kwargs.values())):
        op = op.replace("default", "padding")  # of a convolution, by name
    return op, args, kwargs


def _arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]
