"""Let timm and transformers import beside a torchvision that was built for another torch. Not a source itself."""

from __future__ import annotations

import importlib.util

import torch

_declared: list[torch.library.Library] = []


def declare_missing_schemas() -> None:
    """Declare the two operators that torchvision's import wants, where its compiled half is missing.

    torchvision registers fake versions of them when it is imported, which fails unless their schemas are known.
    Classifiers never call them.
    """
    if _declared or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # a library that is collected takes its schemas with it
