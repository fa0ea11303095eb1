"""Parameters kept in 16 bits are trained in 32."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pared.site import Decoded

NARROW = (torch.float16, torch.bfloat16)


class Precision:
    """Turns trained 16-bit parameters (tables of codes, whole networks) into float32, and back at the end.

    A network that is 16-bit throughout runs under autocast meanwhile, since its inputs are of that type too; its
    running statistics are kept in float32 as well, as normalisation wants them.
    """

    def __init__(self, model: nn.Module, trained: Iterable[Tensor]) -> None:
        inside = {id(p) for module in model.modules() if isinstance(module, Decoded) for p in module.parameters()}
        own = [parameter for parameter in model.parameters() if id(parameter) not in inside and parameter.numel()]
        floats = {parameter.dtype for parameter in own if parameter.is_floating_point()}
        self._throughout = floats.pop() if len(floats) == 1 and floats <= set(NARROW) else None
        self._model = model
        tensors = [*trained, *(model.buffers() if self._throughout is not None else ())]
        self._kept = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in NARROW]

    def widen_(self) -> None:
        for tensor, _ in self._kept:
            tensor.grad = None
            tensor.data = tensor.data.float()

    def round_(self) -> None:
        """Give every tensor a value that its own type can hold; the type stays float32."""
        for tensor, dtype in self._kept:
            tensor.data.copy_(tensor.data.to(dtype))

    def restore_(self) -> None:
        for tensor, dtype in self._kept:
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)

    def autocast(self) -> AbstractContextManager:
        if self._throughout is None:
            return nullcontext()
        return torch.autocast(next(self._model.parameters()).device.type, self._throughout)
