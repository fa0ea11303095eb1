"""One convolution or linear layer as an ONNX file, written directly: a hundred of them take no longer than one export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from pared.errors import ExportError, MissingExtra

OPSET = 18


def write(layer: nn.Module, x: Tensor, path: Path) -> None:
    """Write the layer for inputs of the shape of x.

    Raises:
        ExportError: it is no convolution and no linear layer.
        MissingExtra: onnx is not installed.
    """
    try:
        import onnx
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise MissingExtra("onnx", "onnx") from error
    tensors: dict[str, np.ndarray] = {name: value.detach().cpu().numpy() for name, value in layer.named_parameters()}
    if isinstance(layer, nn.Linear):
        tensors["weight"] = np.ascontiguousarray(tensors["weight"].T)
        nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"])]
        if "bias" in tensors:
            nodes = [helper.make_node("MatMul", ["x", "weight"], ["z"]), helper.make_node("Add", ["z", "bias"], ["y"])]
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not isinstance(layer.padding, str):
        sizes: dict[str, Any] = {
            "kernel_shape": layer.kernel_size, "strides": layer.stride, "dilations": layer.dilation,
            "pads": [*layer.padding, *layer.padding], "group": layer.groups,
        }  # fmt: skip
        nodes = [helper.make_node("Conv", ["x", *tensors], ["y"], **sizes)]
    else:
        raise ExportError(f"a layer must be a convolution with padding in numbers or linear, got {layer}")
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)
