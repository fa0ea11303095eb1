"""A small residual network for Fashion-MNIST: 16, 32 and 64 channels, 78,000 parameters.

    python examples/small_resnet.py      # trains it: about 92.5 % on the test images, some minutes on one core

Three stages of one block each, batch norm after every convolution, one linear layer at the end.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "small_resnet-seed0.safetensors"
EPOCHS = 10


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride > 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    def __init__(self, width: int = 16, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(F.relu(self.bn(self.stem(images)))).mean((2, 3)))


def small_resnet() -> nn.Module:
    return SmallResNet()


def small_resnet_trained() -> nn.Module:
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is missing; run: python examples/small_resnet.py")
    net = small_resnet()
    net.load_state_dict(load_file(WEIGHTS))
    return net


def main() -> None:
    from train_fashion_mnist import accuracy, train

    from pared import sources

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = sources.data("fashion-mnist", batch_size=256, seed=0).task
    net = small_resnet()
    train(net, task.train, task.val, EPOCHS, mirror=True)
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), WEIGHTS)
    print(f"test {accuracy(net, task.test):.2f} %, saved to {WEIGHTS}")


if __name__ == "__main__":
    main()
