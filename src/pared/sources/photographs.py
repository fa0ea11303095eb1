"""Real photographs that scikit-image, scikit-learn and foolbox ship, as crops and mirror images of them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch

from pared.errors import InputError, MissingExtra
from pared.sources.contents import Data, Facts, ImageFormat, task_of
from pared.sources.images import Normalize, centred, cropped, opened
from pared.sources.loader import ArrayLoader, split_groups

N_VIEWS = 8
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "foolbox": "data"}
# Drawings, diagrams, printed text, silhouettes and second views of one scene are left out.
_SKIMAGE = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


def data(which: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """Inputs at the model's size, normalised as the model wants them; eight views of each photograph.

    The first view is the middle of the photograph, the others are random parts of it. `photographs`
    has no labels. `photographs:labelled` is foolbox's twenty, with their ImageNet classes.
    """
    if which not in ("", "labelled"):
        raise InputError(f"photographs may be followed by :labelled only, got {which!r}")
    format = facts.image or ImageFormat()
    if format.channels != 3:
        raise InputError(f"photographs have 3 channels, the model wants {format.channels}")
    files = _labelled() if which else [*_labelled(), *_unlabelled()]
    views, groups = [], []
    for index, (path, _) in enumerate(files):
        picture = opened(path, format.channels)
        random = np.random.RandomState(index)  # its stream is frozen, so everybody sees the same crops
        views += [centred(picture, format), *(cropped(picture, format, random) for _ in range(N_VIEWS - 1))]
        groups += [index] * N_VIEWS
    x, group_of = torch.from_numpy(np.stack(views)), np.array(groups)
    y = torch.tensor([files[index][1] for index in groups]) if which else None
    parts = vars(split_groups(group_of, val=0.25, test=0.25))
    made = {
        part: ArrayLoader(
            x[torch.from_numpy(chosen)],
            None if y is None else y[torch.from_numpy(chosen)],
            batch_size or 16,
            shuffle=part == "train",
            generator=torch.Generator().manual_seed(seed),
            transform=Normalize(format),
            groups=group_of[chosen],
        )
        for part, chosen in parts.items()
    }
    counts = ", ".join(f"{len(chosen) // N_VIEWS} {part}" for part, chosen in parts.items())
    notes = (
        f"{len(files)} photographs ({counts}), {N_VIEWS} views of each, split by photograph",
        "ImageNet labels" if which else "no labels: the measure is agreement with the original",
        f"pictures as {format}" + ("" if facts.image else " (the model does not say; this is the ImageNet habit)"),
    )
    return Data(task_of(made), notes)


def _labelled() -> list[tuple[Path, int]]:
    """foolbox names its files imagenet_INDEX_CLASS.jpg."""
    named = {path: re.fullmatch(r"imagenet_\d+_(\d+)\.jpg", path.name) for path in sorted(_folder("foolbox").iterdir())}
    return [(path, int(match[1])) for path, match in named.items() if match]


def _unlabelled() -> list[tuple[Path, int]]:
    shipped = [_folder("skimage") / name for name in _SKIMAGE]
    return [(path, -1) for path in [*shipped, *sorted(_folder("sklearn").glob("*.jpg"))]]


def _folder(package: str) -> Path:
    """Where a package keeps its pictures, found without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingExtra({"skimage": "scikit-image", "sklearn": "scikit-learn"}.get(package, package), "samples")
    return Path(found.submodule_search_locations[0]) / _FOLDERS[package]
