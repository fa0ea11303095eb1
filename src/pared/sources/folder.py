"""A folder of pictures: one subfolder per class, or no labels; split beforehand into train, val and test, or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pared.errors import InputError
from pared.sources.contents import Data, Facts, ImageFormat, task_of
from pared.sources.images import SUFFIXES, CropAndFlip, Normalize, centred, opened
from pared.sources.loader import ArrayLoader, split_groups

MAX_BYTES = 8_000_000_000
_PART_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def data(folder: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """Inputs at the model's size, (batch, channels, height, width), normalised as the model wants them.

    A class folder whose name is a number is that class; otherwise classes are numbered in the order of their names.
    Training images are cropped and mirrored at random, the others are the middle of the picture.
    """
    root = Path(folder)
    if not folder or not root.is_dir():
        raise InputError(f"folder:DIR must name a folder of pictures, found no {folder!r}; check the path")
    format = facts.image or ImageFormat()
    notes = [f"pictures as {format}" + ("" if facts.image else " (the model does not say; this is the ImageNet habit)")]

    found = {part: root / name for part, names in _PART_NAMES.items() for name in names if (root / name).is_dir()}
    if "train" in found:
        listed = {part: _listed(path) for part, path in found.items()}
    else:
        listed = {"train": _listed(root)}
    classes = _classes({name for files in listed.values() for _, name in files})
    if "val" not in listed:
        files = listed["train"]
        given_test = "test" in listed
        if len(files) < 3:
            raise InputError(f"{folder} must hold at least 3 pictures to split, found {len(files)}")
        cut = split_groups(np.arange(len(files)), val=0.15, test=0.15)
        listed["val"] = [files[index] for index in cut.val]
        kept = np.union1d(cut.train, cut.test) if given_test else cut.train
        listed["train"] = [files[index] for index in kept]
        if not given_test:
            listed["test"] = [files[index] for index in cut.test]
        notes.append("split by photograph at random")
    elif "test" not in listed:
        notes.append("there is no folder test: final figures are those of val")
    _check_memory(sum(map(len, listed.values())), format, folder)
    counts = ", ".join(f"{len(files)} {part}" for part, files in listed.items())
    notes.append(f"{sum(map(len, listed.values()))} photographs ({counts}), {_labels_in_words(classes)}")

    made = {}
    for part, files in listed.items():
        pictures = [centred(opened(path, format.channels), format, margin=part == "train") for path, _ in files]
        made[part] = ArrayLoader(
            torch.from_numpy(np.stack(pictures)),
            _targets(files, classes),
            batch_size or 32,
            shuffle=part == "train",
            generator=torch.Generator().manual_seed(seed),
            augment=CropAndFlip(format.height, format.width) if part == "train" else None,
            transform=Normalize(format),
            groups=np.arange(len(files)),
        )
    return Data(task_of(made), tuple(notes))


def _listed(folder: Path) -> list[tuple[Path, str | None]]:
    """Pictures and the names of their class folders, None for pictures that lie in the folder itself."""
    loose = [(path, None) for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    classed = [
        (path, inner.name)
        for inner in sorted(folder.iterdir())
        if inner.is_dir()
        for path in sorted(inner.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if loose and classed:
        raise InputError(
            f"{folder} must hold either pictures or class folders, found {len(loose)} pictures beside "
            f"{len({name for _, name in classed})} folders; move the pictures into folders, or the folders away"
        )
    if not loose and not classed:
        raise InputError(f"{folder} must hold pictures ({', '.join(sorted(SUFFIXES))}), found none")
    return [*loose, *classed]


def _classes(names: set[str | None]) -> dict[str, int]:
    known = {name for name in names if name is not None}
    if known and None in names:
        raise InputError("either all parts must have class folders or none; give every part its class folders")
    if known and all(name.isdecimal() for name in known):
        return {name: int(name) for name in sorted(known, key=int)}
    return {name: index for index, name in enumerate(sorted(known))}


def _targets(files: list[tuple[Path, str | None]], classes: dict[str, int]) -> Tensor | None:
    if not classes:
        return None
    return torch.tensor([classes[name] for _, name in files if name is not None])


def _labels_in_words(classes: dict[str, int]) -> str:
    if not classes:
        return "no labels: the measure is agreement with the original"
    return f"{len(classes)} classes, numbered by {'their names' if _numbered(classes) else 'the order of their names'}"


def _numbered(classes: dict[str, int]) -> bool:
    return all(name.isdecimal() for name in classes)


def _check_memory(n_images: int, format: ImageFormat, folder: str) -> None:
    n_bytes = round(n_images * format.channels * format.height * format.width / format.crop_pct**2)
    if n_bytes > MAX_BYTES:
        raise InputError(
            f"folder: keeps its pictures in memory, at most {MAX_BYTES / 1e9:.0f} GB, {n_images} pictures of {folder} "
            f"need {n_bytes / 1e9:.0f} GB; write FILE.py:FUNCTION that returns DataLoaders instead"
        )
