"""Fashion-MNIST from its four IDX files."""

from __future__ import annotations

from pathlib import Path

from pared.sources import idx
from pared.sources.contents import Data, Facts

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_ADVICE = "install Debian's package dataset-fashion-mnist, or name the folder that holds the four files: fashion-mnist:DIR"


def data(folder: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """Inputs (batch, 1, 28, 28) in [0, 1]; 55,000 for training, 5,000 for validation, 10,000 for the test."""
    return idx.read(Path(folder) if folder else DEFAULT_FOLDER, batch_size, seed, _ADVICE)
