"""The runtime "torch": the module as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def session(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    threads: int | None = None,
    call: Callable[[nn.Module], Any] | None = None,
) -> Callable[[], Any]:
    """The model in evaluation mode on the device that it is on."""
    if model.training:
        model.eval()
    on_cuda = any(tensor.is_cuda for tensor in model.parameters())

    def once() -> Any:
        with torch.no_grad():
            outputs = model(*args, **kwargs) if call is None else call(model)
            if on_cuda:
                torch.cuda.synchronize()
        return outputs

    return once
