"""scikit-learn's digits, and small networks."""

import copy
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pared.task import Task


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)[order], torch.from_numpy(bunch.target)[order]


@pytest.fixture
def task(digits: tuple[Tensor, Tensor]) -> Task:
    """400 examples for training, shuffled by the global generator, and 400 for validation."""
    x, y = digits
    data = torch.utils.data.TensorDataset(x[:400], y[:400])
    return Task(
        train=torch.utils.data.DataLoader(data, batch_size=50, shuffle=True),
        val=[(x[400:800], y[400:800])],
    )


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10),
    )


@pytest.fixture
def accuracy(task: Task) -> Callable[[nn.Module], float]:
    def measure(model: nn.Module) -> float:
        assert not model.training
        with torch.no_grad():
            return float(torch.cat([task.scores(task.outputs(model, b), b)[0] for b in task.val]).mean())

    return measure


@pytest.fixture
def twin() -> Callable[[nn.Module], nn.Module]:
    return copy.deepcopy
