"""Four small networks, trained on scikit-learn's digits: perceptron, residual convnet, attention, recurrent net."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.errors import InputError
from pared.sources import digits
from pared.sources.contents import Facts
from pared.statistics import Statistics
from pared.task import Task

NETS = ("perceptron", "convolution", "attention", "recurrent")

_EPOCHS = 15


@dataclass(frozen=True, eq=False)
class Net:
    """A trained model in eval mode, its task, and 64 validation examples. All tests share it: copy before changing."""

    name: str
    model: nn.Module
    task: Task
    inputs: Tensor

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def statistics(self) -> Statistics:
        """The curvature of all tensors, observed once; a new object at every call."""
        observed = _observed(self.name)
        curvatures = {path: c for path in observed if (c := observed.curvature(path)) is not None}
        return Statistics(curvatures, observed.positions)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class Convolution(nn.Module):
    """A stem, a residual block with batch-norm, a strided and a grouped convolution, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.down = nn.Sequential(nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.classifier = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.second(self.first(x)))
        return self.classifier(F.relu(self.grouped(self.down(x))).mean((2, 3)))


class Attention(nn.Module):
    """Image rows as tokens: torch's own attention, then one with a fused projection of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.zeros(1, 8, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1)) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.classifier(x.mean(1))


class Recurrent(nn.Module):
    """Image rows as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.lstm(x.squeeze(1))[0][:, -1])


_CLASSES: dict[str, type[nn.Module]] = dict(zip(NETS, (Perceptron, Convolution, Attention, Recurrent), strict=True))


@cache
def net(name: str) -> Net:
    """One of the networks `NETS`, trained in about a second; the same at every call."""
    if name not in _CLASSES:
        raise InputError(f"a net of the conformance suite must be one of {', '.join(NETS)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = digits.data("", Facts(), 64, 0).task
        model = _CLASSES[name]().train()
        _train(model, task)
    inputs = torch.cat([x for x, _ in task.val])[:64]
    return Net(name, model.eval(), task, inputs)


def new(name: str) -> nn.Module:
    """An untrained network of the same class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _CLASSES[name]().eval()


def _train(model: nn.Module, task: Task) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    n_steps = _EPOCHS * sum(1 for _ in task.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, n_steps)
    for _ in range(_EPOCHS):
        for inputs, targets in task.train:
            F.cross_entropy(model(inputs), targets).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()


@cache
def _observed(name: str) -> Statistics:
    from pared.budget.calibrate import gather

    trained = net(name)
    return gather(trained.model, trained.task)
