"""The two nets of LeCun et al. 1998 in the shapes that the compression papers use (Caffe's, with ReLU).

    pared compress examples/lenet.py:lenet_5_trained --data fashion-mnist --size 40x --out run

`train_fashion_mnist.py` writes the weights that the functions `…_trained` read.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).parent / "weights"


def lenet_300_100() -> nn.Sequential:
    """Fully connected, 784-300-100-10: 266,610 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet_5() -> nn.Sequential:
    """Two convolutions (20 and 50 filters of 5 × 5), 500 hidden units: 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, kernel_size=5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, kernel_size=5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def lenet_300_100_trained() -> nn.Module:
    return _trained(lenet_300_100(), "lenet_300_100")


def lenet_5_trained() -> nn.Module:
    return _trained(lenet_5(), "lenet_5")


def _trained(net: nn.Module, name: str) -> nn.Module:
    path = WEIGHTS / f"{name}-seed0.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run: python examples/train_fashion_mnist.py --net {name}")
    net.load_state_dict(load_file(path))
    return net
