"""Arrays of a NumPy archive: `x` and `y`, or `x_train`, `y_train`, `x_val`, `y_val`, `x_test`, `y_test`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pared.errors import InputError
from pared.sources.contents import Data, Facts, task_of
from pared.sources.loader import ArrayLoader, scaled, split

_PARTS = ("train", "val", "test")


def data(file: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """Bytes become values in [0, 1], other integers indices, the rest float32. Missing parts are split from train."""
    arrays = _read(Path(file))
    notes = []
    if "x_train" in arrays:
        parts = {name: _pair(arrays, file, f"x_{name}", f"y_{name}") for name in _PARTS if f"x_{name}" in arrays}
    elif "x" in arrays:
        parts = {"train": _pair(arrays, file, "x", "y")}
    else:
        raise InputError(f"{file} must hold an array x or x_train, it holds {', '.join(sorted(arrays)) or 'nothing'}")
    missing = [name for name in ("val", "test") if name not in parts and (name == "val" or "x" in arrays)]
    if missing:
        n_examples = len(parts["train"][0])
        tenth = max(1, n_examples // 10)
        cut = split(n_examples, tenth if "val" in missing else 0, 2 * tenth if "test" in missing else 0)
        whole_x, whole_y = parts["train"]
        for name in ("train", *missing):
            index = torch.from_numpy(getattr(cut, name))
            parts[name] = (whole_x[index], None if whole_y is None else whole_y[index])
        notes.append(f"{file} has no part of its own for {' and '.join(missing)}: split from the rest at random")
    if len({y is None for _, y in parts.values()}) > 1:
        raise InputError(f"{file} must have labels for all of its parts or for none")
    if parts["train"][1] is None:
        notes.append(f"{file} has no labels: the measure is agreement with the original")
    made = {
        name: ArrayLoader(
            x,
            y,
            batch_size or 64,
            shuffle=name == "train",
            generator=torch.Generator().manual_seed(seed),
            transform=scaled if x.dtype == torch.uint8 else None,
        )
        for name, (x, y) in parts.items()
    }
    return Data(task_of(made), tuple(notes))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"npz:FILE must name a file, found no {str(path)!r}; check the path")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} must be an archive of plain arrays: {reason}; write it with numpy.savez") from error


def _pair(arrays: dict[str, np.ndarray], file: str, x_name: str, y_name: str) -> tuple[Tensor, Tensor | None]:
    x, y = arrays[x_name], arrays.get(y_name)
    if x.ndim < 2 or x.dtype.kind not in "fiub":
        raise InputError(f"{x_name} must be numbers of shape (examples, …), got {x.dtype} {x.shape} in {file}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InputError(f"{x_name} must be finite, found NaN or infinity in {file}; clean the data")
    if x.dtype == np.uint8:
        inputs = torch.from_numpy(x)
    else:
        inputs = torch.from_numpy(x.astype(np.int64 if x.dtype.kind in "iu" else np.float32))
    if y is None:
        return inputs, None
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise InputError(
            f"{y_name} must be one class index per example, got {y.dtype} {y.shape} in {file}; "
            "for another kind of target write FILE.py:FUNCTION that returns a pared.Task"
        )
    if len(x) != len(y):
        raise InputError(f"{x_name} and {y_name} must have one length, got {len(x)} and {len(y)} in {file}")
    return inputs, torch.from_numpy(y.astype(np.int64))
