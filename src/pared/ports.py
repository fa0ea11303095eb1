"""Values seen and changed where they enter or leave a module, by hooks that copies and exports of the model keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from pared.statistics import Port

Change = Callable[[nn.Module, Tensor], Tensor | None]
"""(module, value) -> another value, or None to leave it."""


def attach_(model: nn.Module, port: Port, change: Change) -> RemovableHandle:
    """Let `change` see, and perhaps replace, the one floating-point value that passes through the port."""
    module = model.get_submodule(port.module)
    if port.side == "output":
        return module.register_forward_hook(_Outgoing(change))
    return module.register_forward_pre_hook(_Incoming(change), with_kwargs=True)


@dataclass
class _Incoming:
    change: Change

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        changed = _changed(self.change, module, (args, kwargs))
        return changed if changed is None else (tuple(changed[0]), changed[1])


@dataclass
class _Outgoing:
    change: Change

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _changed(self.change, module, output)


def _changed(change: Change, module: nn.Module, tree: Any) -> Any:
    """The tree with its first floating-point tensor changed, at every place where it stands."""
    value = next((leaf for leaf in pytree.tree_leaves(tree) if _is_value(leaf)), None)
    new = None if value is None else change(module, value)
    return None if new is None else pytree.tree_map(lambda leaf: new if leaf is value else leaf, tree)


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
