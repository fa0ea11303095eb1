"""MobileNetV3 and a tiny vision transformer of timm, trained on Fashion-MNIST.

    python examples/timm_on_fashion_mnist.py --net mobilenetv3      # 64 pixels, about 10 minutes on one core
    python examples/timm_on_fashion_mnist.py --net vit_tiny         # patches of 4, 192 channels, 3 heads, 6 blocks

Both are the architectures of timm at the size of the images; without weights of ImageNet, which are not needed to tell
one quantizer from another.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pared.sources.torchvision_schemas import declare_missing_schemas

WEIGHTS = Path(__file__).parent / "weights"
EPOCHS = {"mobilenetv3": 4, "vit_tiny": 3}


class Enlarged(nn.Module):
    """A network that sees the images at twice their size, with a border of zeros."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(F.interpolate(F.pad(images, (2, 2, 2, 2)), scale_factor=2.0, mode="nearest"))


def mobilenetv3() -> nn.Module:
    declare_missing_schemas()
    import timm

    return Enlarged(timm.create_model("mobilenetv3_small_100", in_chans=1, num_classes=10))


def vit_tiny() -> nn.Module:
    declare_missing_schemas()
    import timm

    sizes = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "depth": 6}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


NETS = {"mobilenetv3": mobilenetv3, "vit_tiny": vit_tiny}


def _trained(name: str) -> nn.Module:
    weights = WEIGHTS / f"{name}-seed0.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; run: python examples/timm_on_fashion_mnist.py --net {name}")
    net = NETS[name]()
    net.load_state_dict(load_file(weights))
    return net


def mobilenetv3_trained() -> nn.Module:
    return _trained("mobilenetv3")


def vit_tiny_trained() -> nn.Module:
    return _trained("vit_tiny")


def main() -> None:
    from train_fashion_mnist import accuracy, train

    from pared import sources

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(NETS), required=True)
    name = parser.parse_args().net
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = sources.data("fashion-mnist", batch_size=128, seed=0).task
    net = NETS[name]()
    train(net, task.train, task.val, EPOCHS[name], mirror=True)
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), WEIGHTS / f"{name}-seed0.safetensors")
    print(f"test {accuracy(net, task.test):.2f} %")


if __name__ == "__main__":
    main()
