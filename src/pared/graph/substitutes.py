"""What export sees in place of some of torch's functions."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Export unrolls recurrent operators over time to find their shapes, which is slow and fixes the length. Under these
# names they stay whole.

_LIBRARY = torch.library.Library("pared", "FRAGMENT")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _recurrent_shapes(
    x: Tensor, hx: Tensor | list[Tensor], params: list[Tensor], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    hidden = hx if isinstance(hx, Tensor) else hx[0]
    batch, length = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    if hidden.shape[1] != batch or hidden.shape[0] != num_layers * (2 if bidirectional else 1):
        raise RuntimeError(f"the state of a recurrent layer does not fit: {tuple(hidden.shape)}")
    out = x.new_empty((length, batch, hidden.shape[2] * (2 if bidirectional else 1)))
    out = out.transpose(0, 1) if batch_first else out
    return (out, *(h.new_empty(h.shape) for h in ([hx] if isinstance(hx, Tensor) else hx)))


for _name in _RECURRENT:
    _hx, _results = ("Tensor[]", "Tensor, Tensor, Tensor") if _name == "lstm" else ("Tensor", "Tensor, Tensor")
    _LIBRARY.define(
        f"{_name}(Tensor input, {_hx} hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
        f"bool bidirectional, bool batch_first) -> ({_results})"
    )
    _LIBRARY.impl(_name, _recurrent_shapes, "Meta")


def bags(
    indices: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.embedding_bag in operators that check their indices and that every runtime has.

    indices (bags, length), or (n,) with offsets (bags,); weight (entries, width); returns (bags, width). An empty bag
    gives zeros.
    """
    rows = F.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    real = torch.ones_like(indices, dtype=torch.bool) if padding is None else indices != padding
    rows = rows.masked_fill(~real.unsqueeze(-1), float("-inf") if mode == "max" else 0.0)
    if offsets is None:
        counts = real.sum(1, keepdim=True)
        if mode == "max":
            return rows.amax(1).masked_fill(counts == 0, 0.0)
        total = rows.sum(1)
    else:
        n_bags = offsets.shape[0] - (1 if include_last_offset else 0)
        bag = torch.searchsorted(offsets[:n_bags], torch.arange(indices.shape[0], device=offsets.device), right=True) - 1
        counts = torch.zeros(n_bags, dtype=torch.int64, device=weight.device).index_add(0, bag, real.to(torch.int64))[:, None]
        if mode == "max":
            lowest = rows.new_full((n_bags, weight.shape[1]), float("-inf"))
            return lowest.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax").masked_fill(counts == 0, 0.0)
        total = rows.new_zeros((n_bags, weight.shape[1])).index_add(0, bag, rows)
    return total / counts.clamp(min=1) if mode == "mean" else total


@final
class Substitutes(TorchFunctionMode):
    """Puts the opaque names in place of torch's recurrent operators (packed sequences aside), and `bags` for embedding bags."""

    def __init__(self) -> None:
        super().__init__()
        self.names = {getattr(torch._VF, name): name for name in _RECURRENT}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding_bag and (kwargs or {}).get("max_norm") is None:
            return bags(*args, **(kwargs or {}))
        try:
            name = self.names.get(func)
        except TypeError:  # unhashable
            name = None
        if name is not None and isinstance(args[2], list | tuple) and not kwargs:
            return getattr(torch.ops.pared, name)(*args)
        return func(*args, **(kwargs or {}))
