"""The runtime "onnxruntime": an exported model on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.errors import ExportError, InputError, MissingExtra
from pared.runtimes.quiet import first_line

if TYPE_CHECKING:
    import numpy as np


def session(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    threads: int | None = None,
    call: Callable[[nn.Module], Any] | None = None,
) -> Callable[[], Any]:
    """The model exported and opened with so many threads."""
    if call is not None:
        raise ExportError("onnxruntime calls the model by itself and cannot follow Task(forward=...); leave it out")
    from pared.runtimes import onnx

    with tempfile.TemporaryDirectory(prefix="pared-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.export(model, path, args, kwargs)
        return opened(path, args, kwargs, threads)


def opened(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], threads: int | None = None) -> Callable[[], Any]:
    """A file as a function that runs it once on these inputs."""
    network = _open(path, threads)
    feeds = _feeds(network, args, kwargs)
    return lambda: network.run(None, feeds)


def run(path: Path, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a file for its inputs in order."""
    import numpy as np

    if not path.is_file():
        raise InputError(f"{path} must be an ONNX file; there is no such file")
    network = _open(path)
    wanted = network.get_inputs()
    if len(arrays) != len(wanted):
        names = ", ".join(f"{item.name} {item.shape}" for item in wanted)
        raise InputError(f"{path.name} takes {len(wanted)} inputs ({names}), got {len(arrays)}")
    feeds = {item.name: np.asarray(array) for item, array in zip(wanted, arrays, strict=True)}
    try:
        return network.run(None, feeds)
    except Exception as error:
        raise InputError(f"{path.name} does not run on these inputs: {first_line(error)}") from error


def outputs_of(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[np.ndarray]:
    """The outputs of a file for the arguments of the model that it was exported from."""
    network = _open(path)
    try:
        return network.run(None, _feeds(network, args, kwargs))
    except Exception as error:
        raise ExportError(f"the exported model does not run: {first_line(error)}") from error


def _open(path: Path, threads: int | None = None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # left to itself it rounds what is multiplied with groups of integer weights to integers, too: another function
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot open {path.name}: {first_line(error)}") from error


def _feeds(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors by the names of the file's inputs: keyword arguments by name, all others in order."""
    wanted = [item.name for item in network.get_inputs()]
    named = {name: _array(value) for name, value in kwargs.items() if isinstance(value, Tensor) and name in wanted}
    rest = [kwargs[name] for name in kwargs if name not in named]
    leaves = [_array(leaf) for leaf in pytree.tree_leaves((args, rest)) if isinstance(leaf, Tensor)]
    unnamed = [name for name in wanted if name not in named]
    if len(leaves) != len(unnamed):
        raise ExportError(
            f"the exported model must take the {len(leaves) + len(named)} inputs given, it takes {', '.join(wanted)}; "
            "leave inputs that the model does not use out of the example"
        )
    return named | dict(zip(unnamed, leaves, strict=True))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()
