"""MNIST from its four IDX files."""

from __future__ import annotations

from pathlib import Path

from pared.errors import InputError
from pared.sources import idx
from pared.sources.contents import Data, Facts


def data(folder: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """Inputs (batch, 1, 28, 28) in [0, 1]; 55,000 for training, 5,000 for validation, 10,000 for the test."""
    if not folder:
        raise InputError("mnist needs the folder that holds the four IDX files: mnist:DIR")
    return idx.read(Path(folder), batch_size, seed, "name the folder that holds the four files of MNIST: mnist:DIR")
