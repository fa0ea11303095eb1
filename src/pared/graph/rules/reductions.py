"""Normalisations, reductions, pooling, and operators along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pared.graph.call import PLACES, Call, Label, rules
from pared.graph.ids import Factors
from pared.graph.operators import Ref
from pared.graph.rules.elementwise import blank, pointwise, unknown


def _with_vectors(call: Call, axis: Factors, names: Sequence[str]) -> Factors:
    for name in names:
        if isinstance(call.ref(name), Ref):
            axis = call.same(axis, call.label(name)[0])
    return axis


def _batch_norm(call: Call) -> Label:
    x = call.label("input")
    if len(x) < 2:
        return unknown(call)
    return [x[0], _with_vectors(call, x[1], ("weight", "bias", "running_mean", "running_var")), *x[2:]]


def _layer_norm(call: Call) -> Any:
    x = call.label("input")
    n = len(call.value("normalized_shape"))
    for name in ("weight", "bias"):
        if isinstance(call.ref(name), Ref):
            x[-n:] = [call.same(a, b) if size > 1 else () for a, b, size in zip(x[-n:], call.label(name), call.shape("input")[-n:])]
    for place in range(n):
        call.size("normalized_shape", place, x[len(x) - n + place], call.shape("input")[-n:][place])
    return x if isinstance(call.out, tuple) else [x, *blank(call.out[1:])]


def _group_norm(call: Call) -> Label:
    x, shape = call.label("input"), call.shape("input")
    groups = int(call.value("num_groups"))
    if groups > 1:
        rows, _ = call.split(x[1], groups, shape[1] // groups)
        call.size("num_groups", None, rows, groups)
    axis = _with_vectors(call, call.ids.factors(*x[1]), ("weight", "bias"))
    return [x[0], axis, *x[2:]]


def _reduction(call: Call) -> Any:
    if "other" in call.bound:  # the larger, the smaller of two
        return pointwise(call)
    first = call.first
    x, rank = call.label(first), len(call.shape(first))
    dims = call.value("dim") if "dim" in call.bound else None
    if dims is None or dims == []:
        gone = set(range(rank))
    else:
        gone = {int(d) % max(rank, 1) for d in (dims if isinstance(dims, list) else [dims])}
    if call.name in ("argmax", "argmin", "cumsum", "median"):
        for axis in gone:
            call.keep(x[axis])
    keep = bool(call.value("keepdim"))
    label = [() if i in gone else axis for i, axis in enumerate(x) if keep or i not in gone]
    return label if isinstance(call.out, tuple) else [label for _ in call.out]


def _along(call: Call) -> Any:
    """Positions along one axis compete or are ordered: all of them stay."""
    x = call.label(call.first)
    if not x:
        return blank(call.out)
    rank = len(x)
    dims = call.value("dim") if call.bound.get("dim") is not None else call.value("dims")
    for dim in dims if isinstance(dims, list) else [dims if dims is not None else -1]:
        call.keep(x[int(dim) % rank], f"it is the axis of {call.name}{f' near {call.near}' if call.near else ''}")
        x[int(dim) % rank] = ()
    return x if isinstance(call.out, tuple) else [x for _ in call.out]


def _spatial(call: Call) -> Any:
    """Channels second; what comes after is space."""
    first = call.first
    x, rank = call.label(first), len(call.shape(first))
    n_lead = max(0, rank - int(call.name[-2])) if call.name[-1:] == "d" and call.name[-2:-1].isdigit() else 2
    for axis in x[n_lead:]:
        call.keep(axis, PLACES)
    label = [*x[:n_lead], *[()] * (rank - n_lead)]
    return label if isinstance(call.out, tuple) else [label for _ in call.out]


RULES = rules(
    {
        "batch_norm instance_norm": _batch_norm,
        "layer_norm native_layer_norm rms_norm _fused_rms_norm": _layer_norm,
        "group_norm": _group_norm,
        "sum mean amax amin max min var std var_mean prod logsumexp linalg_vector_norm norm any all argmax argmin "
        "median": _reduction,
        "softmax log_softmax _softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp sort topk argsort roll fft_fft "
        "fft_ifft": _along,
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d upsample_nearest1d "
        "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d reflection_pad1d reflection_pad2d "
        "replication_pad2d _adaptive_avg_pool2d": _spatial,
    }
)
