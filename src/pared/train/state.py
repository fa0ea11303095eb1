"""All tensors of a model by name: parameters and buffers, each once, those that its state dict leaves out included."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, not copies."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if tensor.numel()}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state_of(model).items()}


def restore_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the model's tensors these values. What it holds decoded is stale until `train()` or `eval()` is called."""
    with torch.no_grad():
        for name, tensor in state_of(model).items():
            tensor.copy_(state[name])
