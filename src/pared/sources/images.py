"""Pictures as arrays: reading, resizing, cropping, normalising. Not a source itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pared.errors import InputError, MissingExtra
from pared.sources.contents import ImageFormat
from pared.sources.loader import Inputs

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def opened(path: Path, channels: int) -> Image:
    """The first picture of a file, with 1 (grey) or 3 (red, green, blue) channels."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise MissingExtra("pillow", "images") from error
    if channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, the model wants {channels}; write FILE.py:FUNCTION instead")
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I;16"):
                upright = upright.point(lambda value: value / 257).convert("L")
            return upright.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} must be a picture: {error}; remove it or put a whole one in its place") from error


def centred(picture: Image, format: ImageFormat, margin: bool = False) -> np.ndarray:
    """The middle of the picture at the model's size, (channels, height, width) bytes.

    The shorter side is resized to size / crop_pct as in the evaluation of the model's authors; with `margin` what is
    then cut off is kept, so that crops can be drawn from it.
    """
    tall, wide = (round(side / format.crop_pct) for side in (format.height, format.width))
    scale = max(tall / picture.height, wide / picture.width)
    size = (max(wide, round(picture.width * scale)), max(tall, round(picture.height * scale)))
    resized = picture.resize(size, _filter(format.interpolation))
    height, width = (tall, wide) if margin else (format.height, format.width)
    top, left = (resized.height - height) // 2, (resized.width - width) // 2
    return _bytes(resized.crop((left, top, left + width, top + height)))


def cropped(picture: Image, format: ImageFormat, random: np.random.RandomState) -> np.ndarray:
    """A random part of the picture, between a fifth of its area and all of it, mirrored half of the time."""
    share = random.uniform(0.2, 1.0) ** 0.5
    shape = format.width / format.height
    width = min(picture.width, picture.height * shape) * share
    height = width / shape
    left, top = random.uniform(0, picture.width - width), random.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    pixels = _bytes(picture.resize((format.width, format.height), _filter(format.interpolation), box=box))
    return pixels[..., ::-1].copy() if random.uniform() < 0.5 else pixels


class Normalize:
    """Bytes (batch, channels, height, width) as the model wants them: (value / 255 − mean) / std, float32."""

    def __init__(self, format: ImageFormat) -> None:
        self.mean = 255 * torch.tensor(format.mean).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(format.std).view(1, -1, 1, 1)

    def __call__(self, pixels: Inputs) -> Tensor:
        if isinstance(pixels, dict):
            raise InputError("pixels must be one tensor, got a dict")
        return (pixels.float() - self.mean) / self.std


class CropAndFlip:
    """A window of the given size at a random place of each image, mirrored half of the time.

    Images are (batch, channels, height, width).
    """

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width

    def __call__(self, pixels: Inputs, generator: torch.Generator) -> Tensor:
        if isinstance(pixels, dict):
            raise InputError("pixels must be one tensor, got a dict")
        n_images, _, tall, wide = pixels.shape
        tops = torch.randint(tall - self.height + 1, (n_images,), generator=generator).tolist()
        lefts = torch.randint(wide - self.width + 1, (n_images,), generator=generator).tolist()
        flips = torch.randint(2, (n_images,), generator=generator).tolist()
        windows = []
        for image, top, left, flip in zip(pixels, tops, lefts, flips, strict=True):
            window = image[:, top : top + self.height, left : left + self.width]
            windows.append(window.flip(-1) if flip else window)
        return torch.stack(windows)


def _bytes(picture: Image) -> np.ndarray:
    pixels = np.asarray(picture, np.uint8)
    return pixels[None].copy() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()


def _filter(name: str) -> int:
    from PIL import Image

    known = {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }
    return known.get(name, Image.Resampling.BICUBIC)  # timm writes "random" where training drew one
