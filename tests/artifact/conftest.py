"""Networks of many kinds, small, and what the tests of the file do with them again and again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pared import factor, prune, quantize
from pared.artifact.write import to_bytes
from pared.place import apply
from pared.record import Record, attach_, record_of
from pared.technique import Chain, Technique


class SamePadded(nn.Conv2d):
    """Pads for itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Convolutional(nn.Module):
    """Batch norm, a residual, a padded subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SamePadded(3, 8, 2)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.body(x).relu_()
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """Tied embedding, LSTM, state passed out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x, (h, _) = self.lstm(self.embedding(ids))
        return {"logits": self.head(x), "state": h}


class Attentive(nn.Module):
    """Fused attention, a bare parameter, buffers that are not saved, constants of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.register_buffer("shift", torch.linspace(-1, 1, 16), persistent=False)
        self.norm = nn.LayerNorm(16)
        self.unused = nn.Linear(16, 3)
        self.head = nn.ModuleDict({"out": nn.Linear(16, 4)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.position + self.shift
        y, weights = self.attention(x, x, x)
        y = self.norm(x + y) * torch.tensor([0.5, 1.5]).repeat(8)
        return self.head["out"](y[:, 0]) * self.scale[0], weights


class Odd(nn.Module):
    """Every type that a file can hold, an empty tensor, a scalar, a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.wide = nn.Parameter(torch.randn(6, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(6).half())
        self.brain = nn.Parameter(torch.randn(6, 6).bfloat16())
        self.wave = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.tensor(0.25))
        for name in ("float8_e4m3fn", "float8_e5m2"):
            self.register_buffer(name, torch.randn(7).to(getattr(torch, name)))
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
            self.register_buffer(name, torch.arange(5).to(getattr(torch, name)))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("strange", torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.twice(x).relu()) + self.narrow.float() + self.wide.float() + self.wave.real
        return (x.bfloat16() @ self.brain).float() * self.scalar


class Upsampling(nn.Module):
    """Transposed convolutions, whose channels are on another axis, one of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, 2, 1)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2)
        self.again = nn.ConvTranspose2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.up(self.down(x)).relu())


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "convolutional": (Convolutional, lambda: (torch.randn(3, 3, 7, 7),)),
    "recurrent": (Recurrent, lambda: (torch.randint(0, 30, (3, 6)),)),
    "attentive": (Attentive, lambda: (torch.randn(3, 5, 16),)),
    "upsampling": (Upsampling, lambda: (torch.randn(3, 3, 8, 8),)),
    "odd": (Odd, lambda: (torch.randn(3, 6),)),
}

TECHNIQUES: dict[str, list[Technique]] = {
    "integer": [quantize.Integer(bits=6)],
    "codebook": [quantize.Codebook(bits=3)],
    "deep": [Chain(prune.Magnitude(sparsity=0.7), quantize.Codebook(bits=3)), quantize.Integer(bits=8)],
    "low rank": [Chain(factor.LowRank(rank=2), quantize.Integer(bits=6))],
    "low rank, then all": [factor.LowRank(rank=2), quantize.Integer(bits=5, group=8)],
}


@dataclass(frozen=True)
class Case:
    """A network in eval mode, coded or not, an example, its class, and its file."""

    model: nn.Module
    args: tuple[Any, ...]
    cls: Callable[[], nn.Module]
    file: bytes


@functools.cache
def case(name: str, techniques: str | None) -> Case:
    torch.manual_seed(0)
    cls, example = NETS[name]
    model, args = cls().eval(), example()
    if techniques is not None:
        model = apply(model, None, TECHNIQUES[techniques])
    attach_(model, Record(record_of(model).edits if techniques else [], (args, {})))
    return Case(model, args, cls, to_bytes(model, record_of(model)))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Case]:
    """A network by name, coded as asked; its file lies at `tmp_path / "a.pared"`."""

    def made(name: str, techniques: str | None = None) -> Case:
        found = case(name, techniques)
        (tmp_path / "a.pared").write_bytes(found.file)
        return dataclasses.replace(found, model=copy.deepcopy(found.model))

    return made


@pytest.fixture(scope="session")
def fuzz() -> Any:
    """benchmarks/fuzz.py, whose mutations the tests share."""
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("pared_benchmarks_fuzz", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    """Whether two outputs agree in every bit."""

    def agree(a: Any, b: Any) -> bool:
        pairs = list(zip(leaves(a), leaves(b), strict=True))
        return bool(pairs) and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)

    return agree
