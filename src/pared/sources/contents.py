"""What a source gives: data ready to be used, and what is known of a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pared.sources.loader import ArrayLoader
from pared.task import Task

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Data:
    """A task, and what the reader should know of its data, one line each."""

    task: Task
    notes: tuple[str, ...] = ()


def task_of(parts: Mapping[str, ArrayLoader]) -> Task:
    """The task of classifying the examples of `train`, `val` and, where there is one, `test`."""
    return Task(train=parts["train"], val=parts["val"], test=parts.get("test"))


@dataclass(frozen=True)
class ImageFormat:
    """How a model wants its images: size in pixels, normalisation of values in [0, 1] per channel."""

    channels: int = 3
    height: int = 224
    width: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std))
        return f"{self.height} × {self.width} × {self.channels}, mean ({mean}), std ({std})"


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its weights.

    Args:
        spec: the name it was asked for.
        image: how it wants its images, None where nobody says.
        tokenizer: name or folder of its tokenizer, None for a model that reads no text.
        example: positional arguments of one call, batch first, None where they are not known.
        example_kwargs: keyword arguments of that call.
        task: the task that came with it.
    """

    spec: str = ""
    image: ImageFormat | None = None
    tokenizer: str | None = None
    example: tuple[Any, ...] | None = None
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    task: Task | None = None


def facts_of(model: nn.Module, spec: str = "") -> Facts:
    """What the module itself tells: timm's `pretrained_cfg`, transformers' `config`."""
    image = _timm_format(getattr(model, "pretrained_cfg", None)) or _transformers_format(getattr(model, "config", None))
    tokenizer = getattr(model, "name_or_path", None)
    return Facts(spec, image=image, tokenizer=tokenizer if isinstance(tokenizer, str) and tokenizer else None)


def _timm_format(settings: Any) -> ImageFormat | None:
    if not isinstance(settings, dict) or "input_size" not in settings:
        return None
    channels, height, width = settings["input_size"]
    default = ImageFormat()
    return ImageFormat(
        channels,
        height,
        width,
        _per_channel(settings.get("mean", default.mean), channels),
        _per_channel(settings.get("std", default.std), channels),
        settings.get("interpolation", default.interpolation),
        settings.get("crop_pct", default.crop_pct) or default.crop_pct,
    )


def _transformers_format(settings: Any) -> ImageFormat | None:
    size = getattr(settings, "image_size", None)
    if not isinstance(size, int | tuple | list):
        return None
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(settings, "num_channels", 3)
    default = ImageFormat()
    return ImageFormat(
        channels, height, width, _per_channel(default.mean, channels), _per_channel(default.std, channels)
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
