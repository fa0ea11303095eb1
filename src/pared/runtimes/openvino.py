"""The runtime "openvino": an exported model on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.errors import ExportError, MissingExtra
from pared.runtimes.quiet import first_line, quiet


def session(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    threads: int | None = None,
    call: Callable[[nn.Module], Any] | None = None,
) -> Callable[[], Any]:
    """The model exported, converted for these shapes and compiled for low latency."""
    if call is not None:
        raise ExportError("openvino calls the model by itself and cannot follow Task(forward=...); leave it out")
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra("openvino", "openvino") from error
    from pared.runtimes import onnx

    arrays = {name: leaf for name, leaf in kwargs.items() if isinstance(leaf, Tensor)}
    positional = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    with tempfile.TemporaryDirectory(prefix="pared-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.export(model, path, args, kwargs)
        # left to itself it rounds to bfloat16 on processors that have it: another function, not the same one faster
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            with quiet():
                compiled = openvino.Core().compile_model(openvino.convert_model(path), "CPU", options)
        except Exception as error:
            reason = first_line(error)
            raise ExportError(f"openvino cannot compile the model: {reason}; leave the runtime out") from error
    request = compiled.create_infer_request()
    names = [port.any_name for port in compiled.inputs if port.any_name not in arrays]
    feeds = {name: leaf.cpu().numpy() for name, leaf in [*zip(names, positional, strict=True), *arrays.items()]}
    return lambda: request.infer(feeds)
