"""scikit-learn's bundled digits: 1,797 images of 8 × 8 pixels, ten classes."""

from __future__ import annotations

import torch

from pared.errors import InputError
from pared.sources.contents import Data, Facts, task_of
from pared.sources.loader import loaders, split


def data(name: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """Inputs (batch, 1, 8, 8) in [0, 1]; 1,257 for training, 180 for validation, 360 for the test."""
    from sklearn.datasets import load_digits

    if name:
        raise InputError(f"digits takes nothing after its name, got {name!r}")
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    parts = split(len(x), n_val=180, n_test=360)
    return Data(task_of(loaders(x, y, vars(parts), batch_size or 64, seed)))
