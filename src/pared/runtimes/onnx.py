"""Export to ONNX, checked and compared with the model's own outputs."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.errors import ExportError, InputError, MissingExtra
from pared.measurement.mode import without_fused_attention_layers
from pared.runtimes import onnxruntime, translation
from pared.runtimes.example import Call, batch_size_of, on_the_processor, resized
from pared.runtimes.lower import lowered
from pared.runtimes.quiet import first_line, quiet
from pared.site import plain

if TYPE_CHECKING:
    import numpy as np

TOLERANCE = 1e-3
"""Largest accepted error, relative to the largest output."""
ROUNDED = 0.1
"""The same where activations are rounded: a kernel that adds in another order may round a few of them to the neighbour."""
MAX_PROTOBUF_BYTES = 2**31 - 2**24
"""Weights above this go into a second file beside the first, since one protobuf message cannot hold them."""


@dataclass(frozen=True)
class Exported:
    """A written model.

    Args:
        file_bytes: of the file, and of the file of weights beside it if there is one.
        max_abs_error: largest difference from our own outputs, on the example and on a batch of another size.
        max_relative_error: the same over the largest output.
        dynamic: whether the batch axis is free; if not, the file takes batches of the example's size only.
        rounds: whether activations are integers in it.
    """

    path: Path
    file_bytes: int
    max_abs_error: float
    max_relative_error: float
    dynamic: bool
    rounds: bool


def export(
    model: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int | None = None
) -> Exported:
    """Write the model as ONNX, integer weights as integers; the old file at the path stays whole until the new one is."""
    for package in ("onnx", "onnxscript"):
        _imported(package)
    network, reference = lowered(model).cpu(), plain(model).eval().cpu()
    args, kwargs = on_the_processor((args, kwargs))
    size = batch_size_of((args, kwargs))
    with tempfile.TemporaryDirectory(prefix=".pared-", dir=folder_of(path)) as folder:
        # an axis of length one would be taken for a constant
        wider = resized((args, kwargs), size, max(2, size))
        draft = Path(folder) / path.name
        dynamic = size > 0 and _write(network, draft, wider, opset, max(2, size))
        if not dynamic and (error := _write_fixed(network, draft, (args, kwargs), opset)) is not None:
            raise ExportError(
                f"the model cannot be written as ONNX: {first_line(error)}; run the .pared file itself"
            ) from error
        _check(draft)
        batches = [(args, kwargs)] + ([resized((args, kwargs), size, n) for n in (1, size + 2)] if dynamic else [])
        errors = [difference(reference, partial(onnxruntime.outputs_of, draft, *batch), *batch) for batch in batches]
        worst = max(error for error, _ in errors), max(error for _, error in errors)
        rounds = translation.rounds(draft)
        check(worst, ROUNDED if rounds else TOLERANCE)
        written = [file for file in Path(folder).iterdir() if file.is_file()]
        file_bytes = sum(file.stat().st_size for file in written)
        for file in sorted(written, key=lambda file: file == draft):
            os.replace(file, path.parent / file.name)
    return Exported(path, file_bytes, *worst, dynamic, rounds)


def _imported(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(package, "onnx") from error


def folder_of(path: Path) -> Path:
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} must exist for {path.name} to be written into it; make it first")
    return path.parent


def _write(network: nn.Module, path: Path, call: Call, opset: int | None, size: int) -> bool:
    """Write with a free batch axis; False where the model does not allow one."""

    def axes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return {0: torch.export.Dim.DYNAMIC} if leaf.ndim and len(leaf) == size else {}

    args, kwargs = pytree.tree_map(axes, call)
    shapes = dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)
    return _write_fixed(network, path, call, opset, dynamic_shapes=shapes) is None


def _write_fixed(network: nn.Module, path: Path, call: Call, opset: int | None, **more: Any) -> Exception | None:
    """Write; gives the exporter's error, if there was one."""
    args, kwargs = call
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values() if isinstance(t, Tensor))
    try:
        with quiet(), torch.no_grad(), without_fused_attention_layers():
            program = torch.onnx.export(
                network, args, kwargs=kwargs, dynamo=True, opset_version=opset or translation.OPSET, verbose=False,
                custom_translation_table=translation.table(opset or translation.OPSET), **more,
            )  # fmt: skip
            if program is None:
                raise ExportError("torch gave no ONNX program")
            translation.tidy_(program.model)
            program.save(path, external_data=weights > MAX_PROTOBUF_BYTES)
    except Exception as error:
        return error
    return None


def _check(path: Path) -> None:
    onnx = _imported("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        reason = first_line(error)
        raise ExportError(f"the exported model is not valid ONNX: {reason}; run the .pared file itself") from error


def check(worst: tuple[float, float], tolerance: float) -> None:
    """Raise an ExportError unless the relative error is within the tolerance."""
    if not worst[1] <= tolerance:
        raise ExportError(
            f"the exported model must give the model's own outputs within {tolerance:g} of the largest, its error "
            f"is {worst[1]:.2g}; the file was not written"
        )


def arrays_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[np.ndarray]:
    """The tensors of a call in order."""
    return [leaf.detach().cpu().contiguous().numpy() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def difference(
    network: nn.Module, outputs: Callable[[], list[np.ndarray]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float, float]:
    """Largest absolute error, and largest error over the largest value, among the outputs."""
    import numpy as np

    with torch.no_grad():
        wanted = network(*args, **kwargs)
    ours = arrays_of((wanted,), {})
    theirs = outputs()
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        raise ExportError(
            f"the exported model must give outputs of shapes {[a.shape for a in ours]}, "
            f"it gives {[b.shape for b in theirs]}; the file was not written"
        )
    worst_abs = worst_relative = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not a.size:
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        error = float(np.abs(a - b).max())
        scale = max(float(np.abs(a).max()), float(np.finfo(np.float32).tiny))
        worst_abs, worst_relative = max(worst_abs, error), max(worst_relative, error / scale)
    return worst_abs, worst_relative
