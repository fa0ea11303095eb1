"""Least squares on a layer's outputs, where the outputs are not simply W x + b."""

import pytest
import torch
from torch import nn

import pared
from pared.budget.reconstruct import reconstruct_, whole_batch
from pared.graph import trace
from pared.site import duplicate


class Addmm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Residual(Addmm):
    """What is added differs from example to example."""

    def forward(self, x):
        return torch.addmm(x[:, :6], x, self.weight)


class Half(Addmm):
    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight, beta=0.5)


class Joined(nn.Module):
    """A bias made of two parts."""

    def __init__(self):
        super().__init__()
        self.weight, self.first = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.randn(3))
        self.register_buffer("rest", torch.ones(3))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, torch.cat([self.first, self.rest]))


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.randn(9))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias[3:])


def images(layer):
    return nn.Sequential(nn.Unflatten(1, (3, 2, 2)), layer, nn.Flatten())


CASES = {
    "linear": lambda: nn.Linear(12, 6),
    "convolution": lambda: images(nn.Conv2d(3, 5, 2, padding=1)),
    "grouped": lambda: images(nn.Conv2d(3, 6, 2, groups=3)),
    "transposed": lambda: images(nn.ConvTranspose2d(3, 4, 2, stride=2)),
    "transposed, overlapping": lambda: images(nn.ConvTranspose2d(3, 4, 3, stride=2, bias=False)),
    "transposed, 1 x 1": lambda: images(nn.ConvTranspose2d(3, 4, 1)),
    "addmm": Addmm,
    "addmm of a residual": Residual,
    "half of a bias": Half,
    "joined bias": Joined,
    "sliced bias": Sliced,
}


def fitted(name, noise):
    torch.manual_seed(0)
    model = CASES[name]().eval()
    x = torch.randn(64, 12) + 1  # inputs have a mean
    task = pared.Task([(x, x)], [(x, x)], loss=lambda out, b: out.mean(), metric=lambda out, b: out.flatten(1).mean(1))
    program, moved = trace(model, (x,)), duplicate(model)
    with torch.no_grad():
        next(moved.parameters()).add_(noise * torch.randn(next(moved.parameters()).shape))
        reconstruct_(moved, model, program, program, lambda node: slice(None), task, whole_batch(task))
    return model, moved, x


@pytest.mark.parametrize("name", CASES)
def test_what_is_right_already_stays(name):
    model, moved, _ = fitted(name, 0.0)
    for (path, value), other in zip(moved.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4, msg=path)
        assert value.requires_grad


@pytest.mark.parametrize("name", ["linear", "convolution", "transposed, 1 x 1", "addmm", "joined bias", "sliced bias"])
def test_a_weight_that_is_off_comes_back(name):
    model, moved, x = fitted(name, 0.3)
    assert float((moved(x) - model(x)).detach().square().mean()) < 1e-3


def test_flags_come_back_where_the_network_fails():
    model = nn.Linear(12, 6)
    x = torch.randn(64, 12)
    program = trace(model, (x,))

    def failing(node):
        raise KeyError(node)

    task = pared.Task([(x, x)], [(x, x)], loss=lambda out, b: out.mean(), metric=lambda out, b: out.mean(1))
    moved = duplicate(model)
    with pytest.raises(KeyError):
        reconstruct_(moved, model, program, program, failing, task, (x, x))
    assert all(parameter.requires_grad for parameter in moved.parameters())
