"""Where a model runs: torch itself, compiled, ONNX Runtime, OpenVINO. Export, run and time it there."""

from __future__ import annotations

import difflib
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from pared.runtimes.onnx import Exported

__all__ = ["RUNTIMES", "export", "layer_session", "run", "session"]

RUNTIMES = {"torch": "eager", "compile": "compiled", "onnxruntime": "onnxruntime", "openvino": "openvino"}
"""Runtimes by name, and the file of this folder that knows each."""
FORMATS = {"onnx": "onnx", "openvino": "openvino", "compressed-tensors": "compressed_tensors"}
"""What `export` writes, and the file of this folder that does it."""


def export(
    model_or_path: nn.Module | str | Path,
    path: str | Path,
    to: str = "onnx",
    example: Any = None,
    opset: int | None = None,
) -> Exported:
    """Write a model for another runtime, integer weights as integers, the batch axis free; compare with our own outputs.

    Args:
        model_or_path: a model, or a .pared file.
        to: "onnx", "openvino" (NAME.xml, with NAME.bin beside it), or "compressed-tensors" (a folder of transformers).
        example: inputs of one call, with a batch axis: a tensor, a tuple of positional arguments or a dict of keyword
            arguments; default: the one that the model carries, or random inputs of the shapes in its file.
        opset: of ONNX; default: the exporter's.

    Raises:
        ExportError: an operator that the format lacks, or outputs that differ by more than 1e-3 of their size.
        MissingExtra: the exporter is not installed.
    """
    if to not in FORMATS:
        raise InputError(f"export writes {', '.join(FORMATS)}, got {to!r}")
    if opset is not None and opset < 13:
        raise InputError(f"scales for every channel need ONNX's opset 13 or newer, got {opset}; leave it out")
    writer = importlib.import_module(f"{__name__}.{FORMATS[to]}")
    model = model_or_path if isinstance(model_or_path, nn.Module) else _loaded(model_or_path)
    args, kwargs = _arguments(model, example)
    return writer.export(model, Path(path), args, kwargs, opset)


def run(path: str | Path, *arrays: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
    """Run a .pared, .onnx or OpenVINO's .xml file on its inputs in order; gives its output, or a tuple of them."""
    suffix = Path(path).suffix
    if suffix == ".onnx":
        from pared.runtimes import onnxruntime

        outputs = onnxruntime.run(Path(path), arrays)
    elif suffix == ".xml":
        from pared.runtimes import openvino

        outputs = openvino.run(Path(path), arrays)
    elif suffix == ".pared":
        model = _loaded(path)
        with torch.no_grad():
            result = model(*(torch.as_tensor(array) for array in arrays))
        leaves = pytree.tree_leaves(result)
        outputs = [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, Tensor)]
    else:
        raise InputError(f"run takes a .pared, .onnx or .xml file, got {path}")
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def session(
    model: nn.Module,
    runtime: str,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    threads: int | None = None,
    call: Callable[[nn.Module], Any] | None = None,
) -> Callable[[], Any]:
    """A function without arguments that runs the model once in a runtime and returns when it is done.

    Args:
        example: positional and keyword arguments of the call.
        threads: of runtimes with a pool of their own; torch's are set by whoever calls the function.
        call: `(model) -> outputs`, where calling `model(*args, **kwargs)` is not right; only torch itself can do that.

    Raises:
        InputError: an unknown runtime.
        ExportError: a model that the runtime cannot express.
        MissingExtra: a runtime that is not installed.
    """
    return _runtime(runtime).session(model, *example, threads, call)


def layer_session(layer: nn.Module, x: Tensor, runtime: str, threads: int | None = None) -> Callable[[], Any]:
    """The same for one convolution or linear layer, made in milliseconds where the runtime reads ONNX files.

    Raises:
        ExportError: another layer, or one that the runtime cannot express.
        MissingExtra: a runtime that is not installed.
    """
    from pared.runtimes.layer import write

    module = _runtime(runtime)
    if not hasattr(module, "opened"):
        return session(layer, runtime, ((x,), {}), threads)
    with tempfile.TemporaryDirectory(prefix="pared-") as folder:
        path = Path(folder) / "layer.onnx"
        write(layer, x, path)
        return module.opened(path, (x,), {}, threads)


def _runtime(name: str) -> ModuleType:
    if name not in RUNTIMES:
        near = difflib.get_close_matches(name, RUNTIMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"a runtime must be one of {', '.join(RUNTIMES)}, got {name!r}{hint}")
    return importlib.import_module(f"{__name__}.{RUNTIMES[name]}")


def _loaded(path: str | Path) -> nn.Module:
    from pared import artifact

    return artifact.load(path)


def _arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        from pared.runtimes.example import example_of

        return example_of(model)
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
