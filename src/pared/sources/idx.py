"""The four IDX files of MNIST, and of the data sets that copy its form, plain or gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from pared.errors import InputError
from pared.sources.contents import Data
from pared.sources.loader import ArrayLoader, scaled, split
from pared.task import Task

N_VAL = 5_000
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read(folder: Path, batch_size: int | None, seed: int, advice: str) -> Data:
    """Inputs (batch, 1, height, width) in [0, 1]; 5,000 of the training images are for validation.

    Raises:
        InputError: a file is missing, which is said with `advice`, or is not as it must be.
    """
    arrays = {part: _part(folder, *names, advice) for part, names in _FILES.items()}
    x, y = arrays["train"]
    parts = split(len(x), N_VAL)
    size = batch_size or 128
    generator = torch.Generator().manual_seed(seed)
    train, val = torch.from_numpy(parts.train), torch.from_numpy(parts.val)
    task = Task(
        train=ArrayLoader(x[train], y[train], size, shuffle=True, generator=generator, transform=scaled),
        val=ArrayLoader(x[val], y[val], size, transform=scaled),
        test=ArrayLoader(*arrays["test"], size, transform=scaled),
    )
    return Data(task)


def _part(folder: Path, images: str, labels: str, advice: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (read_idx(_found(folder, name, advice)) for name in (images, labels))
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
        raise InputError(
            f"{images} must hold as many images as {labels} holds labels, "
            f"found shapes {x.shape} and {y.shape} in {folder}"
        )
    return torch.from_numpy(x).unsqueeze(1), torch.from_numpy(y.astype(np.int64))


def _found(folder: Path, name: str, advice: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise InputError(f"the file {name}[.gz] must be in {folder}, which has none of it; {advice}")


def read_idx(path: Path) -> np.ndarray:
    """Unsigned bytes of an IDX file (the format of the MNIST files: big-endian, magic 0 0 8 ndim, then the shape)."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} must be a whole gzip file: {error}; get it again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise InputError(
            f"{path} must be an IDX file of unsigned bytes, which begins with 00 00 08, got {content[:3].hex(' ')}"
        )
    n_axes = content[3]
    header = 4 + 4 * n_axes
    if len(content) < header:
        raise InputError(f"{path} must have a header of {header} bytes, it has {len(content)} bytes; get it again")
    shape = struct.unpack(f">{n_axes}I", content[4:header])
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise InputError(f"{path} must have {expected} bytes for shape {shape}, it has {len(content)}; get it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
