"""The runtime "openvino": an exported model on the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.errors import ExportError, InputError, MissingExtra
from pared.runtimes.example import on_the_processor
from pared.runtimes.quiet import first_line, quiet
from pared.site import plain

if TYPE_CHECKING:
    import numpy as np

    from pared.runtimes.onnx import Exported


def session(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    threads: int | None = None,
    call: Callable[[nn.Module], Any] | None = None,
) -> Callable[[], Any]:
    """The model exported, converted and compiled for low latency."""
    if call is not None:
        raise ExportError("openvino calls the model by itself and cannot follow Task(forward=...); leave it out")
    _openvino()
    from pared.runtimes import onnx

    with tempfile.TemporaryDirectory(prefix="pared-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.export(model, path, args, kwargs)
        return opened(path, args, kwargs, threads)


def opened(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], threads: int | None = None) -> Callable[[], Any]:
    """An ONNX file, converted and compiled, as a function that runs it once on these inputs."""
    compiled = _compiled(path, threads)
    arrays = {name: leaf for name, leaf in kwargs.items() if isinstance(leaf, Tensor)}
    positional = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    request = compiled.create_infer_request()
    names = [port.any_name for port in compiled.inputs if port.any_name not in arrays]
    feeds = {name: leaf.cpu().numpy() for name, leaf in [*zip(names, positional, strict=True), *arrays.items()]}
    return lambda: request.infer(feeds)


def export(model: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int | None = None) -> Exported:
    """Write the model as OpenVINO's two files, NAME.xml and NAME.bin, by way of a checked ONNX file; compare the outputs."""
    openvino = _openvino()
    from pared.runtimes import onnx

    if path.suffix != ".xml":
        raise InputError(f"OpenVINO's files are called NAME.xml and NAME.bin, got {path.name}; end the name in .xml")
    args, kwargs = on_the_processor((args, kwargs))
    with tempfile.TemporaryDirectory(prefix=".pared-", dir=onnx.folder_of(path)) as folder:
        draft, between = Path(folder) / path.name, Path(folder) / "model.onnx"
        written = onnx.export(model, between, args, kwargs, opset)
        try:
            with quiet():
                openvino.save_model(openvino.convert_model(between), draft, compress_to_fp16=False)
        except Exception as error:
            raise ExportError(f"openvino cannot convert the model: {first_line(error)}; export to onnx") from error
        difference = onnx.difference(plain(model).eval().cpu(), lambda: run(draft, onnx.arrays_of(args, kwargs)), args, kwargs)
        onnx.check(difference, onnx.ROUNDED if written.rounds else onnx.TOLERANCE)
        files = [draft, draft.with_suffix(".bin")]
        file_bytes = sum(file.stat().st_size for file in files)
        for file in reversed(files):
            os.replace(file, path.parent / file.name)
    return replace(written, path=path, file_bytes=file_bytes, max_abs_error=difference[0], max_relative_error=difference[1])


def run(path: Path, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a file for its inputs in order."""
    if not path.is_file():
        raise InputError(f"{path} must be an OpenVINO file; there is no such file")
    compiled = _compiled(path)
    if len(arrays) != len(compiled.inputs):
        raise InputError(f"{path.name} takes {len(compiled.inputs)} inputs, got {len(arrays)}")
    try:
        found = compiled(list(arrays))
    except Exception as error:
        raise InputError(f"{path.name} does not run on these inputs: {first_line(error)}") from error
    return [found[port] for port in compiled.outputs]


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra("openvino", "openvino") from error
    return openvino


def _compiled(path: Path, threads: int | None = None) -> Any:
    openvino = _openvino()
    # left to itself it rounds to bfloat16 on processors that have it, and inputs of integer weights to integers: another
    # function, not the same one faster
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        with quiet():
            core = openvino.Core()
            read = openvino.convert_model if path.suffix == ".onnx" else core.read_model
            return core.compile_model(read(path), "CPU", options)
    except Exception as error:
        raise ExportError(f"openvino cannot compile the model: {first_line(error)}; leave the runtime out") from error
